"""Checks that the address of a server is written as HOST:PORT, and suggests a correction if it is not."""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv6Address
from shlex import quote

from ditforge.client.option import ENCRYPT
from ditforge.errors import UserError
from ditforge.option import option

PORT = 8001  # the default port of ditforge serve
DEFAULT_URL = f"localhost:{PORT}"
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
LEAST_PORT = 1024  # ports below this one are reserved for the system
LONGEST = 500  # characters of an address; a DNS name has at most 253
ENCRYPTED = ("https", "grpcs")
NOT_IN_HOSTS = set("/\\@?#[]%:,;\"'`<>|{}()$&*!^=")


def check_url(url: str) -> str:
    """Return `url` unchanged if it is HOST:PORT, or [ADDRESS]:PORT for IPv6.

    Raises UserError for anything else. The error suggests how the address should be written.
    """
    problem, better, more = what_is_wrong(url)
    if not problem:
        return url
    addresses = better or [DEFAULT_URL]
    flags = " ".join(f"--url {quote(address)}" for address in addresses)
    python = f'"{addresses[0]}"' if len(addresses) == 1 else str(addresses).replace("'", '"')
    shown = url if len(url) <= LONGEST else f"{url[:50]}…"
    raise UserError(
        f"{shown!r} is not HOST:PORT of a gRPC server: {problem}", option(f"Client({python})", flags) + more
    )


def what_is_wrong(url: str) -> tuple[str, list[str], str]:
    """Find the mistake in the address `url`. Returns (problem, better, more).

    problem: the mistake in words, or an empty string if the address is correct.
    better: the addresses that the user may have meant.
    more: text to append to the suggested correction, such as the option for encryption; often empty.
    """
    if len(url) > LONGEST:
        return f"it has {len(url)} characters", [], ""
    if "," in url or ";" in url:
        each = [part for part in re.split(r"[,;\s]+", url) if part]
        return "each address is given by itself", [part for one in each for part in meant(one)], ""
    if url != url.strip():
        return "there is white space around it", meant(url.strip()), ""
    if any(character.isspace() or not character.isprintable() for character in url):
        return "there is white space or a control character in it", [], ""
    if url.startswith(("unix:", "unix-abstract:", "/", "vsock:")):
        return "Unix sockets are not supported, only TCP", [], ""
    if match := SCHEME.fullmatch(url):
        scheme, rest = match.groups()
        more = f", and {ENCRYPT} for an encrypted connection" if scheme.lower() in ENCRYPTED else ""
        return f"it is written without {scheme}://", meant(rest), more
    host, colon, port = url.rpartition(":")
    if is_ipv6(url.strip("[]")) and (not host.endswith("]") or not port):
        # ::1:8001 is also a complete IPv6 address. A last group that looks like a usual port is taken for a port.
        with_port = is_ipv6(host) and port.isdigit() and int(port) >= LEAST_PORT
        better = f"[{host}]:{port}" if with_port else f"[{url.strip('[]')}]:{PORT}"
        return "an IPv6 address is put in brackets, before its port", [better], ""
    if "/" in url:
        return "there is a path in it", meant(url.partition("/")[0]), ""
    if not colon:
        return "the port is missing", [f"{url}:{PORT}"] if is_host(url) else [], ""
    if not host:
        return "the host is missing", [], ""
    if not is_host(host):
        return f"{host!r} is no name of a host, and no IP address", [], ""
    if not (port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 1 << 16):
        return f"a port is a number from 1 to {(1 << 16) - 1}, got {port!r}", [f"{host}:{PORT}"], ""
    return "", [], ""


def meant(text: str) -> list[str]:
    """Return the address that `text`, a part of what the user wrote, most likely means, or [] if that is unclear."""
    problem, better, _ = what_is_wrong(text)
    return better if problem else [text]


def is_host(text: str) -> bool:
    """Whether `text` is written like a host name or an IP address. Whether it exists, only DNS can tell."""
    if text.startswith("[") and text.endswith("]"):
        return is_ipv6(text[1:-1])
    return bool(text) and not NOT_IN_HOSTS & set(text)


def is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except AddressValueError:
        return False
    return True
