"""What executes TensorRT's plans, on a real GPU: each behaviour that the tests show on stand-ins, and the numbers.

    python benchmarks/tensorrt_runtime.py reference out/onnx --out out/reference.npz
    python benchmarks/tensorrt_runtime.py run out/engines out/reference.npz --out docs/tensorrt-runtime.md

`reference` computes every network of an fp32 export on the CPU, for pictures of 128 x 96 pixels, one and three at a
time. `run`, on the GPU, executes the engines that were built from it; it needs NumPy, CuPy and TensorRT, as they do. It
writes a Markdown report, the same as JSON beside it, and exits with 1 if a behaviour was not seen.
The stand-ins are in tests/engines/runtime/test_tensorrt.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from ditforge import manifest
from ditforge.engines.compilers import Arrays
from ditforge.engines.runtime import tensorrt as runtime
from ditforge.engines.runtime.loading import load_engine
from ditforge.errors import DitforgeError, UserError
from ditforge.manifest import Component, Manifest

HEIGHT, WIDTH, BATCH = 128, 96, 3
TOKENS = 20  # ids are below: every vocabulary has as many
DTYPES = {"FP32": np.float32, "FP16": np.float16, "INT32": np.int32, "UINT8": np.uint8}
# Of an output's largest number. TensorRT multiplies fp32 as TF32, of 10 bits, 2^-11, where it may: some tens in a row.
TOLERANCE = 0.02
RUNS = 50
ABOUT = """Written by `benchmarks/tensorrt_runtime.py`: plans executed by `engines/runtime/tensorrt.py`, which the tests
have run on stand-ins for TensorRT (`tests/engines/runtime/test_tensorrt.py`). The reference is ONNX Runtime on a CPU.
Engines of TensorRT 8.6, if it says so below, were executed through an adapter that gives it the names of later ones."""


@dataclass(frozen=True)
class Row:
    """A behaviour, the test that shows it on stand-ins, what was seen here, and whether it is as it should be."""

    behaviour: str
    test: str
    seen: str
    passed: bool


@dataclass(frozen=True)
class Loaded:
    """An engine on the GPU, its name, and its inputs and outputs for one sample and for three."""

    name: str
    engine: Any
    inputs: list[Arrays]
    outputs: list[Arrays]


def networks(described: Manifest) -> dict[str, Component]:
    """The components that are executed."""
    return {name: part for name, part in described.components.items() if "BYTES" not in str(part.inputs.values())}


def examples(component: Component, vae_factor: int, batch: int) -> Arrays:
    """Inputs of a network: numbers as they are in a picture, and token ids."""
    random = np.random.default_rng(batch)
    sizes = {"batch": batch, "height": HEIGHT, "width": WIDTH}
    sizes |= {"latent_height": HEIGHT // vae_factor, "latent_width": WIDTH // vae_factor}
    made: Arrays = {}
    for name, tensor in component.inputs.items():
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        if tensor.dtype in ("INT32", "UINT8"):
            made[name] = random.integers(0, TOKENS if tensor.dtype == "INT32" else 256, shape).astype(
                DTYPES[tensor.dtype]
            )
        else:
            numbers = random.random(shape) if name == "timestep" else random.standard_normal(shape)
            made[name] = (
                np.abs(numbers).astype(np.float32) if name == "guidance" else numbers.astype(DTYPES[tensor.dtype])
            )
    return made


def write_reference(onnx: Path, out: Path) -> None:
    """Inputs and outputs of every network of an fp32 export, as NETWORK/BATCH/in or out/TENSOR."""
    import onnxruntime as ort

    described, arrays = manifest.read(onnx, "onnx"), dict[str, Any]()
    for name, component in networks(described).items():
        session = ort.InferenceSession(onnx / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for batch in (1, BATCH):
            inputs = examples(component, described.model.vae_factor, batch)
            outputs = session.run(list(component.outputs), inputs)
            arrays |= {f"{name}/{batch}/in/{key}": value for key, value in inputs.items()}
            arrays |= {f"{name}/{batch}/out/{key}": v for key, v in zip(component.outputs, outputs, strict=True)}
    np.savez_compressed(out, **arrays)


def load(engines: Path, name: str) -> Any:
    """An engine of the folder, on the GPU."""
    described = manifest.read(engines, "engines")
    return load_engine(engines, described.components[name].files, described.engines[name])


@contextmanager
def all_loaded(engines: Path, reference: Path) -> Iterator[list[Loaded]]:
    """Every engine that there is a reference for."""
    arrays = np.load(reference)

    def of(name: str, batch: int, kind: str) -> Arrays:
        prefix = f"{name}/{batch}/{kind}/"
        return {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}

    names = list(dict.fromkeys(key.split("/")[0] for key in arrays.files))
    made = [
        Loaded(name, load(engines, name), *([of(name, batch, kind) for batch in (1, BATCH)] for kind in ("in", "out")))
        for name in names
    ]
    try:
        yield made
    finally:
        for each in made:
            each.engine.close()


def largest_error(made: Arrays, expected: Arrays) -> float:
    """The largest difference, relative to the largest number of an output; of 8-bit pictures, to all 255 levels."""
    return max(
        float(np.abs(np.asarray(made[name], np.float64) - value).max())
        / (255.0 if value.dtype == np.uint8 else max(float(np.abs(value).max()), 1e-9))
        for name, value in expected.items()
    )


def refusal(kind: type[DitforgeError], call: Callable[[], object]) -> str | None:
    """What the call raises of that kind; None if it goes through."""
    try:
        call()
    except kind as error:
        return " ".join(str(error.problem).split())
    return None


def numbers(loaded: list[Loaded]) -> Iterator[Row]:
    """Outputs beside the reference's, alone and in a batch of several requests."""
    for each in loaded:
        alone = largest_error(each.engine.run(each.inputs[0]), each.outputs[0])
        yield Row(f"{each.name}: one sample", "test_requests_run_as_one_batch", f"{alone:.1e}", alone < TOLERANCE)
        requests = [{key: value[i : i + 1] for key, value in each.inputs[1].items()} for i in range(BATCH)]
        together = {key: value.get() for key, value in each.engine.run_batch(requests).items()}
        error = largest_error(together, each.outputs[1])
        yield Row(
            f"{each.name}: {BATCH} requests as one batch", "test_requests_run_as_one_batch", f"{error:.1e}",
            error < TOLERANCE,
        )  # fmt: skip


def on_the_gpu(loaded: list[Loaded]) -> Iterator[Row]:
    """Inputs on the GPU are read where they are; engines that vary write each result to memory of its own."""
    import cupy

    for each in (each for each in loaded if not each.engine.static):
        there = {name: cupy.asarray(value) for name, value in each.inputs[0].items()}
        first = each.engine.run_batch([there])
        read = all(each.engine.context.get_tensor_address(n) == array.data.ptr for n, array in there.items())
        yield Row(
            f"{each.name}: inputs on the GPU are not copied", "test_what_is_on_the_gpu_is_not_copied",
            "read where they are" if read else "copied", read,
        )  # fmt: skip
        kept = {name: value.copy() for name, value in first.items()}
        each.engine.run(each.inputs[1])
        same = all(bool((first[name] == kept[name]).all()) for name in kept)
        yield Row(
            f"{each.name}: a result stays when the engine runs again", "",
            "unchanged" if same else "overwritten", same,
        )  # fmt: skip


def memory(loaded: list[Loaded]) -> Iterator[Row]:
    """All engines of the process share the memory of their activations, which is as large as the largest one wants."""
    for each in loaded:
        each.engine.run(each.inputs[0])
    wanted = {each.name: int(each.engine.engine.device_memory_size_v2) for each in loaded}
    place = runtime._scratch.data.ptr, runtime._scratch.size
    size = place[1]
    yield Row(
        "engines share the memory of their activations", "test_engines_share_the_memory_of_their_activations",
        f"{size} bytes for {wanted}", size >= max(wanted.values()) and loaded[-1].engine.scratch == place,
    )  # fmt: skip


def refusals(loaded: list[Loaded], engines: Path) -> Iterator[Row]:
    """Sizes that no profile takes, calls that TensorRT refuses, and damaged plans are errors that say why."""
    dit = next(each for each in loaded if each.name == "dit")
    largest = {name: max(p[name][2][0] for p in dit.engine.profiles) for name in dit.inputs[0]}
    many = {name: np.repeat(value, largest[name] + 1, axis=0) for name, value in dit.inputs[0].items()}
    said = refusal(UserError, lambda: dit.engine.run(many))
    yield Row("a batch above the profile", "test_shapes_out_of_range_are_refused", str(said)[:150], said is not None)

    def ask_tensorrt() -> None:
        shape = (largest["latents"] + 1, *dit.inputs[0]["latents"].shape[1:])
        dit.engine.check(dit.engine.context.set_input_shape("latents", shape), "set_input_shape")

    said = refusal(DitforgeError, ask_tensorrt)
    told = said is not None and len(said) > len("TensorRT failed in set_input_shape: ")
    yield Row("a call that fails says what TensorRT said", "test_every_failure_is_an_error", str(said)[:150], told)
    after = largest_error(dit.engine.run(dit.inputs[0]), dit.outputs[0])
    yield Row("the engine goes on after both", "", f"{after:.1e}", after < TOLERANCE)
    built = manifest.read(engines, "engines").engines["dit"]
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(shutil.copy(engines / "dit.plan", folder))
        data = bytearray(plan.read_bytes())
        data[: len(data) // 4] = bytes(len(data) // 4)
        plan.write_bytes(data)
        import tensorrt as trt

        said = refusal(DitforgeError, lambda: runtime.load_plan(trt, plan, built.compiler, built.target))
        said = said and said.replace(str(plan), plan.name)
    yield Row("a damaged plan is not loaded", "", str(said)[:150], said is not None)


def closing(engines: Path) -> Iterator[Row]:
    """What an engine took of the GPU's memory is given back when it is closed, and the last one frees the scratch."""
    import cupy

    def free() -> int:
        cupy.cuda.get_current_stream().synchronize()
        return int(cupy.cuda.runtime.memGetInfo()[0])

    load(engines, "dit").close()  # what the first one makes the driver take stays
    before = free()
    engine = load(engines, "dit")
    taken = before - free()
    engine.close()
    left = before - free()
    passed = runtime._scratch is None and left < 0.1 * taken
    seen = f"{taken} bytes taken, {left} of them still taken after it was closed"
    yield Row("a closed engine gives its memory back", "test_a_closed_engine_holds_nothing", seen, passed)


def times(loaded: list[Loaded]) -> dict[str, float]:
    """Milliseconds of a run of each engine for one sample, the median; inputs and outputs in the CPU's memory."""
    medians = {}
    for each in loaded:
        seconds = []
        for _ in range(RUNS):
            begin = time.perf_counter()
            each.engine.run(each.inputs[0])
            seconds.append(time.perf_counter() - begin)
        medians[each.name] = 1000 * float(np.median(seconds))
    return medians


def machine() -> dict[str, str]:
    """The GPU, and the versions of what executed."""
    import cupy
    import tensorrt as trt

    gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return {
        "gpu": gpu,
        "tensorrt": trt.__version__,
        "cupy": cupy.__version__,
        "driver": str(cupy.cuda.runtime.driverGetVersion()),
        "date": date.today().isoformat(),
    }


def report(here: dict[str, str], rows: list[Row], medians: dict[str, float]) -> str:
    """The Markdown of it."""
    cells = [(row.behaviour, row.seen.replace("|", "/"), "yes" if row.passed else "**no**", row.test) for row in rows]
    lines = [
        "# TensorRT's plans, executed", "", ABOUT, "",
        f"{here['gpu']}, TensorRT {here['tensorrt']}, CuPy {here['cupy']}, driver {here['driver']}, {here['date']}.",
        "", "| behaviour | seen | as it should be | test on stand-ins |", "| --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in cells), "",
        f"Numbers are the largest error relative to the output's largest number; below {TOLERANCE} is right: fp32",
        "is multiplied as TF32. Static engines and TensorRT-RTX's runtime cache are not among what was executed.", "",
        f"Milliseconds of a run for one picture of {HEIGHT} x {WIDTH} pixels, median of {RUNS}: "
        + ", ".join(f"{name} {median:.2f}" for name, median in medians.items()) + ".",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def execute(engines: Path, reference: Path, out: Path) -> bool:
    """Write the report; returns whether all was seen."""
    with all_loaded(engines, reference) as loaded:
        rows = [*numbers(loaded), *on_the_gpu(loaded), *memory(loaded), *refusals(loaded, engines)]
        medians = times(loaded)
    rows += closing(engines)
    here = machine()
    out.write_text(report(here, rows, medians))
    told = {"machine": here, "rows": [asdict(row) for row in rows], "milliseconds": medians}
    out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    for row in rows:
        print("ok  " if row.passed else "FAIL", row.behaviour, "|", row.seen)
    return all(row.passed for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("reference")
    made.add_argument("onnx", type=Path)
    run = commands.add_parser("run")
    run.add_argument("engines", type=Path)
    run.add_argument("reference", type=Path)
    for command in (made, run):
        command.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "reference":
        write_reference(given.onnx, given.out)
    else:
        sys.exit(0 if execute(given.engines, given.reference, given.out) else 1)


if __name__ == "__main__":
    main()
