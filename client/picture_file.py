"""Pictures on disk: PNG with everything in it that makes the picture again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ditforge import small_files
from ditforge.errors import UserError

METADATA_KEY = "ditforge"  # JSON: prompt, seed, steps, …
COMMON_KEY = "parameters"  # the same as one text, where the gallery programs of this field look for it


def check_writable(path: Path) -> None:
    """Raise UserError if no picture can be written to `path`: found out before one is made, not after."""
    if path.suffix.lower() != ".png" and not path.is_dir():
        raise UserError(f"{path} is not a .png file", f"--out {path.with_suffix('.png')}")
    small_files.check_writable(path, "picture.png")


def read_info(image: Image.Image) -> dict[str, Any]:
    """The parameters of a picture that Client.generate made."""
    parameters: dict[str, Any] = json.loads(image.info[METADATA_KEY])
    return parameters


def save_picture(image: Image.Image, path: Path) -> None:
    """Write the picture and its parameters to `path`, whole or not at all. Raises UserError if that is impossible."""
    info = PngInfo()
    info.add_itxt(METADATA_KEY, image.info[METADATA_KEY])
    info.add_itxt(COMMON_KEY, common_text(read_info(image)))
    with small_files.written_whole(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_parameters(path: Path) -> dict[str, Any]:
    """The parameters of a picture that ditforge made. Raises UserError for any other file."""
    try:
        with Image.open(path) as image:
            text = image.info.get(METADATA_KEY)
        parameters = json.loads(text or "null")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a picture: {error}", "give a PNG file that ditforge made") from error
    if not isinstance(parameters, dict):
        raise UserError(
            f"{path} has no parameters in it: ditforge did not make it", "give a PNG file that ditforge made"
        )
    return parameters


def common_text(parameters: dict[str, Any]) -> str:
    """The parameters in the form that AUTOMATIC1111's web UI introduced."""
    rest = f"Steps: {parameters['steps']}, Sampler: {parameters['sampler']}, CFG scale: {parameters['guidance']}, "
    rest += (
        f"Seed: {parameters['seed']}, Size: {parameters['width']}x{parameters['height']}, Model: {parameters['model']}"
    )
    negative = parameters.get("negative_prompt")
    lines = [parameters["prompt"], *([f"Negative prompt: {negative}"] if negative else []), rest]
    return "\n".join(lines)
