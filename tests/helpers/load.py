"""Load on a real `vpt serve`: answers a second, time to the first piece and between pieces, memory, rows left behind.

    python tests/helpers/load.py outputs/demo

Starts the program by itself, and prints one line of JSON for each measurement. For figures worth quoting the machine has
to be idle; the server is given one thread, the clients run in this process.
"""

import asyncio
import base64
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

ACTIONS = ("free", "none", "region", "dino")
TOKENS = 24


@contextmanager
def program(checkpoint, *settings):
    """`vpt serve` as a program; yields its URL and process id."""
    command = [sys.executable, "-m", "vpt", "serve", f"checkpoint={checkpoint}", "port=0", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        found = re.search(r"page (\S+)/,", process.stdout.readline())
        yield found[1], process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def body(number, *, stream=True):
    """A question about an image of its own."""
    pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"what is number {number}?"}]
    # A temperature keeps answers of a trained model from ending after one word; a seed makes them the same each time.
    return {"messages": [{"role": "user", "content": content}], "stream": stream, "max_tokens": TOKENS,
            "action": ACTIONS[number % len(ACTIONS)], "temperature": 1.5, "seed": number}  # fmt: skip


async def one(client, number, *, abort=False):
    """Ask; (seconds to the first piece, seconds between pieces, answered)."""
    began = last = time.perf_counter()
    first, between = None, []
    async with client.stream("POST", "/v1/chat/completions", json=body(number)) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {") or '"content":""' in line:
                continue
            now = time.perf_counter()
            if first is None:
                first = now - began
                if abort:
                    return first, [], False
            else:
                between.append(now - last)
            last = now
    return first, between, True


async def clients(url, count, requests, *, first=0, aborted=0):
    """`count` clients take turns at so many requests, of which every `aborted`-th is left in the middle."""
    numbers = iter(range(first, first + requests))
    found = []

    async def work(client):
        for number in numbers:
            found.append(await one(client, number, abort=bool(aborted) and number % aborted == 0))

    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        began = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(count)))
        seconds = time.perf_counter() - began
    gaps = [gap for _, between, _ in found for gap in between]
    return {
        "clients": count, "requests": requests, "answers_per_second": sum(done for *_, done in found) / seconds,
        "first_piece_ms": 1000 * statistics.median(one[0] for one in found if one[0] is not None),
        "between_pieces_ms": 1000 * statistics.median(gaps) if gaps else None,
    }  # fmt: skip


def resident(pid):
    """Memory of a process, in MiB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def rows_left(url):
    """Rows that are running or wait, once the server has had a moment."""
    for _ in range(200):
        text = httpx.get(f"{url}/metrics").text
        left = [float(value) for value in re.findall(r"^vpt_(?:running|waiting)_rows (\S+)", text, re.MULTILINE)]
        if not any(left):
            return 0
        time.sleep(0.05)
    return sum(left)


def measure(checkpoint, *, requests=64, many=1000):
    """Every figure, one after the other."""
    with program(checkpoint) as (url, pid):
        asyncio.run(clients(url, 32, min(many, 200)))  # threads, caches and the cache's room are made
        speeds = {count: asyncio.run(clients(url, count, requests)) for count in (1, 8, 32)}
        before = resident(pid)
        asyncio.run(clients(url, 16, many, first=10_000, aborted=3))
        after, left = resident(pid), rows_left(url)
    ratio = speeds[8]["answers_per_second"] / speeds[1]["answers_per_second"]
    return [*speeds.values(), {"eight_to_one": ratio, "memory_before_mib": before, "memory_after_mib": after,
                               "rows_left": left, "requests": many}]  # fmt: skip


if __name__ == "__main__":
    for line in measure(sys.argv[1]):
        print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()}))
