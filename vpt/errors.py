"""Errors that a user can mend. Each message says what is wrong, where, and what to do or type next."""

import difflib
import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

WRONG_INPUT = 2  # exit code for a UserError
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
PREEMPTED = 75  # exit code after SIGTERM, SIGUSR1 or SIGUSR2: saved, to be started again (EX_TEMPFAIL)
LISTED = 5  # names in a message
QUOTED = 200  # characters of an input that is quoted
LONGEST = 400  # characters of what another library has to say


def printable(text: str) -> str:
    r"""Text that can be encoded: JSON's \ud800 and bytes of file names that are no UTF-8 are spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()


class UserError(Exception):
    """Something about the input; shown without a traceback by the command-line programs.

    Whatever of the input it quotes, it can be printed: half a character becomes its number.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ConfigError(UserError):
    """A configuration that cannot run."""


class DataError(UserError):
    """A record, image or folder that cannot be used."""


class CheckpointError(UserError):
    """A folder that is no checkpoint, or a checkpoint of another configuration."""


class TrainingError(UserError):
    """A run that cannot go on."""


@contextmanager
def wrap_read_errors(path: Path, fix: str) -> Iterator[None]:
    """Turn every error raised in the block into a CheckpointError about the file or folder `path`.

    For code of other libraries that is given what stands there, and may raise anything. `fix` is what to do.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        words = " ".join(printable(str(error)).split())
        said = words[:LONGEST] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read: {said}; {fix}") from error


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a package that an extra brings. Raises ConfigError that says what to type where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"{purpose} needs the package {module.partition('.')[0]}; type: pip install 'vpt[{extra}]'"
        ) from None


def import_bitsandbytes(purpose: str) -> ModuleType:
    """bitsandbytes. Raises ConfigError that says what to type where it is missing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on CPUs it misses a kernel that a hub would have
    return require("bitsandbytes", "quant", purpose)


def did_you_mean(path: str, known: list[str]) -> str:
    """`; did you mean X?`, or nothing where nothing is near. The last part of a dotted key weighs most."""
    leaf = path.rpartition(".")[2]
    close = difflib.get_close_matches(path, known, n=3, cutoff=0.6)
    leaves = {name.rpartition(".")[2]: name for name in known}
    close += [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)]
    return f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""


def first_line(error: BaseException) -> str:
    """What another library says in its first line; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(names: Sequence[str], *, separator: str = ", ") -> str:
    """The first few of `names` for a message, and how many more there are."""
    more = [f"and {len(names) - LISTED:,} more"] if len(names) > LISTED else []
    return separator.join([*names[:LISTED], *more])


def shortened(text: str) -> str:
    """A text of any length for a message: quoted, on one line, its middle left out where it is long."""
    quoted = repr(text)
    return quoted if len(quoted) <= QUOTED else f"{quoted[: QUOTED - 20]}…{quoted[-20:]}"


def exit_with(error: UserError) -> None:
    """Print the message and exit."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(WRONG_INPUT)
