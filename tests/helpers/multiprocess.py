"""Running a function in several processes that form one run, as torchrun would."""

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import get_context

PATIENCE = 1800  # seconds; processes that wait for each other forever must end the test

# A process of its own that has imported torch and transformers; all others are forked from it in no time.
FORKING = get_context("forkserver")
FORKING.set_forkserver_preload(["vpt.cli.train"])


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """`function(world, *arguments)` on each of `size` ranks (gloo, CPU); what each returned, by rank."""
    processes = started(size, function, *arguments, folder=folder)
    deadline = time.monotonic() + PATIENCE
    while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for process in processes:
        process.join(timeout=1 if any(p.exitcode for p in processes) else 10)
        process.kill()
    codes = [process.exitcode for process in processes]
    assert codes == [0] * size, f"exit codes {codes} (a negative one: killed, for it waited too long)"
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]


def started(size: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """The processes of `on_ranks`, by rank, left to themselves; each writes what it returned into `folder`."""
    processes = [
        FORKING.Process(target=_rank, args=(environment, folder, function, arguments))
        for environment in rank_environments(size)
    ]
    for process in processes:
        process.start()
    return processes


def rank_environments(size: int) -> list[dict[str, str]]:
    """What torchrun tells each of the processes of one run, and to show no progress."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        run = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [run | {"RANK": str(rank), "LOCAL_RANK": str(rank), "TQDM_DISABLE": "1"} for rank in range(size)]


def _rank(environment: dict[str, str], folder: Path, function: Callable[..., Any], arguments: tuple) -> None:
    from vpt.distributed.process_group import init_process_group

    torch.set_num_threads(1)
    os.environ |= environment
    with init_process_group(device="cpu") as world:
        result = function(world, *arguments)
        (folder / f"rank{world.rank}.json").write_text(json.dumps(result))
