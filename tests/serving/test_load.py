"""Many clients at once, as a program: figures are what tests/helpers/load.py prints on an idle machine."""

import signal
import subprocess
import sys

import pytest

from conftest import ROOT
from helpers.load import measure


@pytest.mark.slow
def test_load(trained_run):
    """Eight clients get three times the answers of one; a thousand requests, a third of them aborted, leave nothing."""
    *_, total = measure(trained_run)
    assert total["rows_left"] == 0
    assert abs(total["memory_after_mib"] / total["memory_before_mib"] - 1) < 0.05
    assert total["eight_to_one"] >= 3


@pytest.mark.slow
def test_the_example_runs(trained_run):
    done = subprocess.run([sys.executable, ROOT / "examples/serve_demo.py", trained_run], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("stopped\n") and "-> region" in done.stdout


@pytest.mark.slow
def test_wrong_arguments_and_a_taken_port(trained_run):
    def run(*arguments):
        command = [sys.executable, "-m", "vpt", "serve", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    done = run("chekpoint=x")
    assert done.returncode == 2 and "did you mean checkpoint" in done.stderr
    first = subprocess.Popen([sys.executable, "-m", "vpt", "serve", f"checkpoint={trained_run}", "port=0"], cwd=ROOT,
                             stdout=subprocess.PIPE, text=True)  # fmt: skip
    port = first.stdout.readline().rpartition("/v1")[0].rpartition(":")[2]
    done = run(f"checkpoint={trained_run}", f"port={port}")
    assert done.returncode == 2 and "give another port" in done.stderr
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 0
