"""What Triton's Python backend executes for a network: one engine, run on whatever requests Triton batched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # exists inside Triton's Python backend only

from ditforge.engines.runtime import load_engine
from ditforge.errors import DitforgeError
from ditforge.triton_repo.config import ENGINE_PARAMETER, EngineSource


class TritonPythonModel:
    """Triton's interface to a Python model (github.com/triton-inference-server/python_backend)."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        source = EngineSource.model_validate_json(config["parameters"][ENGINE_PARAMETER]["string_value"])
        folder = Path(args["model_repository"]) / args["model_version"]
        try:
            self.engine = load_engine(
                folder,
                source.files,
                source.compiler,
                source.target,
                source.compiler_version,
                source.segments,
                source.on_demand,
            )
        except DitforgeError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self.inputs = [tensor["name"] for tensor in config["input"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One engine call for all requests: Triton only batches equal shapes."""
        parts = [
            {name: read(pb_utils.get_input_tensor_by_name(request, name)) for name in self.inputs}
            for request in requests
        ]
        sizes = [len(part[self.inputs[0]]) for part in parts]
        try:
            outputs = self.engine.run_batch(parts)
        except Exception as error:  # an engine's errors are of many kinds; the server must answer all the same
            failure = pb_utils.TritonError(str(error))
            return [pb_utils.InferenceResponse(error=failure) for _ in requests]
        return [
            pb_utils.InferenceResponse([write(name, value[start:end]) for name, value in outputs.items()])
            for start, end in spans(sizes)
        ]


def read(tensor: Any) -> Any:
    """A tensor of Triton's as NumPy's array, or as CuPy's where it lies: on the GPU, and not copied."""
    if tensor.is_cpu():
        return tensor.as_numpy()
    import cupy

    return cupy.from_dlpack(tensor)


def write(name: str, array: Any) -> Any:
    """An array of NumPy's or CuPy's as Triton's tensor; the latter stays on the GPU."""
    return pb_utils.Tensor(name, array) if isinstance(array, np.ndarray) else pb_utils.Tensor.from_dlpack(name, array)


def spans(sizes: list[int]) -> list[tuple[int, int]]:
    """Where each request's samples start and end in the batch: [2, 1] gives [(0, 2), (2, 3)]."""
    ends = np.cumsum(sizes).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
