"""What a device can do at most."""

import time
from functools import cache

import torch

from vpt.describe.settings import GPUS

MATMUL = 1024


@cache
def peak_flops() -> float:
    """FLOP a second in bf16: a known GPU's published dense peak, else what a large product reaches here."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower()
        for gpu, (_, rates) in GPUS.items():
            if gpu in name:
                return rates["bf16"] * 1e12
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left = torch.randn(MATMUL, MATMUL, device=device, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        float((left @ left)[0, 0])  # waits for the product
        best = max(best, 2 * MATMUL**3 / (time.perf_counter() - started))
    return best
