"""A gRPC server before a real one: it notes what clients send, and answers some calls in its own way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb, service_pb2_grpc

Refusal = tuple[grpc.StatusCode, str]


@dataclass(frozen=True)
class Call:
    """A call of a model as it arrived: its metadata, and how many seconds its client gives it."""

    model: str
    headers: dict[str, str]
    timeout: float


@dataclass
class Front(service_pb2_grpc.GRPCInferenceServiceServicer):
    """`refuse(CALL)` says with what to refuse the call of a model, None: it is passed on; `change` the answer then."""

    stub: service_pb2_grpc.GRPCInferenceServiceStub
    url: str = ""
    calls: list[Call] = field(default_factory=list)
    asked: list[dict[str, str]] = field(default_factory=list)  # the metadata of calls of everything else
    refuse: Callable[[Call], Refusal | None] = lambda call: None
    change: Callable[[Call, pb.ModelInferResponse], None] = lambda call, answer: None

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        call = Call(request.model_name, dict(context.invocation_metadata()), context.time_remaining())
        self.calls.append(call)
        if refusal := self.refuse(call):
            context.abort(*refusal)
        answer = self.stub.ModelInfer(request)
        self.change(call, answer)
        return answer

    def RepositoryIndex(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.asked.append(dict(context.invocation_metadata()))
        return self.stub.RepositoryIndex(request)

    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self.stub.ModelReady(request)

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self.stub.ModelConfig(request)

    def ServerLive(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self.stub.ServerLive(request)


@contextmanager
def front(url: str) -> Iterator[Front]:
    """A Front before the server at `url`, on a free port."""
    server = grpc.server(ThreadPoolExecutor(8))
    with grpc.insecure_channel(url) as channel:
        passes = Front(service_pb2_grpc.GRPCInferenceServiceStub(channel))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(passes, server)
        passes.url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield passes
        finally:
            server.stop(None).wait(30)
