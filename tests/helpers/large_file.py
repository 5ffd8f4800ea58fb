"""A process that starts on a file of records as training does, for tests/data/test_large_file.py: prints what it took, as JSON.

python tests/helpers/large_file.py ROOT FILE
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from vpt.data.chat_template import ChatTemplate
from vpt.data.images import MediaStore
from vpt.data.loader import StepDataset
from vpt.data.mixture import build_mixture
from vpt.data.processor import Processor
from vpt.data.sources.base import SourceContext
from vpt.data.sources.record_files import RecordFile
from vpt.models.tiny_tokenizer import tiny_tokenizer
from vpt.perception.masking import Masking
from vpt.perception.tokens import PerceptionVocabulary

STEPS, ROWS, LATE = 200, 64, 1_000_000


def proc(name: str, key: str) -> int:
    """A number out of /proc/self."""
    lines = Path(f"/proc/self/{name}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class Watched(Dataset):
    """The batches of steps, of which only the memory of the worker that made them comes back, in bytes."""

    def __init__(self, batches: StepDataset) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> int:
        self.batches[step]
        return 1024 * (proc("smaps_rollup", "Rss") if step % 50 == 49 else 0)


def main(root: Path, name: str) -> None:
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer()
    vocabulary = PerceptionVocabulary.from_tokenizer(tokenizer, {}, region_bins=0)
    encoder = Processor(ChatTemplate(tokenizer, vocabulary, {}, projector_scale=1), {})
    read, started = proc("io", "rchar"), time.perf_counter()
    source = RecordFile(SourceContext(root, {}, {}, True, True, 0, 0), path=name)
    batches = StepDataset(build_mixture([source], [1], 0), [MediaStore(root)], encoder, Masking(), batch_size=ROWS,
                          micro_batch_size=ROWS, steps=LATE + STEPS)  # fmt: skip
    batches[LATE]
    took, read = time.perf_counter() - started, proc("io", "rchar") - read
    loader = DataLoader(Watched(batches), batch_size=None, sampler=range(LATE, LATE + STEPS), num_workers=1)
    held = max(loader)
    print(json.dumps({"records": len(source), "seconds": took, "read": read, "held": held}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
