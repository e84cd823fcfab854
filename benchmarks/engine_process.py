"""What the engine process adds to a call of an engine, inside a Triton model: beside an engine in that model's process.

    python benchmarks/engine_process.py out/demo/engines --out benchmarks/engine_process.md

Both sides run in turn in one call of a Python model of a real Triton, on the tensors that Triton handed to it. One
engine is the DiT of the build in ENGINES; another one takes and gives the tensors of FLUX.1 at 1024 x 1024, and does
next to nothing with them. For engines of the CPU, the engine process copies tensors that are not aligned, as Triton has
them; for those of a GPU it does not. The last engine gets aligned tensors, so that none are copied.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf import text_format
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tritonclient.grpc import InferenceServerClient, InferInput, model_config_pb2 as pb
from tritonclient.utils import np_to_triton_dtype

from ditforge import manifest
from ditforge.engines.compilers import Arrays
from ditforge.engines.verify import example
from ditforge.manifest import Engine, File
from ditforge.triton_repo.config import ENGINE_PARAMETER, EngineSource
from ditforge.triton_repo.server import start

CALLS = 300
TARGET_MS = 0.3
ALIGNED_NAME = 16  # Triton has a tensor right after its name
FLUX: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
    "latents": (np.float32, (1, 16, 128, 128)),
    "timestep": (np.float32, (1,)),
    "guidance": (np.float32, (1,)),
    "prompt_embeds": (np.float16, (1, 512, 4096)),
    "pooled_embeds": (np.float16, (1, 768)),
}
MODEL = f"""
import json, os, sys, time
from pathlib import Path
import numpy as np
import triton_python_backend_utils as pb_utils
from ditforge.engines.runtime.connection import RemoteEngine
from ditforge.engines.runtime.loading import load_engine
from ditforge.triton_repo.config import EngineSource
from ditforge.triton_repo.models.engine import in_place
class TritonPythonModel:
    def initialize(self, args):
        self.config = json.loads(args["model_config"])
        source = EngineSource.model_validate_json(self.config["parameters"]["{ENGINE_PARAMETER}"]["string_value"])
        folder = Path(self.config["parameters"]["folder"]["string_value"])
        place = Path(os.environ["DITFORGE_ENGINES"])
        self.engines = [
            load_engine(folder, source.files, source.made),
            RemoteEngine(folder, source.files, source.made, print, place),
        ]
    def execute(self, requests):
        (request,) = requests
        names = [tensor["name"] for tensor in self.config["input"]]
        tensors = {{name: pb_utils.get_input_tensor_by_name(request, name) for name in names}}
        ways = [
            {{name: tensor.as_numpy() for name, tensor in tensors.items()}},
            {{name: in_place(tensor) for name, tensor in tensors.items()}},
        ]
        times, outputs = [], []
        for turn in range({CALLS} + 20):
            row = []
            for engine, inputs in zip(self.engines, ways):
                begun = time.perf_counter()
                outputs.append(engine.run_batch([inputs]))
                row.append(1000 * (time.perf_counter() - begun))
            (here, there), outputs = outputs, []
            assert all(np.array_equal(here[name], there[name]) for name in here), "they compute different things"
            times.append(row)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("ms", np.array([times[20:]], np.float64))])]
"""


def trivial(folder: Path, inputs: Arrays) -> EngineSource:
    """An engine that takes these tensors, and gives the first one with the other sign."""
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}
    taken = [helper.make_tensor_value_info(name, kinds[array.dtype], array.shape) for name, array in inputs.items()]
    name, latents = next(iter(inputs.items()))
    output = helper.make_tensor_value_info("velocity", kinds[latents.dtype], latents.shape)
    graph = helper.make_graph([helper.make_node("Neg", [name], ["velocity"])], "trivial", taken, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    file = folder / f"{name}.onnx"
    onnx.save(model, file)
    made = Engine(compiler="onnxruntime", compiler_version="", target="cpu", cache_key={})
    return EngineSource(files={file.name: manifest.describe(file)}, made=made)


def write_model(repository: Path, name: str, folder: Path, source: EngineSource, inputs: Arrays) -> None:
    """Write a Triton model that measures an engine of `folder` on such inputs."""
    config = pb.ModelConfig(name=name, backend="python", max_batch_size=1)
    for tensor, array in inputs.items():
        made = config.input.add(name=tensor, dims=array.shape[1:] or [1])
        made.data_type = pb.DataType.Value(f"TYPE_{np_to_triton_dtype(array.dtype)}")
        if array.ndim == 1:
            made.reshape.SetInParent()
    config.output.add(name="ms", data_type=pb.TYPE_FP64, dims=[CALLS, 2])
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU)
    config.parameters[ENGINE_PARAMETER].string_value = source.model_dump_json()
    config.parameters["folder"].string_value = str(folder)
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "1" / "model.py").write_text(MODEL)
    (repository / name / "config.pbtxt").write_text(text_format.MessageToString(config))


def measure(url: str, name: str, inputs: Arrays) -> NDArray[Any]:
    """The milliseconds of each call, in the model's process and in the engine process: [CALLS, 2]."""
    tensors = []
    for tensor, array in inputs.items():
        column = array[:, None] if array.ndim == 1 else array
        made = InferInput(tensor, column.shape, np_to_triton_dtype(array.dtype))
        tensors.append(made.set_data_from_numpy(column))
    with InferenceServerClient(url) as client:
        found: NDArray[Any] = client.infer(name, tensors, client_timeout=600).as_numpy("ms")[0]
    return found


def report(found: dict[str, NDArray[Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "# What the engine process adds to a call",
        "",
        "Measured by `python benchmarks/engine_process.py ENGINES --out benchmarks/engine_process.md`. Inputs that a",
        "GPU takes are not copied, as in the last row: they are uploaded from where Triton has them.",
        "",
        f"{date.today()}, {os.cpu_count()} cores, {platform.processor() or platform.machine()}, "
        f"Python {platform.python_version()}; {CALLS} calls of each, in turn",
        "",
        "| a call of | in the model's process, median ms | in the engine process | added |",
        "| --- | --- | --- | --- |",
    ]
    for name, times in found.items():
        here, there = (statistics.median(times[:, side].tolist()) for side in (0, 1))
        verdict = "met" if there - here <= TARGET_MS else "MISSED"
        lines.append(f"| {name} | {here:.2f} | {there:.2f} | {there - here:.2f}, target {TARGET_MS}: {verdict} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    built = manifest.read(arguments.engines, "engines")
    component, made = built.components["dit"], built.engines["dit"]
    size = built.model.default_size // built.model.vae_factor
    sizes = {"batch": 1, "latent_height": size, "latent_width": size}
    files: dict[str, File] = dict(component.files)
    draw = np.random.default_rng(0).standard_normal
    cases: dict[str, tuple[Path, EngineSource, Arrays]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cases[built.model.name] = (
            arguments.engines.resolve(),
            EngineSource(files=files, made=made.model_copy(update={"cache_key": {}})),
            {name: example(name, tensor, sizes, built.model) for name, tensor in component.inputs.items()},
        )
        large = {name: draw(shape).astype(dtype) for name, (dtype, shape) in FLUX.items()}
        cases["nothing, on FLUX.1's tensors"] = (folder, trivial(folder, large), large)
        named = {name.ljust(ALIGNED_NAME, "_"): array for name, array in large.items()}
        cases["the same, aligned"] = (folder, trivial(folder, named), named)
        for number, (engines, source, inputs) in enumerate(cases.values()):
            write_model(folder / "repo", f"case{number}", engines, source, inputs)
        with start(folder / "repo", port=0) as server:
            found = {
                name: measure(server_socket(server.pid), f"case{number}", inputs)
                for number, (name, (_, _, inputs)) in enumerate(cases.items())
            }
    text = report(found)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def server_socket(pid: int) -> str:
    """The address of Triton itself."""
    (socket,) = Path("/dev/shm").glob(f"*-{pid}-*/grpc:1")
    return f"unix://{socket}"


if __name__ == "__main__":
    main()
