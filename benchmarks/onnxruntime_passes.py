"""What each pass over a graph is worth in ONNX Runtime's CUDA provider: times, errors and kernels.

    python benchmarks/onnxruntime_passes.py out/flux.1-dev-fp16 --sizes 1024,512 --out passes.json

The folder is an export, of random weights too. A variant is the graph with some passes, or a setting of the session:

    exported        the graph as it is, which is what the errors of all others are against
    all             all passes
    no-PASS         all passes but one, such as no-multi-head-attention
    only-PASS       one pass, and those that the provider cannot do without
    SETTING         all passes, and a setting: graph (CUDA graphs); flash, cudnn or efficient (attention's kernels);
                    shrink (activations freed after each step)

Each variant is a small file beside the export's weights, is loaded, timed and dropped; the results are written as they
come. `--kernels` prints what CUPTI counts on the GPU for a variant, by PyTorch's profiler where there is a PyTorch.
`--device cpu` tries the script itself where there is no GPU: ONNX Runtime's CPU side has no kernel for some operators.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from ditforge import manifest
from ditforge.engines.compilers import NUMPY_DTYPES, Arrays, LoadedEngine, onnx_passes
from ditforge.engines.compilers.onnxruntime import Session, session_options
from ditforge.engines.runtime.onnxruntime_cuda import Settings, load_session
from ditforge.engines.verify import example
from ditforge.manifest import Component, Manifest

WARM, RUNS = 3, 10
INLINE = 1 << 30  # bytes of new weights that a graph may hold by itself
SETTINGS = {
    "graph": Settings(graphs=4),
    "flash": Settings(attention=1),
    "efficient": Settings(attention=2),
    "cudnn": Settings(attention=8),
    "shrink": Settings(shrink=True),
}
COUNTED = ("Cast", "Transpose", "Reshape", "Add", "Mul", "MatMul", "Gemm", "Concat", "Slice", "Split")


@dataclass
class Result:
    """What a variant did: milliseconds by size, errors by size and output, operators by name, or why it failed."""

    variant: str
    device: str
    nodes: dict[str, int] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    write_s: float = 0.0
    load_s: float = 0.0
    ms: dict[str, float] = field(default_factory=dict)
    fastest_ms: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    memory_gib: float = 0.0
    kernels: list[tuple[str, int, float]] = field(default_factory=list)
    failed: str = ""


def slug(name: str) -> str:
    """A pass's name as a word of the command line."""
    return name.replace(" ", "-")


def chosen_passes(variant: str) -> list[str]:
    """The passes of a variant."""
    if variant == "exported":
        return []
    if variant.startswith("no-"):
        return [name for name in onnx_passes.PASSES if slug(name) != variant.removeprefix("no-")]
    if variant.startswith("only-"):
        wanted = variant.removeprefix("only-")
        return [name for name in onnx_passes.PASSES if slug(name) == wanted or name in onnx_passes.NEEDED]
    return list(onnx_passes.PASSES)


def write_variant(graph: Path, variant: str, result: Result, without: set[str]) -> Path:
    """Write the graph of a variant beside the export's file of weights, to which it refers."""
    began = time.perf_counter()
    model = onnx_passes.load(graph)
    result.passes = onnx_passes.apply(model, [name for name in chosen_passes(variant) if name not in without])
    result.nodes = dict(Counter(node.op_type for node in model.graph).most_common())
    added = [value.const_value for value in model.graph.initializers.values()]
    inline = sum(tensor.nbytes for tensor in added if tensor is not None and not isinstance(tensor, ir.ExternalTensor))
    path = graph.with_name(f"{graph.stem}-{variant}.onnx")
    if inline < INLINE:
        ir.save(model, path)
    else:
        ir.save(model, path, external_data=f"{path.name}.data")
    result.write_s = time.perf_counter() - began
    return path


def load(path: Path, variant: str, device: str) -> LoadedEngine:
    """Load a variant's graph."""
    if device == "cpu":
        return Session(ort.InferenceSession(path, session_options(), providers=["CPUExecutionProvider"]))
    return load_session(path, session_options(), SETTINGS.get(variant, Settings()))


def inputs_of(component: Component, found: Manifest, size: int, batch: int) -> Arrays:
    """Random inputs of a network for pictures of size² pixels."""
    latents = size // found.model.vae_factor
    sizes = {"batch": batch, "height": size, "width": size, "latent_height": latents, "latent_width": latents}
    made = {}
    for name, tensor in component.inputs.items():
        dtype = NUMPY_DTYPES[tensor.dtype]
        if np.issubdtype(dtype, np.signedinteger):
            shape = [sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape]
            made[name] = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
        else:
            made[name] = example(name, tensor, sizes, found.model).astype(dtype)
    return made


def timed(engine: LoadedEngine, given: Arrays) -> list[float]:
    """Milliseconds of RUNS calls, each until the GPU has done it, after some that do not count."""
    took = []
    for number in range(WARM + RUNS):
        began = time.perf_counter()
        engine.run_batch([given])
        if number >= WARM:
            took.append(1e3 * (time.perf_counter() - began))
    return took


def kernels(engine: LoadedEngine, given: Arrays) -> list[tuple[str, int, float]]:
    """The kernels of one call: their names, how often each ran, and its milliseconds, the longest first."""
    try:
        from torch.profiler import ProfilerActivity, profile
    except ModuleNotFoundError:
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        engine.run_batch([given])
    rows = [(event.key, event.count, event.self_device_time_total / 1e3) for event in found.key_averages()]
    return sorted(((name, count, round(ms, 3)) for name, count, ms in rows if ms), key=lambda row: -row[2])


def measure(
    graph: Path, found: Manifest, variant: str, wanted: argparse.Namespace, expected: dict[str, Arrays]
) -> Result:
    """Write, load and time a variant. `expected` has the outputs of the graph as exported, and gets them from it."""
    component = found.components[wanted.network]
    result = Result(variant, wanted.device)
    path = None
    try:
        path = write_variant(graph, variant, result, {"three terms"} if wanted.device == "cpu" else set())
        began = time.perf_counter()
        engine = load(path, variant, wanted.device)
        result.load_s = time.perf_counter() - began
        try:
            for size in wanted.sizes:
                given: dict[str, Any] = inputs_of(component, found, size, wanted.batch)
                if wanted.device == "cuda":
                    import cupy

                    given = {name: cupy.asarray(array) for name, array in given.items()}
                    cupy.cuda.get_current_stream().synchronize()
                outputs = {name: as_numpy(array) for name, array in engine.run_batch([given]).items()}
                compare(result, str(size), outputs, expected)
                took = timed(engine, given)
                result.ms[str(size)] = round(statistics.median(took), 2)
                result.fastest_ms[str(size)] = round(min(took), 2)
                if variant in wanted.kernels and wanted.device == "cuda" and size == wanted.sizes[0]:
                    result.kernels = kernels(engine, given)
            if wanted.device == "cuda":
                import cupy

                free, total = cupy.cuda.runtime.memGetInfo()
                result.memory_gib = round((total - free) / 2**30, 2)
        finally:
            engine.close()
            del engine
            gc.collect()
    except Exception as error:  # one variant's failure is a row of its own
        result.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
    finally:
        if path is not None and not wanted.keep:
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    return result


def as_numpy(array: Any) -> Any:
    """An array of NumPy or CuPy in the machine's memory."""
    return array if isinstance(array, np.ndarray) else array.get()


def compare(result: Result, size: str, outputs: Arrays, expected: dict[str, Arrays]) -> None:
    """Note the relative error, in the norm of all numbers, against the graph as exported."""
    if result.variant == "exported":
        expected[size] = outputs
    for name, reference in expected.get(size, {}).items():
        difference = outputs[name].astype(np.float64) - reference.astype(np.float64)
        norm = float(np.linalg.norm(reference.astype(np.float64)))
        result.error[f"{size} {name}"] = float(np.linalg.norm(difference)) / norm if norm else float("nan")


def say(result: Result, sizes: list[int]) -> None:
    """Print a variant's row, and its kernels."""
    if result.failed:
        print(f"{result.variant:32} failed: {result.failed}", flush=True)
        return
    times = "  ".join(f"{size}² {result.ms[str(size)]:8.2f} ms" for size in sizes if str(size) in result.ms)
    error = max(result.error.values(), default=float("nan"))
    counts = " ".join(f"{name} {result.nodes[name]}" for name in COUNTED if name in result.nodes)
    print(
        f"{result.variant:32} {times}  error {error:.5f}  load {result.load_s:5.1f} s  {result.memory_gib:5.1f} GiB  "
        f"{sum(result.nodes.values())} nodes: {counts}",
        flush=True,
    )
    for name, count, ms in result.kernels[:40]:
        print(f"    {ms:9.3f} ms {count:6} x {name[:120]}", flush=True)


def default_variants() -> list[str]:
    """The graph as exported, with all passes, with the settings, and without each pass."""
    return ["exported", "all", *SETTINGS, *(f"no-{slug(name)}" for name in onnx_passes.PASSES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("onnx", type=Path, help="what `ditforge export` wrote")
    parser.add_argument("--network", default="dit")
    parser.add_argument("--sizes", default="1024", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--batch", default=1, type=int)
    parser.add_argument("--variants", default=default_variants(), type=lambda text: text.split(","))
    parser.add_argument("--kernels", default=[], type=lambda text: text.split(","), help="variants to show kernels of")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--keep", action="store_true", help="keep the graphs of the variants beside the export")
    parser.add_argument("--list", action="store_true", help="print the variants, and do nothing")
    parser.add_argument("--out", type=Path, help="a file for the results as JSON")
    wanted = parser.parse_args()
    if wanted.list:
        sys.exit("\n".join(default_variants()))
    found = manifest.read(wanted.onnx, "onnx")
    expected: dict[str, Arrays] = {}
    results = []
    for variant in wanted.variants:
        result = measure(wanted.onnx / f"{wanted.network}.onnx", found, variant, wanted, expected)
        say(result, wanted.sizes)
        results.append(result)
        if wanted.out:
            wanted.out.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
