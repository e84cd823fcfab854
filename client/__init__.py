"""The sampler loop, over gRPC: NumPy, tritonclient and Pillow, never torch.

from ditforge.client import Client
Client("localhost:8001").generate("a large red circle", seed=0).save("picture.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditforge.client.aio import AsyncClient as AsyncClient
    from ditforge.client.client import Client as Client
    from ditforge.client.settings import ConnectionSettings as ConnectionSettings
    from ditforge.client.tls import TLS as TLS

MODULES = {"AsyncClient": "aio", "Client": "client", "ConnectionSettings": "settings", "TLS": "tls"}
__all__ = ["TLS", "AsyncClient", "Client", "ConnectionSettings"]


def __getattr__(name: str) -> object:
    """Load gRPC when a client is first asked for: ditforge.client.sampling alone needs NumPy only."""
    if name in MODULES:
        return getattr(import_module(f"ditforge.client.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
