"""ditforge: text-to-image diffusion transformers as ONNX and TensorRT engines, served by Triton.

import ditforge

ditforge.export_checkpoint("models/flux-tiny", "out/onnx")
ditforge.build_engines("out/onnx", "out/engines")
ditforge.write_repository("out/engines", "out/repo")
with ditforge.serve("out/repo", port=0) as server:
    ditforge.Client(server.url).generate("a large red circle", seed=0).save("circle.png")
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditforge.api import (
        build_engines as build_engines,
        export_checkpoint as export_checkpoint,
        serve as serve,
        write_repository as write_repository,
    )
    from ditforge.client import Client as Client
    from ditforge.errors import (
        DitforgeError as DitforgeError,
        DitforgeWarning as DitforgeWarning,
        UserError as UserError,
    )

__version__ = "0.1.0"
# ONNX Runtime would note what it runs in a file of the user's cache, which it may send to its makers.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
_PLACES = {
    "export_checkpoint": "ditforge.api",
    "build_engines": "ditforge.api",
    "write_repository": "ditforge.api",
    "serve": "ditforge.api",
    "Client": "ditforge.client",
    "DitforgeError": "ditforge.errors",
    "DitforgeWarning": "ditforge.errors",
    "UserError": "ditforge.errors",
}
__all__ = [*_PLACES, "__version__"]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that `import ditforge` itself imports nothing heavy."""
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
