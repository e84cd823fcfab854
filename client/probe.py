"""Finds out whether a server speaks TLS. It is needed if gRPC says only that the connection was closed."""

from __future__ import annotations

import socket
import ssl
from typing import Literal

from ditforge.client.tls import TLS

Speaks = Literal["no TLS", "TLS", "TLS, but not with us"]

TIMEOUT = 2.0  # seconds


def speaks_tls(url: str, tls: TLS | None, timeout: float = TIMEOUT) -> Speaks:
    """Begin a TLS handshake with the server at `url`, and tell how the server reacts.

    The handshake uses the client's certificate in `tls`, if there is one. "TLS, but not with us" means that the server
    ends the connection because of that certificate, or because it was shown none. The server's own certificate is not
    checked, because nothing but the handshake is sent to it. `timeout` is in seconds.
    """
    host, _, port = url.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])  # gRPC servers end a connection without this
    if tls is not None and tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout) as raw, context.wrap_socket(raw) as talk:
            try:  # in TLS 1.3, the server checks the client's certificate after the handshake has ended for the client
                return "TLS" if talk.recv(1) else "TLS, but not with us"
            except TimeoutError:
                return "TLS"
            except OSError:
                return "TLS, but not with us"
    except ssl.SSLError as error:
        return "TLS, but not with us" if "ALERT" in (error.reason or "") else "no TLS"
    except (OSError, ValueError):
        return "no TLS"
