"""Run a Hydra program: wrong keys are named before it starts, errors and Ctrl-C end it in one message."""

import sys
from collections.abc import Callable

from vpt.config.overrides import check_overrides, register_schemas
from vpt.errors import INTERRUPTED, UserError, exit_with
from vpt.utils.streams import tolerate_closed_pipes


def run(main: Callable[[], None], schema: type) -> None:
    """Check the command line, then call a Hydra program; a UserError or Ctrl-C ends it in one message."""
    tolerate_closed_pipes()
    register_schemas()
    try:
        check_overrides(sys.argv[1:], schema)
    except UserError as error:
        exit_with(error)
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; what was done is kept, type the same command to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)
