"""The gRPC front: clients reach it in place of Triton, with the same protocol.

Triton itself must not be reachable. Some requests make it end, or lose a model for good, in code that runs before any
model sees them. It takes messages of any size, and lets everybody who reaches its port change its settings. Therefore
it listens on a Unix socket that only this user can open, and clients reach only the front. The front forwards a few
methods, bounds the size of messages, and forwards a request for a model only if it knows that the model accepts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
from tritonclient.grpc import model_config_pb2, service_pb2 as pb

from ditforge.contract import (
    DIT,
    ENGINES_KEY,
    KEEPS_PARAMETER,
    KEPT_KEY,
    PICTURE_KEY,
    SHARED_MEMORY_PARAMETER,
    TEXT_ENCODERS,
    TEXT_ENCODERS_CLIP,
    TEXT_OUTPUTS,
    VAE_DECODER,
    VAE_ENCODER,
)
from ditforge.triton_repo import wire
from ditforge.triton_repo.capacity import Capacity, arrived, started
from ditforge.triton_repo.kept import KeptInputs
from ditforge.triton_repo.lent import LentTensors
from ditforge.triton_repo.limits import BadRequest, shown
from ditforge.triton_repo.local_tensors import LocalTensors
from ditforge.triton_repo.metrics import Metrics
from ditforge.triton_repo.pictures import Pictures
from ditforge.triton_repo.refusal import Refused, Status, of_triton, refuse
from ditforge.triton_repo.served import ModelSignature, message_limit

SERVICE, HEALTH = "/inference.GRPCInferenceService/", "/grpc.health.v1.Health/Check"
INFER = f"{SERVICE}ModelInfer"
DESCRIBING = {
    "ServerMetadata": pb.ServerMetadataRequest,
    "ModelMetadata": pb.ModelMetadataRequest,
    "ModelConfig": pb.ModelConfigRequest,
    "ModelStatistics": pb.ModelStatisticsRequest,
    "ModelReady": pb.ModelReadyRequest,
}  # the methods that are forwarded, and their messages
LIVE, READY = f"{SERVICE}ServerLive", f"{SERVICE}ServerReady"
PROBES = {LIVE, READY, HEALTH}  # answered without reading a message, and even under full load
SIZED = {DIT, VAE_DECODER, VAE_ENCODER, TEXT_ENCODERS, TEXT_ENCODERS_CLIP}  # inputs' shapes give those of the outputs
OPEN = {*PROBES, f"{SERVICE}ModelReady"}  # which need no token
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"  # grpc.health.v1.HealthCheckResponse: field 1 is the status
LONGEST_QUESTION = 4096  # bytes of a message that asks about the server or a model
STUB = re.compile(r"Stub process '(.+?)_\d+_\d+'")  # Triton's name of a model's process, as it complains of one
log = logging.getLogger(__name__)


@dataclass
class Front(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers clients, either by itself or with the answer of Triton. `channel` leads to Triton while that is ready.

    models: what each model accepts.
    engines: the digest of the engines; empty if it is not known.
    token: the token that clients have to send; None if they need none.
    forgone: the folder with the names of requests for which nobody waits any more.
    kept: what is kept of pictures' inputs for their later steps.
    lent: the memory in which large tensors go to Triton and come back.
    local: the files in which tensors of clients on this machine come and go.
    doubted: gets the name of a model when Triton complains about the model's process.
    """

    models: dict[str, ModelSignature]
    engines: str
    token: bytes | None
    metrics: Metrics
    forgone: Path
    kept: KeptInputs = field(default_factory=KeptInputs)
    lent: LentTensors = field(default_factory=LentTensors)
    local: LocalTensors = field(default_factory=LocalTensors)
    channel: grpc.aio.Channel | None = None
    stopping: bool = False
    pictures: Pictures = field(default_factory=Pictures)
    doubted: asyncio.Queue[str] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.largest = message_limit(self.models)
        self.capacity = Capacity(self.largest)
        taken = self.models[DIT].limits.inputs if DIT in self.models else {}
        self.keeps = tuple(name for name in TEXT_OUTPUTS if name in taken)
        offers = {KEEPS_PARAMETER: " ".join(self.keeps), SHARED_MEMORY_PARAMETER: self.local.name}
        parameters = {key: model_config_pb2.ModelParameter(string_value=value) for key, value in offers.items()}
        config = model_config_pb2.ModelConfig(parameters=parameters)
        # Protobuf joins messages that follow each other, and so adds these parameters to Triton's answer.
        self.offers = wire.serialised(pb.ModelConfigResponse(config=config))

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Return the handler of a method, which takes and returns bytes. It reads a message once there is room."""
        metadata = dict(call.invocation_metadata or ())
        if not self.may_call(call.method, metadata):
            return grpc.stream_stream_rpc_method_handler(without_token)
        return grpc.stream_stream_rpc_method_handler(partial(self.answer, call.method, metadata))

    async def answer(
        self, method: str, metadata: dict[str, Any], messages: object, context: grpc.aio.ServicerContext
    ) -> None:
        """Answer a call, or end it with a status in words. A call lasts until its client has taken the answer."""
        try:
            if method in PROBES:
                await context.write(await self.probe(method))
                return
            with self.capacity.call():
                if method == INFER:
                    answer = await self.infer(metadata, context)
                else:
                    answer = await self.tell(method, await arrived(context))
                with self.capacity.holding(len(answer)):
                    await context.write(answer)
                return
        except grpc.aio.InternalError:  # what reads and writes say where the client has gone, sooner than done() does
            raise asyncio.CancelledError from None
        except Refused as refused:
            status, message = refused.status, refused.message
        except BadRequest as error:
            status, message = Status.INVALID_ARGUMENT, str(error)
        except grpc.aio.AioRpcError as error:
            status, message = of_triton(error)
        except Exception:
            if context.done():  # likewise
                raise asyncio.CancelledError from None
            log.exception("the front failed in %s", method)
            status, message = Status.INTERNAL, "the server failed; its log says why"
        await refuse(context, status, message)

    def may_call(self, method: str, metadata: dict[str, Any]) -> bool:
        """Return whether the caller has the token, or only asks whether the server lives."""
        if self.token is None or method in OPEN:
            return True
        sent = metadata.get("authorization", "")
        sent = sent.encode() if isinstance(sent, str) else sent
        return hmac.compare_digest(sent, b"Bearer " + self.token)

    async def probe(self, method: str) -> bytes:
        """Answer whether the server lives, or is ready."""
        if method == LIVE:
            return wire.serialised(pb.ServerLiveResponse(live=True))
        ready = await self.is_ready(READY, b"")
        if method == HEALTH:
            return SERVING if ready else NOT_SERVING
        return wire.serialised(pb.ServerReadyResponse(ready=ready))

    async def tell(self, method: str, data: bytes) -> bytes:
        """Answer a question about the server or a model. Raises Refused for methods that are not for clients."""
        name = method.removeprefix(SERVICE)
        if len(data) > LONGEST_QUESTION and (name in DESCRIBING or name == "RepositoryIndex"):
            raise BadRequest(f"a question has at most {LONGEST_QUESTION} bytes, got {len(data)}")
        if name in DESCRIBING:  # Triton reads nothing that is no message, and no names that are no model's
            question = wire.parse(data, DESCRIBING[name])
            asked = getattr(question, "name", "")
            if (asked and asked not in self.models) or getattr(question, "version", "") not in wire.VERSIONS:
                if name == "ModelReady":
                    return wire.serialised(pb.ModelReadyResponse(ready=False))
                raise Refused(Status.NOT_FOUND, f"there is no model {shown(asked)}; there are {', '.join(self.models)}")
            data = question.SerializeToString()
            if name == "ModelConfig" and asked == DIT:
                self.local.sweep()
                return await self.forward(method, data, timeout=10) + self.offers
        if name == "ModelReady":
            return wire.serialised(pb.ModelReadyResponse(ready=await self.is_ready(method, data)))
        if name == "RepositoryIndex":
            state = "UNAVAILABLE" if self.channel is None else "READY"
            listed = [pb.RepositoryIndexResponse.ModelIndex(name=m, version="1", state=state) for m in self.models]
            return wire.serialised(pb.RepositoryIndexResponse(models=listed))
        if name in DESCRIBING:
            return await self.forward(method, data, timeout=10)
        if name in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name:
            raise Refused(Status.PERMISSION_DENIED, f"{name} is not open to clients of this server")
        raise Refused(Status.UNIMPLEMENTED, "this server has no such method")

    async def is_ready(self, method: str, data: bytes) -> bool:
        """Whether Triton, or a model, is ready, as Triton answers it. False while no new pictures can be begun."""
        if self.stopping or self.channel is None:
            return False
        try:
            answer = await self.forward(method, data, timeout=5)
        except grpc.aio.AioRpcError as error:
            if error.code() in (Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.CANCELLED):
                return False
            raise
        return bool(pb.ServerReadyResponse.FromString(answer).ready)  # field 1, as in ModelReadyResponse

    async def forward(self, method: str, data: bytes, timeout: float | None) -> bytes:
        """Return Triton's answer, which may take `timeout` seconds. Raises Refused while there is no Triton."""
        if self.channel is None:
            raise Refused(Status.UNAVAILABLE, "the models are starting; ask again")
        call: Callable[..., Awaitable[bytes]] = self.channel.unary_unary(method)
        return await call(data, timeout=timeout)

    async def infer(self, metadata: dict[str, Any], context: grpc.aio.ServicerContext) -> bytes:
        """Return a model's outputs for a request that the model accepts."""
        request, raw = wire.parse_infer(await self.capacity.receive(context))
        name, picture = request.model_name, metadata.get(PICTURE_KEY)
        if name not in self.models:
            raise Refused(Status.NOT_FOUND, f"there is no model {shown(name)}; there are {', '.join(self.models)}")
        begun, outcome = time.monotonic(), Status.INTERNAL
        try:
            place = (picture or "", metadata.get(KEPT_KEY, "")) if name == DIT and KEPT_KEY in metadata else None
            with contextlib.ExitStack() as held:
                places = self.local.take(request, raw, self.largest, partial(self.lent.part, held))
                filled = self.kept.find(request, place, self.keeps) if place else None
                if filled:
                    held.callback(self.kept.release, filled)
                    self.kept.fill(request, raw, filled)
                wire.check(request, raw, self.models[name], self.keeps if filled else ())
                self.admit(picture, metadata.get(ENGINES_KEY))
                if filled:
                    self.kept.refer(request, raw, filled)
                elif place and self.channel is not None:  # else it is refused, and would take room all the same
                    self.kept.keep(request, raw, place, self.keeps)
                if name == VAE_DECODER:
                    self.kept.forget(picture)
                held.enter_context(self.capacity.holding(sum(map(len, raw))))
                with self.pictures.request(picture, name == VAE_DECODER):
                    response, raw = await self.run_model(request, raw, context.time_remaining(), held)
                if self.models[name].spoils and wire.is_spoilt(response, raw):
                    raise Refused(outcome, f"the engines of {name} failed; the server's log says why")
                self.local.give(response, raw, places)
                answer = wire.message(response, raw, wire.RAW_OUTPUT)
            outcome = Status.OK
            return answer
        except Refused as refused:
            outcome = refused.status
            raise
        except BadRequest as error:
            outcome = Status.INVALID_ARGUMENT
            raise BadRequest(f"{name}: {error}") from None
        except grpc.aio.AioRpcError as error:
            # Triton's words can have a stranger's in them: only the name of a model that there is counts.
            if (stub := STUB.search(error.details() or "")) and stub[1] in self.models:
                self.doubted.put_nowait(stub[1])
            outcome = of_triton(error)[0]
            raise
        except asyncio.CancelledError:
            if not context.cancelled():  # Triton has gone, and the channel to it was closed
                outcome = Status.UNAVAILABLE
                raise Refused(outcome, "the models are starting again; repeat the request") from None
            outcome = Status.CANCELLED
            raise
        finally:
            self.metrics.answered(name, outcome.name, time.monotonic() - begun)

    async def run_model(
        self,
        request: pb.ModelInferRequest,
        raw: list[wire.Raw],
        left: float | None,
        held: contextlib.ExitStack,
    ) -> tuple[pb.ModelInferResponse, list[wire.Raw]]:
        """Return Triton's answer to the request with the raw contents `raw`, which are released early.

        The answer's raw contents are valid until `held` is closed.

        `left` is the number of seconds until the deadline. Raises Refused when it has passed. `held` counts the bytes
        of the contents, and is closed only when Triton is done with them.

        A request that Triton itself sees cancelled or past its deadline can end Triton with SIGSEGV (2.51 does; see
        https://github.com/triton-inference-server/server/issues/8034). Triton therefore sees neither. The front stops
        waiting, leaves a note with the request's name so that the models do not execute it, and lets Triton finish with
        it.
        """
        asked, name = request.id, uuid4().hex
        request.id = name
        if left is not None:
            request.parameters["timeout"].int64_param = max(int(left * 1e6), 1)
        if request.model_name in SIZED:
            self.lend(request, raw, held)
        message = wire.message(request, raw)
        raw.clear()  # what came from the wire need not stay until the answer
        running = started(self.forward(INFER, message, timeout=None))
        try:
            answer = await asyncio.wait_for(asyncio.shield(running), left)
        except asyncio.TimeoutError:
            self.forgo(name, running, held.pop_all())
            raise Refused(Status.DEADLINE_EXCEEDED, "the deadline passed before the model had answered") from None
        except asyncio.CancelledError:
            if not running.done():
                self.forgo(name, running, held.pop_all())
            raise
        except grpc.aio.AioRpcError:
            self.lent.forget(request)
            raise
        response, contents = wire.parse_answer(answer)
        response.id = asked
        if request.model_name in SIZED:
            self.lent.complete(request, response, contents)
        return response, contents

    def lend(self, request: pb.ModelInferRequest, raw: list[wire.Raw], held: contextlib.ExitStack) -> None:
        """Have large tensors go to Triton and come back in shared memory, as far as there is room."""
        self.lent.lend_inputs(request, raw, held)
        if not request.outputs:
            asked = pb.ModelInferRequest.InferRequestedOutputTensor
            request.outputs.extend(asked(name=name) for name in self.models[request.model_name].outputs)
        self.lent.lend_outputs(request, held)

    def forgo(self, name: str, running: asyncio.Future[bytes], held: contextlib.ExitStack) -> None:
        """Note for the models, until Triton is done with this request, that nobody waits for it any more."""
        word = self.forgone / name

        def done(ended: asyncio.Future[bytes]) -> None:
            held.close()
            word.unlink(missing_ok=True)

        with contextlib.suppress(OSError):
            word.touch()
        running.add_done_callback(done)

    def admit(self, picture: str | None, engines: str | None) -> None:
        """Raise Refused if the picture was begun with other engines, or would be begun while the server stops."""
        if engines and self.engines and engines != self.engines:
            raise Refused(
                Status.FAILED_PRECONDITION,
                f"this server has the engines {self.engines[:12]}, not {shown(engines[:12])} with which the picture"
                " was begun: all servers at one address have to serve the same repository",
            )
        if self.stopping and not self.pictures.knows(picture):
            raise Refused(Status.UNAVAILABLE, "this server is stopping and begins no more pictures")

    async def drain(self, grace: float) -> int:
        """Begin no more pictures, and wait up to `grace` seconds for unfinished ones. Returns how many remain."""
        self.stopping = True
        deadline = time.monotonic() + grace
        while (active := self.pictures.active()) and time.monotonic() < deadline and self.channel is not None:
            await asyncio.sleep(0.05)
        return active


async def without_token(messages: object, context: grpc.aio.ServicerContext) -> None:
    """Refuse a caller who has not sent the token, without waiting for the message."""
    await refuse(context, Status.UNAUTHENTICATED, "this server wants a token: authorization: Bearer TOKEN")
