"""A connection to a Triton server that serves a model of ditforge: arrays in, arrays out, errors in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import numpy as np
import tritonclient.grpc as triton
from pydantic import ValidationError
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from ditforge.errors import DitforgeError, UserError
from ditforge.model import Model

MODEL_PARAMETER = "ditforge_model"
NEEDED = ("text_encoders", "dit", "vae_decoder")
CONNECT_TIMEOUT = 10.0  # seconds for an answer to a question that costs the server nothing
START_SERVER = "ditforge serve REPO_DIR --port PORT   starts a server; --url HOST:PORT names its gRPC port"

Arrays = dict[str, np.ndarray]


class Connection:
    """A gRPC channel, and what the server says of its model: `model`, and `max_batch`, the largest batch of a call.

    Raises UserError where no such server is at `url` (HOST:PORT), DitforgeError where it is not ready.
    """

    def __init__(self, url: str) -> None:
        self.url = check_url(url)
        self._client = triton.InferenceServerClient(self.url)
        try:
            self.model, self.max_batch = self._describe()
        except BaseException:
            self.close()
            raise

    def _describe(self) -> tuple[Model, int]:
        try:
            index = self._client.get_model_repository_index(client_timeout=CONNECT_TIMEOUT)
            known = sorted(model.name for model in index.models)
            for name in NEEDED:
                if name not in known:
                    serves = ", ".join(known) or "nothing"
                    raise UserError(
                        f"the Triton server at {self.url} has no model {name}: it has {serves}", START_SERVER
                    )
                if not self._client.is_model_ready(name, client_timeout=CONNECT_TIMEOUT):
                    raise DitforgeError(
                        f"the model {name} at {self.url} is not ready", "wait for it, and look at the server's log"
                    )
            config = self._client.get_model_config("dit", client_timeout=CONNECT_TIMEOUT).config
        except InferenceServerException as error:
            raise connect_error(self.url, error) from error
        if MODEL_PARAMETER not in config.parameters:
            raise UserError(f"the model dit at {self.url} was not made by ditforge", START_SERVER)
        try:
            model = Model.model_validate_json(config.parameters[MODEL_PARAMETER].string_value)
        except ValidationError as error:
            what = str(error).splitlines()[0]
            raise UserError(
                f"the server at {self.url} describes its model in a way this client does not read: {what}",
                "pip install --upgrade 'ditforge[client]'   or make the repository again with this version",
            ) from error
        return model, max(1, config.max_batch_size)

    def infer(self, name: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run the model `name` on `inputs`, each with the batch first; batches larger than `max_batch` go in parts.

        Raises DitforgeError if the server fails or goes away.
        """
        total = len(next(iter(inputs.values())))
        parts = []
        for start in range(0, total, self.max_batch):
            part = {key: value[start : start + self.max_batch] for key, value in inputs.items()}
            parts.append(self._infer(name, part))
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if len(parts) > 1 else parts[0]

    def _infer(self, name: str, inputs: Arrays) -> Arrays:
        try:
            result = self._client.infer(name, [encode(key, value) for key, value in inputs.items()])
        except InferenceServerException as error:
            raise infer_error(self.url, name, error) from error
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    def close(self) -> None:
        """Close the channel."""
        self._client.close()


def encode(name: str, value: np.ndarray) -> triton.InferInput:
    """An array as Triton's client sends it; strings as BYTES, one number a sample as [B, 1]."""
    value = value[:, None] if value.ndim == 1 else value
    tensor = triton.InferInput(name, value.shape, np_to_triton_dtype(value.dtype))
    tensor.set_data_from_numpy(np.ascontiguousarray(value))
    return tensor


def check_url(url: str) -> str:
    """HOST:PORT as it is. Raises UserError for anything else."""
    host, _, port = url.rpartition(":")
    if "/" in url or not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 1 << 16:
        raise UserError(f"{url!r} is not HOST:PORT of a gRPC server", "--url localhost:8001")
    return url


def connect_error(url: str, error: InferenceServerException) -> DitforgeError:
    """Why a server could not be used at all."""
    status, message = status_of(error), first_line(error)
    if status == "UNAVAILABLE":
        return UserError(f"no gRPC server answers at {url}: {message}", START_SERVER)
    if status == "DEADLINE_EXCEEDED":
        return UserError(f"{url} does not answer within {CONNECT_TIMEOUT:.0f} s", START_SERVER)
    if status in ("UNIMPLEMENTED", "UNKNOWN", "INTERNAL"):
        return UserError(f"the server at {url} is not a Triton server: {message}", START_SERVER)
    return DitforgeError(f"the server at {url} refused: {status} {message}", "look at the server's log")


def infer_error(url: str, name: str, error: InferenceServerException) -> DitforgeError:
    """Why a model could not be run."""
    status, message = status_of(error), first_line(error)
    if status in ("UNAVAILABLE", "CANCELLED", "NOT_FOUND"):  # killed, or stopping: then it has unloaded the model
        return DitforgeError(
            f"the server at {url} went away during {name}: {message}", "start it again, and repeat the request"
        )
    return DitforgeError(f"the server at {url} could not run {name}: {message}", "look at the server's log")


def status_of(error: InferenceServerException) -> str:
    """gRPC's status code, e.g. UNAVAILABLE."""
    return str(error.status() or "").removeprefix("StatusCode.")


def first_line(error: InferenceServerException) -> str:
    """The first line of the error's message."""
    with suppress(IndexError):
        return str(error.message()).strip().splitlines()[0].rpartition("; last error: ")[2]
    return "no reason given"
