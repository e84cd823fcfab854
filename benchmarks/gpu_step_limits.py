"""What bounds a step from below: the operations of its products and its attention, at the rates of this GPU.

Operations are counted by shape while the step runs. The rates are the best that a model's own largest products and its
attention reach by themselves, in the same run and on the same GPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ditforge.engines.compilers.region_packages import ATTENTION
from ditforge.engines.step_limit import FP8_SINCE, in_fp8, product_operations
from ditforge.export.graph.measure_footprint import attention_flops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, the script itself is tried
WARM = 2  # calls that do not count, of which the first may compile
MOST_RUNS, LEAST_RUNS = 10, 3
RUNS_S = 2.0  # seconds that the calls of a step that count may take, if they are more than LEAST_RUNS
REPEATS = 20  # of a single product or attention, within one measurement

Product = tuple[int, int, int]  # [M, K] times [K, N]
Heads = tuple[int, int, int, int]  # [B, heads, tokens, channels]


def synchronize() -> None:
    """Wait for the GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def has_fp8() -> bool:
    """Whether products can be computed in FP8 here."""
    return DEVICE == "cpu" or torch.cuda.get_device_capability() >= FP8_SINCE


def measured(step: Callable[[], Any], foreign: int = 0) -> dict[str, float]:
    """The median, smallest and largest milliseconds of a step, of how many, and the peak of the GPU's memory in GiB.

    `first_s` is the seconds of the first call, which may compile. `foreign` are the bytes in the GPU's memory that are
    not what is measured, and do not count.
    """

    def timed() -> float:
        start = time.perf_counter()
        step()
        synchronize()
        return time.perf_counter() - start

    first, *warm = [timed() for _ in range(WARM)]
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    runs = max(LEAST_RUNS, min(MOST_RUNS, int(RUNS_S / warm[-1])))
    times = [1e3 * timed() for _ in range(runs)]
    found = {"ms": statistics.median(times), "least": min(times), "most": max(times), "runs": runs, "first_s": first}
    if DEVICE == "cuda":
        found["peak_gib"] = (torch.cuda.max_memory_allocated() - foreign) / 2**30
    return found


@dataclass(frozen=True)
class Operations:
    """The floating point operations of a step for one sample, and the shapes of its largest product and attention."""

    products: int
    attention: int
    product: Product
    heads: Heads


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that counts the operations of everything that is run within it, by shape."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted = 0  # of all but attention
        self.products: set[Product] = set()
        self.attention = 0
        self.heads: set[Heads] = set()

    def __torch_dispatch__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if "scaled_dot_product" in str(function):
            self.attention += attention_flops(args)
            self.heads.add(tuple(args[0].shape))
        elif count := flop_registry.get(function._overloadpacket):
            self.counted += int(count(*args, **(kwargs or {}), out_val=result))
            if function._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                left, right = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 2][-2:]
                self.products.add((left.shape[0], left.shape[1], right.shape[1]))
        return result


def count(step: Callable[[], Any]) -> Operations:
    """Count the operations of a step for one sample."""
    with Counting() as counting:
        step()
    largest, most = (max(found, key=math.prod) for found in (counting.products, counting.heads))
    return Operations(counting.counted, counting.attention, largest, most)


def rates(products: Iterable[Product], heads: Iterable[Heads]) -> dict[str, float]:
    """The most operations a second of products in bf16 and FP8, and of attention in bf16, over all of these shapes.

    There is no rate of FP8 where the GPU has none.
    """
    found = {"bf16": 0.0, "fp8": 0.0, "attention": 0.0}
    for rows, inner, columns in products:
        a, b = (torch.randn(size, inner, device=DEVICE, dtype=torch.bfloat16) for size in (rows, columns))
        operations = product_operations((rows, inner, columns))
        found["bf16"] = max(found["bf16"], rate(operations, lambda a=a, b=b: a @ b.t()))  # type: ignore[misc]
        if DEVICE == "cuda" and has_fp8():
            found["fp8"] = max(found["fp8"], rate(operations, in_fp8(a, b)))
    for shape in heads:
        query, key, value = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
        operations = attention_flops((query, key, value))

        def attend(q: Any = query, k: Any = key, v: Any = value) -> torch.Tensor:
            with sdpa_kernel(ATTENTION, set_priority=True):
                return scaled_dot_product_attention(q, k, v)

        found["attention"] = max(found["attention"], rate(operations, attend))
    return {name: speed for name, speed in found.items() if speed}


def rate(operations: int, run: Callable[[], Any]) -> float:
    """Operations a second. Calls are repeated within one measurement, so that starting it does not count."""

    def many() -> None:
        for _ in range(REPEATS):
            run()

    return operations * REPEATS / (measured(many)["least"] / 1e3)


def limit_ms(operations: Operations, batch: int, speeds: dict[str, float], precision: str) -> float | None:
    """The milliseconds of a step's products, in FP8 if `precision` is fp8 and else in 16 bits, and of its attention."""
    product, attention = speeds.get("fp8" if precision == "fp8" else "bf16"), speeds.get("attention")
    if not product or not attention:
        return None
    return 1e3 * batch * (operations.products / product + operations.attention / attention)
