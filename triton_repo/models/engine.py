"""The code that Triton's Python backend executes for a network: one engine, run on all requests that Triton batched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # exists inside Triton's Python backend only

from ditforge.engines.runtime.loading import load_engine
from ditforge.errors import DitforgeError
from ditforge.triton_repo.config import (
    ENGINE_PARAMETER,
    FORGONE_VARIABLE,
    LIMITS_PARAMETER,
    MEMBER_PARAMETER,
    EngineSource,
)
from ditforge.triton_repo.limits import DTYPES, BadRequest, Limits

Arrays = dict[str, Any]


class TritonPythonModel:
    """Triton's interface to a Python model (github.com/triton-inference-server/python_backend)."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        source = EngineSource.model_validate_json(config["parameters"][ENGINE_PARAMETER]["string_value"])
        folder = Path(args["model_repository"]) / args["model_version"]
        try:
            self.engine = load_engine(folder, source.files, source.made)
        except DitforgeError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self.name = config["name"]
        self.limits = read_limits(config)
        self.outputs = config["output"]
        self.fail = self.spoil if MEMBER_PARAMETER in config["parameters"] else failure

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run the engine once for all valid requests. Triton batches only requests with equal shapes."""
        return answer_each(self.name, requests, self.read, self.engine.run_batch, self.fail)

    def spoil(self, request: Any, message: str, code: Any) -> Any:
        """Outputs that are not numbers, in place of an error.

        Where two members of an ensemble answer one request with an error each, Triton (2.51) loses the answer, or ends
        with SIGSEGV. The front makes the error of it.
        """
        batch = len(read(pb_utils.get_input_tensor_by_name(request, next(iter(self.limits.inputs)))))
        arrays = {}
        for tensor in self.outputs:
            dtype = DTYPES[tensor["data_type"].removeprefix("TYPE_")]
            value = np.nan if np.issubdtype(dtype, np.floating) else 0
            arrays[tensor["name"]] = np.full((batch, *map(int, tensor["dims"])), value, dtype)
        return pb_utils.InferenceResponse([write(name, array) for name, array in arrays.items()])

    def read(self, request: Any) -> Arrays:
        """The inputs of one request. Raises BadRequest if the engine must not see them."""
        inputs = {name: read(pb_utils.get_input_tensor_by_name(request, name)) for name in self.limits.inputs}
        self.limits.check_arrays(inputs)
        return inputs


def answer_each(
    model: str,
    requests: Sequence[Any],
    read_request: Callable[[Any], Arrays],
    run_batch: Callable[[list[Arrays]], Arrays],
    fail: Callable[[Any, str, Any], Any] | None = None,
) -> list[Any]:
    """Return a response for each request. If something is wrong with one request, only that request gets an error.

    A request for which nobody waits any more is not executed. If a batch fails, its requests are executed one by one.
    Each response gets an error object of its own, because Triton ends if several responses share one. `fail` makes the
    response to a request that was not executed, or failed; by default it is an error.
    """
    fail = fail or failure
    answers: dict[int, Any] = {}
    sound: dict[int, Arrays] = {}
    for index, request in enumerate(requests):
        if is_forgone(request.request_id()):
            answers[index] = fail(request, "nobody waits for it any more", pb_utils.TritonError.CANCELLED)
            continue
        try:
            sound[index] = read_request(request)
        except BadRequest as error:
            answers[index] = failure(request, f"{model}: {error}", pb_utils.TritonError.INVALID_ARG)
    try:
        answers |= run_together(sound, run_batch)
    except Exception as error:  # an engine's errors are of many kinds; the server must answer all the same
        log(model, error)
        for index, inputs in sound.items():
            try:
                answers |= run_together({index: inputs}, run_batch)
            except Exception as own:
                log(model, own)
                # What the engine said can name files and machines; it is in the log.
                problem = f"the engine of {model} failed ({type(own).__name__}); the server's log says why"
                answers[index] = fail(requests[index], problem, pb_utils.TritonError.INTERNAL)
    return [answers[index] for index in range(len(requests))]


def is_forgone(name: str) -> bool:
    """Return whether the front noted that nobody waits for the request of this name any more."""
    folder = os.environ.get(FORGONE_VARIABLE)
    return bool(folder and name) and os.path.exists(f"{folder}/{name}")


def run_together(parts: dict[int, Arrays], run_batch: Callable[[list[Arrays]], Arrays]) -> dict[int, Any]:
    """Run several requests in one call of the engine. Returns their responses by the number of the request."""
    if not parts:
        return {}
    outputs = run_batch(list(parts.values()))
    sizes = [len(next(iter(inputs.values()))) for inputs in parts.values()]
    return {
        index: pb_utils.InferenceResponse([write(name, value[start:end]) for name, value in outputs.items()])
        for index, (start, end) in zip(parts, spans(sizes), strict=True)
    }


def failure(request: Any, message: str, code: Any) -> Any:
    """Make the response to a request that says its error."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def log(model: str, error: Exception) -> None:
    """Write an engine's error into Triton's log, on one line."""
    pb_utils.Logger.log_error(f"{model}: {type(error).__name__}: {' '.join(str(error).split())}")


def read_limits(config: dict[str, Any]) -> Limits:
    """Read the limits from a model's configuration."""
    return Limits.model_validate_json(config["parameters"][LIMITS_PARAMETER]["string_value"])


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
    """Return where each request's samples start and end in the batch: [2, 1] gives [(0, 2), (2, 3)]."""
    ends = np.cumsum(sizes).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
