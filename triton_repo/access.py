"""The files that say who is let in: certificates, keys and the token, checked before a server starts.

gRPC says nothing of what is wrong with them.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from ditforge.errors import UserError
from ditforge.option import option

CERTIFICATE = option('tls_cert="FILE"', "--tls-cert FILE")
KEY = option('tls_key="FILE"', "--tls-key FILE")
CLIENT_CA = option('tls_client_ca="FILE"', "--tls-client-ca FILE")
TOKEN = option('token_file="FILE"', "--token-file FILE")
PAIR = option('tls_cert="FILE", tls_key="FILE"', "--tls-cert FILE --tls-key FILE")


def read_file(path: Path) -> bytes:
    """The bytes of a certificate, key or token file, without white space around them. Raises UserError where it cannot
    be read, or is empty.
    """
    try:
        content = path.read_bytes().strip()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "name a file that this user can read") from None
    except ValueError as error:  # a null byte
        raise UserError(f"cannot read {str(path)!r}: {error}", "name a file that this user can read") from None
    if not content:
        raise UserError(f"{path} is empty", "put a certificate, key or token into it")
    return content


def check_token(path: Path) -> None:
    """Raise UserError, which does not show it, unless the file holds a token that clients can send."""
    if not all(ord("!") <= byte <= ord("~") for byte in read_file(path)):
        problem = f"the token in {path} is not one word of visible ASCII characters, and no client could send it"
        raise UserError(problem, f"openssl rand -base64 24 > {path}   writes another one, for {TOKEN}")


def check_pair(certificate: Path, key: Path) -> None:
    """Raise UserError unless the files are a certificate and its key, which is not encrypted, both in PEM."""
    certificate_holds, key_holds = held(certificate), held(key)
    if (certificate_holds, key_holds) == ("a key", "a certificate"):
        pair = option(f'tls_cert="{key}", tls_key="{certificate}"', f"--tls-cert {key} --tls-key {certificate}")
        raise UserError(f"the certificate {certificate} holds a key, and the key {key} a certificate", pair)
    if not certificate_holds.startswith("a certificate"):
        problem = f"the certificate {certificate} should hold a certificate in PEM, and holds {certificate_holds}"
        raise UserError(problem, CERTIFICATE)
    if not key_holds.endswith("a key"):
        raise UserError(f"the key {key} should hold a private key in PEM, and holds {key_holds}", KEY)

    def password() -> str:  # OpenSSL would ask for it on the terminal
        problem = f"the key {key} is encrypted, and a server has nobody to ask for its password"
        raise UserError(problem, f"openssl pkey -in {key} -out plain.key   writes it without, for {KEY}")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password)
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            problem = f"the key {key} does not belong to the certificate {certificate}"
            raise UserError(problem, f"{PAIR}, of one pair") from None
        problem = f"the certificate {certificate} or its key {key} is damaged: {reason_of(error)}"
        raise UserError(problem, PAIR) from None


def check_authority(path: Path) -> None:
    """Raise UserError unless the file holds certificates in PEM."""
    if not (holds := held(path)).startswith("a certificate"):
        raise UserError(f"{path} should hold a certificate in PEM, and holds {holds}", CLIENT_CA)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError as error:
        raise UserError(f"{path} is damaged: {reason_of(error)}", CLIENT_CA) from None


def held(path: Path) -> str:
    """In words, what a file in PEM holds."""
    content = read_file(path)
    certificate = b"-----BEGIN CERTIFICATE-----" in content or b"-----BEGIN TRUSTED CERTIFICATE-----" in content
    key = b"PRIVATE KEY-----" in content
    if certificate and key:
        return "a certificate and a key"
    return "a certificate" if certificate else "a key" if key else "none"


def reason_of(error: ssl.SSLError) -> str:
    """What OpenSSL says, in words as far as it has any."""
    return (error.reason or "it is not in PEM").replace("_", " ").lower()
