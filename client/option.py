"""How an option is written on the command line and in Python: an error names both, since it may be read in both."""

from __future__ import annotations


def option(python: str, flag: str = "") -> str:
    """`python` is NAME=VALUE as `Client` or `generate` take it; `flag` is the same on the command line, by default of
    that name.
    """
    name, _, value = python.partition("=")
    dashed = name.replace("_", "-")
    return f"{flag or f'--{dashed} {value}'} (in Python: {python})"


CA = option('tls=TLS(ca="FILE")', "--tls-ca FILE")
PAIR = option('tls=TLS(certificate="FILE", key="FILE")', "--tls-cert FILE --tls-key FILE")
CERTIFICATE = option('tls=TLS(certificate="FILE", …)', "--tls-cert FILE")
KEY = option('tls=TLS(key="FILE", …)', "--tls-key FILE")
ENCRYPT = option("tls=TLS()", "--tls")
PLAIN = option("tls=None", "no --tls and no --tls-…")
TOKEN = option('token="…"', "--token-file FILE")
