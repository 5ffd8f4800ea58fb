"""Evaluate a checkpoint: answer the test questions, perceiving while answering.

python eval.py checkpoint=outputs/dino                        writes outputs/dino/eval/test/
python eval.py checkpoint=outputs/dino data.limit=500 name=quick
python eval.py checkpoint=outputs/dino data.test.vpt.options.path=other.json name=other      another test file
python eval.py checkpoint=outputs/dino +ablations=all baseline=outputs/baseline    does the perception do the work?

Stop it however you like and type the same command again: it goes on where it stopped.
"""

import hydra
from omegaconf import DictConfig

from vpt.cli.hydra_main import run
from vpt.config.evaluation import EvalConfig
from vpt.config.resolve import resolve_config
from vpt.errors import UserError, exit_with


@hydra.main(config_path="conf", config_name="eval", version_base=None)
def main(composed: DictConfig) -> None:
    try:
        config = resolve_config(composed, EvalConfig)
        from vpt.cli.evaluate import evaluate_checkpoint

        evaluate_checkpoint(config)
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    run(main, EvalConfig)
