"""The programs of a network by region, which `export` writes beside its ONNX graph for compilers that read them.

A file NAME.programs is a zip archive. `regions.json` in it is a `Regions`, and KIND.pt2 is the torch.export program of
a kind of region. A program takes the tensors of a call, and then its weights, which are in the graph's file of weights.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ditforge.errors import UserError

SUFFIX = ".programs"
DESCRIPTION = "regions.json"
PROGRAM = ".pt2"
LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the time of all members of an archive, so that equal programs make equal files


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Call(_Record):
    """One run of a region's program: its kind, and the names of the tensors that it takes and gives.

    The tensors are the network's inputs and outputs by their own names, and what regions hand to each other. `weights`
    are the names of weights in the checkpoint, as the ONNX graph has them.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]


class Stored(_Record):
    """How a weight is stored for the ONNX graph.

    name: the name of its initializer.
    transposed: whether the matrix [N, K] that the program takes is stored as [K, N].
    scheme: its 8-bit format (fp8, fp8-weights, int8-weights), or empty. `scale` is the initializer with the scales of
        the output channels.
    activation_scale: what an 8-bit input of the product stands for, where the scheme quantises activations.
    """

    name: str
    transposed: bool = False
    scheme: str = ""
    scale: str = ""
    activation_scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class Regions(_Record):
    """Of which regions a network consists, in the order in which they run.

    torch: the version of torch that wrote the programs.
    outputs: the names of the network's outputs.
    weights: by the name of each weight, how it is stored.
    """

    torch: str
    calls: tuple[Call, ...]
    outputs: tuple[str, ...]
    weights: dict[str, Stored]


def write(path: Path, regions: Regions, programs: Mapping[str, bytes]) -> None:
    """Write the archive `path` of the programs, by their kinds."""
    members = {DESCRIPTION: regions.model_dump_json(exclude_defaults=True).encode()}
    members |= {kind + PROGRAM: content for kind, content in programs.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name, LONG_AGO), content, zipfile.ZIP_DEFLATED)


def read(path: Path) -> Regions:
    """Read what the archive `path` says of its regions. Raises UserError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return Regions.model_validate_json(archive.read(DESCRIPTION))
    except (OSError, zipfile.BadZipFile, KeyError, ValidationError) as error:
        raise UserError(f"{path} is damaged: {error}", "ditforge export CHECKPOINT --out DIR   again") from error


def read_program(path: Path, kind: str) -> bytes:
    """Read the program of a kind of region from the archive `path`. Raises UserError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(kind + PROGRAM)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{path} is damaged: {error}", "ditforge export CHECKPOINT --out DIR   again") from error
