"""Packages of regions that were compiled before: the blocks of one model are those of its fine-tunes too.

They are in the folder `packages` of the cache, under a digest of everything that they depend on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ditforge import small_files
from ditforge.cache import default_cache, forget_oldest
from ditforge.engines.compilers import Shape, region_lowering
from ditforge.engines.compilers.inductor_engine import PACKAGE
from ditforge.engines.runtime.inductor import load_package
from ditforge.errors import UserError
from ditforge.regions import Stored

MOST = 1000  # packages that are kept, of about 1 MB each
CODE = ("region_lowering.py", "region_packages.py")  # what decides how a program is compiled
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A tensor that a program takes: its largest shape, its dtype, and which of its dimensions vary."""

    shape: Shape
    dtype: torch.dtype
    varying: frozenset[int] = frozenset()

    @classmethod
    def between(cls, small: torch.Tensor, large: torch.Tensor) -> Example:
        """An example of all sizes between those of two tensors."""
        pairs = enumerate(zip(small.shape, large.shape, strict=True))
        return cls(tuple(large.shape), large.dtype, frozenset(axis for axis, (low, high) in pairs if low < high))


@dataclass(frozen=True)
class Package:
    """A package to compile.

    path: the file to write. kind: what it is, for people.
    content: the program as torch.export saved it. examples: what it takes before the weights, which are `stored` so.
    device: "cuda" or "cpu". settings: Inductor's.
    """

    path: Path
    kind: str
    content: bytes
    examples: tuple[Example, ...]
    stored: tuple[Stored, ...]
    device: str
    settings: Mapping[str, Any] = field(default_factory=dict)


class Packages:
    """The packages that were compiled before, with this version of PyTorch, for this machine's GPU or processor."""

    def __init__(self) -> None:
        self.folder = default_cache() / "packages"

    @cached_property
    def own(self) -> str:
        """A digest of what all packages depend on: PyTorch's version, and the code that compiles programs."""
        code = [Path(region_lowering.__file__).with_name(name).read_text() for name in CODE]
        return digest([torch.__version__, str(torch.version.cuda), *code])

    def path_of(self, package: Package) -> Path:
        """The file of a package, whether it is there or not."""
        examples = [(one.shape, str(one.dtype), sorted(one.varying)) for one in package.examples]
        parts = [
            self.own,
            computer(package.device),
            hashlib.sha256(package.content).hexdigest(),
            repr(region_lowering.formats_of(package.stored)),
            repr(examples),
            repr(sorted(package.settings.items())),
        ]
        return self.folder / f"{digest(parts)}{PACKAGE}"

    def take(self, package: Package) -> bool:
        """Copy a package to its place, if it is there and can be loaded. Returns whether it is."""
        file = self.path_of(package)
        try:
            shutil.copyfile(file, package.path)
            load_package(package.path, torch.device(package.device))
            os.utime(file)
        except Exception as error:  # there is none, or it is damaged, for which the loader has no class
            if file.exists():
                log.info("%s in the cache is of no use: %s", file, error)
            return False
        return True

    def keep(self, package: Package) -> None:
        """Keep a package that was compiled. If that fails, it will be compiled again."""
        file = self.path_of(package)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with small_files.written_whole(file) as temporary:
                shutil.copyfile(package.path, temporary)
            forget_oldest(self.folder.glob(f"*{PACKAGE}"), MOST)
        except (OSError, UserError) as error:
            log.info("%s is not kept: %s", package.path.name, error)


def computer(device: str) -> str:
    """What a package for the device can be run on: a model of GPU, or a processor with the same instructions."""
    if device == "cuda":
        return torch.cuda.get_device_name() + repr(torch.cuda.get_device_capability())
    return digest(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))


def digest(parts: Iterable[str]) -> str:
    """A digest of texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
