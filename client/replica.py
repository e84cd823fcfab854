"""One server among those that a client may use: its channel, what it serves, and a single try of a call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton
from pydantic import ValidationError
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from ditforge.client.failures import START_SERVER
from ditforge.client.retry import NOT_READY, Failure
from ditforge.client.settings import TLS, ConnectionSettings
from ditforge.errors import DitforgeError, UserError
from ditforge.model import Model

MODEL_PARAMETER, ENGINES_PARAMETER = "ditforge_model", "ditforge_engines"
NEEDED = ("text_encoders", "dit", "vae_decoder")
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
]

Arrays = dict[str, np.ndarray]


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
    """What a server says of itself. `engines` is the SHA-256 of its engines; of an older repository, empty."""

    model: Model
    max_batch: int
    engines: str

    def makes_the_same(self, other: Served) -> bool:
        """Whether a picture that began at one server can go on at the other, and be the same."""
        return (self.engines, self.model) == (other.engines, other.model)


class Replica:
    """The server at `url`. Its channel is made when it is first needed."""

    def __init__(self, url: str, settings: ConnectionSettings) -> None:
        self.url = url
        self._settings, self._lock = settings, threading.Lock()
        self._channel: triton.InferenceServerClient | None = None
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

    def infer(self, name: str, inputs: Arrays, max_batch: int, headers: Mapping[str, str], until: float) -> Arrays:
        """Run the model `name` once on `inputs`; batches larger than `max_batch` go in parts.

        Each call ends after the settings' step_timeout, and at `until`, of time.monotonic. Raises CallFailed.
        """

        def call(part: Arrays) -> Arrays:
            timeout = min(self._settings.step_timeout, until - time.monotonic())
            result = self._call(name, part, headers, max(timeout, 0.001))
            self._heard = time.monotonic()
            return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

        return in_parts(call, inputs, max_batch)

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

    def _open(self) -> triton.InferenceServerClient:
        with self._lock:
            if self._closed:
                raise DitforgeError(f"the connection to {self.url} is closed", "make a new Client")
            if self._channel is None:
                tls = self._settings.tls
                creds = None if tls is None else credentials(tls)
                self._channel = triton.InferenceServerClient(self.url, creds=creds, channel_args=CHANNEL)
            return self._channel

    def _ask(self, timeout: float) -> Served:
        client = self._open()
        asked: dict[str, Any] = {"client_timeout": timeout, "headers": self._settings.headers()}
        try:
            known = sorted(model.name for model in client.get_model_repository_index(**asked).models)
            for name in NEEDED:
                if name not in known:
                    serves = ", ".join(known) or "nothing"
                    no_model = f"the Triton server at {self.url} has no model {name}: it has {serves}"
                    raise Unfit(UserError(no_model, START_SERVER))
                if not client.is_model_ready(name, **asked):
                    raise CallFailed(Failure("UNAVAILABLE", f"the model {name} is {NOT_READY}"))
            config = client.get_model_config("dit", **asked).config
        except InferenceServerException as error:
            raise CallFailed(failure_of(error)) from error
        if MODEL_PARAMETER not in config.parameters:
            raise Unfit(UserError(f"the model dit at {self.url} was not made by ditforge", START_SERVER))
        try:
            model = Model.model_validate_json(config.parameters[MODEL_PARAMETER].string_value)
        except ValidationError as error:
            what = str(error).splitlines()[0]
            problem = f"the server at {self.url} describes its model in a way this client does not read: {what}"
            fix = "pip install --upgrade 'ditforge[client]'   or make the repository again with this version"
            raise Unfit(UserError(problem, fix)) from error
        engines = config.parameters[ENGINES_PARAMETER].string_value if ENGINES_PARAMETER in config.parameters else ""
        return Served(model, max(1, config.max_batch_size), engines)

    def _call(self, name: str, inputs: Arrays, headers: Mapping[str, str], timeout: float) -> triton.InferResult:
        """One call, during which the server is asked now and then whether it is live."""
        client, answers = self._open(), SimpleQueue[tuple[Any, InferenceServerException | None]]()
        tensors = [encode(key, value) for key, value in inputs.items()]

        def answer(result: Any, error: InferenceServerException | None) -> None:
            answers.put((result, error))

        last = time.monotonic() + timeout + self._settings.keepalive  # gRPC may never tell of an answer it cannot read
        running = client.async_infer(name, tensors, answer, headers=dict(headers), client_timeout=timeout)
        try:
            while True:
                try:
                    result, error = answers.get(timeout=self._settings.keepalive)
                    break
                except Empty:
                    if time.monotonic() > last:
                        raise CallFailed(Failure("DEADLINE_EXCEEDED", "no answer that can be read")) from None
                    self._check_alive(client)
        except BaseException:  # Ctrl-C too: the server need not go on
            running.cancel()
            raise
        if error is not None:
            raise CallFailed(failure_of(error)) from error
        return result

    def _check_alive(self, client: triton.InferenceServerClient) -> None:
        """Raise CallFailed if there is no answer at all; whatever else the answer is, the call itself will tell."""
        timeout = self._settings.keepalive_timeout
        try:
            client.is_server_live(headers=self._settings.headers(), client_timeout=timeout)
        except InferenceServerException as error:
            if failure_of(error).status == "DEADLINE_EXCEEDED":
                raise CallFailed(Failure("DEADLINE_EXCEEDED", f"no sign of life for {timeout:g} s")) from error


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


def encode(name: str, value: np.ndarray) -> triton.InferInput:
    """An array as Triton's client sends it; strings as BYTES, one number a sample as [B, 1]."""
    value = value[:, None] if value.ndim == 1 else value
    tensor = triton.InferInput(name, value.shape, np_to_triton_dtype(value.dtype))
    tensor.set_data_from_numpy(np.ascontiguousarray(value))
    return tensor


def failure_of(error: InferenceServerException) -> Failure:
    """gRPC's status code, e.g. UNAVAILABLE, and the first line of the message."""
    message = "no reason given"
    with suppress(IndexError):
        message = str(error.message()).strip().splitlines()[0]
    return Failure(str(error.status() or "").removeprefix("StatusCode."), message)
