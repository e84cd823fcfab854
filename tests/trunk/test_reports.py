"""Reports as JSON: docs/json.md lists the keys that there are."""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from ditforge.commands.build import BuildReport
from ditforge.commands.doctor import Machine
from ditforge.contents import CheckpointFolder, Picture, StageFolder
from ditforge.engines.bench import Bench
from ditforge.engines.gpu_table import GpuTable
from ditforge.engines.verdict import Verification
from ditforge.export.checkpoint.description import TensorFile
from ditforge.plan_report import PlanReport
from ditforge.reports import as_document

REPORTS = {
    "gpus": GpuTable,
    "doctor": Machine,
    "plan": PlanReport,
    "build": BuildReport,
    "verify": Verification,
    "bench": Bench,
    "inspect FOLDER": StageFolder,
    "inspect CHECKPOINT": CheckpointFolder,
    "inspect FILE.safetensors": TensorFile,
    "inspect PICTURE": Picture,
}
DOCUMENT = Path(__file__).parents[2] / "docs" / "json.md"


def keys(kind: Any, path: str = "") -> Iterator[str]:
    """The keys of a dataclass's document, as docs/json.md writes them."""
    if dataclasses.is_dataclass(kind):
        for name, inner in get_type_hints(kind).items():
            yield from keys(inner, f"{path}.{name}" if path else name)
    elif get_origin(kind) in (Union, types.UnionType):
        yield from keys(next(one for one in get_args(kind) if one is not type(None)), path)
    elif get_origin(kind) is tuple:
        yield from keys(get_args(kind)[0], f"{path}[]")
    elif get_origin(kind) is dict:
        yield from keys(get_args(kind)[1], f"{path}.NAME")
    else:
        yield path


@pytest.mark.parametrize("command", REPORTS)
def test_every_key_is_documented(command: str) -> None:
    (section,) = re.findall(rf"^## {command}\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    listed = re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)
    assert listed == list(keys(REPORTS[command]))


def test_the_document_names_the_commands() -> None:
    assert re.findall(r"^## (.+)$", DOCUMENT.read_text(), re.MULTILINE) == list(REPORTS)


def test_a_number_that_json_lacks() -> None:
    @dataclasses.dataclass(frozen=True)
    class Infinite:
        psnr: float

    assert json.loads(as_document(Infinite(float("inf")))) == {"psnr": None}
