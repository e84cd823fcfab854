"""One server among those that a client may use: its channel, what it serves, and a single try of a call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from pydantic import ValidationError
from tritonclient.grpc import model_config_pb2, service_pb2 as pb
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from ditforge import install_hint
from ditforge.client.answer import Arrays, Inputs, Output, WrongAnswer, embeddings_of, expected_outputs, read_answer
from ditforge.client.failures import START_SERVER, connect_error
from ditforge.client.probe import speaks_tls
from ditforge.client.retry import NOT_READY, Failure
from ditforge.client.settings import ConnectionSettings
from ditforge.client.transport import CallFailed, Channel, Metadata, Transport, shown
from ditforge.contract import DIT, ENGINES_PARAMETER, MODEL_PARAMETER, TEXT_ENCODERS, VAE_DECODER
from ditforge.errors import DitforgeError, UserError
from ditforge.model import Model
from ditforge.served_model import ClientTooOld, read_served_model

M = TypeVar("M", bound=Message)
NEEDED = (TEXT_ENCODERS, DIT, VAE_DECODER)
HEARD_LATELY = 1.0  # seconds, in which no server ends, starts again and has its models ready
REST = 30.0  # seconds for which a server that failed is only used after the others


class Unfit(Exception):
    """A server answered, and is none that the picture can go on at; `error` is what to say where there is no other."""

    def __init__(self, error: DitforgeError, engines: str | None = None) -> None:
        super().__init__(error)
        self.error, self.engines = error, engines


@dataclass(frozen=True)
class Served:
    """What a server says of itself. `engines` is the SHA-256 of its engines; of an older repository, empty.

    `embeddings` is what its text encoders make of one prompt, by name.
    """

    model: Model
    max_batch: int
    engines: str
    embeddings: Mapping[str, Output]

    def makes_the_same(self, other: Served) -> bool:
        """Whether a picture that began at one server can go on at the other, and be the same."""
        return (self.engines, self.model) == (other.engines, other.model)


class Replica:
    """The server at `url`. Its channel is made when it is first needed."""

    def __init__(self, url: str, settings: ConnectionSettings, transport: Transport) -> None:
        self.url = url
        self._settings, self._transport, self._lock = settings, transport, threading.Lock()
        self._channel: Channel | None = None
        self._served: Served | None = None
        self._heard = self._failed = -float("inf")  # when last, as time.monotonic has it
        self._closed = False

    def describe(self, timeout: float) -> Served:
        """What it serves; asked within `timeout` seconds, unless it was heard from within the last one.

        Raises CallFailed where it does not answer or is not ready, Unfit where it serves no model made by ditforge.
        """
        served = self._served
        if served is None or time.monotonic() - self._heard > HEARD_LATELY:
            served = self._ask(timeout)
            self._served, self._heard = served, time.monotonic()
        return served

    def infer(self, name: str, inputs: Arrays, served: Served, metadata: Metadata, until: float) -> Arrays:
        """Run the model `name` once on `inputs`; batches larger than what is `served` takes go in parts.

        Each call ends after the settings' step_timeout, and at `until`, of time.monotonic. Raises CallFailed, and
        WrongAnswer where the answer is not what such a server makes of the inputs.
        """

        def call(part: Arrays) -> Arrays:
            timeout = min(self._settings.step_timeout, until - time.monotonic())
            data = self._call(name, part, metadata, max(timeout, 0.001))
            arrays = read_answer(data, expected_outputs(name, part, served.model, served.embeddings))
            self._heard = time.monotonic()
            return arrays

        return in_parts(call, inputs, served.max_batch)

    def failed(self) -> None:
        """Note that it failed just now, and forget what it serves: once it is back, that may be something else."""
        self._served, self._failed = None, time.monotonic()

    @property
    def failed_lately(self) -> float:
        """When it failed, if that was lately, else 0. Sorted by this, servers that may work come first."""
        return self._failed if time.monotonic() - self._failed < REST else 0.0

    def connect_error(self, failure: Failure) -> DitforgeError:
        """Why it could not be used at all."""
        probe = self._transport.aside
        return connect_error(self.url, failure, self._settings, lambda url, tls: probe(speaks_tls, url, tls))

    def close(self) -> None:
        """Close the channel, for good."""
        with self._lock:
            self._closed, channel = True, self._channel
        if channel is not None:
            channel.close()

    def _open(self) -> Channel:
        with self._lock:
            if self._closed:
                raise self._closed_error()
            if self._channel is None:
                self._channel = self._transport.open(self.url, self._settings)
            return self._channel

    def _closed_error(self) -> DitforgeError:
        return DitforgeError(f"the connection to {self.url} is closed", "make a new client")

    def _ask(self, timeout: float) -> Served:
        """All answers together have `timeout` seconds."""
        until = time.monotonic() + timeout
        index = self._tell("RepositoryIndex", pb.RepositoryIndexRequest(), pb.RepositoryIndexResponse, until)
        known = sorted({model.name for model in index.models})
        for name in NEEDED:
            if name not in known:
                serves = shown(", ".join(known)) or "nothing"
                no_model = f"the Triton server at {self.url} has no model {name}: it has {serves}"
                raise Unfit(UserError(no_model, START_SERVER))
            if not self._tell("ModelReady", pb.ModelReadyRequest(name=name), pb.ModelReadyResponse, until).ready:
                raise CallFailed(self._why_not_ready(name, until))
        answer = self._tell("ModelConfig", pb.ModelConfigRequest(name=DIT), pb.ModelConfigResponse, until)
        return self._read(answer.config)

    def _why_not_ready(self, name: str, until: float) -> Failure:
        """Whether a server whose model is not ready is about to be, or about to end: it says so where it is asked for a
        picture. A server that is ready again by then reads an empty prompt, once.
        """
        empty = {"prompt": np.array([[b""]], np.object_)}
        try:
            self._call(TEXT_ENCODERS, empty, self._settings.metadata(), max(until - time.monotonic(), 0.001))
        except CallFailed as failed:
            if failed.failure.ending:
                return failed.failure
        return Failure("UNAVAILABLE", f"the model {name} is {NOT_READY}")

    def _read(self, config: model_config_pb2.ModelConfig) -> Served:
        """What the server serves, by the configuration of its DiT. Raises Unfit where that is none of ditforge's."""
        if MODEL_PARAMETER not in config.parameters:
            raise Unfit(UserError(f"the model dit at {self.url} was not made by ditforge", START_SERVER))
        try:
            model = read_served_model(config.parameters[MODEL_PARAMETER].string_value)
            if unreadable := [name for name in (model.name, *model.max_tokens) if not name.isprintable()]:
                raise WrongAnswer(f"{unreadable[0]!a} is no name")  # warnings show it, and the progress bar
            embeddings = embeddings_of(config)
        except (ValueError, RecursionError, WrongAnswer) as error:
            raise Unfit(unreadable_model(self.url, error)) from error
        engines = config.parameters[ENGINES_PARAMETER].string_value if ENGINES_PARAMETER in config.parameters else ""
        return Served(model, max(1, config.max_batch_size), shown(engines), embeddings)

    def _tell(self, method: str, request: Message, answer: type[M], until: float) -> M:
        """What the server says of itself, by `until` of time.monotonic."""
        timeout = max(until - time.monotonic(), 0.001)
        data = self._answer(method, request.SerializeToString(), timeout, self._settings.metadata())
        try:
            read: M = answer.FromString(data)
        except DecodeError as error:
            raise CallFailed(Failure("INTERNAL", f"its answer to {method} cannot be read")) from error
        return read

    def _call(self, name: str, inputs: Arrays, metadata: Metadata, timeout: float) -> bytes:
        """One call of a model, during which the server is asked now and then whether it is live.

        Returns the ModelInferResponse unread: gRPC for Python would never tell of an answer that it cannot read.
        """
        request = encode(name, inputs).SerializeToString()
        return self._answer("ModelInfer", request, timeout, metadata, self._settings.keepalive)

    def _answer(
        self, method: str, request: bytes, timeout: float, metadata: Metadata, keepalive: float | None = None
    ) -> bytes:
        """The answer to one call; with `keepalive`, the server is asked so often whether it is live."""
        pending = self._open().begin(method, request, timeout, metadata)
        try:
            while not pending.wait(keepalive):
                self._check_alive()
            return pending.result()
        except CallFailed as error:
            if self._closed:
                raise self._closed_error() from error
            raise
        finally:
            pending.cancel()  # where it has not ended: Ctrl-C, a task that was cancelled, a server that is not live

    def _check_alive(self) -> None:
        """Raise CallFailed if there is no answer at all; whatever else the answer is, the call itself will tell."""
        timeout = self._settings.keepalive_timeout
        try:
            self._answer("ServerLive", b"", timeout, self._settings.metadata())
        except CallFailed as error:
            if error.failure.status == "DEADLINE_EXCEEDED":
                raise CallFailed(Failure("DEADLINE_EXCEEDED", f"no sign of life for {timeout:g} s")) from error


def in_parts(call: Callable[[Arrays], Arrays], inputs: Inputs, max_batch: int) -> Arrays:
    """The outputs of `call` for `inputs`, each with the batch first, of which it takes `max_batch` at a time."""
    total = len(next(iter(inputs.values())))
    parts = [
        call({key: value[start : start + max_batch] for key, value in inputs.items()})
        for start in range(0, total, max_batch)
    ]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if len(parts) > 1 else parts[0]


def encode(model: str, inputs: Inputs) -> pb.ModelInferRequest:
    """A request as Triton takes it; strings as BYTES, one number a sample as [B, 1]."""
    request = pb.ModelInferRequest(model_name=model)
    for name, value in inputs.items():
        array = value[:, None] if value.ndim == 1 else value
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        raw = serialize_byte_tensor(array).item() if array.dtype == np.object_ else array.tobytes()
        request.raw_input_contents.append(raw)
    return request


def unreadable_model(url: str, error: Exception) -> UserError:
    """What is wrong with what a server says of its model, and which side is older, where that can be told."""
    problem = f"the server at {url} describes its model in a way this client does not read: "
    upgrade, again = install_hint.upgrade("client"), "make the repository again with this version"
    if isinstance(error, ClientTooOld):
        return UserError(f"{problem}{error}", f"{upgrade}   or {again}")
    if not isinstance(error, ValidationError):
        return UserError(f"{problem}{shown(str(error))}", f"{upgrade}   or {again}")
    kinds = {each["type"] for each in error.errors(include_url=False)}
    problem += first_of(error)
    if "missing" in kinds:  # a field that there was not yet
        return UserError(f"{problem}; the server's repository is older than this client", f"{again} of ditforge")
    return UserError(problem, f"{upgrade}   or {again}")


def first_of(error: ValidationError) -> str:
    """The first of the things that are wrong: where, what, and the value."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"])) or MODEL_PARAMETER
    return shown(f"{where}: {first['msg']}, got {first['input']!a:.60}")
