"""`ditforge.json`: what the folder of a checkpoint says of its model, and no other file of diffusers' layout says.

It lies beside model_index.json and is a JSON object. All its fields are optional:

variant: the variant of the family that the model is, as `--variant` takes it: "large-turbo".
text_length: the number of tokens of T5's input that the model was trained with.
steps: the number of steps that the model's authors recommend.
guidance: the guidance that they recommend; 1 is none for models with classifier-free guidance.

For example, {"variant": "large-turbo", "text_length": 64}. An option of the command goes before the file.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ditforge.errors import UserError
from ditforge.model import MAX_STEPS, Scale
from ditforge.option import setting
from ditforge.small_files import read_json_object

FILE = "ditforge.json"
LONGEST_TEXT = 512  # tokens; the pipelines of diffusers take no more


class FolderSettings(BaseModel):
    """The contents of a ditforge.json. A field that is None was not given."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    variant: str | None = None
    text_length: Annotated[int, Field(ge=1, le=LONGEST_TEXT)] | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance: Scale | None = None


def read_settings(folder: Path) -> FolderSettings:
    """Read the folder's ditforge.json; without one, nothing is given.

    Raises UserError for an unknown field, with the nearest name, and for a value that a field cannot have.
    """
    file = folder / FILE
    if not file.is_file():
        return FolderSettings()
    content, known = read_json_object(file), list(FolderSettings.model_fields)
    for name in content:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            better = f"write {near[0]!r}" if near else "take it out"
            raise UserError(f"{file} has the field {name!r}, which is not known", f"{better}; {', '.join(known)} are")
    try:
        return FolderSettings.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{file}: {first['loc'][0]} is {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        raise UserError(problem, "correct it, or take it out") from error


def check_text_length(length: int | None) -> None:
    """Raise UserError unless T5's input can have that many tokens; None stands for the model's own length."""
    if length is not None and not 1 <= length <= LONGEST_TEXT:
        problem = f"the text length must be from 1 to {LONGEST_TEXT} tokens, got {length}"
        raise UserError(problem, f"{setting('text_length', LONGEST_TEXT // 2)}, or leave it out")
