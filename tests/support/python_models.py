"""Small repositories of Python models, for what a server does whatever it serves; and the processes of a server."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import psutil
from google.protobuf import text_format
from tritonclient.grpc import InferenceServerClient, InferInput, model_config_pb2 as pb

from ditforge.triton_repo.server import Server

ADD_ONE = """
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        x = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x + np.float32(1))]) for x in x]
"""
SLEEP = ADD_ONE.replace("        return", "        import time; time.sleep(float(x[0].ravel()[0]))\n        return")

# Requests are answered as those of engines are. 13 fails, with the batch that it is in; 60 and more are slept over.
CAREFUL = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils
from ditforge.triton_repo.models.engine import answer_each
class TritonPythonModel:
    calls = 0
    def execute(self, requests):
        return answer_each("careful", requests, self.read, self.run)
    def read(self, request):
        return {"x": pb_utils.get_input_tensor_by_name(request, "x").as_numpy()}
    def run(self, parts):
        x = np.concatenate([part["x"] for part in parts])
        self.calls += len(x)
        if (x == 13).any():
            raise RuntimeError("no kernel in /opt/build/onnxruntime/core/provider.cc for 13")
        time.sleep(float(x.max()) - 60 if x.max() >= 60 else 0)
        return {"y": np.stack([x[:, 0] + 1, np.full(len(x), self.calls)], 1).astype(np.float32)}
"""


def write_models(repository: Path, max_batch: int = 0, queue: int = 0, **models: str) -> Path:
    """Write Python models, given as NAME=SOURCE, with x FP32 [-1] in and y FP32 [-1] out; batches wait for 0.3 s."""
    for name, source in models.items():
        config = pb.ModelConfig(name=name, backend="python", max_batch_size=max_batch)
        config.input.add(name="x", data_type=pb.TYPE_FP32, dims=[-1])
        config.output.add(name="y", data_type=pb.TYPE_FP32, dims=[-1])
        config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU)
        if max_batch:
            config.dynamic_batching.max_queue_delay_microseconds = 300_000
            policy = config.dynamic_batching.default_queue_policy
            policy.max_queue_size, policy.allow_timeout_override = queue, True
            policy.default_timeout_microseconds = 600_000_000
        model = repository / name / "1" / "model.py"
        model.parent.mkdir(parents=True)
        model.write_text(source)
        (model.parents[1] / "config.pbtxt").write_text(text_format.MessageToString(config))
    return repository


def infer(url: str, model: str, *x: float, batched: bool = False, timeout: float = 60) -> np.ndarray:
    """The output y of a model for x."""
    with InferenceServerClient(url) as client:
        return client.infer(model, [tensor(*x, batched=batched)], client_timeout=timeout).as_numpy("y")


def tensor(*x: float, batched: bool = False) -> InferInput:
    """The input x, with a batch of one before it or not."""
    array = np.array([x] if batched else x, np.float32)
    made = InferInput("x", array.shape, "FP32")
    made.set_data_from_numpy(array)
    return made


def tritonserver(server: Server) -> psutil.Process:
    """The tritonserver that runs behind a server's front."""
    (found,) = [p for p in psutil.Process(server.pid).children() if "tritonserver" in " ".join(p.cmdline())]
    return found


def model_processes(server: Server) -> dict[str, psutil.Process]:
    """The processes of a server's models, by the models' names."""
    found = {}
    for process in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if code := [word for word in process.cmdline() if word.endswith("/1/model.py")]:
                found[Path(code[0]).parents[1].name] = process
    return found


def engine_process(server: Server) -> psutil.Process:
    """The process that has a server's engines."""
    (file,) = Path("/dev/shm").glob(f"*-{server.pid}-*/engines/pid")
    return psutil.Process(int(file.read_text()))


def socket_of(server: Server) -> str:
    """The address of Triton itself, behind the front."""
    (socket,) = Path("/dev/shm").glob(f"*-{server.pid}-*/grpc:1")
    return f"unix://{socket}"


def below(pid: int, name: str) -> list[psutil.Process]:
    """The processes below another one whose name begins so."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended in the meantime
            if process.name().startswith(name):
                found.append(process)
    return found
