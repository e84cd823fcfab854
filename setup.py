"""Which packages there are: each top-level folder with an `__init__.py` is a room, and `trunk` is `ditforge` itself."""

import warnings
from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = {f"ditforge.{init.parent.name}": init.parent.name for init in sorted(Path().glob("*/__init__.py"))}
FOLDERS["ditforge"] = FOLDERS.pop("ditforge.trunk")

# Folders called like the package would come before it: there is none here, since the folders are rooms.
warnings.filterwarnings("ignore", message=".*Editable installation")

setup(
    packages=[*FOLDERS, *(f"{room}.{part}" for room, folder in FOLDERS.items() for part in find_packages(folder))],
    package_dir=FOLDERS,
)
