"""Programs whose output nobody reads any more."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT


@pytest.mark.parametrize("command", [
    "train.py --help", *(pytest.param(slow, marks=pytest.mark.slow) for slow in (
        "train.py --cfg job", "eval.py --help", "-m vpt --help", "-m vpt convert --help", "-u -m vpt",
    )),
])  # fmt: skip
def test_a_reader_that_leaves_ends_nothing_in_a_traceback(command):
    """As `| head` does, of standard output and of both."""
    unread, output = os.pipe()
    os.close(unread)
    for errors in (subprocess.PIPE, output):
        done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, stdout=output, stderr=errors, timeout=100)
        assert (done.returncode, done.stderr or b"") == (0, b"")
    os.close(output)
