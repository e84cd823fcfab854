"""Serves the metrics of a server in Prometheus' format: first those of ditforge, then Triton's own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse

# The time of each series' beginning is left out: nobody asks for it.
disable_created_metrics()  # type: ignore[no-untyped-call]
LISTENER, ENGINES = "gRPC port", "engines"  # in the counter of restarts
MOST_CONNECTIONS = 32
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The counters of a server. Only the names in `models` become labels, so that strangers cannot make new ones."""

    def __init__(self, models: Iterable[str]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ditforge_requests", "Requests for a model, by gRPC status.", ["model", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "ditforge_request_seconds",
            "From a request to its answer.",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.restarts = Counter(
            "ditforge_restarts",
            "Starts of Triton, of the engine process, or of the gRPC port, after a death.",
            ["process"],
            registry=self.registry,
        )
        self.ready = Gauge("ditforge_ready", "1 while pictures can be made.", registry=self.registry)
        self.active = Gauge("ditforge_pictures_active", "Unfinished pictures.", registry=self.registry)
        for model in models:
            self.requests.labels(model, "OK")
            self.restarts.labels(model)
        for process in ("tritonserver", ENGINES, LISTENER):
            self.restarts.labels(process)

    def answered(self, model: str, status: str, seconds: float) -> None:
        """Count a request to a model that was answered with this gRPC status after so many seconds."""
        self.requests.labels(model, status).inc()
        self.seconds.labels(model).observe(seconds)

    def serve(self, host: str, port: int, triton: Path, active: Callable[[], int]) -> int:
        """Serve the metrics over HTTP, in a thread. Returns the port, which is a free one if `port` is 0.

        `triton` is the Unix socket of Triton's own metrics, and `active` returns the number of unfinished pictures.
        Raises OSError if the port cannot be used.
        """
        self.active.set_function(active)

        def answer(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
            if environ["PATH_INFO"] not in ("/metrics", "/"):
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [b"metrics are at /metrics\n"]
            start_response("200 OK", [("Content-Type", CONTENT_TYPE)])
            return [generate_latest(self.registry), tritons_metrics(triton)]

        server = make_server(host, port, answer, BoundedServer, Quiet)
        number = server.server_port

        def run() -> None:
            with server:  # if it fails, the port is closed, and does not let those who ask wait
                server.serve_forever()

        threading.Thread(target=run, daemon=True, name="metrics").start()
        return number


class BoundedServer(ThreadingMixIn, WSGIServer):
    """An HTTP server with a thread for each connection.

    If there are more than MOST_CONNECTIONS, the oldest one is closed, so that slow senders cannot keep others out.
    """

    daemon_threads = True  # which do not keep the process alive
    request_queue_size = 128  # connections that wait to be accepted

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.connections: list[socket.socket] = []
        self.lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a request in a thread of its own."""
        with self.lock:
            self.connections.append(request)
            oldest = self.connections.pop(0) if len(self.connections) > MOST_CONNECTIONS else None
        if oldest is not None:
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # its thread then closes it
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self.lock, suppress(ValueError):
            self.connections.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do nothing: a connection that ends early is no news, and a stranger could fill the log with it."""


class Quiet(WSGIRequestHandler):
    """Handles requests for metrics without a log, and ends them if the other side is silent for too long."""

    timeout = 10

    def log_message(self, format: str, *args: object) -> None:
        """Do nothing."""


def tritons_metrics(path: Path) -> bytes:
    """Read Triton's own metrics from its Unix socket. They are empty as long as nobody listens there."""
    try:
        with closing(UnixConnection(path)) as connection:
            connection.request("GET", "/metrics")
            return connection.getresponse().read()
    except (OSError, HTTPException):
        return b""


class UnixConnection(HTTPConnection):
    """An HTTP connection over the Unix socket `path`."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=5)
        self.path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(5)
        self.sock.connect(str(self.path))
