"""Programs whose output nobody reads any more."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT

COMMANDS = [
    "train.py --help",
    "train.py --cfg job",
    "eval.py --help",
    "-m vpt --help",
    "-m vpt convert --help",
    "-u -m vpt",
]


@pytest.mark.parametrize(("command", "both"), [
    (COMMANDS[0], False),
    *(pytest.param(command, both, marks=pytest.mark.slow) for command in COMMANDS for both in (False, True)
      if both or command != COMMANDS[0]),
])  # fmt: skip
def test_a_reader_that_leaves_ends_nothing_in_a_traceback(command, both):
    """As `| head` does, of standard output and of both."""
    unread, output = os.pipe()
    os.close(unread)
    errors = output if both else subprocess.PIPE
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, stdout=output, stderr=errors, timeout=100)
    assert (done.returncode, done.stderr or b"") == (0, b"")
    os.close(output)
