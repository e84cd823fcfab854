"""One server among those that a client may use: its channel, what it serves, and a single try of a call."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import grpc
import numpy as np
from pydantic import ValidationError
from tritonclient.grpc import model_config_pb2, service_pb2 as pb, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from ditforge.client.answer import Arrays, Output, WrongAnswer, embeddings_of, expected_outputs, read_answer
from ditforge.client.failures import START_SERVER
from ditforge.client.retry import NOT_READY, Failure
from ditforge.client.settings import ConnectionSettings
from ditforge.client.tls import TLS
from ditforge.contract import DIT, ENGINES_PARAMETER, MODEL_PARAMETER, TEXT_ENCODERS, VAE_DECODER
from ditforge.errors import DitforgeError, UserError
from ditforge.model import Model

T = TypeVar("T")
NEEDED = (TEXT_ENCODERS, DIT, VAE_DECODER)
SERVICE = "inference.GRPCInferenceService"
DESCRIBING = ("RepositoryIndex", "ModelReady", "ModelConfig", "ServerLive")
LARGEST_DESCRIPTION = 4 << 20  # bytes: the configurations of our models have some thousands
LONGEST_MESSAGE = 500  # characters of what a server says, which is shown
HEARD_LATELY = 1.0  # seconds, in which no server ends, starts again and has its models ready
REST = 30.0  # seconds for which a server that failed is only used after the others

# A server that was started again is seen within a second, and channels of different clients share no connection. What
# is not here: gRPC's own keepalive. Triton allows a ping in 5 minutes, and closes a connection with a call that takes
# 50 s while it is pinged every 10 s ("too_many_pings"); so a busy server is asked whether it is live instead.
CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    (
        "grpc.service_config",
        json.dumps(
            {
                "methodConfig": [
                    {
                        "name": [{"service": SERVICE, "method": method} for method in DESCRIBING],
                        "maxResponseMessageBytes": LARGEST_DESCRIPTION,
                    }
                ]
            }
        ),
    ),
]


class CallFailed(Exception):
    """A try of a call failed, or a question what a server serves."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


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

    def __init__(self, url: str, settings: ConnectionSettings) -> None:
        self.url = url
        self._settings, self._lock = settings, threading.Lock()
        self._channel: grpc.Channel | None = None
        self._served: Served | None = None
        self._heard = self._failed = -float("inf")  # when last, as time.monotonic has it
        self._closed = False

    def describe(self, timeout: float) -> Served:
        """What it serves; asked within `timeout` seconds, unless it was heard from within the last one.

        Raises CallFailed where it does not answer or is not ready, Unfit where it serves no model made by ditforge.
        """
        served = self._served
        if served is None or time.monotonic() - self._heard > HEARD_LATELY:
            served = aside(self._ask, timeout).result()
            self._served, self._heard = served, time.monotonic()
        return served

    def infer(self, name: str, inputs: Arrays, served: Served, headers: Mapping[str, str], until: float) -> Arrays:
        """Run the model `name` once on `inputs`; batches larger than what is `served` takes go in parts.

        Each call ends after the settings' step_timeout, and at `until`, of time.monotonic. Raises CallFailed, and
        WrongAnswer where the answer is not what such a server makes of the inputs.
        """

        def call(part: Arrays) -> Arrays:
            timeout = min(self._settings.step_timeout, until - time.monotonic())
            data = self._call(name, part, headers, max(timeout, 0.001))
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

    def close(self) -> None:
        """Close the channel, for good."""
        with self._lock:
            self._closed = True
            if self._channel is not None:
                self._channel.close()

    def _open(self) -> grpc.Channel:
        with self._lock:
            if self._closed:
                raise DitforgeError(f"the connection to {self.url} is closed", "make a new Client")
            if self._channel is None:
                tls = self._settings.tls
                self._channel = (
                    grpc.insecure_channel(self.url, CHANNEL)
                    if tls is None
                    else grpc.secure_channel(self.url, credentials(tls), CHANNEL)
                )
            return self._channel

    def _ask(self, timeout: float) -> Served:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._open())
        until = time.monotonic() + timeout

        def asked() -> dict[str, Any]:
            """All answers together have this long."""
            left = max(until - time.monotonic(), 0.001)
            return {"timeout": left, "metadata": tuple(self._settings.headers().items())}

        try:
            index = stub.RepositoryIndex(pb.RepositoryIndexRequest(), **asked())
            known = sorted({model.name for model in index.models})
            for name in NEEDED:
                if name not in known:
                    serves = shown(", ".join(known)) or "nothing"
                    no_model = f"the Triton server at {self.url} has no model {name}: it has {serves}"
                    raise Unfit(UserError(no_model, START_SERVER))
                if not stub.ModelReady(pb.ModelReadyRequest(name=name), **asked()).ready:
                    raise CallFailed(self._why_not_ready(name, asked()["timeout"]))
            config = stub.ModelConfig(pb.ModelConfigRequest(name=DIT), **asked()).config
        except grpc.RpcError as error:
            raise CallFailed(failure_of(error)) from error
        return self._read(config)

    def _why_not_ready(self, name: str, timeout: float) -> Failure:
        """Whether a server whose model is not ready is about to be, or about to end: it says so where it is asked for a
        picture. A server that is ready again by then reads an empty prompt, once.
        """
        try:
            self._call(TEXT_ENCODERS, {"prompt": np.array([[b""]], np.object_)}, self._settings.headers(), timeout)
        except CallFailed as failed:
            if failed.failure.ending:
                return failed.failure
        return Failure("UNAVAILABLE", f"the model {name} is {NOT_READY}")

    def _read(self, config: model_config_pb2.ModelConfig) -> Served:
        """What the server serves, by the configuration of its DiT. Raises Unfit where that is none of ditforge's."""
        if MODEL_PARAMETER not in config.parameters:
            raise Unfit(UserError(f"the model dit at {self.url} was not made by ditforge", START_SERVER))
        try:
            model = Model.model_validate_json(config.parameters[MODEL_PARAMETER].string_value)
            if unreadable := [name for name in (model.name, *model.max_tokens) if not name.isprintable()]:
                raise WrongAnswer(f"{unreadable[0]!a} is no name")  # warnings show it, and the progress bar
            embeddings = embeddings_of(config)
        except (ValidationError, WrongAnswer) as error:
            what = first_of(error) if isinstance(error, ValidationError) else str(error)
            problem = f"the server at {self.url} describes its model in a way this client does not read: {what}"
            fix = "pip install --upgrade 'ditforge[client]'   or make the repository again with this version"
            raise Unfit(UserError(problem, fix)) from error
        engines = config.parameters[ENGINES_PARAMETER].string_value if ENGINES_PARAMETER in config.parameters else ""
        return Served(model, max(1, config.max_batch_size), shown(engines), embeddings)

    def _call(self, name: str, inputs: Arrays, headers: Mapping[str, str], timeout: float) -> bytes:
        """One call, during which the server is asked now and then whether it is live; the ModelInferResponse unread.

        gRPC for Python would never tell of an answer that it cannot read.
        """
        channel, ended = self._open(), SimpleQueue[object]()
        request = encode(name, inputs).SerializeToString()

        def begin() -> grpc.Future:
            call = channel.unary_unary(f"/{SERVICE}/ModelInfer").future(request, timeout, tuple(headers.items()))
            call.add_done_callback(ended.put)
            return call

        def failed(ready: Future[grpc.Future]) -> None:
            if ready.exception():
                ended.put(ready)

        begun = aside(begin)
        begun.add_done_callback(failed)
        try:
            while True:
                try:
                    ended.get(timeout=self._settings.keepalive)
                    break
                except Empty:
                    aside(self._check_alive, channel).result()
        except BaseException:  # Ctrl-C too: the server need not go on
            begun.add_done_callback(lambda ready: ready.exception() or ready.result().cancel())
            raise
        try:
            data: bytes = begun.result().result()
        except grpc.RpcError as error:
            raise CallFailed(failure_of(error)) from error
        except grpc.FutureCancelledError as error:  # the channel was closed meanwhile
            raise CallFailed(Failure("CANCELLED", "channel closed")) from error
        return data

    def _check_alive(self, channel: grpc.Channel) -> None:
        """Raise CallFailed if there is no answer at all; whatever else the answer is, the call itself will tell."""
        timeout, headers = self._settings.keepalive_timeout, tuple(self._settings.headers().items())
        try:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            stub.ServerLive(pb.ServerLiveRequest(), timeout=timeout, metadata=headers)
        except grpc.RpcError as error:
            if failure_of(error).status == "DEADLINE_EXCEEDED":
                raise CallFailed(Failure("DEADLINE_EXCEEDED", f"no sign of life for {timeout:g} s")) from error


def aside(function: Callable[..., T], *args: Any) -> Future[T]:
    """What a function gives, from a thread of its own, which Ctrl-C does not interrupt.

    A call of gRPC's that is interrupted while it begins counts as one that never ends, and closing its channel waits
    for it for ever.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def credentials(tls: TLS) -> grpc.ChannelCredentials:
    """What gRPC encrypts a channel with."""
    return grpc.ssl_channel_credentials(tls.read("ca"), tls.read("key"), tls.read("certificate"))


def in_parts(call: Callable[[Arrays], Arrays], inputs: Mapping[str, np.ndarray], max_batch: int) -> Arrays:
    """The outputs of `call` for `inputs`, each with the batch first, of which it takes `max_batch` at a time."""
    total = len(next(iter(inputs.values())))
    parts = [
        call({key: value[start : start + max_batch] for key, value in inputs.items()})
        for start in range(0, total, max_batch)
    ]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if len(parts) > 1 else parts[0]


def encode(model: str, inputs: Mapping[str, np.ndarray]) -> pb.ModelInferRequest:
    """A request as Triton takes it; strings as BYTES, one number a sample as [B, 1]."""
    request = pb.ModelInferRequest(model_name=model)
    for name, value in inputs.items():
        array = value[:, None] if value.ndim == 1 else value
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        raw = serialize_byte_tensor(array).item() if array.dtype == np.object_ else array.tobytes()
        request.raw_input_contents.append(raw)
    return request


def failure_of(error: grpc.RpcError) -> Failure:
    """gRPC's status code, e.g. UNAVAILABLE, and the first line of the message."""
    lines = (error.details() or "").strip().splitlines()
    return Failure(error.code().name, shown(lines[0]) if lines else "no reason given")


def first_of(error: ValidationError) -> str:
    """The first of the things that are wrong: where, what, and the value."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"])) or MODEL_PARAMETER
    return shown(f"{where}: {first['msg']}, got {first['input']!a:.60}")


def shown(text: str) -> str:
    """What a server said, with nothing in it that a terminal would obey, and no more than people read."""
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}…"
