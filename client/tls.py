"""The files of an encrypted connection, which are checked before anything is sent, so that errors can name the file."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

from ditforge.arguments import bound_fields
from ditforge.client.option import CA, CERTIFICATE, KEY, pair
from ditforge.credentials import Options, check_authorities, check_pair, read_file

FILES = Options(CA, CERTIFICATE, KEY, pair)


@bound_fields
@dataclass(frozen=True)
class TLS:
    """Encrypt the connections, with files in PEM format.

    ca: the certificates of the authorities that are trusted to sign servers' certificates. By default, these are the
        public authorities that come with gRPC.
    certificate, key: the client's own certificate and its key, for servers that ask for them (mutual TLS).

    Raises UserError if a file is missing, damaged or of another kind, if the key is encrypted, if the certificate and
    the key do not belong together, or if only one of them is given.
    """

    ca: str | PathLike[str] | None = None
    certificate: str | PathLike[str] | None = None
    key: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.ca is not None:
            check_authorities(self.ca, FILES)
        check_pair(self.certificate, self.key, FILES)

    def read(self, name: str) -> bytes | None:
        """Read the file of the field `name`: ca, certificate or key. Raises UserError if it cannot be read any more.

        Returns None if the field is None.
        """
        path = getattr(self, name)
        return None if path is None else read_file(f"the TLS {name}", path, getattr(FILES, name))
