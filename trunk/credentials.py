"""Checks certificates, keys and tokens before they are used, because gRPC does not say what is wrong with them.

The errors here name the file, and the option by which another file can be given.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import NoReturn

from ditforge.errors import UserError
from ditforge.option import command
from ditforge.small_files import read_bytes

LARGEST = 1 << 20  # bytes of a file; the certificates of all public authorities together have about 200 kB
DATES = (9, 10)  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED
HANDSHAKE = 3  # turns of each side, which is enough for a whole handshake
File = str | PathLike[str]


@dataclass(frozen=True)
class Options:
    """The options by which each file is given, on the command line and in Python, for the advice in errors.

    `pair` takes the paths of a certificate and of its key, and writes the options that give both.
    """

    ca: str
    certificate: str
    key: str
    pair: Callable[[str, str], str]


def read_file(what: str, path: File, fix: str) -> bytes:
    """Read the bytes of a file, without white space around them. Raises UserError if it cannot be read or is empty.

    `what` is what errors call the file, and `fix` is their advice.
    """
    try:
        content = read_bytes(path, LARGEST).strip()
    except (OSError, ValueError, TypeError) as error:  # ValueError: a null byte in the path; TypeError: not a path
        reason = getattr(error, "strerror", None) or str(error)
        name = str(path) if str(path).isprintable() else repr(str(path))
        raise UserError(f"cannot read {what} {name}: {reason}", fix) from None
    if not content:
        raise UserError(f"{what} {fspath(path)} is empty", fix)
    return content


def check_token(token: str, what: str, fix: str) -> str:
    """Return the token unchanged. Raises UserError, which does not show the token, if a header cannot carry it."""
    if not isinstance(token, str) or not token or not all("!" <= character <= "~" for character in token):
        raise UserError(f"{what} is not one word of visible ASCII characters, and cannot be sent", fix)
    return token


def read_token(path: Path, fix: str) -> str:
    """The token in a file, without the white space around it. Raises UserError if there is none."""
    return check_token(read_file("the token in", path, fix).decode("latin-1"), f"the token in {path}", fix)


def check_authorities(path: File, options: Options) -> None:
    """Raise UserError unless the file holds certificates of authorities, in PEM."""
    check_certificates("the TLS ca", path, options.ca)


def check_pair(certificate: File | None, key: File | None, options: Options) -> None:
    """Raise UserError unless both files are None, or are a certificate and its unencrypted key, in PEM."""
    if certificate is None and key is None:
        return
    if certificate is None:
        raise UserError("there is a TLS key, but no certificate", f"{options.certificate}, or leave out both")
    if key is None:
        raise UserError("there is a TLS certificate, but no key", f"{options.key}, or leave out both")
    certificate_holds = held(read_file("the TLS certificate", certificate, options.certificate))
    key_holds = held(read_file("the TLS key", key, options.key))
    if (certificate_holds, key_holds) == ("a key", "a certificate"):
        problem = f"the TLS certificate {certificate} holds a key, and the TLS key {key} a certificate"
        raise UserError(problem, options.pair(fspath(key), fspath(certificate)))
    check_certificates("the TLS certificate", certificate, options.certificate)
    if not key_holds.endswith("a key"):
        raise UserError(f"the TLS key {key} should hold a private key in PEM, and holds {key_holds}", options.key)

    def password() -> NoReturn:  # OpenSSL would ask for it on the terminal
        plain = command("openssl pkey -in {} -out plain.key", fspath(key))
        fix = f"{plain}   writes it without its password, for {options.key}"
        raise UserError(f"the TLS key {key} is encrypted, and there is nobody to ask for its password", fix)

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password)
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            problem = f"the TLS key {key} does not belong to the certificate {certificate}"
            raise UserError(problem, f"{options.pair('FILE', 'FILE')}, of one pair") from None
        raise UserError(f"the TLS key {key} cannot be used: {reason_of(error)}", options.key) from None
    check_dates(certificate, key, options)


def check_dates(certificate: File, key: File, options: Options) -> None:
    """Raise UserError if the certificate has expired or is not yet valid. A TLS handshake in memory tests it."""
    ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ours.load_cert_chain(certificate, key)
    theirs.load_verify_locations(certificate)
    theirs.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is trusted, whoever has signed it
    theirs.check_hostname = False
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    server, client = ours.wrap_bio(there, back, server_side=True), theirs.wrap_bio(back, there)
    for _ in range(HANDSHAKE):
        try:
            for side in (client, server):
                with suppress(ssl.SSLWantReadError):
                    side.do_handshake()
        except ssl.SSLCertVerificationError as error:
            if error.verify_code in DATES:
                problem = f"the TLS certificate {certificate} cannot be used: {error.verify_message}"
                raise UserError(problem, options.certificate) from None
            return


def check_certificates(what: str, path: File, fix: str) -> None:
    """Raise UserError unless the file holds certificates in PEM."""
    content = read_file(what, path, fix)
    if not (holds := held(content)).startswith("a certificate"):
        raise UserError(f"{what} {path} should hold a certificate in PEM, and holds {holds}", fix)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode("latin-1"))
    except (ssl.SSLError, ValueError) as error:
        raise UserError(f"{what} {path} is damaged: {reason_of(error)}", fix) from None


def held(content: bytes) -> str:
    """Say in words what a file in PEM holds."""
    certificate = b"-----BEGIN CERTIFICATE-----" in content or b"-----BEGIN TRUSTED CERTIFICATE-----" in content
    key = b"PRIVATE KEY-----" in content
    if certificate and key:
        return "a certificate and a key"
    return "a certificate" if certificate else "a key" if key else "none"


def reason_of(error: Exception) -> str:
    """OpenSSL's reason for an error, or else the error's own text, in lower case and with spaces."""
    return (getattr(error, "reason", None) or str(error)).replace("_", " ").lower()
