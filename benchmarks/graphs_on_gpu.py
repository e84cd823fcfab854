"""What exported graphs compute on a GPU, in ONNX Runtime's CUDA provider, beside the fp32 ones on its CPU.

    python benchmarks/graphs_on_gpu.py out/flux-tiny out/sd35-tiny --out benchmarks/graphs_on_gpu.md

ONNX Runtime has 16-bit kernels on a GPU that its CPU side lacks, so this is where bf16 graphs are run as they are: each
network on the same inputs as the reference, and whole pictures of held-out captions by the client's sampler loop, for
the judge. Each model's folder holds an export called fp32, the reference, and others. Needs onnxruntime-gpu in the
place of onnxruntime. What the provider cannot run is a row that says why; in pictures, the reference's text encoder or
VAE takes its place.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import numpy as np
import onnxruntime as ort
import torch
from PIL import Image

from ditforge import manifest
from ditforge.client import Client
from ditforge.client.connection import Connection
from ditforge.client.replica import in_parts
from ditforge.contract import TOKENIZER
from ditforge.engines.compilers import Arrays
from ditforge.engines.compilers.onnxruntime import session_options
from ditforge.engines.verify import (
    PROMPTS,
    as_declared,
    compared_sizes,
    difference,
    example,
    run_graph,
    tokenize,
)
from ditforge.manifest import Component

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from judge import judge
from scenes import held_out_captions

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
STEPS, SEED, BATCH = 20, 2026, 50
ABOUT = """Written by `benchmarks/graphs_on_gpu.py`: what `ditforge export` wrote, executed by ONNX Runtime's CUDA
provider. "fp8 in fp16" is `--precision fp8 --activations fp16`. Pictures come from the client's sampler loop, each
model with its own guidance. On a GPU, ONNX Runtime has no bf16 kernels for Resize, which a VAE decoder has, nor for
8-bit weights around bf16. TensorRT, which has them, was not at hand to execute."""
HEADINGS = ("precision", "network", "output", "relative error", "cosine", "operators on the GPU", "and on the CPU")


def session(graph: Path, profile: Path | None = None) -> ort.InferenceSession:
    """A session on the GPU; fp32 is not computed as TF32."""
    options = session_options()
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    made = ort.InferenceSession(graph, options, providers=[(CUDA, {"use_tf32": "0"}), CPU])
    if made.get_providers()[0] != CUDA:
        sys.exit("there is no CUDA provider\nfix:   pip uninstall onnxruntime, then pip install onnxruntime-gpu")
    return made


def run_on_gpu(graph: Path, component: Component, inputs: Arrays) -> tuple[Arrays, Counter[str], Counter[str]]:
    """Outputs, and the operators that ran on the GPU and on the CPU, as ONNX Runtime's profile has them."""
    with TemporaryDirectory() as folder:
        loaded = session(graph, Path(folder) / "profile")
        names = list(component.outputs)
        outputs = dict(zip(names, loaded.run(names, as_declared(inputs, component)), strict=True))
        events = json.loads(Path(loaded.end_profiling()).read_text())
    ran = [event["args"] for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {})]
    where = {name: Counter(args["op_name"] for args in ran if args["provider"] == name) for name in (CUDA, CPU)}
    return outputs, where[CUDA], where[CPU]


def rows(folder: Path, against: Path) -> list[tuple[str, ...]]:
    """A row for each output of each network of the export `folder`, beside the fp32 export `against`.

    Of an export with 8-bit weights, only of the networks that have them.
    """
    found, reference = manifest.read(folder, "onnx"), manifest.read(against, "onnx")
    tensors = tokenize(against, reference, PROMPTS)
    made: list[tuple[str, ...]] = []
    for name in (name for name in found.components if name != TOKENIZER):
        component, sizes = found.components[name], compared_sizes(found.model, name, len(PROMPTS))
        inputs = {
            key: tensors[key] if key in tensors else example(key, tensor, sizes, reference.model)
            for key, tensor in component.inputs.items()
        }
        expected = run_graph(against / f"{name}.onnx", reference.components[name], inputs)
        tensors |= {key: value for key, value in expected.items() if key not in reference.components["dit"].outputs}
        if not component.layers and any(other.layers for other in found.components.values()):
            continue
        label = folder.name, name
        try:
            actual, gpu, cpu = run_on_gpu(folder / f"{name}.onnx", component, inputs)
        except Exception as error:  # ONNX Runtime's errors have no common class
            made.append((*label, "", "not run: " + " ".join(str(error).split())[:200], "", "", ""))
            continue
        on_cpu = ", ".join(f"{count} {op}" for op, count in cpu.most_common(3)) or "none"
        for key in expected:
            d = difference(name, component.precision, key, actual[key], expected[key])
            made.append((*label, key, f"{d.relative:.5f}", f"{d.cosine:.6f}", str(gpu.total()), on_cpu))
    return made


class Local:
    """An export in the place of a server: the client's own loop calls its graphs.

    `replaced` are the networks that the GPU cannot run so, and that are taken from the export `against`; not the DiT.
    """

    def __init__(self, folder: Path, against: Path) -> None:
        self.folder, self.found, self.repeated = folder, manifest.read(folder, "onnx"), ""
        self.model, self.components = self.found.model, dict(self.found.components)
        self.sessions, self.replaced = {}, []
        for name in (name for name in self.components if name not in (TOKENIZER, "vae_encoder")):
            try:
                self.sessions[name] = session(folder / f"{name}.onnx")
            except Exception:  # ONNX Runtime's errors have no common class
                if name == "dit":
                    raise
                self.sessions[name] = session(against / f"{name}.onnx")
                self.components[name] = manifest.read(against, "onnx").components[name]
                self.replaced.append(name)

    def begin(self, cancelled: object = None) -> Local:
        """The calls of a picture, as ditforge.client.connection.Connection begins them."""
        return self

    def infer(self, name: str, inputs: Arrays, step: str = "") -> Arrays:
        """Run a network, on as many samples at a time as fit."""
        return in_parts(lambda part, start: self._infer(name, part), inputs, BATCH)

    def _infer(self, name: str, inputs: Arrays) -> Arrays:
        if name in self.sessions:
            return self._call(name, inputs)
        prompts = [prompt.decode() for prompt in inputs["prompt"][:, 0]]
        wanted = self.components["dit"].inputs
        tensors = tokenize(self.folder, self.found, prompts)
        for network in self.sessions:
            if all(key in tensors for key in self.components[network].inputs) and network != "join_clip":
                tensors |= self._call(network, tensors)
        unread = np.zeros((len(prompts), len(self.model.max_tokens)), np.int32)
        return {key: tensors[key] for key in tensors if key in wanted} | {"prompt_tokens": unread}

    def _call(self, name: str, inputs: Arrays) -> Arrays:
        component = self.components[name]
        names = list(component.outputs)
        return dict(zip(names, self.sessions[name].run(names, as_declared(inputs, component)), strict=True))

    def close(self) -> None:
        """Drop the sessions."""
        self.sessions.clear()


def captions_right(folder: Path, against: Path, captions: list[str], judges: Executor) -> tuple[str, str]:
    """The percentage of the captions that come out right, or why none does; and what is the reference's."""
    try:
        local = Local(folder, against)
        client = Client._over(cast(Connection, local))
        pictures: list[Image.Image] = []
        for start in range(0, len(captions), BATCH):
            pictures += client.generate(captions[start : start + BATCH], seed=SEED + start, steps=STEPS)
    except Exception as error:
        return "not run: " + " ".join(str(error).split())[:200], ""
    right = sum(verdict.correct for verdict in judges.map(judge, pictures, captions, chunksize=16))
    return f"{100 * right / len(captions):.1f}", ", ".join(local.replaced)


def table(headings: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    """As Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, ("---",) * len(headings), *lines))


def report(folder: Path, captions: list[str], judges: Executor) -> str:
    """The figures of one model, whose exports are the folders in `folder`."""
    against = folder / "fp32"
    exports = sorted(path for path in folder.iterdir() if path.is_dir() and path != against)
    judged = [(path.name, *captions_right(path, against, captions, judges)) for path in (against, *exports)]
    print(judged, flush=True)
    return "\n\n".join(
        [
            f"## {manifest.read(against, 'onnx').model.name}",
            f"{date.today()}, {torch.cuda.get_device_name()}, ONNX Runtime {ort.__version__}: {len(captions)} held-out "
            f"captions, {STEPS} Euler steps, seeds from {SEED}.",
            table(("precision", "captions right, %", "taken from fp32"), judged),
            "Each network beside the fp32 graph on the CPU:",
            table(HEADINGS, [row for path in exports for row in rows(path, against)]),
        ]
    )


def main() -> None:
    """Run the exports of each model; print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders, each with an export fp32 and others")
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    captions = held_out_captions(options.captions, SEED)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as judges:
        reports = [report(folder, captions, judges) for folder in options.models]
    text = "\n\n".join([f"# Exported graphs on a GPU\n\n{ABOUT}", *reports]) + "\n"
    print(text)
    options.out.write_text(text)


if __name__ == "__main__":
    main()
