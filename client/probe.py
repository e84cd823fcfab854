"""Whether a server speaks TLS: asked by itself where gRPC says no more than that the connection was closed."""

from __future__ import annotations

import socket
import ssl
from typing import Literal

from ditforge.client.tls import TLS

Speaks = Literal["no TLS", "TLS", "TLS, but not with us"]

TIMEOUT = 2.0  # seconds


def speaks_tls(url: str, tls: TLS | None, timeout: float = TIMEOUT) -> Speaks:
    """What the server at `url` does when it is greeted in TLS, with the certificate in `tls` where there is one.

    "TLS, but not with us": it ends the connection for our certificate, or because we showed none. The server's own
    certificate is not checked, since nothing is said to the server beyond the greeting.
    """
    host, _, port = url.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])  # without which gRPC's servers end the connection
    if tls is not None and tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout) as raw, context.wrap_socket(raw) as talk:
            try:  # in TLS 1.3, the client's certificate is looked at when the handshake has ended for the client
                return "TLS" if talk.recv(1) else "TLS, but not with us"
            except TimeoutError:
                return "TLS"
            except OSError:
                return "TLS, but not with us"
    except ssl.SSLError as error:
        return "TLS, but not with us" if "ALERT" in (error.reason or "") else "no TLS"
    except (OSError, ValueError):
        return "no TLS"
