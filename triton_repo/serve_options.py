"""What a server is started with: one record, from the command line or Python to the process that serves."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ditforge.errors import UserError

PortNumber = Annotated[int, Field(ge=0, lt=1 << 16)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ServeOptions(BaseModel):
    """How `repo` is served.

    host: an IPv4 address or name of this machine; `0.0.0.0` is every network. port: of gRPC, 0 is a free one.
    http_port, metrics_port: where Triton's HTTP and Prometheus' metrics are served too; None: not at all.
    log: appended to; None is a new file in the temporary folder, which stays.
    timeout: seconds until the models are ready. grace: seconds that pictures in the middle get to be finished once the
        server is told to stop.
    tls_cert, tls_key: PEM files with which gRPC is encrypted; tls_client_ca: PEM file of the authorities of which each
        client has to show a certificate. token_file: holds the bearer token that clients have to send.
    insecure: allows another address than loopback without any of these.
    shm_bytes, shm_growth: what each instance of a Python model takes of /dev/shm from the start, and at a time when
        that is too little, for good. Docker gives a container 64 MiB in all; `--shm-size` gives more.
    extra_args: more of tritonserver's own, such as `--cache-config=local,size=1048576`, with absolute paths.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    repo: Path
    host: str = "127.0.0.1"
    port: PortNumber = 8001
    http_port: PortNumber | None = None
    metrics_port: PortNumber | None = None
    log: Path | None = None
    timeout: Seconds = 600
    grace: Seconds = 30
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
    insecure: bool = False
    shm_bytes: int = 8 << 20
    shm_growth: int = 16 << 20
    extra_args: tuple[str, ...] = ()

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host == "localhost" or self.host.startswith("127.")

    @property
    def access(self) -> list[str]:
        """How the port is protected, in words."""
        ways = {"TLS": self.tls_cert, "client certificates": self.tls_client_ca, "token": self.token_file}
        return [*([] if self.on_loopback else [f"listening at {self.host}"]), *(w for w, file in ways.items() if file)]

    @property
    def closed(self) -> bool:
        """Whether strangers are kept out, and cannot listen either."""
        return self.tls_cert is not None and (self.tls_client_ca is not None or self.token_file is not None)


def make_options(repo: Path, options: dict[str, Any]) -> ServeOptions:
    """The options, checked against each other. Raises UserError for what cannot be, or is not safe."""
    try:
        made = ServeOptions(repo=repo.resolve(), **options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{name}={first['input']!r}: {first['msg']}", f"options: {', '.join(ServeOptions.model_fields)}"
        ) from None
    if (made.tls_cert is None) != (made.tls_key is None):
        raise UserError("a certificate and its key go together", "--tls-cert FILE --tls-key FILE")
    if made.tls_client_ca and not made.tls_cert:
        raise UserError(
            "clients show certificates over TLS only", "--tls-cert FILE --tls-key FILE --tls-client-ca FILE"
        )
    if made.http_port is not None and (made.tls_cert or made.token_file):
        raise UserError(
            "Triton's HTTP port has neither TLS nor tokens, and would be a way around them", "leave out --http-port"
        )
    if not made.on_loopback and not made.closed and not made.insecure:
        raise UserError(
            f"anyone who reaches {made.host} could use this server: there is no TLS with tokens or client certificates",
            "--tls-cert FILE --tls-key FILE with --token-file FILE or --tls-client-ca FILE; or --insecure",
        )
    resolved = {}
    for name in ("tls_cert", "tls_key", "tls_client_ca", "token_file"):
        if (path := getattr(made, name)) is not None:
            read_file(path)
            resolved[name] = path.resolve()
    check_certificates(made)
    return made.model_copy(update=resolved)


def check_certificates(options: ServeOptions) -> None:
    """Raise UserError unless the TLS files are what they should be: gRPC says nothing of what is wrong with them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        if options.tls_cert:
            # An encrypted key would have OpenSSL ask for its password on the terminal.
            context.load_cert_chain(options.tls_cert, options.tls_key, password=lambda: "")
    except ssl.SSLError as error:
        if options.tls_key and b"ENCRYPTED" in read_file(options.tls_key):
            problem = f"the key {options.tls_key} is encrypted, and a server has nobody to ask for its password"
            raise UserError(problem, f"openssl pkey -in {options.tls_key} -out key.pem; --tls-key key.pem") from None
        problem = f"{options.tls_cert} is no certificate in PEM, or {options.tls_key} is not its key: {error.reason}"
        raise UserError(problem, "--tls-cert FILE --tls-key FILE, both in PEM") from None
    try:
        if options.tls_client_ca:
            context.load_verify_locations(options.tls_client_ca)
    except ssl.SSLError as error:
        problem = f"{options.tls_client_ca} holds no certificate in PEM: {error.reason}"
        raise UserError(problem, "--tls-client-ca FILE, in PEM") from None


def read_file(path: Path) -> bytes:
    """The bytes of a certificate, key or token file. Raises UserError where it cannot be read, or is empty."""
    try:
        content = path.read_bytes().strip()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "name a file that this user can read") from None
    if not content:
        raise UserError(f"{path} is empty", "put a certificate, key or token into it")
    return content
