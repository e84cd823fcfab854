"""What an engine of Inductor consists of, as NAME.inductor describes it in JSON, beside its packages and weights."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ditforge.engines.compilers import Shape
from ditforge.errors import UserError
from ditforge.manifest import NEXT_COMMAND, Tensor
from ditforge.regions import Call

SUFFIX = ".inductor"
WEIGHTS = ".safetensors"
PACKAGE = ".pt2"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Variant(_Record):
    """Packages for a range of shapes: by the name of each input, the smallest and the largest; by kind, the file."""

    smallest: dict[str, Shape]
    largest: dict[str, Shape]
    packages: dict[str, str]


class Description(_Record):
    """An engine: the network's inputs and outputs, the calls of its regions, and packages in several variants.

    The weights of a call are tensors in the file of weights, in the order in which the package takes them after the
    call's inputs. The first variant that takes the shapes of a request is run.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    calls: tuple[Call, ...]
    variants: tuple[Variant, ...]


def read(path: Path) -> Description:
    """Read the description in the file `path`. Raises UserError if it is damaged."""
    try:
        return Description.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} is damaged: {error}", f"{NEXT_COMMAND['engines']}   again") from error
