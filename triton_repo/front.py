"""The gRPC front: what clients reach in Triton's place, in the same protocol.

Triton ends, or loses a model for good, on requests that its own code reads before any model sees them, it takes
messages of any size, and it lets whoever reaches its port change its settings. So it listens on a Unix socket that
only this user can open, and what comes from elsewhere comes through here: a few methods are forwarded, messages are
bounded, and a request for a model is forwarded once it is known to be one that the model takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
from tritonclient.grpc import service_pb2 as pb

from ditforge.triton_repo import wire
from ditforge.triton_repo.limits import BadRequest, Limits, shown
from ditforge.triton_repo.metrics import Metrics
from ditforge.triton_repo.pictures import Pictures

SERVICE, HEALTH = "/inference.GRPCInferenceService/", "/grpc.health.v1.Health/Check"
INFER = f"{SERVICE}ModelInfer"
DESCRIBING = {
    "ServerMetadata": pb.ServerMetadataRequest,
    "ModelMetadata": pb.ModelMetadataRequest,
    "ModelConfig": pb.ModelConfigRequest,
    "ModelStatistics": pb.ModelStatisticsRequest,
    "ModelReady": pb.ModelReadyRequest,
}  # the methods that are forwarded, and their messages
PROBES = {f"{SERVICE}ServerLive", f"{SERVICE}ServerReady", f"{SERVICE}ModelReady", HEALTH}  # which need no token
PICTURE_KEY, ENGINES_KEY = "ditforge-picture", "ditforge-engines"  # in a request's metadata
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"  # grpc.health.v1.HealthCheckResponse: field 1 is the status
MOST_AT_ONCE = 512  # requests that are read and answered; one more is refused
MOST_OF_ONE = 128  # of them over one connection
PING_INTERVAL = 5_000  # ms: clients may ask as often whether the connection lives
LONGEST_MESSAGE = 1000  # characters of an error; gRPC loses those that are too long
LONGEST_QUESTION = 4096  # bytes of a message that asks about the server or a model
WINDOW = 4 << 20  # bytes that a client may send ahead of what is read
PATH = re.compile(r"(?<![\w.])/(?:[^\s/:'\",;()]+/)+[^\s:'\",;()]*")
Status = grpc.StatusCode
log = logging.getLogger(__name__)


class Refused(Exception):
    """A request is not answered but by a status."""

    def __init__(self, status: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass
class Front(grpc.GenericRpcHandler):
    """Answers clients: itself, or by Triton where `channel` leads to one that is ready.

    `models` has what each model takes; `engines` is the digest of the engines, empty where nobody knows it; `token`
    is what clients have to send, if anything; `forgone` is the folder of words about requests that nobody waits for;
    the models in `spoiling` give outputs that are not numbers where they fail.
    """

    models: dict[str, Limits]
    engines: str
    token: bytes | None
    metrics: Metrics
    forgone: Path
    spoiling: frozenset[str] = frozenset()
    channel: grpc.aio.Channel | None = None
    stopping: bool = False
    pictures: Pictures = field(default_factory=Pictures)

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """The handler of a method: bytes in, bytes out."""
        metadata = dict(call.invocation_metadata or ())
        if not self.may_call(call.method, metadata):
            return grpc.stream_unary_rpc_method_handler(refuse)  # which does not wait for the message
        return grpc.unary_unary_rpc_method_handler(partial(self.answer, call.method, metadata))

    async def answer(
        self, method: str, metadata: dict[str, Any], data: bytes, context: grpc.aio.ServicerContext
    ) -> bytes:
        """The answer to a call, or a status in words."""
        try:
            if method == INFER:
                return await self.infer(data, metadata, context)
            return await self.tell(method, data)
        except Refused as refused:
            status, message = refused.status, refused.message
        except BadRequest as error:
            status, message = Status.INVALID_ARGUMENT, str(error)
        except grpc.aio.AioRpcError as error:
            status, message = self.of_triton(error)
        except Exception:
            log.exception("the front failed in %s", method)
            status, message = Status.INTERNAL, "the server failed; its log says why"
        if context.done():  # nobody hears it
            raise asyncio.CancelledError
        await context.abort(status, message[:LONGEST_MESSAGE])
        raise AssertionError("abort() raises")

    def may_call(self, method: str, metadata: dict[str, Any]) -> bool:
        """Whether the caller has the token, or asks for no more than whether the server lives."""
        if self.token is None or method in PROBES:
            return True
        sent = metadata.get("authorization", "")
        sent = sent.encode() if isinstance(sent, str) else sent
        return hmac.compare_digest(sent, b"Bearer " + self.token)

    async def tell(self, method: str, data: bytes) -> bytes:
        """What is asked about the server or a model. Raises Refused for methods that clients have no business in."""
        name = method.removeprefix(SERVICE)
        if name == "ServerLive":
            return pb.ServerLiveResponse(live=True).SerializeToString()
        if len(data) > LONGEST_QUESTION and (name in DESCRIBING or name == "RepositoryIndex"):
            raise BadRequest(f"a question has at most {LONGEST_QUESTION} bytes, got {len(data)}")
        if name in DESCRIBING:  # Triton reads nothing that is no message
            data = wire.parse(data, DESCRIBING[name]).SerializeToString()
        if name in ("ServerReady", "ModelReady") or method == HEALTH:
            ready = await self.is_ready(method, data)
            if method == HEALTH:
                return SERVING if ready else NOT_SERVING
            return pb.ServerReadyResponse(ready=ready).SerializeToString()  # field 1, as in ModelReadyResponse
        if name == "RepositoryIndex":
            state = "UNAVAILABLE" if self.channel is None else "READY"
            listed = [pb.RepositoryIndexResponse.ModelIndex(name=m, version="1", state=state) for m in self.models]
            return pb.RepositoryIndexResponse(models=listed).SerializeToString()
        if name in DESCRIBING:
            return await self.forward(method, data, timeout=10)
        if name in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name:
            raise Refused(Status.PERMISSION_DENIED, f"{name} is not open to clients of this server")
        raise Refused(Status.UNIMPLEMENTED, "this server has no such method")

    async def is_ready(self, method: str, data: bytes) -> bool:
        """Whether new pictures can be made; in ModelReady, whether that model can be asked."""
        if self.stopping or self.channel is None:
            return False
        asked = method if method == f"{SERVICE}ModelReady" else f"{SERVICE}ServerReady"
        try:
            answer = await self.forward(asked, data if asked == f"{SERVICE}ModelReady" else b"", timeout=5)
        except grpc.aio.AioRpcError as error:
            if error.code() in (Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.CANCELLED):
                return False
            raise
        return bool(pb.ServerReadyResponse.FromString(answer).ready)

    async def forward(self, method: str, data: bytes, timeout: float | None) -> bytes:
        """Triton's answer. Raises Refused while there is no Triton."""
        if self.channel is None:
            raise Refused(Status.UNAVAILABLE, "the models are starting; ask again")
        call: Callable[..., Awaitable[bytes]] = self.channel.unary_unary(method)
        return await call(data, timeout=timeout)

    async def infer(self, data: bytes, metadata: dict[str, Any], context: grpc.aio.ServicerContext) -> bytes:
        """A model's outputs for a request that the model takes."""
        request = wire.parse(data, pb.ModelInferRequest)
        name, picture = request.model_name, metadata.get(PICTURE_KEY)
        if name not in self.models:
            raise Refused(Status.NOT_FOUND, f"there is no model {shown(name)}; there are {', '.join(self.models)}")
        begun, outcome = time.monotonic(), Status.INTERNAL
        try:
            wire.check(request, self.models[name])
            self.admit(picture, metadata.get(ENGINES_KEY))
            with self.pictures.request(picture):
                answer = await self.run_model(request, data, context.time_remaining())
            if name in self.spoiling and wire.is_spoilt(answer):
                raise Refused(outcome, f"the engines of {name} failed; the server's log says why")
            outcome = Status.OK
            return answer
        except Refused as refused:
            outcome = refused.status
            raise
        except BadRequest as error:
            outcome = Status.INVALID_ARGUMENT
            raise BadRequest(f"{name}: {error}") from None
        except grpc.aio.AioRpcError as error:
            outcome = self.of_triton(error)[0]
            raise
        except asyncio.CancelledError:
            if not context.cancelled():  # Triton has gone, and the channel to it was closed
                outcome = Status.UNAVAILABLE
                raise Refused(outcome, "the models are starting again; repeat the request") from None
            outcome = Status.CANCELLED
            raise
        finally:
            self.metrics.answered(name, outcome.name, time.monotonic() - begun)

    async def run_model(self, request: pb.ModelInferRequest, data: bytes, left: float | None) -> bytes:
        """Triton's answer to the request, whose message is `data`. Raises Refused after `left` seconds.

        A request that Triton itself sees cancelled, or run out of time, can end Triton with SIGSEGV (2.51 does; see
        https://github.com/triton-inference-server/server/issues/8034). So it sees neither: the front waits no longer,
        leaves a word with the request's name for the models, which do not execute it, and lets Triton finish with it.
        """
        name = uuid4().hex
        # Protobuf joins messages that follow each other; the last one of two names counts.
        added = pb.ModelInferRequest(id=name)
        if left is not None:
            added.parameters["timeout"].int64_param = max(int(left * 1e6), 1)
        running = asyncio.ensure_future(self.forward(INFER, data + added.SerializeToString(), timeout=None))
        running.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody may be left to ask
        try:
            answer = await asyncio.wait_for(asyncio.shield(running), left)
        except asyncio.TimeoutError:
            self.forgo(name, running)
            raise Refused(Status.DEADLINE_EXCEEDED, "the deadline passed before the model had answered") from None
        except asyncio.CancelledError:
            if not running.done():
                self.forgo(name, running)
            raise
        return answer + pb.ModelInferResponse(id=request.id).SerializeToString()

    def forgo(self, name: str, running: asyncio.Future[bytes]) -> None:
        """Nobody waits for the request of this name any more: tell the models, until Triton is done with it."""
        word = self.forgone / name

        def done(ended: asyncio.Future[bytes]) -> None:
            word.unlink(missing_ok=True)

        with contextlib.suppress(OSError):
            word.touch()
        running.add_done_callback(done)

    def admit(self, picture: str | None, engines: str | None) -> None:
        """Raise Refused where the picture was begun with other engines, or would be begun while the server stops."""
        if engines and self.engines and engines != self.engines:
            raise Refused(
                Status.FAILED_PRECONDITION,
                f"this server has the engines {self.engines[:12]}, not {shown(engines[:12])} with which the picture"
                " was begun: all servers at one address have to serve the same repository",
            )
        if self.stopping and not self.pictures.knows(picture):
            raise Refused(Status.UNAVAILABLE, "this server is stopping and begins no more pictures")

    def of_triton(self, error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str]:
        """Triton's status, and its reason in one line that says nothing of the server's files."""
        status, details = error.code(), (error.details() or "").strip()
        line = details.splitlines()[0] if details else "no reason given"
        if status is Status.UNAVAILABLE and "maximum queue size" in line:
            return Status.RESOURCE_EXHAUSTED, "too many requests wait for this model; ask again later"
        if "Request timeout expired" in line:
            return Status.DEADLINE_EXCEEDED, "the request waited for as long as its deadline allows"
        if "shared memory pool" in line:
            return Status.INTERNAL, "the server's /dev/shm is too small for this request: docker run --shm-size"
        gone = "is not healthy" in line or "no available versions" in line or "Stub process" in line
        if gone or status is Status.UNAVAILABLE:
            return Status.UNAVAILABLE, "the models are starting again; repeat the request"
        return status, PATH.sub("…", line).replace(socket.gethostname(), "…")

    async def drain(self, grace: float) -> int:
        """Begin no more pictures, wait up to `grace` seconds for those in the middle; returns how many remain."""
        self.stopping = True
        deadline = time.monotonic() + grace
        while (active := self.pictures.active()) and time.monotonic() < deadline and self.channel is not None:
            await asyncio.sleep(0.05)
        return active


async def refuse(request_iterator: object, context: grpc.aio.ServicerContext) -> None:
    """The answer to callers without the token."""
    await context.abort(Status.UNAUTHENTICATED, "this server wants a token: authorization: Bearer TOKEN")


def make_server(front: Front, limit: int) -> grpc.aio.Server:
    """A gRPC server that refuses messages of more than `limit` bytes before it has read them."""
    options = [
        ("grpc.so_reuseport", 0),  # else two servers could share a port, and each get half of the requests
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_INTERVAL),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_connection_idle_ms", 600_000),
        ("grpc.max_concurrent_streams", MOST_OF_ONE),
        ("grpc.http2.bdp_probe", 0),  # which lets the window of a connection grow without bound
        ("grpc.http2.lookahead_bytes", WINDOW),
    ]
    return grpc.aio.server(handlers=[front], options=options, maximum_concurrent_rpcs=MOST_AT_ONCE)
