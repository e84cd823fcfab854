"""How many operators the passes for ONNX Runtime leave of a full-size DiT, and how they round a rotation.

    python benchmarks/pass_counts.py flux.1-dev sd3.5-large --out benchmarks/pass_counts.md

The graphs are traced without weights, so that this takes half a minute a model and no GPU. What the passes are
worth in time is shown by onnxruntime_passes.py, on a GPU.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditforge.contract import DIT
from ditforge.engines.compilers import onnx_passes
from ditforge.export.checkpoint.source import CheckpointSource, opened
from ditforge.export.families import family_of
from ditforge.export.graph.tracing import trace
from ditforge.export.graph.writing import store_transposed
from ditforge.export.quantisation.precision import parse_precision

Array = NDArray[np.float64]
READ = 200_000  # numbers that a vector may have; nothing larger is read
SHOWN = 10  # operators of which fewer are left and were there are not shown
AXES, THETA, GRID = (16, 56, 56), 10_000, 64  # FLUX.1's rotation, for pictures of 1024 x 1024


def small_numbers(value: ir.Value) -> ir.LazyTensor:
    """Numbers in the place of a weight. Raises AssertionError if a matrix is read."""
    shape, dtype = ir.Shape(value.shape or ()), value.dtype
    assert dtype is not None, f"{value.name} has no dtype"

    def read() -> ir.TensorProtocol:
        sizes = shape.numpy()
        assert np.prod(sizes) < READ, f"{value.name} was read"
        numbers = np.arange(np.prod(sizes)).reshape(sizes) % 7 + 1
        return ir.Tensor(numbers.astype(dtype.numpy()), dtype=dtype, name=value.name)

    return ir.LazyTensor(read, dtype=dtype, shape=shape, name=value.name)


def counts(name: str, precision: str) -> tuple[Counter[str], Counter[str], dict[str, int]]:
    """The operators of a published model's DiT before and after the passes, and what each pass found."""
    with opened(CheckpointSource(Path(name), random_weights=True)) as checkpoint:
        networks = family_of(checkpoint).networks(checkpoint, parse_precision(precision))
        network = next(network for network in networks if network.name == DIT)
        model = trace(network).model
        store_transposed(model)
        for value in model.graph.initializers.values():
            if value.const_value is None:
                value.const_value = small_numbers(value)
    before = Counter(node.op_type for node in model.graph)
    model = onnx_passes.shapes.infer(model)
    found = onnx_passes.apply(model)
    return before, Counter(node.op_type for node in model.graph), found


def rotation(dtype: Any) -> tuple[float, float]:
    """The relative error of rotated queries: rotated in fp32 and then rounded, and with each step rounded."""
    row, column = np.divmod(np.arange(GRID * GRID), GRID)
    ids = np.stack((np.zeros_like(row), row, column), axis=1)
    powers = [np.arange(0, width, 2) / width for width in AXES]
    angle = np.concatenate([ids[:, i, None] * THETA**-power for i, power in enumerate(powers)], axis=1)

    def rounded(x: Array) -> Array:
        narrow: Array = x.astype(dtype).astype(np.float64)
        return narrow

    def rotate(x: Array, step: Callable[[Array], Array]) -> Array:
        cos, sin, even, odd = step(np.cos(angle)), step(np.sin(angle)), x[:, ::2], x[:, 1::2]
        first, second = step(even * cos) - step(odd * sin), step(odd * cos) + step(even * sin)
        return np.stack((step(first), step(second)), axis=2).reshape(x.shape)

    query = rounded(np.random.default_rng(0).standard_normal((len(ids), sum(AXES))))
    exact = rotate(query, lambda x: x)
    errors = (np.linalg.norm(result - exact) for result in (rounded(exact), rotate(query, rounded)))
    wide, narrow = (float(error / np.linalg.norm(exact)) for error in errors)
    return wide, narrow


def lines(models: list[str], precisions: list[str]) -> list[str]:
    """The document."""
    out = [
        f"Written by `benchmarks/pass_counts.py`, {date.today()}: operators of DiTs before and after the passes.",
        "",
    ]
    columns = [(model, precision, *counts(model, precision)) for model in models for precision in precisions]
    names = sorted(
        {name for column in columns for side in column[2:4] for name, count in side.items() if count >= SHOWN}
    )
    titles = [f"{model}, {precision}" for model, precision, *_ in columns]
    out += ["| operator | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(columns)]
    for name in names:
        out.append(
            f"| {name} | " + " | ".join(f"{before[name]} → {after[name]}" for *_, before, after, _ in columns) + " |"
        )
    totals = (f"{before.total()} → {after.total()}" for *_, before, after, _ in columns)
    out += ["| all | " + " | ".join(totals) + " |", "", "How often each pass found its pattern:", ""]
    out += ["| pass | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(columns)]
    for name in onnx_passes.PASSES:
        out.append(f"| {name} | " + " | ".join(str(found[name]) for *_, found in columns) + " |")
    out += ["", "Relative error of normally distributed queries after FLUX.1's rotation, at 1024 x 1024:", ""]
    out += ["| | rotated in fp32, then rounded | each step rounded |", "| --- | --- | --- |"]
    for name, dtype in (("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        wide, narrow = rotation(dtype)
        out.append(f"| {name} | {wide:.1e} | {narrow:.1e} |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("models", nargs="+", help="names of published models")
    parser.add_argument("--precisions", default=["fp16", "bf16"], type=lambda text: text.split(","))
    parser.add_argument("--out", type=Path, required=True)
    wanted = parser.parse_args()
    text = "# What the passes leave of a graph\n\n" + "\n".join(lines(wanted.models, wanted.precisions)) + "\n"
    wanted.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
