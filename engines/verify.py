"""`ditforge verify`: are a folder's files undamaged, and does what is in it compute what a reference computes?

The reference is an fp32 export. Engines that this machine cannot execute are verified through the export that they were
built from: its graphs, quantised ones too, run in ONNX Runtime on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ditforge import manifest
from ditforge.contract import DIT
from ditforge.engines.build import TOKENIZER
from ditforge.engines.compilers import Arrays
from ditforge.engines.fp32_graph import write_twin
from ditforge.engines.runtime.loading import load_engine
from ditforge.errors import UserError
from ditforge.manifest import Component, Manifest, Tensor
from ditforge.model import Model

PROMPTS = ("a photograph of a lighthouse at night", "")
SIZE = (128, 192)  # height and width in pixels of what is compared, where the engines take it: not square
NUMPY_DTYPES = {"FP32": np.float32, "FP16": np.float16, "INT32": np.int32, "UINT8": np.uint8}


@dataclass(frozen=True)
class Difference:
    """How an output differs from the reference's.

    largest: of the absolute differences. relative: L2 norm of the difference over that of the reference. psnr: in dB,
    its peak the reference's range.
    """

    component: str
    precision: str
    output: str
    largest: float
    relative: float
    cosine: float
    psnr: float

    def row(self) -> tuple[str, ...]:
        """As text, under HEADINGS."""
        figures = f"{self.largest:.3g}", f"{self.relative:.3g}", f"{self.cosine:.7f}", f"{self.psnr:.1f}"
        return self.component, self.precision, self.output, *figures


FP32 = "ditforge export CHECKPOINT --precision fp32 --out DIR   makes the reference"
HEADINGS = ("component", "precision", "output", "largest difference", "relative error", "cosine", "PSNR")


def verify_files(folder: Path) -> int:
    """Check every file that a stage wrote into `folder`, and return how many there are. Raises UserError."""
    found = manifest.read_any(folder)
    for component in found.components.values():
        manifest.check_files(folder, component.files, fix=f"{manifest.NEXT_COMMAND[found.kind]}   again")
    return sum(len(component.files) for component in found.components.values())


def check_comparable(folder: Path, found: Manifest, onnx: Path, reference: Manifest) -> None:
    """Raise UserError unless what is in `folder` can be compared with `onnx`, which is an fp32 export of the model."""
    if found.kind == "repository":
        fix = f"ditforge verify ENGINE_DIR --against {onnx}, with the engines that it was made of"
        raise UserError(f"{folder} is a repository, which is not compared", fix)
    for name, component in found.components.items():
        there = reference.components.get(name)
        if there is None or ports(there) != ports(component):
            different = f"the {name} of {found.model.name} in {folder}, and {reference.model.name} in {onnx}"
            raise UserError(f"two models that cannot be compared: {different}", FP32)
    if other := [name for name, one in reference.components.items() if name != TOKENIZER and one.precision != "fp32"]:
        precision = reference.components[other[0]].precision
        raise UserError(f"{other[0]} in {onnx} is {precision}: the reference has to be fp32", FP32)


def ports(component: Component) -> tuple[set[str], set[str]]:
    """The names of a network's inputs and outputs."""
    return set(component.inputs), set(component.outputs)


def compare(folder: Path, onnx: Path, progress: Callable[[str, int, int], None] | None = None) -> list[Difference]:
    """Run what is in `folder` (engines, or an export) and the graphs of the fp32 export `onnx` on the same inputs.

    Prompts go through the reference's own tokenizer and text encoders, so that each network sees real embeddings.
    Sizes and batches are such as the engines take. Raises UserError for engines that this machine cannot execute.
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
        precision = component.precision
        differences += [difference(name, precision, key, actual[key], expected[key]) for key in expected]
        tensors |= {key: value for key, value in expected.items() if key not in reference.components[DIT].outputs}
    report("done", len(networks), len(networks))
    return differences


def compared_prompts(found: Manifest) -> tuple[str, ...]:
    """The prompts that engines are run on, as many as fit into a batch."""
    return PROMPTS[: min([len(PROMPTS), *(engine.max_batch for engine in found.engines.values() if engine.max_batch)])]


def compared_sizes(model: Model, network: str, batch: int) -> dict[str, int]:
    """What the varying dimensions are for a network of a `model` that has the sizes of the engines' shape profiles.

    See ditforge.engines.profile.announced.
    """
    height, width = model.piece(network, *compared_size(model))
    latents = {"latent_height": height // model.vae_factor, "latent_width": width // model.vae_factor}
    return {"batch": batch, "height": height, "width": width, **latents}


def compared_size(model: Model) -> tuple[int, int]:
    """Height and width in pixels: SIZE, or the nearest that the model makes; not square, where it makes others."""
    if model.sizes:
        return min(model.sizes, key=lambda size: (size[0] == size[1], size[0] * size[1]))
    multiple = model.size_multiple
    lowest, highest = -(-model.min_size // multiple) * multiple, model.max_size // multiple * multiple
    height, width = (min(max(size, lowest), highest) for size in SIZE)
    if height == width:
        height, width = (height, width + multiple) if width < highest else (max(height - multiple, lowest), width)
    return height, width


def tokenize(onnx: Path, reference: Manifest, prompts: Sequence[str]) -> Arrays:
    """Token ids of the prompts for every text encoder."""
    from tokenizers import Tokenizer

    files = [onnx / file for file in reference.components[TOKENIZER].files]
    encoded = {f.stem: Tokenizer.from_file(str(f)).encode_batch(list(prompts)) for f in files}
    return {f"{name}_ids": np.array([e.ids for e in encodings], np.int32) for name, encodings in encoded.items()}


def example(name: str, tensor: Tensor, sizes: dict[str, int], model: Model) -> np.ndarray:
    """A random input of the contract (latents, timestep, guidance, image, embeddings), its dimensions from `sizes`."""
    shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape)
    random = np.random.default_rng(0)
    if tensor.dtype == "UINT8":
        return random.integers(0, 256, shape, np.uint8)
    if name == "guidance":
        return np.full(shape, model.default_guidance, np.float32)
    return (random.random(shape) if name == "timestep" else random.standard_normal(shape)).astype(np.float32)


def run_component(folder: Path, found: Manifest, name: str, inputs: Arrays) -> Arrays:
    """Run the engine called `name`; in an export its graph, a bf16 one as its fp32 twin."""
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
    with TemporaryDirectory() as temporary:
        return run_graph(write_twin(graph, Path(temporary)), component, inputs)


def run_graph(graph: Path, component: Component, inputs: Arrays) -> Arrays:
    """Run an exported graph as it is in ONNX Runtime."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # no rewriting into integer products
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = list(component.outputs)
    return dict(zip(names, session.run(names, as_declared(inputs, component)), strict=True))


def as_declared(inputs: Arrays, component: Component) -> Arrays:
    """The inputs in the dtypes that the component takes: an fp16 export wants fp16 embeddings."""
    return {key: inputs[key].astype(NUMPY_DTYPES[tensor.dtype]) for key, tensor in component.inputs.items()}


def difference(component: str, precision: str, output: str, actual: np.ndarray, expected: np.ndarray) -> Difference:
    """Compare two outputs."""
    a, b = actual.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    norms, mse = (np.linalg.norm(a), np.linalg.norm(b)), np.mean((a - b) ** 2)
    return Difference(
        component,
        precision,
        output,
        largest=float(np.abs(a - b).max()),
        relative=float(np.linalg.norm(a - b) / norms[1]),
        cosine=float(a @ b / (norms[0] * norms[1])),
        psnr=float(10 * np.log10(np.ptp(b) ** 2 / mse)) if mse else np.inf,
    )
