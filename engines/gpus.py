"""The table of GPUs, and the targets that `--gpu` can name.

The compute capabilities are from https://developer.nvidia.com/cuda-gpus. The memory is in GiB, which
NVIDIA's data sheets call GB: an RTX 3060 of 12 GB reports 12 GiB.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from ditforge import local_gpu
from ditforge.errors import UserError
from ditforge.option import option, setting

CPU = "cpu"
LOCAL = "local"
MOST_MEMORY_GB = 10_000  # more than any GPU has, so that a size in bytes is a number of 64 bits
BF16_MEMORY_GB = 40  # of a DiT of 12 billion parameters, 16-bit weights and the text encoders fit
OTHERS = "also takes sm_89, several (sm_86,sm_89), local, and cpu"
NAMES = option("ditforge gpus   lists the names; gpu " + OTHERS, "ditforge gpus   lists the names; --gpu " + OTHERS)

# name, product, memory in GiB
PRODUCTS = {
    "sm_75": """
        rtx2060, GeForce RTX 2060, 6 | rtx2060super, GeForce RTX 2060 SUPER, 8 | rtx2070, GeForce RTX 2070, 8
        rtx2070super, GeForce RTX 2070 SUPER, 8 | rtx2080, GeForce RTX 2080, 8
        rtx2080super, GeForce RTX 2080 SUPER, 8 | rtx2080ti, GeForce RTX 2080 Ti, 11 | titanrtx, TITAN RTX, 24
        quadrortx4000, Quadro RTX 4000, 8 | quadrortx5000, Quadro RTX 5000, 16
        quadrortx6000, Quadro RTX 6000, 24 | quadrortx8000, Quadro RTX 8000, 48 | t4, T4, 16
    """,
    "sm_80": "a30, A30, 24 | a100, A100 40GB, 40 | a100-80gb, A100 80GB, 80",
    "sm_86": """
        rtx3050, GeForce RTX 3050, 8 | rtx3060, GeForce RTX 3060, 12 | rtx3060ti, GeForce RTX 3060 Ti, 8
        rtx3070, GeForce RTX 3070, 8 | rtx3070ti, GeForce RTX 3070 Ti, 8 | rtx3080, GeForce RTX 3080, 10
        rtx3080ti, GeForce RTX 3080 Ti, 12 | rtx3090, GeForce RTX 3090, 24 | rtx3090ti, GeForce RTX 3090 Ti, 24
        rtxa2000, RTX A2000, 12 | rtxa4000, RTX A4000, 16 | rtxa4500, RTX A4500, 20 | rtxa5000, RTX A5000, 24
        rtxa6000, RTX A6000, 48 | a2, A2, 16 | a10, A10, 24 | a10g, A10G, 24 | a16, A16, 16 | a40, A40, 48
    """,
    "sm_89": """
        rtx4060, GeForce RTX 4060, 8 | rtx4060ti, GeForce RTX 4060 Ti, 8 | rtx4070, GeForce RTX 4070, 12
        rtx4070super, GeForce RTX 4070 SUPER, 12 | rtx4070ti, GeForce RTX 4070 Ti, 12
        rtx4070tisuper, GeForce RTX 4070 Ti SUPER, 16 | rtx4080, GeForce RTX 4080, 16
        rtx4080super, GeForce RTX 4080 SUPER, 16 | rtx4090, GeForce RTX 4090, 24
        rtx2000ada, RTX 2000 Ada Generation, 16 | rtx4000ada, RTX 4000 Ada Generation, 20
        rtx4500ada, RTX 4500 Ada Generation, 24 | rtx5000ada, RTX 5000 Ada Generation, 32
        rtx6000ada, RTX 6000 Ada Generation, 48 | l4, L4, 24 | l40, L40, 48 | l40s, L40S, 48
    """,
    "sm_90": "h100, H100, 80 | h100nvl, H100 NVL, 94 | h200, H200, 141 | gh200, GH200 Grace Hopper, 96",
    "sm_100": "b200, B200, 180 | gb200, GB200 Grace Blackwell, 186",
    "sm_103": "b300, B300, 288 | gb300, GB300 Grace Blackwell, 288",
    "sm_120": """
        rtx5050, GeForce RTX 5050, 8 | rtx5060, GeForce RTX 5060, 8 | rtx5060ti, GeForce RTX 5060 Ti, 16
        rtx5070, GeForce RTX 5070, 12 | rtx5070ti, GeForce RTX 5070 Ti, 16 | rtx5080, GeForce RTX 5080, 16
        rtx5090, GeForce RTX 5090, 32 | rtxpro2000, RTX PRO 2000 Blackwell, 16
        rtxpro4000, RTX PRO 4000 Blackwell, 24 | rtxpro4500, RTX PRO 4500 Blackwell, 32
        rtxpro5000, RTX PRO 5000 Blackwell, 48 | rtxpro6000, RTX PRO 6000 Blackwell, 96
    """,
    "sm_121": "gb10, GB10 (DGX Spark), 128",
}

# The compute capability from which a number format can be computed with, and what those before it lack.
SINCE = {"fp32": 75, "fp16": 75, "int8-weights": 75, "bf16": 80, "fp8": 89, "fp8-weights": 89}
LACKS = {"bf16": "no bf16 arithmetic", "fp8": "no FP8 tensor cores", "fp8-weights": "no FP8 tensor cores"}


@dataclass(frozen=True)
class Gpu:
    """A product: its name for `--gpu`, its commercial name, its compute capability, and its memory in GiB."""

    name: str
    product: str
    capability: str
    memory_gb: int


def _gpu(entry: str, capability: str) -> Gpu:
    name, product, memory = entry.split(", ")
    return Gpu(name, product, capability, int(memory))


GPUS = [
    _gpu(entry.strip(), capability)
    for capability, entries in PRODUCTS.items()
    for entry in entries.strip().replace("\n", "|").split("|")
]


@dataclass(frozen=True)
class Target:
    """What to compile for: the user's name for it, the compute capabilities (none for the CPU), and the memory in GiB.

    The memory is the smallest of all products that are named, or None if it is not known. As text, a target is `cpu` or
    the capabilities (`sm_86,sm_89`), because nothing else of a target changes an engine.
    """

    name: str
    capabilities: tuple[str, ...] = ()
    memory_gb: float | None = None

    def __str__(self) -> str:
        return ",".join(self.capabilities) or CPU


def number(capability: str) -> int:
    """The number in a compute capability: 89 for `sm_89`."""
    return int(capability.removeprefix("sm_"))


def find_target(name: str) -> Target:
    """The target that the user calls `name`: a product, a compute capability, `cpu`, `local`, or several with commas.

    Raises UserError for an unknown name, and gives the nearest ones.
    """
    if name.strip().lower() == CPU:
        return Target(CPU)
    found = [_find_one(part) for part in name.split(",")]
    capabilities = {capability for target in found for capability in target.capabilities}
    memories = [target.memory_gb for target in found if target.memory_gb is not None]
    memory = min(memories) if len(memories) == len(found) else None
    return Target(",".join(target.name for target in found), tuple(sorted(capabilities, key=number)), memory)


def limited(target: Target, memory_gb: float | None) -> Target:
    """The target with `memory_gb` GiB of memory, or as it is for None. Raises UserError if no GPU has that much."""
    if memory_gb is None:
        return target
    if not target.capabilities:
        raise UserError(
            f"{option('gpu_memory')} is a GPU's, and this is for the CPU", f"leave it out, or {setting('gpu', 'GPU')}"
        )
    if not 0 < memory_gb <= MOST_MEMORY_GB:
        problem = f"{option('gpu_memory')} must be above 0 and at most {MOST_MEMORY_GB} GiB, got {memory_gb:g}"
        raise UserError(problem, f"{setting('gpu_memory', 10)}, for example")
    return replace(target, memory_gb=memory_gb)


def _find_one(name: str) -> Target:
    called = re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())
    if called == LOCAL:
        return local_target()
    for gpu in GPUS:
        if called in (gpu.name.replace("-", ""), re.sub(r"geforce|\s", "", gpu.product.lower())):
            return Target(gpu.name, (gpu.capability,), gpu.memory_gb)
    if f"sm_{called[2:]}" in PRODUCTS and called.startswith("sm"):
        return Target(f"sm_{called[2:]}", (f"sm_{called[2:]}",))
    known = [gpu.name for gpu in GPUS] + list(PRODUCTS)
    near = difflib.get_close_matches(called, known, n=3)
    nearest = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise UserError(f"unknown GPU {name.strip()!r}{nearest}", NAMES)


def local_target() -> Target:
    """The first GPU of this machine, as its driver describes it. Raises UserError if there is none."""
    gpu = local_gpu.local_gpus()[0]
    return Target(gpu.product, (gpu.capability,), round(gpu.memory / 2**30))


def precisions(capability: str) -> list[str]:
    """The precisions that GPUs of a compute capability can compute with."""
    return [precision for precision, since in SINCE.items() if number(capability) >= since]


def default_precision(target: Target) -> tuple[str, str]:
    """The precision that is taken if the user names none, and the reason for it."""
    if not target.capabilities:
        return "fp32", "ONNX Runtime computes 16-bit numbers in 32-bit on a CPU"
    oldest = target.capabilities[0]
    if number(oldest) >= SINCE["fp8-weights"]:
        return "fp8-weights", f"{oldest} has FP8 tensor cores; half the memory of bf16, and no calibration"
    if number(oldest) >= SINCE["bf16"] and (target.memory_gb or 0) >= BF16_MEMORY_GB:
        return "bf16", f"{oldest} has no FP8 tensor cores, and {target.memory_gb:g} GiB hold 16-bit weights"
    held = f"{target.memory_gb:g} GiB are" if target.memory_gb is not None else "an unknown memory may be"
    return "int8-weights", f"{oldest} has no FP8 tensor cores, and {held} too little for 16-bit weights"


def default_activations(target: Target) -> str:
    """The number format of activations and other weights beside 8-bit weights."""
    if not target.capabilities:
        return "fp32"
    return "bf16" if all("bf16" in precisions(capability) for capability in target.capabilities) else "fp16"


def check_precision(name: str, precision: str, dtype: str, target: Target) -> None:
    """Raise UserError, with what is possible, if a GPU cannot compute `precision` with the other layers in `dtype`."""
    for capability in target.capabilities:
        able = precisions(capability)
        lacking = next((wanted for wanted in (precision, dtype) if wanted in SINCE and wanted not in able), None)
        if lacking is None:
            continue
        fix = "ditforge export CHECKPOINT --precision int8-weights   (or bf16)"
        if "bf16" not in able:
            fix = "ditforge export CHECKPOINT --precision int8-weights --activations fp16   (or fp16)"
        raise UserError(
            f"{capability} has {LACKS[lacking]}, and {name} is {precision}"
            + (f" in {dtype}" if lacking != precision else ""),
            fix,
        )
