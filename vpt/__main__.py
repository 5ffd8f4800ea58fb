"""The command line: `vpt COMMAND ...`, or `python -m vpt COMMAND ...`."""

import importlib
import sys
from collections.abc import Sequence

from vpt.errors import INTERRUPTED, WRONG_INPUT, UserError, did_you_mean, exit_with
from vpt.utils.streams import tolerate_closed_pipes

# command -> what it does; `vpt.cli.COMMAND` has `main(arguments)`
COMMANDS = {
    "ask": "one question about one image, and a picture of how the model perceived it",
    "benchmarks": "benchmarks of the field through lmms-eval, in one table",
    "compare": "runs side by side: what differs, and what each reached; --paired: two runs question by question",
    "convert": "Visual-CoT files to records",
    "dashboard": "the curves of runs as one page, or as a W&B workspace",
    "estimate": "parameters, FLOPs, memory and days of a run, from its configuration alone",
    "export": "a trained model into a folder of its own: for vpt, as upstream published, or for transformers",
    "launch": "torchrun that ends as the run does",
    "pretrain": "the small parts anew that model=small starts from",
    "report": "write a run's reports anew",
    "serve": "an endpoint of the OpenAI chat format, and a page to watch the model look again",
}
# of these, whose arguments are KEY=VALUE and no options, the docstring is the help
DOCSTRING_HELP = ("ask", "benchmarks", "export", "pretrain", "serve")
USAGE = "usage: vpt COMMAND ...    (vpt COMMAND --help says more)\n\n" + "\n".join(
    f"  {name:10} {text}" for name, text in COMMANDS.items()
) + "\n\nTraining and evaluation: python train.py --help, python eval.py --help"  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` name first, and return the exit code. A UserError ends it in one message."""
    tolerate_closed_pipes()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(USAGE)
            return 0
        name = arguments[0]
        if name not in COMMANDS:
            print(f"error: {name} is no command of vpt{did_you_mean(name, [*COMMANDS])}\n\n{USAGE}", file=sys.stderr)
            return WRONG_INPUT
        command, rest = importlib.import_module(f"vpt.cli.{name}"), arguments[1:]
        if name in DOCSTRING_HELP and (not rest or {"-h", "--help"} & {*rest}):
            print(f"{command.__doc__}{command.help_text() if hasattr(command, 'help_text') else ''}")
            return 0
        return command.main(rest) or 0
    except UserError as error:
        exit_with(error)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
