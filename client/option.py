"""The options of a client that many errors name, as they are written in Python and on the command line."""

from __future__ import annotations

from shlex import quote

from ditforge.option import option


def pair(certificate: str, key: str) -> str:
    """The options that give a client's certificate and its key, both paths of files."""
    python = f'tls=TLS(certificate="{certificate}", key="{key}")'
    return option(python, f"--tls-cert {quote(certificate)} --tls-key {quote(key)}")


CA = option('tls=TLS(ca="FILE")', "--tls-ca FILE")
PAIR = pair("FILE", "FILE")
CERTIFICATE = option('tls=TLS(certificate="FILE", …)', "--tls-cert FILE")
KEY = option('tls=TLS(key="FILE", …)', "--tls-key FILE")
ENCRYPT = option("tls=TLS()", "--tls")
PLAIN = option("tls=None", "no --tls and no --tls-…")
TOKEN = option('token="…"', "--token-file FILE")
