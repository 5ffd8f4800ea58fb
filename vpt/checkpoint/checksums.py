"""Checksums of a checkpoint's files, and the check that it holds nothing but regular files.

A flipped bit in a weight, or half of a copy, would load without an error. So a checkpoint has a list of its
files' checksums, in the format of `sha256sum` (`sha256sum -c SHA256SUMS` in the folder says the same). A checkpoint
without a list is from elsewhere and is taken as it is.
"""

import hashlib
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vpt.errors import CheckpointError

CHECKSUMS = "SHA256SUMS"
_SMALL = 1 << 28  # bytes; what is not tensors is read at once
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_checksums(folder: Path) -> None:
    """Write the list of all files that `folder` holds now."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    with ThreadPoolExecutor() as pool:
        sums = pool.map(sha256, files)
        (folder / CHECKSUMS).write_text(
            "".join(f"{sum}  {path.relative_to(folder)}\n" for sum, path in zip(sums, files))
        )


def check_regular_files(folder: Path) -> Path:
    """Return the folder. Raises CheckpointError where it holds anything but regular files of its own; reads none."""
    if problem := _irregular(folder):
        raise CheckpointError(f"{folder}/{problem}")
    return folder


def verify(folder: Path) -> None:
    """Raise CheckpointError with the message of `find_damage`, if any."""
    if problem := find_damage(folder):
        raise CheckpointError(problem)


def find_damage(folder: Path, *, rank: int = 0, ranks: int = 1) -> str:
    """The first damaged file of a checkpoint and how to mend it, or "". Each of several ranks reads its share."""
    if problem := _irregular(folder):
        return f"{folder}/{problem}"
    if not (folder / CHECKSUMS).is_file():
        return ""
    wanted = _read_checksums(folder / CHECKSUMS)
    if wanted is None:
        return f"{folder}/{CHECKSUMS} is no list of checksums; copy the checkpoint again"
    for name in sorted(wanted)[rank::ranks]:
        path = folder / name
        there = path.is_file()
        if not there or sha256(path) != wanted[name]:
            return (
                f"{path} {'is not what was written there' if there else 'is missing'}; copy the checkpoint again, or "
                f"remove {folder} and go on from the one before it. Where it was changed on purpose, remove {CHECKSUMS}"
            )
    return ""


def _irregular(folder: Path) -> str:
    """The first entry that is no regular file, leads out of the folder, or is far too large; "" where there is none."""
    for parent, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            path = Path(parent, name)
            shown, mode = path.relative_to(folder), path.lstat().st_mode
            if stat.S_ISLNK(mode):
                if not _inside(path, folder):
                    return f"{shown} is a link that leads nowhere or out of the folder; copy the files, as cp -rL does"
                mode = path.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                return f"{shown} is neither a file nor a folder; remove it, or copy the checkpoint again"
            if path.suffix not in (".safetensors", ".bin") and stat.S_ISREG(mode) and path.stat().st_size > _SMALL:
                return f"{shown} has {path.stat().st_size:,} bytes, which no checkpoint needs; copy it again"
    return ""


def _inside(link: Path, folder: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # to nothing, or in a circle
        return False


def _read_checksums(file: Path) -> dict[str, str] | None:
    """Parse SHA256SUMS to {file: checksum}; None if malformed."""
    lines = [_LINE.fullmatch(line) for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    found = {match[2]: match[1] for match in lines if match}
    plain = all(not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name for name in found)
    return found if found and plain and len(found) == len(lines) else None


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
