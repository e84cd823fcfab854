"""One of the servers that a client may use: its channel, the model that it serves, and a single try of a call."""

from __future__ import annotations

import functools
import logging
import re
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
from ditforge.client.answer import (
    Arrays,
    Inputs,
    Output,
    Read,
    WrongAnswer,
    embeddings_of,
    expected_outputs,
    read_answer,
)
from ditforge.client.failures import START_SERVER, connect_error
from ditforge.client.kept import MOST_LOST, KeptInputs
from ditforge.client.local_tensors import LocalTensors, TensorFile, find
from ditforge.client.probe import speaks_tls
from ditforge.client.retry import NOT_READY, Failure
from ditforge.client.settings import ConnectionSettings
from ditforge.client.transport import CallFailed, Channel, Metadata, Transport, shown
from ditforge.contract import (
    DIT,
    ENGINES_PARAMETER,
    KEEPS_PARAMETER,
    KEPT_KEY,
    MODEL_PARAMETER,
    SHARED_MEMORY_PARAMETER,
    TEXT_ENCODERS,
    VAE_DECODER,
)
from ditforge.errors import DitforgeError, UserError
from ditforge.model import Model
from ditforge.served_model import ClientTooOld, read_served_model

M = TypeVar("M", bound=Message)
NEEDED = (TEXT_ENCODERS, DIT, VAE_DECODER)
HEARD_LATELY = 1.0  # seconds; no server can end, start again and have its models ready in this time
INFER = "ModelInfer"
NO_MEMORY = ("NOT_FOUND", "shared.memory")  # it has no such shared memory; older servers and Triton say it in words
LOST = ("ABORTED", "INVALID_ARGUMENT")  # it does not have what it kept; a proxy between does not tell it the label
REST = 30.0  # seconds for which a server that failed is used only after all others
log = logging.getLogger("ditforge.client")


class Unfit(Exception):
    """A server answered, but it cannot be used for the picture. `error` is for the user if there is no other server.

    `engines` is the digest of the server's engines if these are the reason, or else None.
    """

    def __init__(self, error: DitforgeError, engines: str | None = None) -> None:
        super().__init__(error)
        self.error, self.engines = error, engines


@dataclass(frozen=True)
class Served:
    """What a server serves, as it describes itself.

    max_batch: the most samples that it takes in one call.
    engines: the SHA-256 of its engines in hexadecimal; empty if an older ditforge wrote its repository.
    embeddings: the dtypes and shapes of the embeddings of one prompt, by name.
    keeps: the inputs of the DiT that it keeps for a picture's later steps. Empty if no front is before Triton.
    shared_memory: the name of its folder in /dev/shm for the tensors of clients. Empty if no front is before Triton.
    """

    model: Model
    max_batch: int
    engines: str
    embeddings: Mapping[str, Output]
    keeps: tuple[str, ...] = ()
    shared_memory: str = ""

    def makes_the_same(self, other: Served) -> bool:
        """Whether both have the same engines and model, so that a picture can go on at the other and be the same."""
        return (self.engines, self.model) == (other.engines, other.model)


class Replica:
    """The server at `url`, HOST:PORT. Its channel is made when it is first needed."""

    def __init__(self, url: str, settings: ConnectionSettings, transport: Transport) -> None:
        self.url = url
        self._settings, self._transport, self._lock = settings, transport, threading.Lock()
        self._channel: Channel | None = None
        self._served: Served | None = None
        self._heard = self._failed = -float("inf")  # when it last answered, and last failed, in time.monotonic's time
        self._local: LocalTensors | None = None
        self._folder, self._losses = "", 0  # what the server calls its shared memory, and how often that was not there
        self._closed = False

    def describe(self, timeout: float) -> Served:
        """Return what it serves. It is asked again unless it has answered within the last second.

        Raises CallFailed if it does not answer within `timeout` seconds or is not ready, and Unfit if it serves no
        model made by ditforge.
        """
        served = self._served
        if served is None or time.monotonic() - self._heard > HEARD_LATELY:
            served = self._ask(timeout)
            self._served, self._heard = served, time.monotonic()
            self._meet(served.shared_memory)
        return served

    def infer(
        self, name: str, inputs: Arrays, served: Served, metadata: Metadata, until: float, kept: KeptInputs
    ) -> Arrays:
        """Run the model `name` on `inputs`, arrays with the batch dimension first. Returns its outputs by name.

        What the server keeps of the picture's inputs is sent once, as `kept` notes. A batch larger than
        `served.max_batch` is sent in several calls. Each call ends after the settings' step_timeout seconds, or at the
        time `until` of time.monotonic. Raises CallFailed if a call fails, and WrongAnswer if the answer does not fit
        the inputs.
        """
        keeps = served.keeps if name == DIT else ()
        label = kept.label(inputs, keeps) if keeps else ""

        def send(part: Arrays, metadata: Metadata) -> Arrays:
            timeout = min(self._settings.step_timeout, until - time.monotonic())
            expected = expected_outputs(name, part, served.model, served.embeddings)
            return self._call(name, part, metadata, max(timeout, 0.001), expected)

        def send_new(part: Arrays, place: str) -> Arrays:
            """Send what the server does not have."""
            metadata_kept = {**metadata, KEPT_KEY: place}
            if kept.has(self.url, place):
                try:
                    return send({key: array for key, array in part.items() if key not in keeps}, metadata_kept)
                except CallFailed as failed:
                    if failed.failure.status not in LOST:
                        raise
                    kept.lost(self.url, place)
            arrays = send(part, metadata_kept)
            kept.sent(self.url, place)
            return arrays

        def call(part: Arrays, start: int) -> Arrays:
            arrays = send_new(part, f"{label}-{start}") if label else send(part, metadata)
            self._heard = time.monotonic()
            return arrays

        return in_parts(call, inputs, served.max_batch)

    def failed(self) -> None:
        """Note that it failed just now. Forget what it serves, which may be something else when it is back."""
        self._served, self._failed = None, time.monotonic()

    @property
    def failed_lately(self) -> float:
        """The time.monotonic of its last failure if it was in the last 30 seconds, or else 0.

        Servers sorted by this begin with those that have not failed lately.
        """
        return self._failed if time.monotonic() - self._failed < REST else 0.0

    def connect_error(self, failure: Failure) -> DitforgeError:
        """The error that says why it could not be used at all."""
        probe = self._transport.aside
        return connect_error(self.url, failure, self._settings, lambda url, tls: probe(speaks_tls, url, tls))

    def close(self) -> None:
        """Close the channel. The server cannot be called through this object any more."""
        with self._lock:
            self._closed, channel, local = True, self._channel, self._local
        if channel is not None:
            channel.close()
        if local is not None:
            local.close()

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
        """Ask the server what it serves. It has `timeout` seconds for all its answers together."""
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
        """Find out whether a server whose model `name` is not ready is starting or shutting down.

        ditforge's server says that it is shutting down when it is asked to begin a picture, so it is sent an empty
        prompt. If it is ready again by then, it encodes that prompt, which does no harm.
        """
        empty = {"prompt": np.array([[b""]], np.object_)}
        try:
            request = encode(TEXT_ENCODERS, empty).SerializeToString()
            self._answer(INFER, request, max(until - time.monotonic(), 0.001), self._settings.metadata())
        except CallFailed as failed:
            if failed.failure.ending:
                return failed.failure
        return Failure("UNAVAILABLE", f"the model {name} is {NOT_READY}")

    def _read(self, config: model_config_pb2.ModelConfig) -> Served:
        """Read what the server serves from its DiT's configuration. Raises Unfit if ditforge did not write that."""
        if MODEL_PARAMETER not in config.parameters:
            raise Unfit(UserError(f"the model dit at {self.url} was not made by ditforge", START_SERVER))
        try:
            model = read_served_model(config.parameters[MODEL_PARAMETER].string_value)
            if unreadable := [name for name in (model.name, *model.max_tokens) if not name.isprintable()]:
                raise WrongAnswer(f"{unreadable[0]!a} is no name")  # warnings and the progress bar print these names
            embeddings = embeddings_of(config)
        except (ValueError, RecursionError, WrongAnswer) as error:
            raise Unfit(unreadable_model(self.url, error)) from error
        engines, keeps, folder = (
            config.parameters[name].string_value if name in config.parameters else ""
            for name in (ENGINES_PARAMETER, KEEPS_PARAMETER, SHARED_MEMORY_PARAMETER)
        )
        kept = tuple(name for name in keeps.split() if name in embeddings)
        return Served(model, max(1, config.max_batch_size), shown(engines), embeddings, kept, folder)

    def _tell(self, method: str, request: Message, answer: type[M], until: float) -> M:
        """Ask the server about itself with the gRPC method `method`. It must answer by `until` of time.monotonic."""
        timeout = max(until - time.monotonic(), 0.001)
        data = self._answer(method, request.SerializeToString(), timeout, self._settings.metadata())
        try:
            read: M = answer.FromString(data)
        except DecodeError as error:
            raise CallFailed(Failure("INTERNAL", f"its answer to {method} cannot be read")) from error
        return read

    def _call(
        self, name: str, inputs: Arrays, metadata: Metadata, timeout: float, expected: Mapping[str, Output]
    ) -> Arrays:
        """Call the model `name`, and return its outputs, which have to be as expected.

        Large tensors travel in shared memory if the server is on this machine and still has it.
        """
        local = self._local
        if local is not None:
            try:
                with local.file() as file:
                    return self._exchange(name, inputs, metadata, timeout, expected, file)
            except CallFailed as failed:
                status, words = NO_MEMORY
                if failed.failure.status != status and not re.search(words, failed.failure.message):
                    raise
                self._lose(local)
        return self._exchange(name, inputs, metadata, timeout, expected)

    def _exchange(
        self,
        name: str,
        inputs: Arrays,
        metadata: Metadata,
        timeout: float,
        expected: Mapping[str, Output],
        file: TensorFile | None = None,
    ) -> Arrays:
        """Call the model `name`. While the call runs, the server is asked now and then whether it is live.

        The answer is not parsed by gRPC for Python, which would never report one that it cannot parse.
        """
        request, elsewhere = encode(name, inputs, file), dict[str, Read]()
        if file is not None:
            for key, output in expected.items():
                asked = request.outputs.add(name=key)
                if (start := file.place(asked.parameters, output.bytes)) is not None:
                    elsewhere[key] = functools.partial(file.read, start)
        data = self._answer(INFER, request.SerializeToString(), timeout, metadata, self._settings.keepalive)
        return read_answer(data, expected, elsewhere)

    def _meet(self, folder: str) -> None:
        """Use the folder in /dev/shm that the server names, if it names one, and this machine and user have it."""
        with self._lock:
            if self._closed or folder == self._folder:
                return
            before, self._local, self._folder = self._local, None, folder
            if folder and self._losses < MOST_LOST and (local := find(folder)) is not None:
                self._local = local
        if folder and self._local is None:
            log.info("tensors are sent to %s: it is on another machine, or another user's", self.url)
        if before is not None:
            before.close()

    def _lose(self, local: LocalTensors) -> None:
        """Note that a server at this address does not have the folder: it is another one than has told of it.

        Before the next call, the server is asked again what it has.
        """
        with self._lock:
            if self._local is local:
                self._local, self._folder, self._losses = None, "", self._losses + 1
        self._served = None
        local.close()

    def _answer(
        self, method: str, request: bytes, timeout: float, metadata: Metadata, keepalive: float | None = None
    ) -> bytes:
        """Make a call, and return its answer. Every `keepalive` seconds, if given, ask whether the server is live."""
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
            pending.cancel()  # if it has not ended, because of Ctrl-C, a cancelled task, or a server that is not live

    def _check_alive(self) -> None:
        """Raise CallFailed if the server does not answer at all. The running call itself will show other failures."""
        timeout = self._settings.keepalive_timeout
        try:
            self._answer("ServerLive", b"", timeout, self._settings.metadata())
        except CallFailed as error:
            if error.failure.status == "DEADLINE_EXCEEDED":
                raise CallFailed(Failure("DEADLINE_EXCEEDED", f"no sign of life for {timeout:g} s")) from error


def in_parts(call: Callable[[Arrays, int], Arrays], inputs: Inputs, max_batch: int) -> Arrays:
    """Call `call` on parts of `inputs` with at most `max_batch` samples each, and join the outputs.

    It also gets the number of a part's first sample. All arrays have the batch dimension first.
    """
    total = len(next(iter(inputs.values())))
    parts = [
        call({key: value[start : start + max_batch] for key, value in inputs.items()}, start)
        for start in range(0, total, max_batch)
    ]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if len(parts) > 1 else parts[0]


def encode(model: str, inputs: Inputs, file: TensorFile | None = None) -> pb.ModelInferRequest:
    """Make Triton's request for a model. Strings become BYTES; an array [B], one number a sample, becomes [B, 1].

    Arrays that are large go into the file, if there is one.
    """
    request = pb.ModelInferRequest(model_name=model)
    for name, value in inputs.items():
        array = value[:, None] if value.ndim == 1 else value
        tensor = request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        if array.dtype == np.object_:
            request.raw_input_contents.append(serialize_byte_tensor(array).item())
        elif file is None or not file.put(tensor.parameters, array):
            request.raw_input_contents.append(array.tobytes())
    return request


def unreadable_model(url: str, error: Exception) -> UserError:
    """The error for a server whose description of its model cannot be read. It says, if known, which side is older."""
    problem = f"the server at {url} describes its model in a way this client does not read: "
    upgrade, again = install_hint.upgrade("client"), "make the repository again with this version"
    if isinstance(error, ClientTooOld):
        return UserError(f"{problem}{error}", f"{upgrade}   or {again}")
    if not isinstance(error, ValidationError):
        return UserError(f"{problem}{shown(str(error))}", f"{upgrade}   or {again}")
    kinds = {each["type"] for each in error.errors(include_url=False)}
    problem += first_of(error)
    if "missing" in kinds:  # a field that did not exist when the server's repository was written
        return UserError(f"{problem}; the server's repository is older than this client", f"{again} of ditforge")
    return UserError(problem, f"{upgrade}   or {again}")


def first_of(error: ValidationError) -> str:
    """The first mistake that pydantic found, as text: the field, what is wrong with it, and its value."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"])) or MODEL_PARAMETER
    return shown(f"{where}: {first['msg']}, got {first['input']!a:.60}")
