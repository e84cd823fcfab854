"""The files of an encrypted connection, checked before anything is sent, so that errors name the file that is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

from typing_extensions import Self

from ditforge.client.option import CA, CERTIFICATE, KEY, pair
from ditforge.credentials import Options, check_authorities, check_pair, read_file
from ditforge.errors import UserError

FILES = Options(CA, CERTIFICATE, KEY, pair)


@dataclass(frozen=True)
class TLS:
    """Encrypted connections, by files in PEM. `ca` has the certificates that the servers' are checked against (None:
    those that gRPC brings); `certificate` and `key` are what the client shows servers that ask for it (mutual TLS).

    Raises UserError for a file that is missing, damaged or something else than it should be, for an encrypted key, and
    for a certificate and a key that do not belong together, or of which one is missing.
    """

    ca: str | PathLike[str] | None = None
    certificate: str | PathLike[str] | None = None
    key: str | PathLike[str] | None = None

    def __new__(cls, *files: object, **named: object) -> Self:
        for name in named:
            if name not in ("ca", "certificate", "key"):
                fix = 'TLS(ca="ca.pem", certificate="client.pem", key="client.key"), of which each can be left out'
                raise UserError(f"TLS has no file {name!r}, but ca, certificate and key", fix)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.ca is not None:
            check_authorities(self.ca, FILES)
        check_pair(self.certificate, self.key, FILES)

    def read(self, name: str) -> bytes | None:
        """What is in the file called `name` here: ca, certificate or key. Raises UserError where it is gone by now."""
        path = getattr(self, name)
        return None if path is None else read_file(f"the TLS {name}", path, getattr(FILES, name))
