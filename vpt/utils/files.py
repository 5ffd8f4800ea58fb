"""Write files and folders so that they are complete or absent."""

from pathlib import Path


def atomic_write(path: Path, text: str) -> None:
    """Write a file under another name and rename it: it is there whole, or as it was."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
