"""How a client reaches its servers: which they are, how long it waits for what, and what it proves itself with.

The one place for this: `Client`, `AsyncClient` and the command line all make a `ConnectionSettings`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from numbers import Real
from os import PathLike, fspath
from pathlib import Path
from typing import TypedDict

from typing_extensions import Unpack

from ditforge.errors import UserError

DEFAULT_URL = "localhost:8001"
LONGEST = 7 * 24 * 3600.0  # seconds
NAMES = {"ca": "--tls-ca", "certificate": "--tls-cert", "key": "--tls-key"}


@dataclass(frozen=True)
class TLS:
    """Encrypted connections, by files in PEM. `ca` has the certificates that the servers' are checked against (None:
    those that gRPC brings); `certificate` and `key` are what the client shows servers that ask for it (mutual TLS).

    Raises UserError for a file that is missing or no PEM, and for a key without a certificate or the other way round.
    """

    ca: str | PathLike[str] | None = None
    certificate: str | PathLike[str] | None = None
    key: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name in NAMES:
            self.read(name)
        if (self.certificate is None) != (self.key is None):
            there, missing = ("certificate", "key") if self.key is None else ("key", "certificate")
            raise UserError(f"there is a TLS {there}, but no {missing}", f"{NAMES[missing]} FILE, or leave out both")

    def read(self, name: str) -> bytes | None:
        """What is in the file called `name` here: ca, certificate or key."""
        path = getattr(self, name)
        if path is None:
            return None
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the TLS {name} {fspath(path)}: {error.strerror}", f"{NAMES[name]} FILE"
            ) from None
        if b"-----BEGIN " not in content:
            raise UserError(
                f"the TLS {name} {fspath(path)} is not in PEM", f"{NAMES[name]} FILE, that begins -----BEGIN"
            )
        return content


class Settings(TypedDict, total=False):
    """What `Client` takes beside addresses; see ConnectionSettings."""

    timeout: float
    connect_timeout: float
    step_timeout: float
    retry_timeout: float
    keepalive: float
    keepalive_timeout: float
    token: str | None
    tls: TLS | None


@dataclass(frozen=True)
class ConnectionSettings:
    """Addresses (HOST:PORT of gRPC) of one server, or of several that serve the same engines, and times in seconds.

    timeout: for a picture, from the first call to the last. connect_timeout: until a server says what it serves, and is
    ready to. step_timeout: for each call of a model (the text encoders, a step, the VAE), which then is repeated.
    retry_timeout: how long after its first failure a call is repeated; 0: on each server once. keepalive: how often a
    server that is busy with a call is asked whether it still lives, and keepalive_timeout: how long it may take to
    answer. token: sent with every call as a bearer token (RFC 6750); without TLS it can be read on the way. tls: None
    for connections that are not encrypted.

    Raises UserError for what cannot be.
    """

    urls: tuple[str, ...] = (DEFAULT_URL,)
    timeout: float = 1800.0
    connect_timeout: float = 10.0
    step_timeout: float = 300.0
    retry_timeout: float = 60.0
    keepalive: float = 10.0
    keepalive_timeout: float = 10.0
    token: str | None = field(default=None, repr=False)
    tls: TLS | None = None

    def __post_init__(self) -> None:
        if not self.urls:
            raise UserError("no server was named", f"--url {DEFAULT_URL}")
        for url in self.urls:
            check_url(url)
            if self.urls.count(url) > 1:
                raise UserError(f"the server {url} is named more than once", "name it once")
        for setting in fields(self):
            if isinstance(setting.default, float):
                check_seconds(setting.name, getattr(self, setting.name), setting.default)
        if self.token is not None:
            check_token(self.token, "the token")
        if self.tls is not None and not isinstance(self.tls, TLS):
            raise UserError(f"tls is a TLS of ditforge.client, got {self.tls!r}", "tls=TLS(ca='ca.pem')")

    def headers(self) -> dict[str, str]:
        """The gRPC metadata of every call, whatever it asks for."""
        return {"authorization": f"Bearer {self.token}"} if self.token else {}


def make_settings(url: str | Sequence[str], **settings: Unpack[Settings]) -> ConnectionSettings:
    """The settings for one address or several. Raises UserError, with the closest name, for one that there is not."""
    known = Settings.__annotations__
    for name in settings:
        if name not in known:
            close = get_close_matches(name, known, n=1) or ["timeout"]
            raise UserError(f"there is no setting {name!r}, but {', '.join(known)}", f"{close[0]}=…")
    if not isinstance(url, str) and not all(isinstance(each, str) for each in url):
        raise UserError(f"addresses are strings, HOST:PORT, got {url!r}", f'"{DEFAULT_URL}", or a list of such')
    return ConnectionSettings(urls=(url,) if isinstance(url, str) else tuple(url), **settings)


def check_url(url: str) -> str:
    """HOST:PORT as it is. Raises UserError for anything else."""
    host, _, port = url.rpartition(":")
    if "/" in url or not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 1 << 16:
        raise UserError(f"{url!r} is not HOST:PORT of a gRPC server", f"--url {DEFAULT_URL}")
    return url


def check_seconds(name: str, value: float, default: float) -> None:
    """Raise UserError unless `value` is a number of seconds above 0 (retry_timeout: or 0), and at most a week."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and value <= LONGEST
    if not number or value < 0 or (value == 0 and name != "retry_timeout"):
        least = "0" if name == "retry_timeout" else "above 0"
        flag = f"--{name.replace('_', '-')} {default:g}"
        raise UserError(f"{name} must be from {least} to {LONGEST:.0f} seconds, got {value!r}", flag)


def check_token(token: str, what: str) -> str:
    """A token as it is. Raises UserError, which does not show it, for what cannot be sent."""
    if not isinstance(token, str) or not token or not all("!" <= character <= "~" for character in token):
        raise UserError(
            f"{what} is not one word of visible ASCII characters", "--token-file FILE, with the token alone"
        )
    return token


def read_token(path: Path | None) -> str | None:
    """The token in a file, without the white space around it; None where there is no file."""
    if path is None:
        return None
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"cannot read the token in {path}: {reason}", "--token-file FILE") from None
    return check_token(text.strip(), f"what is in {path}")
