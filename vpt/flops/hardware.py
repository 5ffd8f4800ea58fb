"""Peak FLOP/s of a device: published for known GPUs, measured for all others."""

import torch
from torch.utils.benchmark import Timer

# memory (10^9 bytes), and the published dense peak (10^12 FLOP/s) by the precision of the products
GPUS: dict[str, tuple[float, dict[str, float]]] = {
    "a100": (80, {"bf16": 312, "fp32": 19.5}),
    "h100": (80, {"bf16": 989, "fp32": 67}),
    "h200": (141, {"bf16": 989, "fp32": 67}),
}


def peak_flops(device: torch.device, *, precision: str) -> float:
    """FLOP/s of products in `precision` (`fp32`, `bf16`) on a device.

    A GPU's published dense peak; elsewhere the best of a few products of square matrices, with the threads that are
    set: a tenth of a second.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower()
        for gpu, (_, peaks) in GPUS.items():
            if gpu in name:
                return peaks[precision] * 1e12
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
    return 2 * side**3 / min(timer.timeit(1).mean for _ in range(8))
