"""Estimates how long a step takes on a GPU, from its floating point operations and the GPU's published rate.

Only an H100 was measured. A step of FLUX.1-dev at 1024 x 1024 (74.4 TFLOP) took 195.7 ms there in fp16 by ONNX Runtime,
and 133.6 ms in bf16 compiled by PyTorch. These are 38 and 56 % of the published rate, and an estimate applies the two
shares to another GPU's rate. fp8 took 96.0 ms, so it counts as 1.39 times as fast as compiled bf16. A precision that
has only its weights in 8 bits computes in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

MEASURED_STEP = 74.4e12  # floating point operations
SLOW, FAST, FAST_FP8 = 0.1957, 0.1336, 0.0960  # seconds, on an H100

# Published rates of the tensor cores in TFLOP/s: 16-bit products, dense, added up in fp32. Sources: NVIDIA's data
# sheets and architecture white papers; GeForce cards add up in fp32 at half the rate that they have in fp16.
RATES = {
    "rtx2060": 25.8, "rtx2060super": 28.7, "rtx2070": 29.9, "rtx2070super": 36.3, "rtx2080": 40.3,
    "rtx2080super": 44.6, "rtx2080ti": 53.8, "titanrtx": 130.5, "quadrortx4000": 57.0, "quadrortx5000": 89.2,
    "quadrortx6000": 130.5, "quadrortx8000": 130.5, "t4": 65,
    "a30": 165, "a100": 312, "a100-80gb": 312,
    "rtx3050": 18.2, "rtx3060": 25.5, "rtx3060ti": 32.4, "rtx3070": 40.6, "rtx3070ti": 43.5, "rtx3080": 59.5,
    "rtx3080ti": 68.2, "rtx3090": 71, "rtx3090ti": 80, "rtxa2000": 31.9, "rtxa4000": 76.7, "rtxa4500": 94.6,
    "rtxa5000": 111.1, "rtxa6000": 154.8, "a2": 18, "a10": 125, "a10g": 70, "a16": 17.9, "a40": 149.7,
    "rtx4060": 30.2, "rtx4060ti": 44.1, "rtx4070": 58.3, "rtx4070super": 71, "rtx4070ti": 80.2,
    "rtx4070tisuper": 88.2, "rtx4080": 97.5, "rtx4080super": 104.4, "rtx4090": 165.2, "rtx2000ada": 48,
    "rtx4000ada": 81.9, "rtx4500ada": 158.5, "rtx5000ada": 261.1, "rtx6000ada": 364.2, "l4": 121,
    "l40": 181, "l40s": 362,
    "h100": 989, "h100nvl": 835, "h200": 989, "gh200": 989, "b200": 2250, "gb200": 2500, "b300": 2250, "gb300": 2500,
    "rtx5050": 26.3, "rtx5060": 38.4, "rtx5060ti": 47.4, "rtx5070": 61.7, "rtx5070ti": 87.9, "rtx5080": 112.6,
    "rtx5090": 209.5, "rtxpro6000": 500, "gb10": 125,
}  # fmt: skip
NO_TENSOR_CORES = ("fp32",)  # nothing was measured that would say how fast it is


@dataclass(frozen=True)
class Estimate:
    """The seconds of a step, and of all steps of a picture, each from the faster to the slower estimate.

    They leave out text encoding, decoding, and the time for loading segments in each step.
    """

    step_fast: float
    step_slow: float
    picture_fast: float
    picture_slow: float


def estimate(gpu: str, precision: str, flops: float, steps: int) -> Estimate | None:
    """Estimate how long a step of so many floating point operations takes, and so many of these steps.

    Returns None for a GPU whose rate is not in the table, and for fp32.
    """
    rate = RATES.get(gpu)
    if rate is None or precision in NO_TENSOR_CORES:
        return None
    share = flops / MEASURED_STEP * RATES["h100"] / rate
    faster = FAST / FAST_FP8 if precision == "fp8" else 1.0
    fast, slow = share * FAST / faster, share * SLOW / faster
    return Estimate(fast, slow, fast * steps, slow * steps)
