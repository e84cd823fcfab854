"""`ditforge verify`: checks that the files of a folder are undamaged, and compares their outputs with a reference.

The reference is an fp32 export. If this machine cannot execute some engines, verify the export from which they were
built: its graphs, also quantised ones, run in ONNX Runtime on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditforge import manifest, regions
from ditforge.contract import DIT, TOKENIZER
from ditforge.engines.compilers import NUMPY_DTYPES, Arrays
from ditforge.engines.fp32_graph import write_fp32_graph
from ditforge.engines.gpus import CPU
from ditforge.engines.runtime.loading import load_engine
from ditforge.errors import DitforgeError, UserError
from ditforge.manifest import Component, Manifest, Tensor
from ditforge.model import Model
from ditforge.option import command
from ditforge.temporary_folder import filled, temporary_folder

PROMPTS = ("a photograph of a lighthouse at night", "")
SIZE = (128, 192)  # height and width in pixels of what is compared, where the engines take it: not square
AnyArray = NDArray[Any]


@dataclass(frozen=True)
class Difference:
    """How an output differs from the reference's.

    largest: the largest absolute difference. relative: the L2 norm of the difference divided by that of the reference.
    psnr: in dB, with the reference's range as the peak. same_graph: whether the same ONNX Runtime executed the
    reference's own graph with the same result; such a comparison says nothing about the graph.
    """

    component: str
    precision: str
    output: str
    largest: float
    relative: float
    cosine: float
    psnr: float
    same_graph: bool = False


FP32 = "ditforge export CHECKPOINT --precision fp32 --out DIR   makes the reference"


def verify_files(folder: Path) -> int:
    """Check every file that a stage wrote into `folder`, and return their number. Raises UserError for damage."""
    found = manifest.read_any(folder)
    for component in found.components.values():
        again = f"{manifest.NEXT_COMMAND[found.kind]}   again"
        manifest.check_files(folder, component.files, again, anew=True)
    return sum(len(component.files) for component in found.components.values())


def check_comparable(folder: Path, found: Manifest, onnx: Path, reference: Manifest) -> None:
    """Raise UserError unless what is in `folder` can be compared with `onnx`, which is an fp32 export of the model."""
    if found.kind == "repository":
        fix = command("ditforge verify ENGINE_DIR --against {}   with the engines that it was made of", onnx)
        raise UserError(f"{folder} is a repository, which is not compared", fix)
    manifest.check_components(reference, onnx, [TOKENIZER])
    for name, component in found.components.items():
        there = reference.components.get(name)
        if there is None or ports(there) != ports(component):
            different = f"the {name} of {found.model.name} in {folder}, and {reference.model.name} in {onnx}"
            fix = f"{FP32} from the checkpoint of {found.model.name}"
            raise UserError(f"two models that cannot be compared: {different}", fix)
    if other := [name for name, one in reference.components.items() if name != TOKENIZER and one.precision != "fp32"]:
        precision = reference.components[other[0]].precision
        raise UserError(f"{other[0]} in {onnx} is {precision}: the reference has to be fp32", FP32)


def ports(component: Component) -> tuple[dict[str, tuple[int | str, ...]], ...]:
    """The names and shapes of a network's inputs and outputs, without dtypes, which depend on the precision."""
    return tuple({name: t.shape for name, t in tensors.items()} for tensors in (component.inputs, component.outputs))


def compare(folder: Path, onnx: Path, progress: Callable[[str, int, int], None] | None = None) -> list[Difference]:
    """Run what is in `folder` (engines, or an export) and the graphs of the fp32 export `onnx` on the same inputs.

    The reference's own tokenizer and text encoders encode prompts, so that each network gets real embeddings. Sizes and
    batches are chosen so that the engines take them. Raises UserError for engines that this machine cannot execute.
    """
    found, reference = manifest.read_any(folder), manifest.read(onnx, "onnx")
    networks = [name for name in found.components if name != TOKENIZER]
    check_comparable(folder, found, onnx, reference)
    report = progress or (lambda component, done, total: None)
    prompts = compared_prompts(found)
    tensors = tokenize(onnx, reference, prompts)
    differences = []
    for done, name in enumerate(networks):
        report(name, done, len(networks))
        component, sizes = found.components[name], compared_sizes(found.model, name, len(prompts))
        inputs = {
            key: tensors[key] if key in tensors else example(key, tensor, sizes, reference.model)
            for key, tensor in component.inputs.items()
        }
        expected = run_graph(onnx / f"{name}.onnx", reference.components[name], inputs)
        actual = run_component(folder, found, name, inputs)
        same = is_same_graph(found, reference, name)
        outputs = (difference(name, component.precision, key, actual[key], expected[key]) for key in expected)
        differences += [replace(one, same_graph=same and one.largest == 0) for one in outputs]
        tensors |= {key: value for key, value in expected.items() if key not in reference.components[DIT].outputs}
    report("done", len(networks), len(networks))
    return differences


def compared_prompts(found: Manifest) -> tuple[str, ...]:
    """The prompts for the comparison, as many as fit into a batch."""
    return PROMPTS[: min([len(PROMPTS), *(engine.max_batch for engine in found.engines.values() if engine.max_batch)])]


def compared_sizes(model: Model, network: str, batch: int) -> dict[str, int]:
    """What the varying dimensions are for a network of a `model` that has the sizes of the engines' shape profiles.

    See ditforge.engines.profile.announced.
    """
    return varying_sizes(model, network, compared_size(model), batch)


def varying_sizes(model: Model, network: str, size: tuple[int, int], batch: int) -> dict[str, int]:
    """What the varying dimensions are for a network, for pictures of that (height, width) in pixels."""
    height, width = model.piece(network, *size)
    latents = {"latent_height": height // model.vae_factor, "latent_width": width // model.vae_factor}
    return {"batch": batch, "height": height, "width": width, **latents}


def compared_size(model: Model) -> tuple[int, int]:
    """Height and width in pixels: the nearest to SIZE that the model makes, and not square if it makes others."""
    if model.sizes:
        return min(model.sizes, key=lambda size: (size[0] == size[1], size[0] * size[1]))
    multiple = model.size_multiple
    lowest, highest = -(-model.min_size // multiple) * multiple, model.max_size // multiple * multiple
    height, width = (min(max(size, lowest), highest) for size in SIZE)
    if height == width:
        height, width = (height, width + multiple) if width < highest else (max(height - multiple, lowest), width)
    return height, width


def tokenize(onnx: Path, reference: Manifest, prompts: Sequence[str]) -> Arrays:
    """Token ids of the prompts for every text encoder. Raises UserError for a file that is no tokenizer."""
    from tokenizers import Tokenizer

    encoded = {}
    for file in (onnx / file for file in reference.components[TOKENIZER].files):
        try:
            encoded[file.stem] = Tokenizer.from_file(str(file)).encode_batch(list(prompts))
        except Exception as error:  # the library raises no other
            raise UserError(f"{file} is no tokenizer: {error}", FP32) from None
    return {f"{name}_ids": np.array([e.ids for e in encodings], np.int32) for name, encodings in encoded.items()}


def example(name: str, tensor: Tensor, sizes: dict[str, int], model: Model) -> AnyArray:
    """A random value for an input of the contract (latents, timestep, …), with its dimensions taken from `sizes`."""
    shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape)
    random = np.random.default_rng(0)
    if tensor.dtype == "UINT8":
        return random.integers(0, 256, shape, np.uint8)
    if name == "guidance":
        return np.full(shape, model.default_guidance, np.float32)
    return (random.random(shape) if name == "timestep" else random.standard_normal(shape)).astype(np.float32)


def is_same_graph(found: Manifest, reference: Manifest, name: str) -> bool:
    """Whether both sides execute the reference's own graph in ONNX Runtime, as it is or as an engine made of it."""
    files, engine = reference.components[name].files, found.engines.get(name)
    if engine is None:
        return found.components[name].files == files
    digests = {f"sha256 of {file}": files[file].sha256 for file in files if not file.endswith(regions.SUFFIX)}
    return (engine.compiler, engine.target) == ("onnxruntime", CPU) and digests.items() <= engine.cache_key.items()


def run_component(folder: Path, found: Manifest, name: str, inputs: Arrays) -> Arrays:
    """Run the engine called `name`, or the graph of that name in an export. A bf16 graph runs in fp32."""
    component = found.components[name]
    if found.kind == "engines":
        engine = found.engines[name]
        loaded = load_engine(folder, component.files, engine)
        try:
            return loaded.run(as_declared(inputs, component))
        finally:
            loaded.close()
    graph = folder / f"{name}.onnx"
    if component.dtype != "bf16":
        return run_graph(graph, component, inputs)
    with temporary_folder() as folder:
        with filled(folder):
            graph = write_fp32_graph(graph, folder)
        return run_graph(graph, component, inputs)


def run_graph(graph: Path, component: Component, inputs: Arrays) -> Arrays:
    """Run an exported graph as it is in ONNX Runtime. Raises DitforgeError if ONNX Runtime cannot execute it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # no rewriting into integer products
    names = list(component.outputs)
    try:
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(names, as_declared(inputs, component)), strict=True))
    except Exception as error:  # its own classes have no common base
        reason = " ".join(str(error).split())[:300]
        raise DitforgeError(
            f"ONNX Runtime cannot execute {graph}: {reason}", "ditforge export CHECKPOINT --out DIR   again"
        ) from error


def as_declared(inputs: Arrays, component: Component) -> Arrays:
    """The inputs in the dtypes that the component takes; for example, an fp16 export takes fp16 embeddings."""
    return {key: inputs[key].astype(NUMPY_DTYPES[tensor.dtype]) for key, tensor in component.inputs.items()}


def difference(component: str, precision: str, output: str, actual: AnyArray, expected: AnyArray) -> Difference:
    """Compare two outputs. A value that is not finite counts as infinitely far from the reference."""
    a, b = actual.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    if not np.isfinite(a).all():
        return Difference(component, precision, output, np.inf, np.inf, 0.0, -np.inf)
    norms, mse = (float(np.linalg.norm(a)), float(np.linalg.norm(b))), float(np.mean((a - b) ** 2))
    product = norms[0] * norms[1]
    return Difference(
        component,
        precision,
        output,
        largest=float(np.abs(a - b).max()),
        relative=float(np.linalg.norm(a - b)) / norms[1] if norms[1] else float(norms[0] and np.inf),
        cosine=float(a @ b) / product if product else float(norms[0] == norms[1]),
        psnr=float(10 * np.log10(np.ptp(b) ** 2 / mse)) if mse and np.ptp(b) else (-np.inf if mse else np.inf),
    )
