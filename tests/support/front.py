"""A gRPC server before a real one: it notes what clients send, and answers some calls in its own way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb, service_pb2_grpc

METHODS = ("ModelInfer", "RepositoryIndex", "ModelReady", "ModelConfig", "ServerLive")
Refusal = tuple[grpc.StatusCode, str]


@dataclass(frozen=True)
class Call:
    """A call of a model as it arrived: its metadata, and how many seconds its client gives it.

    `peer` is the client's end of the connection; `active` says whether the client still waits.
    """

    model: str
    headers: dict[str, str]
    timeout: float
    peer: str
    active: Callable[[], bool]


@dataclass
class Front:
    """`refuse(CALL)` says with what to refuse the call of a model, None: it is passed on; `change` the answer then, or
    returns the bytes to send instead. `configure` changes what it says of a model, and `ready` whether one is ready.
    """

    stub: service_pb2_grpc.GRPCInferenceServiceStub
    url: str = ""
    calls: list[Call] = field(default_factory=list)
    asked: list[dict[str, str]] = field(default_factory=list)  # the metadata of calls of everything else
    refuse: Callable[[Call], Refusal | None] = lambda call: None
    change: Callable[[Call, pb.ModelInferResponse], bytes | None] = lambda call, answer: None
    configure: Callable[[Any], None] = lambda config: None
    ready: Callable[[], bool] = lambda: True

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        headers, timeout = dict(context.invocation_metadata()), context.time_remaining()
        call = Call(request.model_name, headers, timeout, context.peer(), context.is_active)
        self.calls.append(call)
        if refusal := self.refuse(call):
            context.abort(*refusal)
        passed = [(key, value) for key, value in headers.items() if key.startswith("ditforge-")]
        answer = self.stub.ModelInfer(request, metadata=passed)
        return self.change(call, answer) or answer

    def RepositoryIndex(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.asked.append(dict(context.invocation_metadata()))
        return self.stub.RepositoryIndex(request)

    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self.stub.ModelReady(request) if self.ready() else pb.ModelReadyResponse(ready=False)

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:
        answer = self.stub.ModelConfig(request)
        self.configure(answer.config)
        return answer

    def ServerLive(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self.stub.ServerLive(request)


@contextmanager
def front(url: str) -> Iterator[Front]:
    """A Front before the server at `url`, on a free port."""
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.max_send_message_length", -1)])
    with grpc.insecure_channel(url) as channel:
        passes = Front(service_pb2_grpc.GRPCInferenceServiceStub(channel))
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                getattr(passes, name),
                request_deserializer=getattr(pb, f"{name}Request").FromString,
                response_serializer=lambda answer: answer if isinstance(answer, bytes) else answer.SerializeToString(),
            )
            for name in METHODS
        }
        generic = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)
        server.add_generic_rpc_handlers((generic,))
        passes.url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield passes
        finally:
            server.stop(None).wait(30)
