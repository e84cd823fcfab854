"""What bounds a step of the DiT from below on this GPU: its operations at the rates that the GPU reaches by itself.

Products and attention of shapes that suit a GPU are run alone, by PyTorch or by ONNX Runtime, which needs no PyTorch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ditforge.temporary_folder import temporary_folder

if TYPE_CHECKING:
    import torch

ONNXRUNTIME = "onnxruntime"
SIXTEEN_BIT = ("fp16", "bf16", "fp8-weights", "int8-weights")  # precisions whose products are in 16 bits
FP8 = "fp8"
FP8_SINCE = (8, 9)  # the compute capability
PRODUCT = 16384, 8192, 8192  # [M, K] times [K, N]
HEADS = 1, 24, 16384, 128  # batch, heads, tokens and channels
WARM, RUNS = 2, 5  # calls that do not count, and those of which the fastest does


@dataclass(frozen=True)
class Rates:
    """The floating point operations a second of products in 16 bits and in FP8 (None: not measured), and of attention.

    Attention is in 16 bits.
    """

    product: float
    attention: float
    product_fp8: float | None = None

    def least_ms(self, precision: str, products: float, attention: float) -> float | None:
        """The milliseconds of so many operations of products in a precision, and of attention; None if not known."""
        rate = self.product_fp8 if precision == FP8 else self.product if precision in SIXTEEN_BIT else None
        return None if rate is None else 1e3 * (products / rate + attention / self.attention)


def measure_rates(compiler: str) -> Rates:
    """The rates of this machine's GPU, by what the compiler's engines run on.

    For engines of ONNX Runtime, whose products are never in FP8, ONNX Runtime measures. For others PyTorch does, where
    one for the GPU is installed, and else ONNX Runtime. Raises UserError if neither can use the GPU.
    """
    if compiler != ONNXRUNTIME and find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            return by_torch()
    rates = by_onnxruntime()
    return replace(rates, product_fp8=rates.product) if compiler == ONNXRUNTIME else rates


def fastest(run: Callable[[], object]) -> float:
    """The seconds of the fastest call."""
    took = []
    for _ in range(WARM + RUNS):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return min(took[WARM:])


def product_operations(shape: tuple[int, int, int] = PRODUCT) -> int:
    """The operations of a product; a multiplication and an addition are two."""
    rows, inner, columns = shape
    return 2 * rows * inner * columns


def attention_operations(heads: tuple[int, int, int, int] = HEADS) -> int:
    """The operations of attention: the scores, and the weighted sum of the values."""
    batch, count, tokens, channels = heads
    return 4 * batch * count * tokens**2 * channels


def by_torch() -> Rates:
    """Measure with PyTorch on the GPU."""
    import torch
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from ditforge.engines.compilers.region_packages import ATTENTION

    def on_gpu(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def timed(run: Callable[[], object]) -> float:
        def whole() -> None:
            run()
            torch.cuda.synchronize()

        return fastest(whole)

    rows, inner, columns = PRODUCT
    a, b, query, key, value = on_gpu(rows, inner), on_gpu(columns, inner), *(on_gpu(*HEADS) for _ in range(3))
    with torch.no_grad():
        product = product_operations() / timed(lambda: a @ b.t())
        with sdpa_kernel(ATTENTION, set_priority=True):
            attention = attention_operations() / timed(lambda: scaled_dot_product_attention(query, key, value))
        fp8 = None
        if torch.cuda.get_device_capability() >= FP8_SINCE:
            fp8 = product_operations() / timed(in_fp8(a, b))
    return Rates(product, attention, fp8)


def in_fp8(a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A product of a [M, K] and b [N, K] in FP8, with a scale for each matrix, on the GPU that has them."""
    import torch

    one = torch.ones((), device=a.device)
    left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    return lambda: torch._scaled_mm(
        left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def by_onnxruntime() -> Rates:
    """Measure with ONNX Runtime's CUDA provider. Raises UserError if it cannot be used, or CuPy is missing."""
    import numpy as np

    from ditforge.engines.compilers.onnxruntime import session_options
    from ditforge.engines.runtime.onnxruntime_cuda import load_session

    numbers = np.random.default_rng(0)

    def seconds(graph: Path) -> float:
        session = load_session(graph, session_options())
        try:
            cupy = session.cupy
            shapes = {tensor.name: tensor.shape for tensor in session.session.get_inputs()}  # type: ignore[union-attr]
            given = {
                name: cupy.asarray(numbers.standard_normal(shape, np.float32).astype(np.float16))
                for name, shape in shapes.items()
            }
            cupy.cuda.get_current_stream().synchronize()
            return fastest(lambda: session.run_batch([given]))
        finally:
            session.close()

    with temporary_folder() as folder:
        product, attention = write_graphs(folder)
        return Rates(product_operations() / seconds(product), attention_operations() / seconds(attention))


def write_graphs(
    folder: Path, product: tuple[int, int, int] = PRODUCT, heads: tuple[int, int, int, int] = HEADS
) -> tuple[Path, Path]:
    """Write an ONNX graph of a product, and one of attention, in fp16."""
    import onnx
    from onnx import TensorProto, helper

    rows, inner, columns = product
    batch, count, tokens, channels = heads
    matrices = {"a": (rows, inner), "b": (inner, columns)}
    streams = dict.fromkeys(("query", "key", "value"), (batch, tokens, count * channels))
    made = []
    for name, operator, shapes, options in (
        ("product", "MatMul", matrices, {}),
        ("attention", "MultiHeadAttention", streams, {"domain": "com.microsoft", "num_heads": count}),
    ):
        node = helper.make_node(operator, list(shapes), ["y"], **options)
        inputs = [helper.make_tensor_value_info(key, TensorProto.FLOAT16, shape) for key, shape in shapes.items()]
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
        graph = helper.make_graph([node], name, inputs, [output])
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        made.append(folder / f"{name}.onnx")
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), made[-1])
    return made[0], made[1]
