"""The sampler loop, over gRPC: NumPy, tritonclient and Pillow, never torch.

from ditforge.client import Client
Client("localhost:8001").generate("a large red circle", seed=0).save("picture.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditforge.client.client import AsyncClient as AsyncClient, Client as Client
    from ditforge.client.tls import TLS as TLS

__all__ = ["TLS", "AsyncClient", "Client"]


def __getattr__(name: str) -> object:
    """Load gRPC when a client is first asked for: ditforge.client.sampling alone needs NumPy only."""
    if name in __all__:
        from ditforge.client import client, tls

        return getattr(tls if name == "TLS" else client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
