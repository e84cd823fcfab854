"""Addresses of servers, HOST:PORT, and what is said of those that are written in another way."""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv6Address

from ditforge.client.option import ENCRYPT
from ditforge.errors import UserError
from ditforge.option import option

PORT = 8001  # where ditforge serve listens by default
DEFAULT_URL = f"localhost:{PORT}"
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
LEAST_PORT = 1024  # of those that are not the system's
LONGEST = 500  # characters; a name in DNS has at most 253
ENCRYPTED = ("https", "grpcs")
NOT_IN_HOSTS = set("/\\@?#[]%:,;\"'`<>|{}()$&*!^=")


def check_url(url: str) -> str:
    """HOST:PORT as it is, of IPv6 [ADDRESS]:PORT. Raises UserError, with the address as it should be, for others."""
    problem, better, more = what_is_wrong(url)
    if not problem:
        return url
    addresses = better or [DEFAULT_URL]
    flags = " ".join(f"--url {address}" for address in addresses)
    python = f'"{addresses[0]}"' if len(addresses) == 1 else str(addresses).replace("'", '"')
    shown = url if len(url) <= LONGEST else f"{url[:50]}…"
    raise UserError(
        f"{shown!r} is not HOST:PORT of a gRPC server: {problem}", option(f"Client({python})", flags) + more
    )


def what_is_wrong(url: str) -> tuple[str, list[str], str]:
    """What is wrong with an address (empty: nothing), which addresses may be meant, and what else would be needed."""
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
        with_port = is_ipv6(host) and port.isdigit() and int(port) >= LEAST_PORT  # ::1:8001 is an address, too
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
    """The address that `text`, which is a part of what was written, most likely means; none where that is unclear."""
    problem, better, _ = what_is_wrong(text)
    return better if problem else [text]


def is_host(text: str) -> bool:
    """Whether `text` may be a name or an address: DNS says more."""
    if text.startswith("[") and text.endswith("]"):
        return is_ipv6(text[1:-1])
    return bool(text) and not NOT_IN_HOSTS & set(text)


def is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except AddressValueError:
        return False
    return True
