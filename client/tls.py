"""The files of an encrypted connection, checked before anything is sent, so that errors name the file that is wrong."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

from typing_extensions import Self

from ditforge.client.option import CA, CERTIFICATE, KEY, PAIR, option
from ditforge.errors import UserError

FIXES = {"ca": CA, "certificate": CERTIFICATE, "key": KEY}


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
            if name not in FIXES:
                fix = 'TLS(ca="ca.pem", certificate="client.pem", key="client.key"), of which each can be left out'
                raise UserError(f"TLS has no file {name!r}, but ca, certificate and key", fix)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        ca, certificate, key = (self.read(name) for name in FIXES)
        if ca is not None:
            check_certificates("ca", self.ca, ca)
        if (certificate is None) != (key is None):
            there, missing = ("certificate", "key") if key is None else ("key", "certificate")
            raise UserError(f"there is a TLS {there}, but no {missing}", f"{FIXES[missing]}, or leave out both")
        if certificate is not None and key is not None:
            if is_key(certificate) and is_certificate(key) and not is_certificate(certificate) and not is_key(key):
                swapped = (
                    f"the TLS certificate {self.certificate} holds a key, and the TLS key {self.key} a certificate"
                )
                pair = f'tls=TLS(certificate="{self.key}", key="{self.certificate}")'
                raise UserError(swapped, option(pair, f"--tls-cert {self.key} --tls-key {self.certificate}"))
            check_certificates("certificate", self.certificate, certificate)
            check_pair(self.certificate, self.key, key)

    def read(self, name: str) -> bytes | None:
        """What is in the file called `name` here: ca, certificate or key."""
        path = getattr(self, name)
        if path is None:
            return None
        try:
            content = Path(path).read_bytes()
        except (OSError, ValueError, TypeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"cannot read the TLS {name} {path}: {reason}", FIXES[name]) from None
        if b"-----BEGIN " not in content:
            raise UserError(
                f"the TLS {name} {fspath(path)} is not in PEM", f"{FIXES[name]}, that begins with -----BEGIN"
            )
        return content


def is_certificate(content: bytes) -> bool:
    return b"-----BEGIN CERTIFICATE-----" in content or b"-----BEGIN TRUSTED CERTIFICATE-----" in content


def is_key(content: bytes) -> bool:
    return b"PRIVATE KEY-----" in content


def check_certificates(name: str, path: object, content: bytes) -> None:
    """Raise UserError unless `content`, of the file `path`, holds certificates."""
    if not is_certificate(content):
        holds = "a key" if is_key(content) else "none"
        raise UserError(f"the TLS {name} {path} should hold a certificate, and holds {holds}", FIXES[name])
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode("latin-1"))
    except (ssl.SSLError, ValueError) as error:
        raise UserError(f"the TLS {name} {path} is damaged: {reason_of(error)}", FIXES[name]) from None


def check_pair(certificate: str | PathLike[str] | None, path: object, key: bytes) -> None:
    """Raise UserError unless the file `path`, which holds `key`, is the key to `certificate`, and can be used."""
    if not is_key(key):
        holds = "a certificate" if is_certificate(key) else "none"
        raise UserError(f"the TLS key {path} should hold a private key, and holds {holds}", KEY)

    def password() -> str:
        fix = f"openssl pkey -in {path} -out plain.key   writes it without its password, for {KEY}"
        raise UserError(f"the TLS key {path} is encrypted, and its password is asked of nobody", fix)

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(fspath(certificate or ""), fspath(str(path)), password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH" or error.reason == "KEY_TYPE_MISMATCH":
            problem = f"the TLS key {path} does not belong to the certificate {certificate}"
            raise UserError(problem, f"{PAIR}, of one pair") from None
        raise UserError(f"the TLS key {path} cannot be used: {reason_of(error)}", KEY) from None


def reason_of(error: Exception) -> str:
    """What OpenSSL says, in words as far as it has any."""
    return (getattr(error, "reason", None) or str(error)).replace("_", " ").lower()
