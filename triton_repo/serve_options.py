"""The options of a server: one record that goes from the command line or Python to the process that serves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from ditforge import arguments
from ditforge.arguments import FilePath, Name, Number, Whole
from ditforge.credentials import Options, check_authorities, check_pair, read_token
from ditforge.errors import UserError
from ditforge.option import check_names, option, setting
from ditforge.real_path import real_path

LAST_PORT = (1 << 16) - 1
LONGEST = 7 * 24 * 3600  # seconds
DEFAULT_PORTS = {"port": 8001, "http_port": 8000, "metrics_port": 8002}  # Triton's own
PORTS = tuple(DEFAULT_PORTS)
CLIENT_CA = option('tls_client_ca="FILE"', "--tls-client-ca FILE")
TOKEN = option('token_file="FILE"', "--token-file FILE")


def pair(certificate: str, key: str) -> str:
    """How a server's certificate and its key are given."""
    flags = f"--tls-cert {quote(certificate)} --tls-key {quote(key)}"
    return option(f'tls_cert="{certificate}", tls_key="{key}"', flags)


NEW_TOKEN = f"openssl rand -base64 24 > FILE   writes one, for {TOKEN}"
PAIR = pair("FILE", "FILE")
FILES = Options(
    CLIENT_CA, option('tls_cert="FILE"', "--tls-cert FILE"), option('tls_key="FILE"', "--tls-key FILE"), pair
)
PortNumber = Annotated[Whole, Field(ge=0, le=LAST_PORT)]
Seconds = Annotated[Number, Field(ge=0, le=LONGEST)]
Bytes = Annotated[Whole, Field(gt=0)]


class ServeOptions(BaseModel):
    """How the model repository `repo` is served.

    host: an IPv4 address or name of this machine; `0.0.0.0` means every network.
    port: the port of gRPC; 0 means a free one.
    http_port, metrics_port: the ports of Triton's HTTP and of Prometheus' metrics. None: these are not served.
    log: the log file; existing content is kept. None means a new file in the temporary folder, which is removed if the
        server is stopped and ends cleanly.
    timeout: the seconds within which the models must be ready.
    grace: the seconds that unfinished pictures get when the server is told to stop.
    tls_cert, tls_key: PEM files for the encryption of gRPC.
    tls_client_ca: a PEM file of authorities. Each client then has to show a certificate of one of them.
    token_file: a file with the bearer token that clients have to send, one word of visible ASCII characters.
    insecure: allows an address other than loopback without any of these protections.
    shm_bytes, shm_growth: the bytes of /dev/shm that each instance of a Python model takes at the start, and the bytes
        by which this grows, permanently, whenever it is too little. Docker gives a container 64 MiB in all;
        `--shm-size` gives more.
    extra_args: further arguments of tritonserver, such as `--cache-config=local,size=1048576`, with absolute paths.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    repo: Path
    host: Name = "127.0.0.1"
    port: PortNumber = 8001
    http_port: PortNumber | None = None
    metrics_port: PortNumber | None = None
    log: FilePath | None = None
    timeout: Annotated[Seconds, Field(gt=0)] = 600
    grace: Seconds = 30
    tls_cert: FilePath | None = None
    tls_key: FilePath | None = None
    tls_client_ca: FilePath | None = None
    token_file: FilePath | None = None
    insecure: bool = False
    shm_bytes: Bytes = 8 << 20
    shm_growth: Bytes = 16 << 20
    extra_args: Sequence[Name] = ()

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host == "localhost" or self.host.startswith("127.")

    @property
    def access(self) -> list[str]:
        """How the port is protected, as text."""
        ways = {"TLS": self.tls_cert, "client certificates": self.tls_client_ca, "token": self.token_file}
        return [*([] if self.on_loopback else [f"listening at {self.host}"]), *(w for w, file in ways.items() if file)]

    @property
    def closed(self) -> bool:
        """Whether strangers can neither use the server nor read what is sent."""
        return self.tls_cert is not None and (self.tls_client_ca is not None or self.token_file is not None)


def make_options(repo: Path, options: dict[str, Any]) -> ServeOptions:
    """Make the options and check them against each other. Raises UserError for values that are impossible or unsafe."""
    check_names(options, [name for name in ServeOptions.model_fields if name != "repo"])
    try:
        made = ServeOptions(repo=real_path(repo), **options)
    except ValidationError as error:
        raise refused(error.errors()[0]) from None
    check_ports(made)
    for name, path in made:
        if isinstance(path, Path) and not is_text(path):
            named = option(name, "REPO_DIR") if name == "repo" else option(name)
            problem = f"{named} is {str(path)!r}, which is not text in UTF-8"
            raise UserError(problem, "rename it; or, where the locale says so, set PYTHONUTF8=1")
    check_pair(made.tls_cert, made.tls_key, FILES)
    if made.tls_client_ca and not made.tls_cert:
        raise UserError("clients show certificates over TLS only", f"{PAIR}, beside {option('tls_client_ca')}")
    if made.http_port is not None and (made.tls_cert or made.token_file):
        raise UserError(
            "Triton's HTTP port has neither TLS nor tokens, and would be a way around them",
            f"leave out {option('http_port')}",
        )
    if not made.on_loopback and not made.closed and not made.insecure:
        raise UserError(
            f"anyone who reaches {made.host} could use this server: there is no TLS with tokens or client certificates",
            f"{PAIR}, with {TOKEN} or {CLIENT_CA}; or {option('insecure=True', '--insecure')}",
        )
    if made.token_file:
        read_token(made.token_file, NEW_TOKEN)
    if made.tls_client_ca:
        check_authorities(made.tls_client_ca, FILES)
    files = {name: getattr(made, name) for name in ("tls_cert", "tls_key", "tls_client_ca", "token_file")}
    return made.model_copy(update={name: path.resolve() for name, path in files.items() if path is not None})


def is_text(path: Path) -> bool:
    """Return whether the path can be written as text, in JSON and in Triton's configuration."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def refused(error: ErrorDetails) -> UserError:
    """What is wrong with an option, what it may be, and how to write it."""
    name, value = str(error["loc"][0]), error["input"]
    if name in PORTS:
        must, example = f"an integer from 0 to {LAST_PORT}, where 0 is a free one", DEFAULT_PORTS[name]
    elif name in ("timeout", "grace"):
        above = "above 0 and up" if name == "timeout" else "from 0"
        must, example = f"{above} to {LONGEST} seconds", ServeOptions.model_fields[name].default
    elif name == "host":
        must, example = "an IPv4 address or name of this machine", ServeOptions.model_fields[name].default
    else:
        return arguments.refused(error)
    return UserError(f"{option(name)} must be {must}, got {value!r}", setting(name, example))


def check_ports(options: ServeOptions) -> None:
    """Raise UserError if two ports have the same number, except 0."""
    for one, other in combinations(PORTS, 2):
        number = getattr(options, one)
        if number and number == getattr(options, other):
            fix = option(f"{other}={number + 1 if number < LAST_PORT else number - 1}")
            raise UserError(f"{option(one)} and {option(other)} are both {number}", f"{fix}; 0 is a free one")
