"""Checks and reads the user's headers, which gRPC calls metadata and which are sent with every call."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from shlex import quote

from ditforge.client.option import TOKEN
from ditforge.contract import ENGINES_KEY, PICTURE_KEY
from ditforge.errors import UserError
from ditforge.option import option

NAME = re.compile(r"[a-z0-9_.-]+")
HEADER = option('headers={"name": "value"}', "--header name:value")
BINARY = option('headers={"name-bin": b"…"}', "--header name-bin:BASE64")
RESERVED = ("content-type", "host", "te", "user-agent", ENGINES_KEY, PICTURE_KEY)  # gRPC or the client sends these
AUTHORIZATION = "authorization"


def check_headers(headers: Mapping[str, str | bytes], token: str | None) -> dict[str, str | bytes]:
    """Return the headers unchanged, as a new dict. Raises UserError for a name or a value that cannot be sent.

    The error does not show the value, which may be a secret.
    Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md, Custom-Metadata.
    """
    if not isinstance(headers, Mapping):
        raise UserError(f"headers is a mapping of names to values, got a {type(headers).__name__}", HEADER)
    for name, value in headers.items():
        check_name(name, token)
        check_value(name, value)
    return dict(headers)


def read_headers(written: Sequence[str]) -> dict[str, str | bytes]:
    """Read headers from the command line: NAME:VALUE, or NAME-bin:BASE64 for bytes. Raises UserError for other text."""
    headers: dict[str, str | bytes] = {}
    for text in written:
        name, colon, value = text.partition(":")
        if not colon:
            raise UserError(f"a header is NAME:VALUE, got {name[:20]!r} with no colon", HEADER)
        if name in headers:
            raise UserError(
                f"the header {name} is given twice",
                option(f'headers={{"{name}": "…"}}', f"--header {quote(name)}:…") + ", once",
            )
        headers[name] = read_bytes(name, value) if name.endswith("-bin") else value.strip()
    return headers


def read_bytes(name: str, value: str) -> bytes:
    """Decode `value`, which is in base64. Raises UserError, which shows the header's `name`, if it is not base64."""
    try:
        return base64.b64decode(value.strip(), validate=True)
    except ValueError:  # also raised for text that is not ASCII
        raise UserError(f"the value of the header {name} is not base64", BINARY) from None


def check_name(name: str, token: str | None) -> None:
    """Raise UserError unless a header can be called `name`. `token` is the bearer token that is sent, or None."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        lower = name.lower() if isinstance(name, str) else ""
        fix = option(f'headers={{"{lower}": "…"}}', f"--header {quote(lower)}:…") if NAME.fullmatch(lower) else HEADER
        raise UserError(f"a header's name has lower-case letters, digits, - _ and . only, got {name!r:.60}", fix)
    if name.startswith("grpc-") or name in RESERVED:
        raise UserError(f"the header {name} is sent by the client itself, and cannot be given", f"leave out {name}")
    if name == AUTHORIZATION and token is not None:
        raise UserError("there is a token and a header authorization, and the token is sent as that", f"only {TOKEN}")


def check_value(name: str, value: str | bytes) -> None:
    """Raise UserError unless the header `name` can have that value: bytes if the name ends in -bin, else ASCII text."""
    if name.endswith("-bin"):
        if not isinstance(value, bytes):
            raise UserError(f"the header {name} takes bytes, as every one that ends in -bin", BINARY)
    elif not isinstance(value, str):
        raise UserError(f"the header {name} takes a string; names of headers with bytes end in -bin", BINARY)
    elif not all(" " <= character <= "~" for character in value):
        raise UserError(f"the header {name} has a value that is not visible ASCII; bytes need a name in -bin", BINARY)
    elif value != value.strip():
        raise UserError(f"the header {name} has white space around its value, which gRPC may drop", HEADER)
