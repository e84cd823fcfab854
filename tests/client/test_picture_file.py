"""Pictures on disk, in each format."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

import ditforge.client
from ditforge.client.grid import grid_size, make_grid
from ditforge.client.picture_file import METADATA_KEY, check_fits, check_writable, read_parameters, save_picture
from ditforge.errors import UserError
from ditforge.option import as_flags

PARAMETERS: dict[str, Any] = {
    "prompt": 'ein "großer" 圆 🔴\n',
    "seed": 2**64 - 1,
    "steps": 3,
    "height": 32,
    "width": 48,
    "guidance": 3.5,
    "sampler": "euler",
    "negative_prompt": "blue",
    "model": "dev",
}
SUFFIXES = [".png", ".jpg", ".JPEG", ".webp"]


def picture(parameters: dict[str, Any] = PARAMETERS, size: tuple[int, int] = (48, 32), level: int = 0) -> Image.Image:
    ramp = np.linspace(level, 255, size[0] * size[1] * 3).astype(np.uint8)
    image = Image.fromarray(ramp.reshape(size[1], size[0], 3))
    image.info[METADATA_KEY] = json.dumps(parameters, ensure_ascii=False)
    return image


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_keeps_the_parameters(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    save_picture(picture(), path)
    save_picture(picture(), path)  # one that is there is replaced
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert read_parameters(path) == PARAMETERS
    with Image.open(path) as saved:
        assert saved.format == {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG")
        largest = np.abs(np.asarray(saved, np.int16) - np.asarray(picture(), np.int16)).max()
        assert largest <= (0 if suffix == ".png" else 8)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_the_common_text_is_where_gallery_programs_look(suffix: str, tmp_path: Path) -> None:
    """Exif's UserComment, in its own way to say UTF-16, as AUTOMATIC1111's web UI writes it."""
    save_picture(picture(), tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as saved:
        comment = saved.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    text = comment[8:].decode("utf-16-be")
    assert text.startswith('ein "großer" 圆 🔴\n\nNegative prompt: blue\nSteps: 3, Sampler: euler')


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300), st.sampled_from(SUFFIXES))
@settings(max_examples=50, deadline=None)
def test_any_prompt(tmp_path_factory: pytest.TempPathFactory, prompt: str, suffix: str) -> None:
    path = tmp_path_factory.mktemp("any") / f"a{suffix}"
    save_picture(picture({**PARAMETERS, "prompt": prompt}), path)
    assert read_parameters(path)["prompt"] == prompt


def test_a_prompt_that_fits_into_a_jpeg_only_once(tmp_path: Path) -> None:
    long = {**PARAMETERS, "prompt": "a" * 40_000}
    check_fits(tmp_path / "a.jpg", (48, 32), long)
    save_picture(picture(long), tmp_path / "a.jpg")
    assert read_parameters(tmp_path / "a.jpg") == long
    with pytest.raises(UserError, match=r"(?s)too long for the JPEG file.*out=.*a\.png"):
        check_fits(tmp_path / "a.jpg", (48, 32), {**PARAMETERS, "prompt": "a" * 70_000})
    check_fits(tmp_path / "a.webp", (48, 32), {**PARAMETERS, "prompt": "a" * 70_000})


def test_a_picture_that_is_too_large_for_its_format(tmp_path: Path) -> None:
    check_fits(tmp_path / "a.webp", (16_383, 16), PARAMETERS)
    with pytest.raises(UserError, match=r"WEBP file cannot be 16384 x 16 pixels"):
        check_fits(tmp_path / "a.webp", (16_384, 16), PARAMETERS)


@pytest.mark.parametrize("name", ["a", "a.gif", "a.png.txt"])
def test_another_suffix(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a \.png, \.jpg or \.webp file"):
        check_writable(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("description", [None, "A sunset", "[1]", '{"ditforge": 3}', "{" * 100_000])
def test_pictures_of_others(suffix: str, description: str | None, tmp_path: Path) -> None:
    exif = Image.Exif()
    if description:
        exif[0x010E] = description[:60_000]
    Image.new("RGB", (8, 8)).save(tmp_path / f"a{suffix}", exif=exif)
    with pytest.raises(UserError, match=r"(?s)ditforge did not make it, or another program saved it\n.*save_picture"):
        read_parameters(tmp_path / f"a{suffix}")


def test_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no picture")
    with pytest.raises(UserError, match="is not a picture"):
        read_parameters(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="is not a regular file"):
        read_parameters(tmp_path / "fifo")


def test_a_picture_that_says_it_is_enormous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="is not a picture"):
        read_parameters(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (4, 2, 2), (5, 3, 2), (10, 4, 3)]
)
def test_a_grid(count: int, columns: int, rows: int, tmp_path: Path) -> None:
    images = [picture({**PARAMETERS, "seed": i}, level=20 * i) for i in range(count)]
    grid = make_grid(images)
    assert grid.size == (48 * columns, 32 * rows)
    assert grid_size([image.size for image in images]) == (columns, *grid.size)
    for i, image in enumerate(images):
        left, top = 48 * (i % columns), 32 * (i // columns)
        np.testing.assert_array_equal(np.asarray(grid)[top : top + 32, left : left + 48], np.asarray(image))
    for suffix in SUFFIXES:
        save_picture(grid, tmp_path / f"grid{suffix}")
        made = read_parameters(tmp_path / f"grid{suffix}")
        assert [parameters["seed"] for parameters in made["pictures"]] == list(range(count))


def test_a_grid_of_several_sizes() -> None:
    grid = make_grid([picture(), picture(size=(16, 64))])
    assert grid.size == (96, 64)
    assert grid.getpixel((95, 63)) == (255, 255, 255)


def test_the_advice_is_an_option_that_a_shell_reads(tmp_path: Path) -> None:
    for path, name, words in (
        (Path("my grid.gif"), "grid", "fix:   --grid 'my grid.png'"),
        (tmp_path, "grid", f"is a folder\nfix:   --grid {tmp_path}/picture.png"),
        (Path("/dev/null"), "out", "not a regular file\nfix:   choose another --out"),
        (Path("a" * 300 + ".png"), "grid", "File name too long\nfix:   choose another --grid"),
    ):
        with as_flags(), pytest.raises(UserError) as error:
            check_writable(path, name)
        assert words in str(error.value)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path / ("a" * 300)):
        with pytest.raises(UserError, match=r"^cannot read .*: [\w ]+\nfix"):
            read_parameters(path)


def test_what_a_client_made_is_saved_in_python(tmp_path: Path) -> None:
    ditforge.client.save_picture(picture(), str(tmp_path / "folder" / "a.png"))
    assert read_parameters(tmp_path / "folder" / "a.png") == PARAMETERS
    for image, path, words in (
        (None, tmp_path / "a.png", "an image of PIL, got None"),
        (picture(), 3, "path must be a path"),
        (picture(), tmp_path / "a.gif", "not a .png, .jpg or .webp file"),
        (Image.new("RGB", (8, 8)), tmp_path / "a.png", "has no parameters"),
    ):
        with pytest.raises(UserError, match=words):
            ditforge.client.save_picture(image, path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
