"""The commands that install a part of ditforge, written so that they work for the copy of ditforge that is running."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from importlib.metadata import distributions
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ditforge.errors import UserError

CHECKOUT = "in a checkout of ditforge"
# Each extra of ditforge, and the top-level modules that it installs.
EXTRAS = {
    "client": ("numpy", "PIL", "tritonclient", "grpc"),
    "export": ("torch", "diffusers", "transformers", "safetensors", "onnxscript", "onnx_ir", "huggingface_hub"),
    "engines": ("onnx", "onnxruntime", "pynvml"),
    "tensorrt-rtx": ("tensorrt_rtx",),
    "tensorrt": ("tensorrt",),
    "gpu": ("cupy",),
    "onnxruntime-gpu": (),  # its module is that of engines
    "serve-in-container": ("tokenizers", "google", "psutil", "prometheus_client"),
    "serve": ("pytriton",),
}


def install(extra: str) -> str:
    """The command that installs an extra of ditforge, such as "export".

    ditforge is on no package index, so `pip install 'ditforge[export]'` would fail or install another package. pip
    notes from where it installed a package (PEP 610). If this is a folder or a wheel that still exists, the command
    names it, and works in any folder. Otherwise the command works in a checkout of ditforge, and says so.
    """
    origin = installed_from()
    if origin is None:
        return f"{pip()} install '.[{extra}]'   {CHECKOUT}"
    editable = "-e " if origin.is_dir() and is_editable() else ""
    return f"{pip()} install {editable}{shlex.quote(f'{origin}[{extra}]')}"


def lacking(error: ModuleNotFoundError, what: str) -> UserError | None:
    """The error of `what`, such as "this command", which needs a module that is missing. None if it is of no extra."""
    module = (error.name or "").split(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
    return UserError(f"{what} needs {module}, which is not installed", install(extra)) if extra else None


def again() -> str:
    """The command that installs the checkout from which ditforge runs again, after its files have changed."""
    origin = installed_from()
    return f"{pip()} install -e {shlex.quote(str(origin)) if origin else f'.   {CHECKOUT}'}"


def upgrade(extra: str) -> str:
    """The command that installs an extra of a newer ditforge."""
    return f"{pip()} install '.[{extra}]'   in a newer checkout of ditforge"


def pip() -> str:
    """The command that runs the pip of this Python. It is `pip` if the first pip on PATH belongs to this Python."""
    found = shutil.which("pip")
    if found and Path(found).parent == Path(sys.executable).parent:
        return "pip"
    return f"{shlex.quote(sys.executable)} -m pip"


def installed_from() -> Path | None:
    """The checkout or the wheel that pip installed ditforge from, or None if it is not known or no longer exists."""
    url = str(direct_url().get("url", ""))
    path = Path(unquote(urlsplit(url).path)) if url.startswith("file://") else None
    return path if path and path.exists() else None


def is_editable() -> bool:
    """Whether ditforge was installed with `pip install -e`, so that the checkout itself is what runs."""
    folder = direct_url().get("dir_info")
    return isinstance(folder, dict) and folder.get("editable") is True


def direct_url() -> dict[str, object]:
    """What pip noted about the place that it installed ditforge from.

    Empty if ditforge came from a package index, or was not installed by pip.
    Source: https://packaging.python.org/en/latest/specifications/direct-url/
    """
    for found in distributions(name="ditforge"):
        text = found.read_text("direct_url.json")
        if text is None:
            continue  # this is an egg-info in the current folder, and not the installed package
        try:
            noted = json.loads(text)
        except ValueError:
            continue
        if isinstance(noted, dict):
            return noted
    return {}
