"""`ditforge verify`: are a build's files undamaged, and do its engines compute what the graphs compute?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ditforge import manifest
from ditforge.engines.build import TOKENIZER
from ditforge.engines.compiler import Arrays
from ditforge.engines.runtime import load_engine
from ditforge.manifest import Component, Manifest, Tensor
from ditforge.model import Model

PROMPTS = ("a photograph of a lighthouse at night", "")
LATENT_SIZE = (16, 24)  # height and width of the latents that are compared: not square
NUMPY_DTYPES = {"FP32": np.float32, "FP16": np.float16, "INT32": np.int32, "UINT8": np.uint8}


@dataclass(frozen=True)
class Difference:
    """How an engine's output differs from the reference: largest absolute and relative L2 difference, and cosine."""

    component: str
    output: str
    largest: float
    relative: float
    cosine: float

    def row(self) -> tuple[str, ...]:
        """As text."""
        return self.component, self.output, f"{self.largest:.3g}", f"{self.relative:.3g}", f"{self.cosine:.7f}"


def verify_files(engines: Path) -> int:
    """Check every file of the build in the folder `engines`, and return how many there are. Raises UserError."""
    built = manifest.read(engines, "engines")
    for component in built.components.values():
        manifest.check_files(engines, component.files, fix="ditforge build ONNX_DIR --gpu GPU --out DIR   again")
    return sum(len(component.files) for component in built.components.values())


def compare(engines: Path, onnx: Path, progress: Callable[[str, int, int], None] | None = None) -> list[Difference]:
    """Run every engine, and the graph of the same name in the folder `onnx`, on the same inputs.

    Prompts go through the reference's own tokenizer and text encoders, so that each network sees real embeddings.
    """
    built, reference = manifest.read(engines, "engines"), manifest.read(onnx, "onnx")
    report = progress or (lambda component, done, total: None)
    height, width = LATENT_SIZE
    pixels = {"height": height * reference.model.vae_factor, "width": width * reference.model.vae_factor}
    sizes = {"batch": len(PROMPTS), "latent_height": height, "latent_width": width, **pixels}
    tensors = tokenize(onnx, reference)
    differences = []
    for done, name in enumerate(built.engines):
        report(name, done, len(built.engines))
        component = built.components[name]
        inputs = {
            key: tensors[key] if key in tensors else example(key, tensor, sizes, reference.model)
            for key, tensor in component.inputs.items()
        }
        expected = run_graph(onnx / f"{name}.onnx", reference.components[name], inputs)
        engine = load_engine(engines, component.files, built.engines[name].compiler, built.engines[name].target)
        actual = engine.run(as_declared(inputs, component))
        differences += [difference(name, key, actual[key], expected[key]) for key in expected]
        tensors |= {key: value for key, value in expected.items() if key not in reference.components["dit"].outputs}
    report("done", len(built.engines), len(built.engines))
    return differences


def tokenize(onnx: Path, reference: Manifest) -> Arrays:
    """Token ids of PROMPTS for every text encoder."""
    from tokenizers import Tokenizer

    files = [onnx / file for file in reference.components[TOKENIZER].files]
    encoded = {f.stem: Tokenizer.from_file(str(f)).encode_batch(list(PROMPTS)) for f in files}
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


def run_graph(graph: Path, component: Component, inputs: Arrays) -> Arrays:
    """Run an exported graph as it is in ONNX Runtime."""
    import onnxruntime as ort

    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = list(component.outputs)
    return dict(zip(names, session.run(names, as_declared(inputs, component)), strict=True))


def as_declared(inputs: Arrays, component: Component) -> Arrays:
    """The inputs in the dtypes that the component takes: an fp16 export wants fp16 embeddings."""
    return {key: inputs[key].astype(NUMPY_DTYPES[tensor.dtype]) for key, tensor in component.inputs.items()}


def difference(component: str, output: str, actual: np.ndarray, expected: np.ndarray) -> Difference:
    """Compare two outputs."""
    a, b = actual.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    norms = np.linalg.norm(a), np.linalg.norm(b)
    return Difference(
        component,
        output,
        largest=float(np.abs(a - b).max()),
        relative=float(np.linalg.norm(a - b) / norms[1]),
        cosine=float(a @ b / (norms[0] * norms[1])),
    )
