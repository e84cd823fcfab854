"""HTTP/2 as strangers write it: frames by hand, with headers that no library would send.

Source: RFC 9113 (frames) and RFC 7541, 6.2.2 (headers without compression).
"""

from __future__ import annotations

import socket

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6
END_STREAM, END_HEADERS, ACK = 1, 4, 1
MESSAGE = bytes(5)  # an empty one of gRPC
CALL = {
    b":method": b"POST",
    b":scheme": b"http",
    b":path": b"/inference.GRPCInferenceService/ServerMetadata",
    b":authority": b"x",
    b"content-type": b"application/grpc",
    b"te": b"trailers",
}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def header(name: bytes, value: bytes) -> bytes:
    """A header as it is; shorter than 2**14 bytes."""
    return b"\0" + text(name) + text(value)


def text(value: bytes) -> bytes:
    if len(value) < 127:
        return bytes([len(value)]) + value
    rest = len(value) - 127
    return bytes([127, rest & 127 | 128, rest >> 7]) + value


def call(url: str, headers: dict[bytes, bytes]) -> None:
    """Send one call of an empty message, and wait until the server has read it, or has ended the connection."""
    host, port = url.split(":")
    block = b"".join(header(*each) for each in headers.items())
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        sent = frame(HEADERS, END_HEADERS, 1, block) + frame(DATA, END_STREAM, 1, MESSAGE)
        try:
            connection.sendall(PREFACE + frame(SETTINGS, 0, 0) + sent + frame(PING, 0, 0, b"asked..."))
            received = b""
            while frame(PING, ACK, 0, b"asked...") not in received and (more := connection.recv(65536)):
                received += more
        except ConnectionError:
            return
