"""Pictures on disk: PNG, JPEG or WebP files that contain the parameters with which the picture can be made again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ditforge import small_files
from ditforge.arguments import AnyPath, read
from ditforge.errors import UserError
from ditforge.option import setting

METADATA_KEY = "ditforge"  # the parameters as JSON: prompt, seed, steps, …
COMMON_KEY = "parameters"  # the same as one text; gallery programs for generated pictures look for it here
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LONGEST_SIDE = {"PNG": 2**31 - 1, "JPEG": 65_535, "WEBP": 16_383}  # pixels
QUALITY = 95  # of JPEG and WebP files, up to 100
# Tags of Exif 2.32. The description is the JSON; gallery programs find the common text in the comment.
DESCRIPTION, EXIF, COMMENT = 0x010E, 0x8769, 0x9286
LARGEST_EXIF = 65_000  # bytes; Exif has to fit into one JPEG segment, of at most 65,535
OURS = "give a picture that ditforge made"
SAVE = "write it with ditforge generate or ditforge.client.save_picture; image.save(), for one, keeps no parameters"


def png(path: Path, name: str) -> str:
    """The option `name`, for the advice in errors, with a PNG file in place of `path`."""
    return setting(name, str(path.with_suffix(".png")))


def check_writable(path: Path, name: str = "out") -> None:
    """Raise UserError if no picture can be written to `path`, which the option `name` gives. It makes its folder.

    It is called before the picture is made.
    """
    if path.suffix.lower() not in FORMATS and (os.path.isfile(path) or not os.path.exists(path)):
        raise UserError(f"{path} is not a .png, .jpg or .webp file", png(path, name))
    small_files.check_writable(path, "picture.png", name)


def check_fits(path: Path, size: tuple[int, int], parameters: dict[str, Any], name: str = "out") -> None:
    """Raise UserError if the file format of `path` cannot hold a picture of that size, or parameters of that length.

    `size` is (width, height) in pixels. `name` is the option that gives the path.
    """
    kind = FORMATS[path.suffix.lower()]
    fix = png(path, name)
    if max(size) > LONGEST_SIDE[kind]:
        raise UserError(f"a {kind} file cannot be {size[0]} x {size[1]} pixels large", fix)
    if kind == "JPEG" and len(exif(parameters, comment=False)) > LARGEST_EXIF:
        raise UserError(f"the parameters of the picture, with its prompt, are too long for the JPEG file {path}", fix)


def read_info(image: Image.Image) -> dict[str, Any]:
    """The parameters of a picture that `Client.generate` has returned. Raises UserError if it has none."""
    if METADATA_KEY not in image.info:
        raise UserError("the picture has no parameters in it: no client made it", OURS)
    parameters: dict[str, Any] = json.loads(image.info[METADATA_KEY])
    return parameters


def save_picture(image: Image.Image, path: AnyPath) -> None:
    """Write a picture that a client made, with its parameters, to `path`: a .png, .jpg or .webp file.

    The file appears complete or not at all, and replaces an existing file. Raises UserError if it cannot be written, or
    if the picture has no parameters.
    """
    if not isinstance(image, Image.Image):
        raise UserError(f"a picture is an image of PIL, got {image!r:.60}", "save_picture(client.generate(…), path)")
    file: Path = read(AnyPath, path, "path")
    read_info(image)
    check_writable(file, "path")
    write_picture(image, file, "path")


def write_picture(image: Image.Image, path: Path, name: str = "out") -> None:
    """Do what save_picture() does, for a path that check_writable() has seen. `name` is the option that gives it."""
    parameters = read_info(image)
    kind = FORMATS[path.suffix.lower()]
    with small_files.written_whole(path, name) as temporary:
        if kind == "PNG":
            info = PngInfo()
            info.add_itxt(METADATA_KEY, image.info[METADATA_KEY])
            info.add_itxt(COMMON_KEY, common_text(parameters))
            image.save(temporary, format=kind, pnginfo=info)
            return
        described = exif(parameters)
        if kind == "JPEG" and len(described) > LARGEST_EXIF:
            described = exif(parameters, comment=False)
        more: dict[str, Any] = {"subsampling": 0} if kind == "JPEG" else {}  # colours as sharp as brightness
        image.save(temporary, format=kind, quality=QUALITY, exif=described, **more)


def exif(parameters: dict[str, Any], comment: bool = True) -> bytes:
    """The parameters as Exif data: as JSON in ImageDescription and, if `comment`, as common text in UserComment."""
    data = Image.Exif()
    data[DESCRIPTION] = json.dumps({METADATA_KEY: parameters})
    if comment:
        data[EXIF] = {COMMENT: b"UNICODE\0" + common_text(parameters).encode("utf-16-be")}
    return data.tobytes()


def read_parameters(path: Path) -> dict[str, Any]:
    """The parameters of a picture that ditforge made. Raises UserError for any other file."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file", OURS)
        with Image.open(path) as image:
            text, described = image.info.get(METADATA_KEY), image.getexif().get(DESCRIPTION)
    except (
        OSError,
        UnidentifiedImageError,
        SyntaxError,
        ValueError,
        RecursionError,
        Image.DecompressionBombError,
    ) as error:
        reason = getattr(error, "strerror", None)  # the system's, and not Pillow's
        problem = f"cannot read {path}: {reason}" if reason else f"{path} is not a picture: {error}"
        raise UserError(problem, OURS) from error
    try:
        parameters = json.loads(text) if text else json.loads(described or "null")[METADATA_KEY]
    except (TypeError, ValueError, KeyError, RecursionError):
        parameters = None
    if not isinstance(parameters, dict):
        problem = f"{path} has no parameters in it: ditforge did not make it, or another program saved it"
        raise UserError(problem, SAVE)
    return parameters


def common_text(parameters: dict[str, Any]) -> str:
    """The parameters, those of the first picture for a grid, as text in the form of AUTOMATIC1111's web UI."""
    parameters = {**parameters, **parameters.get("pictures", [{}])[0]}
    rest = f"Steps: {parameters['steps']}, Sampler: {parameters['sampler']}, CFG scale: {parameters['guidance']}, "
    rest += (
        f"Seed: {parameters['seed']}, Size: {parameters['width']}x{parameters['height']}, Model: {parameters['model']}"
    )
    negative = parameters.get("negative_prompt")
    lines = [parameters["prompt"], *([f"Negative prompt: {negative}"] if negative else []), rest]
    return "\n".join(lines)
