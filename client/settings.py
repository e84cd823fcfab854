"""The settings of a client's connection: addresses, timeouts, and what it proves its identity with.

`Client`, `AsyncClient` and the command line all make a `ConnectionSettings`, or are given one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from shlex import quote
from typing import TypedDict

from typing_extensions import Unpack

from ditforge.arguments import bound_fields
from ditforge.client.address import DEFAULT_URL, check_url
from ditforge.client.headers import AUTHORIZATION, check_headers
from ditforge.client.option import TOKEN
from ditforge.client.shared import Shared
from ditforge.client.tls import TLS
from ditforge.credentials import check_token
from ditforge.errors import UserError
from ditforge.option import check_names, option

LONGEST = 7 * 24 * 3600.0  # seconds


class Settings(TypedDict, total=False):
    """The keyword arguments of `Client`, whose docstring says what each means."""

    timeout: float
    connect_timeout: float
    step_timeout: float
    retry_timeout: float
    keepalive: float
    keepalive_timeout: float
    token: str | None
    tls: TLS | None
    headers: Mapping[str, str | bytes]


@bound_fields
@dataclass(frozen=True)
class ConnectionSettings:
    """The addresses (HOST:PORT of gRPC) of one server, or of several that serve the same engines, and the settings.

    `Client` says what each setting means. Times are in seconds. The token is a bearer token (RFC 6750).
    `dataclasses.replace` makes a copy with some settings changed.

    A client has one channel to each server for all of its pictures. Clients that are given the same object share their
    channels, so that many clients need only one connection and one TLS handshake. An equal object is not the same
    object. A channel is closed with the last client that uses it. A client that is closed earlier ends only its own
    calls. AsyncClients share channels only with those of the same event loop, and never with a Client. If the traffic
    is too much for one connection, give the clients settings of their own.

    Raises UserError for an invalid address or setting.
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
    headers: Mapping[str, str | bytes] = field(default_factory=dict, repr=False, hash=False)
    shared: Shared = field(default_factory=Shared, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_urls(self.urls)
        for setting in fields(self):
            if isinstance(setting.default, float):
                check_seconds(setting.name, getattr(self, setting.name), setting.default)
        if self.token is not None:
            check_token(self.token, "the token", TOKEN)
        if self.tls is not None and not isinstance(self.tls, TLS):
            raise UserError(f"tls is a TLS of ditforge.client, got {self.tls!r}", 'tls=TLS(ca="ca.pem")')
        object.__setattr__(self, "headers", check_headers(self.headers, self.token))

    def metadata(self) -> dict[str, str | bytes]:
        """The gRPC metadata that is sent with every call: the token and the headers."""
        return {**({AUTHORIZATION: f"Bearer {self.token}"} if self.token else {}), **self.headers}


def make_settings(url: str | Sequence[str] | ConnectionSettings, **settings: Unpack[Settings]) -> ConnectionSettings:
    """Make settings for one address or several. If `url` has settings already, change those that are given by name.

    Raises UserError for an unknown name, with the closest one, and for an invalid address or setting.
    """
    check_names(settings, Settings.__annotations__)
    if isinstance(url, ConnectionSettings):
        return replace(url, **settings) if settings else url
    urls = (url,) if isinstance(url, str) else tuple(url) if isinstance(url, Sequence) else url
    return ConnectionSettings(urls=urls, **settings)


def check_urls(urls: Sequence[str]) -> None:
    """Raise UserError unless these are addresses, HOST:PORT, at least one and none of them twice."""
    if isinstance(urls, str | bytes) or not isinstance(urls, Sequence) or not all(isinstance(u, str) for u in urls):
        raise UserError(f"addresses are strings, HOST:PORT, got {urls!r}", f'"{DEFAULT_URL}", or a list of such')
    if not urls:
        raise UserError("no server was named", option(f'Client("{DEFAULT_URL}")', f"--url {quote(DEFAULT_URL)}"))
    for url in urls:
        check_url(url)
        if urls.count(url) > 1:
            raise UserError(f"the server {url} is named more than once", "name it once")


def check_seconds(name: str, value: float, default: float) -> None:
    """Raise UserError unless `value` is a number of seconds above 0 and at most a week. retry_timeout may also be 0."""
    number = isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= LONGEST
    if not number or (value == 0 and name != "retry_timeout"):
        least = "from 0 to" if name == "retry_timeout" else "above 0 and at most"
        problem = f"{option(name)} must be {least} {LONGEST:.0f} seconds, got {value!r}"
        raise UserError(problem, option(f"{name}={default:g}"))
