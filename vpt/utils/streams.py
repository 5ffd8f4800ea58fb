"""Standard output and error whose reader may leave early, as `| head` does."""

import io
import os
import sys
from typing import Any


class _Output(io.FileIO):
    """Falls silent once nobody reads it, instead of raising in whatever prints next, or at exit."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return super().write(data)


def tolerate_closed_pipes() -> None:
    """Let this process go on, or end, without a traceback after the reader of its output has gone."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue  # somebody else has put it there
        if type(getattr(stream.buffer, "raw", stream.buffer)) is io.FileIO:
            raw = _Output(stream.fileno(), "w", closefd=False)
            how = {key: getattr(stream, key) for key in ("encoding", "errors", "line_buffering", "write_through")}
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **how))
