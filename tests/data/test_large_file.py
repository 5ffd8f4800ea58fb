"""As many records as the paper's: starting again reads nothing but what it needs, and workers stay small."""

import io
import json
import os
import subprocess
import sys
import tarfile

import pytest
from PIL import Image

from conftest import ROOT

RECORDS = 829_000


def record(number: int) -> str:
    """About 600 bytes, as a short question of the published files has."""
    question = f"<number {number}> " + "what is it that the picture shows beside the red shape? " * 6
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": f"{number}"}],
                       "dataset": "made", "region_bins": 8, "box": [1, 2, 3, 4 + number % 100]})  # fmt: skip


def started(root, name: str) -> dict:
    """What a fresh process says about its start."""
    done = subprocess.run(
        [sys.executable, "tests/helpers/large_file.py", str(root), name], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "VPT_CACHE": str(root / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train.parquet"])
def test_829k_records(tmp_path, name, capsys):
    with (tmp_path / "few.jsonl").open("w") as file:
        file.writelines(record(number) + "\n" for number in range(64))
    with (tmp_path / "train.jsonl").open("w") as file:
        file.writelines(record(number) + "\n" for number in range(RECORDS))
    if name == "train.json":
        with (tmp_path / "train.jsonl").open() as lines, (tmp_path / name).open("w") as file:
            file.write("[")
            file.writelines(("," if number else "") + line for number, line in enumerate(lines))
            file.write("]")
    if name == "train.parquet":
        from pyarrow import json as arrow
        from pyarrow import parquet

        parquet.write_table(arrow.read_json(tmp_path / "train.jsonl"), tmp_path / name)
    started(tmp_path, "few.jsonl")
    empty, first, again = started(tmp_path, "few.jsonl"), started(tmp_path, name), started(tmp_path, name)
    size = (tmp_path / name).stat().st_size
    assert first["records"] == again["records"] == RECORDS
    assert first["read"] > size / 2  # all of it, once
    assert again["read"] < 1 << 20  # a step's records, and nothing else
    assert again["held"] - empty["held"] < 300 << 20
    with capsys.disabled():
        print(f"\n{name}, {size >> 20} MiB: first start {first['seconds']:.1f} s, later {again['seconds']:.2f} s and "
              f"{again['read'] >> 10} KiB read; a worker holds {(again['held'] - empty['held']) >> 20} MiB above an "
              "empty one")  # fmt: skip


SHARD = 10_000  # images of a tar file

READ = """
import json, sys, time
from pathlib import Path
from large_file import proc
from vpt.data.images import MediaStore
from vpt.data.references import ImageRef

media, count, step = MediaStore(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
before, started = proc("smaps_rollup", "Rss"), time.perf_counter()
names = [f"{number // 10_000}.tar/{number}.png" for number in range(0, count, step)]
sizes = {media.image(ImageRef(name), where="r").size for name in names}
print(json.dumps({"sizes": [*sizes], "seconds": time.perf_counter() - started, "read": len(names),
                  "held": 1024 * (proc("smaps_rollup", "Rss") - before)}))
"""


@pytest.mark.slow
def test_829k_images_in_tar_files(tmp_path, capsys):
    """Every shard is used. The first time lists its members; later an image costs what a file of its own does."""
    kept = io.BytesIO()
    Image.effect_noise((24, 24), 60).save(kept, "PNG")
    for first in range(0, RECORDS, SHARD):
        with tarfile.open(tmp_path / f"{first // SHARD}.tar", "w") as tar:
            for number in range(first, min(first + SHARD, RECORDS)):
                about = tarfile.TarInfo(f"{number}.png")
                about.size = kept.tell()
                tar.addfile(about, io.BytesIO(kept.getvalue()))

    def read(step: int) -> dict:
        done = subprocess.run(
            [sys.executable, "-c", READ, str(tmp_path), str(RECORDS), str(step)], capture_output=True, text=True,
            env={**os.environ, "VPT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": f"{ROOT}:{ROOT}/tests/helpers"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first, again = read(5_000), read(997)
    assert first["sizes"] == again["sizes"] == [[24, 24]]
    assert again["held"] < 64 << 20
    with capsys.disabled():
        print(f"\n83 tar files: listing them {first['seconds']:.1f} s; later {again['read']} images of all of them in "
              f"{again['seconds']:.2f} s, {again['held'] >> 20} MiB held")  # fmt: skip
