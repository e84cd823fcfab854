"""Finds the tritonserver that is installed, and prepares the Python with which its Python backend runs models."""

import importlib.util
import os
import re
import shutil
import site
import sys
import sysconfig
from pathlib import Path

from ditforge import install_hint
from ditforge.errors import UserError

STUB = "triton_python_backend_stub"  # the program that runs a Python model, linked against one libpython:
LIBPYTHON = re.compile(rb"libpython3(?:-\w+)?(\.\d+)\.so[.\d]*")


def other_triton() -> str:
    """Return the advice, for errors, on how to get a Triton that runs here."""
    return f"{install_hint.install('serve')}, or run in the container nvcr.io/nvidia/tritonserver"


def find_tritonserver() -> Path:
    """Find the path of the tritonserver command, or else the folder of Triton in nvidia-pytriton's wheel.

    Raises UserError if there is neither, or if it cannot run here.
    """
    version = sysconfig.get_python_version()
    if found := shutil.which("tritonserver"):
        stub = Path(found).resolve().parent.parent / "backends" / "python" / STUB
        linked = LIBPYTHON.search(stub.read_bytes()) if stub.is_file() else None
        if linked and (built := f"3{linked[1].decode()}") != version:
            problem = f"{found} runs Python models in Python {built}, and this is Python {version}"
            raise UserError(problem, f"install and run ditforge in Python {built}")
        return Path(os.path.abspath(found))
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise UserError("no Triton: no tritonserver is on PATH, and nvidia-pytriton is not installed", other_triton())
    wheel = Path(spec.origin).parent / "tritonserver"
    versions = {stub.parent.name for stub in wheel.glob(f"python_backend_stubs/*/{STUB}")}
    if version not in versions:
        known = ", ".join(sorted(versions, key=lambda name: int(name.partition(".")[2])))
        raise UserError(
            f"nvidia-pytriton runs Python models in Python {known}; this is Python {version}", other_triton()
        )
    return wheel


def tritonserver_command(folder: Path, env: dict[str, str]) -> list[str]:
    """Return the command that runs Triton, as a list of words.

    For nvidia-pytriton's Triton, links to files that it needs are made in `folder`, and env's LD_LIBRARY_PATH is
    extended. Raises UserError if Triton, or the library of this Python, is missing.
    """
    wheel = find_tritonserver()
    if wheel.is_file():
        return [str(wheel)]
    stub = wheel / "python_backend_stubs" / sysconfig.get_python_version() / STUB
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    for file in (stub, *(wheel / "backends" / "python").iterdir()):
        if file.is_file():  # __pycache__ is not: Python would write into the wheel's
            (backend / file.name).symlink_to(file)
    bundled = wheel.parents[1] / "nvidia_pytriton.libs"
    linked = LIBPYTHON.search(stub.read_bytes())
    name = linked[0].decode() if linked else "libpython"
    libdir, multiarch = (sysconfig.get_config_var(key) or "" for key in ("LIBDIR", "MULTIARCH"))
    folders = (bundled, Path(libdir), Path(libdir, multiarch), Path(sys.base_prefix, "lib"))
    library = next((path / name for path in folders if (path / name).exists()), None)
    if library is None:
        problem = f"{sys.executable} comes without the {name} that Triton runs Python models with"
        raise UserError(problem, f"apt install {name.partition('.so')[0]}, or use the Python of uv, conda or pyenv")
    # A link to this one file: a whole folder of libraries could replace others that Triton was built with.
    (folder / "lib" / name).symlink_to(library)
    env["LD_LIBRARY_PATH"] = ":".join(filter(None, [f"{folder}/lib", f"{bundled}", env.get("LD_LIBRARY_PATH")]))
    binary = wheel / "bin" / "tritonserver"
    return [str(binary), f"--backend-directory={backend.parent}", f"--cache-directory={wheel / 'caches'}"]


def python_environment(folder: Path) -> Path:
    """Make a virtual environment in `folder` that can import everything that this Python can.

    Returns its `bin` folder, which has to come first in PATH: the stub of Triton's Python backend uses the first
    python3 there. The stub isolates this Python (PEP 587), which therefore reads neither PYTHONPATH nor the user's
    site-packages. addsitedir() also runs the import hooks of editable installs.
    """
    packages = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    packages.mkdir(parents=True)
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sites = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
    lines = ["import sys; sys.dont_write_bytecode = True"]  # a model repository stays as it is, and can be read-only
    lines += [f"import sys; sys.path.append({path!a})" for path in paths]
    lines += [f"import site; site.addsitedir({path!a})" for path in sites]
    (packages / "ditforge.pth").write_text("\n".join(lines) + "\n")
    settings = f"home = {sys.base_exec_prefix}/bin\ninclude-system-site-packages = false\n"
    (folder / "pyvenv.cfg").write_text(settings, encoding="utf-8")
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").symlink_to(sys.executable)
    return folder / "bin"
