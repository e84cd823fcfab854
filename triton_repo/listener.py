"""The gRPC port. It is opened with TLS if there is a certificate, and opened again if gRPC itself fails."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable

import grpc

from ditforge.credentials import read_file, read_token
from ditforge.errors import UserError
from ditforge.option import option
from ditforge.triton_repo.front import Front
from ditforge.triton_repo.metrics import LISTENER
from ditforge.triton_repo.serve_options import FILES, TOKEN, ServeOptions
from ditforge.triton_repo.served import message_limit

Report = Callable[..., None]  # takes the name of an event, and its details
AGAIN = 1.0  # seconds between two openings
PING_INTERVAL = 5_000  # ms; clients may ping the connection this often
MOST_CONNECTIONS = 20_000  # each takes some 17 kB
LEAST_CONNECTIONS = 16
RESERVED = 128  # file descriptors that are kept for other things than connections
MOST_OF_ONE = 128  # requests over one connection; gRPC lets clients wait with one more
WINDOW = 256 << 10  # bytes of a message that a client may send before it is read


class Listener:
    """The gRPC port of a front."""

    def __init__(self, front: Front, options: ServeOptions) -> None:
        self.front = front
        self.options = options
        self.port = options.port
        self.server = make_server(front)

    async def start(self) -> int:
        """Open the port; returns its number. Raises UserError where it is not to be had."""
        self.port = listen(self.server, self.options, self.port)
        await self.server.start()
        return self.port

    async def keep(self, report: Report) -> None:
        """Open the port again whenever gRPC's own code fails, which would end a server of grpc.aio for good.

        In some versions of gRPC, any stranger can cause that: in 1.84 and 1.85, with a path that is not UTF-8.
        """
        while True:
            try:
                await asyncio.shield(self.server.wait_for_termination())  # which, cancelled, keeps stop() from ending
                return
            except Exception as error:
                self.front.metrics.restarts.labels(LISTENER).inc()
                told = f"the gRPC port failed ({type(error).__name__} in gRPC {grpc.__version__}) and is opened again"
                report("died", message=f"{told}; where that goes on, install another version of grpcio")
            await self.server.stop(grace=0)
            await asyncio.sleep(AGAIN)
            self.server = make_server(self.front)
            await self.start()

    async def stop(self) -> None:
        """Close the port, and end the requests that are left."""
        await self.server.stop(grace=0)


def listen(server: grpc.aio.Server, options: ServeOptions, port: int) -> int:
    """Take the port, with TLS where there is a certificate; returns its number. Raises UserError where it cannot."""
    address = f"{options.host}:{port}"
    try:
        if options.tls_cert is None or options.tls_key is None:
            taken = server.add_insecure_port(address)
        else:
            clients = options.tls_client_ca and read_file("the TLS ca", options.tls_client_ca, FILES.ca)
            key = read_file("the TLS key", options.tls_key, FILES.key)
            pair = (key, read_file("the TLS certificate", options.tls_cert, FILES.certificate))
            credentials = grpc.ssl_server_credentials([pair], clients, require_client_auth=clients is not None)
            taken = server.add_secure_port(address, credentials)
    except RuntimeError:
        taken = 0
    if not taken:
        raise UserError(f"cannot listen on {options.host}, port {port}", f"{option('port=0')} takes a free one")
    result: int = taken
    return result


def token_of(options: ServeOptions) -> bytes | None:
    """Return the token that clients have to send, if any."""
    return read_token(options.token_file, TOKEN).encode() if options.token_file else None


def most_connections() -> int:
    """Return the number of connections that leaves enough file descriptors to start Triton again."""
    return max(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED, MOST_CONNECTIONS), LEAST_CONNECTIONS)


def make_server(front: Front) -> grpc.aio.Server:
    """Make a gRPC server that refuses a message before reading it if the message is larger than any model takes."""
    options = [
        ("grpc.so_reuseport", 0),  # else two servers could share a port, and each get half of the requests
        ("grpc.max_receive_message_length", message_limit(front.models)),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_INTERVAL),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 60_000),  # a client's machine that is gone frees its connection
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.max_connection_idle_ms", 600_000),
        ("grpc.max_concurrent_streams", MOST_OF_ONE),
        ("grpc.max_allowed_incoming_connections", most_connections()),
        ("grpc.http2.bdp_probe", 0),  # which lets the window of a connection grow without bound
        ("grpc.http2.lookahead_bytes", WINDOW),
    ]
    return grpc.aio.server(handlers=[front], options=options)
