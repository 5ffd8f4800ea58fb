"""Models on a hub that huggingface_hub speaks with: `OWNER/NAME` in place of a folder, and uploads."""

import re
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from vpt.errors import CheckpointError, ConfigError, first_line

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A checkpoint's own files, and an upstream one's: nothing else of a repository is fetched, above all no code.
FILES = ["*.safetensors", "*.json", "config.yaml", "merges.txt", "SHA256SUMS", "sizes/*.json", "tokenizer/*"]


def is_hub_name(path: str | Path) -> bool:
    """Whether a path that is no folder is spelt like a hub's name; what begins with a folder that is here is none."""
    return bool(_NAME.fullmatch(str(path))) and not Path(path).exists() and not Path(path).parent.is_dir()


def fetched(path: str | Path) -> Path:
    """The folder itself, or the one that a hub's `OWNER/NAME` was fetched to. Raises CheckpointError."""
    if not is_hub_name(path) or Path(path).parts[0] == "outputs":
        return Path(path)
    folder = Path(constants.HF_HUB_CACHE) / "vpt" / str(path).replace("/", "--")
    try:
        # Regular files: checkpoints may hold no links, which the hub's shared cache is made of.
        snapshot_download(str(path), local_dir=folder, allow_patterns=FILES)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no folder here, and the hub does not give it ({first_line(error)}); give a run "
            "(outputs/RUN_NAME), a folder, or a hub's OWNER/NAME"
        ) from None
    return folder


def check_name(name: str) -> None:
    """Raises ConfigError for what is no OWNER/NAME."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"push={name} is no OWNER/NAME")


def push(folder: Path, name: str) -> str:
    """Upload a folder as the model OWNER/NAME, private if it is new; returns its address. Raises CheckpointError."""
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by vpt export")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"push={name}: {first_line(error)}; {folder} is written. Type hf auth login, or set HF_TOKEN, and push "
            "again"
        ) from None
    return f"{api.endpoint}/{name}"
