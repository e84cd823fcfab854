"""The code that Triton's Python backend executes for a network: one engine, run on all requests that Triton batched.

The engine itself is in the engine process (`ditforge.engines.runtime.process`), which all networks of a server share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # exists inside Triton's Python backend only

from ditforge.engines.runtime.connection import EngineFailed, ProcessLost, RemoteEngine
from ditforge.errors import DitforgeError
from ditforge.triton_repo.config import (
    ENGINE_PARAMETER,
    ENGINES_VARIABLE,
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
        place = os.environ.get(ENGINES_VARIABLE)
        self.name = config["name"]
        self.limits = read_limits(config)
        self.outputs = config["output"]
        self.member = MEMBER_PARAMETER in config["parameters"]
        self.fail = self.spoil if self.member else failure
        try:
            self.engine = RemoteEngine(folder, source.files, source.made, self.tell, Path(place) if place else None)
        except DitforgeError as error:
            raise pb_utils.TritonModelException(str(error)) from error

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run the engine once for all valid requests. Triton batches only requests with equal shapes."""
        return answer_each(self.name, requests, self.read, self.run_batch, self.fail)

    def run_batch(self, parts: list[Arrays]) -> Arrays:
        """Run the engine. A member of an ensemble cannot tell a client to ask again, and so does it itself, once."""
        try:
            return self.engine.run_batch(parts)
        except ProcessLost as error:
            if not self.member:
                raise
            log(self.name, error)
            return self.engine.run_batch(parts)

    def tell(self, message: str) -> None:
        """Write what happened to the engine process into Triton's log."""
        pb_utils.Logger.log_warn(f"{self.name}: {message}")

    def finalize(self) -> None:
        """Free the engine."""
        self.engine.close()

    def spoil(self, request: Any, message: str, code: Any) -> Any:
        """Outputs that are not numbers, in place of an error.

        Where two members of an ensemble answer one request with an error each, Triton (2.51) loses the answer, or ends
        with SIGSEGV. The front makes the error of it.
        """
        batch = len(pb_utils.get_input_tensor_by_name(request, next(iter(self.limits.inputs))).as_numpy())
        arrays = {}
        for tensor in self.outputs:
            dtype = DTYPES[tensor["data_type"].removeprefix("TYPE_")]
            value = np.nan if np.issubdtype(dtype, np.floating) else 0
            arrays[tensor["name"]] = np.full((batch, *map(int, tensor["dims"])), value, dtype)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in arrays.items()])

    def read(self, request: Any) -> Arrays:
        """The inputs of one request. Raises BadRequest if the engine must not see them."""
        inputs = {name: in_place(pb_utils.get_input_tensor_by_name(request, name)) for name in self.limits.inputs}
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
        again = len(sound) > 1 and not isinstance(error, ProcessLost)  # whoever ends the process could end the next one
        for index, inputs in sound.items():
            why = error
            if again:
                try:
                    answers |= run_together({index: inputs}, partial(run_copied, run_batch))
                    continue
                except Exception as own:
                    log(model, own)
                    why = own
            answers[index] = fail(requests[index], *in_words(model, why))
    return [answers[index] for index in range(len(requests))]


def run_copied(run_batch: Callable[[list[Arrays]], Arrays], parts: list[Arrays]) -> Arrays:
    """Outputs that stay when the engine is run again."""
    return {name: array.copy() for name, array in run_batch(parts).items()}


def in_words(model: str, error: Exception) -> tuple[str, Any]:
    """Say to a client that an engine failed, with Triton's code. What the engine said is in the log: it names files."""
    if isinstance(error, ProcessLost):
        return "the engines are starting again; repeat the request", pb_utils.TritonError.UNAVAILABLE
    kind = error.kind if isinstance(error, EngineFailed) else type(error).__name__
    return f"the engine of {model} failed ({kind}); the server's log says why", pb_utils.TritonError.INTERNAL


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
        index: pb_utils.InferenceResponse([pb_utils.Tensor(name, value[start:end]) for name, value in outputs.items()])
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


def in_place(tensor: Any) -> Any:
    """A numeric tensor as an array of the shared memory in which Triton has it; as_numpy() copies it to the heap."""
    return np.from_dlpack(tensor)


def spans(sizes: list[int]) -> list[tuple[int, int]]:
    """Return where each request's samples start and end in the batch: [2, 1] gives [(0, 2), (2, 3)]."""
    ends = np.cumsum(sizes).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
