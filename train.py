"""Train a Visual Perception Token model.

python train.py +experiment=dino                              built-in data, a small pretrained model, any computer
python train.py +experiment=dino model=qwen2_vl_2b data=vpt data.root=FOLDER
python train.py +experiment=dino run_name=other seed=1        type the same command again to resume
"""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from vpt.cli.hydra_main import run
from vpt.cli.sweep import forget_failure, in_sweep, note_failure, note_overrides
from vpt.config.resolve import resolve_config
from vpt.config.schema import TrainConfig
from vpt.config.validate import validate
from vpt.config.weight_folder import check_model_group
from vpt.errors import UserError, exit_with


@hydra.main(config_path="conf", config_name="train", version_base=None)
def main(composed: DictConfig) -> float | None:
    hydra_config = HydraConfig.get()
    folder = hydra_config.runtime.output_dir
    if in_sweep():
        note_overrides(Path(folder))
    try:
        config = resolve_config(composed, TrainConfig)
        validate(config)
        check_model_group(config.model, hydra_config.overrides.task)
        from vpt.cli.stages import train_stages  # the heavy part, after all that can be wrong has been checked

        accuracy = train_stages(config, folder, hydra_config.overrides.task)
        forget_failure(Path(folder))
        return accuracy
    except Exception as error:
        if in_sweep():
            note_failure(error, Path(folder))
            return None
        if isinstance(error, UserError):
            exit_with(error)
        raise


if __name__ == "__main__":
    run(main, TrainConfig)
