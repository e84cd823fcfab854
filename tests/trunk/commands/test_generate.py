"""`ditforge generate` against a real server: options, files and what is printed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Result, assert_error, run_here, settled_calls
from pictures import LAST_BIT, largest_difference
from PIL import Image

from ditforge.client.picture_file import METADATA_KEY, read_parameters, save_picture
from ditforge.triton_repo.server import Server

Run = Callable[..., Result]


@pytest.fixture
def run(
    schnell_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Runs `ditforge generate` with these arguments, and small pictures, in the empty folder `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def generate(*arguments: str, small: bool = True) -> Result:
        options = ("--steps", "1", "--height", "32", "--width", "48") if small else ()
        return run_here(["generate", "--url", schnell_server.url, *options, *arguments], monkeypatch, capfd)

    return generate


def same(one: str, other: str) -> bool:
    with Image.open(one) as a, Image.open(other) as b:
        return a.size == b.size and largest_difference(a, b) <= LAST_BIT


def test_the_seed_is_printed_beside_the_paths(run: Run) -> None:
    one = run("a", "-o", "a.png")
    seed = read_parameters(Path("a.png"))["seed"]
    assert (one.code, one.out) == (0, "a.png\n")
    assert f"a.png: seed {seed}\n" in one.err
    several = run("a", "--count", "2", "--seed", "7")
    assert several.out == "picture-7.png\npicture-8.png\n"
    assert "picture-7.png: seed 7\npicture-8.png: seed 8\n" in several.err
    assert run("a", "--count", "2", "-o", "b.webp").out == "b-0.webp\nb-1.webp\n"
    assert sorted(os.listdir()) == ["a.png", "b-0.webp", "b-1.webp", "picture-7.png", "picture-8.png"]


def test_a_picture_that_is_there_is_replaced(run: Run) -> None:
    for seed in ("1", "2"):
        assert run("a", "--seed", seed, "-o", "a.png").code == 0
    assert read_parameters(Path("a.png"))["seed"] == 2


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_from_a_picture(
    run: Run, suffix: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps", "3", "--size", "64x32", "--sampler", "ddim", "--eta", "0.5", "--schedule", "karras")
    first = run("a red circle", "--seed", "4", *options, "-o", f"a.{suffix}", small=False)
    assert first.code == 0, first.err
    shown = run_here(["inspect", f"a.{suffix}"], monkeypatch, capfd).out
    for row in ("prompt a red circle", "seed 4", "sampler ddim", "eta 0.5", "schedule karras", "width 64"):
        assert any(" ".join(line.split()) == row for line in shown.splitlines()), shown
    again = run("--from", f"a.{suffix}", "-o", f"b.{suffix}", small=False)
    assert (again.code, again.out) == (0, f"b.{suffix}\n"), again.err
    assert "warning" not in again.err
    assert read_parameters(Path(f"b.{suffix}")) == read_parameters(Path(f"a.{suffix}"))
    assert same(f"a.{suffix}", f"b.{suffix}")
    other = run("a blue square", "--from", f"a.{suffix}", "--sampler", "euler", "-o", "c.png", small=False)
    assert other.code == 0, other.err
    made = read_parameters(Path("c.png"))
    assert (made["prompt"], made["sampler"], made["seed"], made["steps"]) == ("a blue square", "euler", 4, 3)
    assert "eta" not in made


def test_from_a_picture_of_another_model(run: Run) -> None:
    image = Image.new("RGB", (48, 32))
    parameters = {"prompt": "a", "seed": 1, "steps": 1, "height": 32, "width": 48, "guidance": 3.5, "sampler": "euler"}
    image.info[METADATA_KEY] = json.dumps({**parameters, "model": "flux-tiny"})
    save_picture(image, Path("a.png"))
    result = run("--from", "a.png", "-o", "b.png", small=False)
    assert result.code == 0
    assert "warning: that picture is of flux-tiny, and the server has random-schnell" in result.err


def test_a_file_of_prompts_and_a_grid(run: Run) -> None:
    lines = 'a red circle\na blue square\t9\n{"prompt": "a", "size": "32x64", "sampler": "euler_ancestral"}\n'
    Path("prompts.txt").write_text(lines)
    result = run("--prompts", "prompts.txt", "--seed", "5", "-o", "p.png", "--grid", "grid.jpg")
    assert result.code == 0, result.err
    assert result.out == "p-0.png\np-1.png\np-2.png\ngrid.jpg\n"
    assert "p-1.png: seed 9\np-2.png: seed 7\n" in result.err
    assert "2 of 2" in result.err  # the progress is over all steps: two of the prompts are one batch
    made = [read_parameters(Path(f"p-{i}.png")) for i in range(3)]
    assert [each["seed"] for each in made] == [5, 9, 7]
    assert (made[2]["sampler"], made[2]["height"], made[2]["s_noise"]) == ("euler_ancestral", 64, 1.0)
    with Image.open("grid.jpg") as grid:
        assert grid.size == (96, 128)
    assert [each["seed"] for each in read_parameters(Path("grid.jpg"))["pictures"]] == [5, 9, 7]
    alone = run("a blue square", "--seed", "9", "-o", "alone.png")
    assert alone.code == 0
    assert same("alone.png", "p-1.png")
    unnamed = run("--prompts", "prompts.txt", "--seed", "5")
    assert unnamed.out == "picture-0-5.png\npicture-1-9.png\npicture-2-7.png\n"


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        ((), ("no prompt was given", "ditforge generate --help")),
        (("a", "-o", "a.gif"), ("a.gif", "--out a.png")),
        (("a", "--grid", "my grid.gif"), ("my grid.gif is not a", "fix:   --grid 'my grid.png'")),
        (("a", "-o", "a.png", "--grid", "a.png"), ("both the grid and a picture", "--grid a-grid.png")),
        (("a", "-o", "a.png", "--grid", "./folder/../a.png"), ("both the grid and a picture",)),
        (("a", "--seed", "3", "--grid", "picture-3.png"), ("both the grid and a picture",)),
        (
            ("a", "-o", "folder/none.png", "--count", "2", "--grid", "/proc/grid.png"),
            ("/proc/grid.png", "choose another --grid"),
        ),
        (("a", "-o", "/dev/null"), ("/dev/null is not a regular file", "choose another --out")),
        (("a", "--size", "33x33"), ("--size must have sides", "--size 32x32")),
        (("a", "--seed", "18446744073709551615", "--count", "2"), ("2 pictures", "--seed 18446744073709551614")),
        (("a", "--count", "2", "-o", "b.png"), ("b-1.png is a folder",)),
        (("a", "--count", "2", "-o", ""), ("the path is empty",)),
        (("💡" * 20_000, "-o", "a.jpg"), ("too long for the JPEG file",)),
        (("a", "--prompts", "prompts.txt"), ("--prompts, and a prompt",)),
        (("--from", "a.png", "--prompts", "prompts.txt"), ("--prompts, and --from",)),
        (("--from", "none.png"), ("cannot read none.png: No such file or directory",)),
        (("--prompts", "prompts.txt"), ("prompts.txt, line 2", "steps")),
        (("a", "--size", "16:9", "--width", "32"), ("both the height and the width",)),
        (("a", "--sigmas", "1,x,0"), ("--sigmas must be numbers, got '1,x,0'", "--sigmas 1,0.75")),
        (("a", "--sigmas", "1,0.5"), ("fall from 1 to 0",)),
        (("a", "--sampler", "euler", "--eta", "1"), ("euler takes no --eta", "--sampler ddim")),
        (("a", "--schedule", "karas"), ("unknown schedule 'karas'", "--schedule karras")),
        (("a", "--size", "4:1x"), ("size must be",)),
    ],
)
def test_what_is_refused_before_any_work(
    run: Run, schnell_server: Server, arguments: tuple[str, ...], mentions: tuple[str, ...]
) -> None:
    Path("prompts.txt").write_text('a\n{"prompt": "a", "stepz": 3}\n')
    Path("b-1.png").mkdir()
    before = settled_calls(schnell_server.url)
    assert_error(run(*arguments, small=False), *mentions)
    assert settled_calls(schnell_server.url) == before
    assert set(os.listdir()) <= {"prompts.txt", "b-1.png", "folder"}
