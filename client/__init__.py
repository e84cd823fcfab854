"""The client, which runs the sampler loop and calls the networks over gRPC. It needs NumPy, tritonclient and Pillow.

It never imports torch.

from ditforge.client import Client
Client("localhost:8001").generate("a large red circle", seed=0).save("picture.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditforge.client.aio import AsyncClient as AsyncClient
    from ditforge.client.client import Client as Client
    from ditforge.client.options import GenerateOptions as GenerateOptions
    from ditforge.client.picture_file import save_picture as save_picture
    from ditforge.client.samplers import SAMPLERS as SAMPLERS, Sampler as Sampler, Step as Step
    from ditforge.client.schedules import SCHEDULES as SCHEDULES, Spacing as Spacing
    from ditforge.client.settings import ConnectionSettings as ConnectionSettings
    from ditforge.client.tls import TLS as TLS

# Each public name, and the module that defines it. The module is imported when the name is first used, so that a
# program that only uses the samplers needs NumPy, but not gRPC.
_PUBLIC = {
    "SAMPLERS": "samplers",
    "SCHEDULES": "schedules",
    "TLS": "tls",
    "AsyncClient": "aio",
    "Client": "client",
    "ConnectionSettings": "settings",
    "GenerateOptions": "options",
    "Sampler": "samplers",
    "Spacing": "schedules",
    "Step": "samplers",
    "save_picture": "picture_file",
}
__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "TLS",
    "AsyncClient",
    "Client",
    "ConnectionSettings",
    "GenerateOptions",
    "Sampler",
    "Spacing",
    "Step",
    "save_picture",
]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
