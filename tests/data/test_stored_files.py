"""Images inside tar and Parquet files: the same pixels as from files of their own, and messages that say where."""

import io
import json
import os
import tarfile
from functools import lru_cache

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader

from vpt.data import tar_index
from vpt.data.images import MediaStore
from vpt.data.index_cache import OPEN_FILES
from vpt.data.parquet import GROUPS, _row_group
from vpt.data.record_store import RecordStore
from vpt.data.references import ImageRef
from vpt.data.sources.base import SourceContext
from vpt.data.sources.record_files import RecordFile
from vpt.errors import DataError
from vpt.perception.batch import VISION_TOWER

LONG = "a" * 150 + "/é" + "b" * 120 + ".png"  # a name that a PAX header tells
NAMES = ["0.png", "deep/1.png", LONG]
TALK = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "red"}]


def encoded(number: int) -> bytes:
    kept = io.BytesIO()
    Image.effect_noise((40 + number, 30), 80).convert("RGB").save(kept, "PNG")
    return kept.getvalue()


@pytest.fixture
def files(tmp_path) -> dict[str, bytes]:
    return {name: encoded(number) for number, name in enumerate(NAMES)}


def write_tar(path, files, *, form=tarfile.PAX_FORMAT, prefix="") -> None:
    with tarfile.open(path, "w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("deep"))
        for name, content in files.items():
            about = tarfile.TarInfo(prefix + name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


def pixels(media: MediaStore, path: str) -> bytes:
    return media.image(ImageRef(path), where="r").tobytes()


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_members_of_a_tar_file(tmp_path, files, form, prefix):
    write_tar(tmp_path / "a.tar", files, form=form, prefix=prefix)
    for name, content in files.items():
        expected = Image.open(io.BytesIO(content)).convert("RGB").tobytes()
        assert pixels(MediaStore(tmp_path), f"a.tar/{name}") == expected
        assert pixels(MediaStore(tmp_path / "a.tar"), name) == expected  # the tar file in a folder's place
        reference = ImageRef(f"a.tar/{name}")
        MediaStore(tmp_path).check(reference, where="r")
        assert MediaStore(tmp_path).size(reference, where="r") == Image.open(io.BytesIO(content)).size


def test_the_last_member_of_a_name_counts(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(2):
            about = tarfile.TarInfo("x.png")
            about.size = len(content := encoded(number))
            tar.addfile(about, io.BytesIO(content))
    assert MediaStore(tmp_path).size(ImageRef("a.tar/x.png"), where="r") == (41, 30)


def image_table(files, kind: str) -> pyarrow.Table:
    contents = list(files.values())
    cells = {
        "bytes": contents,
        "struct": [{"bytes": content, "path": None} for content in contents],
        "list": [[{"bytes": content, "path": f"{n}.png"} for n, content in enumerate(contents[: number + 1])]
                 for number in range(len(contents))],
        "bytes_list": [contents[: number + 1] for number in range(len(contents))],
    }[kind]  # fmt: skip
    return pyarrow.Table.from_pylist([{"messages": TALK, "images": cell, "dataset": "a"} for cell in cells])


@pytest.mark.parametrize("kind", ["bytes", "struct", "list", "bytes_list"])
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_cells_of_a_parquet_file(tmp_path, files, kind, rows):
    parquet.write_table(image_table(files, kind), tmp_path / "a.parquet", row_group_size=rows)
    contents = list(files.values())
    for number, (_, record) in enumerate(RecordStore(tmp_path / "a.parquet", "a.parquet")):
        assert record["messages"] == TALK
        listed = record["images"] if isinstance(record["images"], list) else [record["images"]]
        assert len(listed) == (number + 1 if "list" in kind else 1)
        shown = contents if "list" in kind else contents[number:]
        for path, content in zip(listed, shown, strict=False):
            assert pixels(MediaStore(tmp_path), path) == Image.open(io.BytesIO(content)).convert("RGB").tobytes()


def test_rows_without_an_image(tmp_path, files):
    table = pyarrow.Table.from_pylist([
        {"messages": TALK, "images": [{"bytes": encoded(0), "path": None}]}, {"messages": TALK, "images": []},
        {"messages": TALK, "images": None},
    ])  # fmt: skip
    parquet.write_table(table, tmp_path / "a.parquet")
    found = [record["images"] for _, record in RecordStore(tmp_path / "a.parquet")]
    assert found == [["a.parquet/images/0/0"], [], None]


def test_what_a_process_holds_of_many_files_is_bounded(tmp_path, files, monkeypatch):
    """A few row groups of all Parquet files together, and no more open files than a system allows."""
    for number in range(12):
        write_tar(tmp_path / f"{number}.tar", files)
        parquet.write_table(image_table(files, "struct"), tmp_path / f"{number}.parquet", row_group_size=1)
    monkeypatch.setattr(tar_index, "_indexed", lru_cache(maxsize=3)(tar_index._indexed.__wrapped__))
    media, before = MediaStore(tmp_path), len(os.listdir("/proc/self/fd"))
    for number in range(12):
        assert pixels(media, f"{number}.tar/0.png") == pixels(media, f"{number}.parquet/images/0")
    assert _row_group.cache_info().currsize == GROUPS
    assert len(os.listdir("/proc/self/fd")) - before < 12 + 12
    assert 2 * OPEN_FILES < 1024


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_of_shards(tmp_path, files, workers):
    """Records in a Parquet file below a folder, with their images, and lines that name members of a tar file."""
    (tmp_path / "sub").mkdir()
    rows = [{"messages": TALK, "images": [{"bytes": content, "path": None}]} for content in files.values()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "sub/a.parquet", row_group_size=2)
    write_tar(tmp_path / "a.tar", files)
    lines = [json.dumps({"messages": TALK, "images": [f"a.tar/{name}"]}) for name in files]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    context = SourceContext(tmp_path, {}, {}, True, True, 0, 0)
    sources = [RecordFile(context, path=name) for name in ("sub/a.parquet", "b.jsonl")]
    media = MediaStore(tmp_path)
    first = pixels(media, sources[0][0].images[VISION_TOWER][0].path)  # before workers are forked

    def shown(number: int) -> torch.Tensor:
        source = sources[number // 3]
        if number == 0:
            assert pixels(media, source[0].images[VISION_TOWER][0].path) == first
        return torch.tensor([sum(pixels(media, image.path)) for image in source[number % 3].images[VISION_TOWER][:1]])

    class Rows(torch.utils.data.Dataset):
        __getitem__ = staticmethod(shown)

    found = [
        int(value) for value in DataLoader(Rows(), batch_size=None, sampler=[0, 1, 2, 3, 4, 5], num_workers=workers)
    ]
    sums = [sum(Image.open(io.BytesIO(content)).convert("RGB").tobytes()) for content in files.values()]
    assert found == sums * 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "a.tar/nine.png",
            r"r: image .*a\.tar/nine\.png cannot be read \(it has no such member; `tar tf a\.tar` lists",
        ),
        ("a.tar", r"r: image .*a\.tar cannot be read"),
        ("b.tar/0.png", r"r: file .*b\.tar/0\.png does not exist"),
        ("c.tar/0.png", r"c\.tar is no whole tar file"),
        ("d.tar.gz/0.png", r"d\.tar\.gz is compressed: make a plain \.tar"),
        ("a.tar/clip.mp4", "is a video, which is read from a file of its own"),
        ("e.parquet/images/7/0", r"e\.parquet has no image there"),
        ("e.parquet/nothing/0/0", r"e\.parquet has no image there"),
        ("e.parquet/images/-1/0", r"e\.parquet has no image there"),
        ("e.parquet/images/x", r"e\.parquet has no image there"),
        ("e.parquet/messages/0", r"e\.parquet has no image there"),
        ("f.parquet/images/0", r"f\.parquet has no image there"),
    ],
)
def test_broken_containers_say_where(tmp_path, files, path, message):
    write_tar(tmp_path / "a.tar", files)
    (tmp_path / "c.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "d.tar.gz").write_bytes(b"packed")
    parquet.write_table(image_table(files, "list"), tmp_path / "e.parquet")
    (tmp_path / "f.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=message):
        MediaStore(tmp_path).image(ImageRef(path), where="r")
    with pytest.raises(DataError, match=message):
        MediaStore(tmp_path).check(ImageRef(path), where="r")


def test_a_tar_file_that_is_cut_or_changed(tmp_path, files):
    path = tmp_path / "a.tar"
    write_tar(path, files)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(DataError, match=r"a\.tar is no whole tar file"):
        pixels(MediaStore(tmp_path), "a.tar/deep/1.png")
    path.write_bytes(whole)
    before, state = pixels(MediaStore(tmp_path), "a.tar/0.png"), path.stat()
    path.write_bytes(whole[:600])
    with pytest.raises(DataError, match=r"a\.tar is no whole tar file: it ends within a block"):
        pixels(MediaStore(tmp_path), "a.tar/deep/1.png")
    path.write_bytes(bytes(len(whole)))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # what the index is kept under is the same
    with pytest.raises(DataError, match=r"a\.tar is cut short, or was changed while it was in use"):
        pixels(MediaStore(tmp_path), "a.tar/deep/1.png")
    path.unlink()
    write_tar(path, {name: files[name] for name in reversed(NAMES)})
    assert pixels(MediaStore(tmp_path), "a.tar/0.png") == before  # another file, another index
