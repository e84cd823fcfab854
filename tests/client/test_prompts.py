"""Prompts from a file, and from a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from published import MODEL

from ditforge.client import GenerateOptions
from ditforge.client.picture_file import METADATA_KEY, save_picture
from ditforge.client.prompts import Prompt, make_requests, read_picture, read_prompts
from ditforge.errors import UserError
from ditforge.option import as_flags

FILE = """
a red circle
  a blue square \t7

{"prompt": "a green star", "seed": 3, "steps": 5, "sampler": "ddim", "eta": 0.5}
{"prompt": "wide", "size": "16:9"}
12: the movie
"""


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(FILE)
    given = {"steps": 2, "height": 64}
    assert read_prompts(tmp_path / "prompts.txt", given) == [
        Prompt("a red circle", None, GenerateOptions(**given)),
        Prompt("a blue square", 7, GenerateOptions(**given)),
        Prompt("a green star", 3, GenerateOptions(steps=5, height=64, sampler="ddim", eta=0.5)),
        Prompt("wide", None, GenerateOptions(steps=2, size="16:9")),
        Prompt("12: the movie", None, GenerateOptions(**given)),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a\tb", r"line 2: behind the tab is 'b', not a seed"),
        ("a\t" + "9" * 5000, r"line 2: behind the tab is '9+', not a seed"),
        ('{"prompt": "a", "schedule": [1]}', r"line 2: unknown schedule \[1\]"),
        ("a\t", "behind the tab is ''"),
        (
            "a\t18446744073709551616",
            r"line 2: behind the tab is '18446744073709551616', not a seed from 0 to 2\^64 - 1",
        ),
        ("{a|b} cats", "line 2: this is not JSON"),
        ('{"prompt": "a", "seed": 1, "seed": 2}', r'(?s)line 2: "seed" is there twice\n.*leave one of them out'),
        (
            '{"prompt": "a", "seed": ' + "1" * 5000 + "}",
            r"(?s)line 2: .*more than 4300 digits\n.*write a shorter number",
        ),
        ('{"prompt": "' + "a" * 32_001 + '"}', 'line 2: "prompt" has at most 32,000 characters, got 32,001'),
        ('{"seed": 3}', 'line 2: there is no "prompt"'),
        ('{"prompt": 3}', 'line 2: "prompt" must be a string, got 3'),
        (
            '{"prompt": "a", "cfg_scale": 3}',
            r"(?s)line 2: there is no option 'cfg_scale'\n.*\"guidance\": …",
        ),
        ('{"prompt": "a", "count": 4}', r"(?s)line 2: there is no option 'count'\n.*--count 4 makes"),
        ('{"prompt": "a", "sampler": "eular"}', r"(?s)line 2: unknown sampler 'eular'.*fix:   \"sampler\": \"euler\""),
        (
            '{"prompt": "a", "size": "16:9", "width": 64}',
            r'line 2: "size": "16:9" is both .*\nfix:   leave out "width"',
        ),
        ('{"prompt": "a", "callback": 3}', "line 2: there is no option 'callback'"),
        ('{"prompt": "a", "steps": "3"}', r'line 2: "steps" must be .*\nfix:   "steps": 28, '),
        ('{"prompt": "a", "seed": [1, 2]}', r'line 2: "seed" must be one seed, got \[1, 2\]\nfix:   "seed": 1'),
        ('{"prompt": "a", "eta": 1}', 'line 2: the sampler euler takes no "eta"'),
    ],
)
def test_a_line_that_is_wrong(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"fine\n{line}\n")
    with as_flags(), pytest.raises(UserError, match=words) as error:
        read_prompts(tmp_path / "prompts.txt", {})
    assert str(tmp_path / "prompts.txt") in error.value.problem


@pytest.mark.parametrize(
    ("line", "given", "problem", "fix"),
    [
        ("a", {"height": 700}, "--height must be divisible by 16, got 700", "--height 704"),
        ('{"prompt": "a"}', {"size": "17x17"}, "--size must have sides .*got '17x17'", "--size 64x64"),
        ('{"prompt": "a", "steps": 3}', {"height": 700}, "--height must be", "--height 704"),
        ('{"prompt": "a", "height": 700}', {"steps": 3}, 'p.txt, line 1: "height" must be divisible', '"height": 704'),
        (
            '{"prompt": "a", "skip_layer_guidance": 3}',
            {},
            "p.txt, line 1: .* has no",
            'leave out "skip_layer_guidance"',
        ),
        ('{"prompt": "a", "size": "17x17"}', {}, 'p.txt, line 1: "size" must have sides', '"size": "64x64"'),
        (
            '{"prompt": "a", "seed": 18446744073709551615}',
            {},
            "p.txt, line 1: 2 pictures with .*2^64 - 1",
            '"seed": 184467',
        ),
    ],
)
def test_an_error_says_where_the_option_is_written(
    line: str, given: dict[str, Any], problem: str, fix: str, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text(line)
    small = MODEL.model_copy(update={"min_size": 64})
    with as_flags(), pytest.raises(UserError) as error:
        make_requests(small, read_prompts(tmp_path / "p.txt", given), 2)
    assert re.search(f"^({tmp_path}/)?{problem.replace('^', chr(92) + '^')}", error.value.problem)
    assert error.value.fix.startswith(fix)


def test_an_option_that_is_wrong_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n")
    with as_flags(), pytest.raises(UserError, match=r"^--steps must be"):
        read_prompts(tmp_path / "p.txt", {"steps": 0})


def test_lines_as_editors_write_them(tmp_path: Path) -> None:
    """Windows' ends of lines and its mark at the beginning; other characters that Python takes for ends of lines."""
    (tmp_path / "p.txt").write_bytes("\ufeffa\t7\r\n# a comment\r\n  #\tb\r\nc\u2028d\x0be\r\n".encode())
    assert read_prompts(tmp_path / "p.txt", {}) == [
        Prompt("a", 7, GenerateOptions()),
        Prompt("c\u2028d\x0be", None, GenerateOptions()),
    ]
    (tmp_path / "p.txt").write_text('{"prompt": "#1 dad"}')
    assert read_prompts(tmp_path / "p.txt", {})[0].text == "#1 dad"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no prompt"),
        (b"\n \n# a\n", "no prompt"),
        (b"\xff\xfe", "not UTF-8"),
        ("a cat".encode("utf-16-le"), "not UTF-8 text: there are null bytes"),
        (None, "cannot read"),
    ],
)
def test_a_file_without_prompts(content: bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_prompts(tmp_path / "prompts.txt", {})


def test_neighbours_that_differ_in_nothing_else_are_one_request() -> None:
    small, large = GenerateOptions(height=64), GenerateOptions(height=128)
    prompts = [Prompt("a", None, small), Prompt("b", 7, small), Prompt("c", None, large), Prompt("d", None, small)]
    first, second, third = make_requests(MODEL, prompts, 2, seed=100)
    assert (first.prompts, first.seeds) == (("a", "a", "b", "b"), (100, 101, 7, 8))
    assert (second.prompts, second.seeds, second.height) == (("c", "c"), (104, 105), 128)
    assert (third.prompts, third.seeds, third.height) == (("d", "d"), (106, 107), 64)
    random = [make_requests(MODEL, prompts)[0].seeds[0] for _ in range(8)]
    assert len(set(random)) > 1


PARAMETERS: dict[str, Any] = {
    "prompt": "a red circle",
    "seed": 5,
    "steps": 3,
    "height": 32,
    "width": 48,
    "guidance": 3.5,
    "sampler": "ddim",
    "eta": 0.5,
    "sigmas": [1, 0.5, 0.25, 0],
    "model": "dev",
    "of_next_year": True,
}


def saved(folder: Path, parameters: dict[str, Any] = PARAMETERS) -> Path:
    image = Image.new("RGB", (48, 32))
    image.info[METADATA_KEY] = json.dumps(parameters)
    save_picture(image, folder / "a.webp")
    return folder / "a.webp"


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({}, {}),
        ({"guidance": 2.0}, {"guidance": 2.0}),
        ({"sampler": "heun"}, {"sampler": "heun", "eta": None}),
        ({"sampler": "euler_ancestral"}, {"sampler": "euler_ancestral"}),
        ({"steps": 9}, {"steps": 9, "sigmas": None}),
        ({"schedule": "karras"}, {"schedule": "karras", "sigmas": None}),
        ({"sigmas": [1, 0]}, {"sigmas": [1, 0], "steps": None}),
        ({"size": "16:9"}, {"size": "16:9", "height": None, "width": None}),
    ],
)
def test_a_picture_again(given: dict[str, Any], changed: dict[str, Any], tmp_path: Path) -> None:
    prompt, model = read_picture(saved(tmp_path), given)
    names = ("steps", "height", "width", "guidance", "sampler", "eta", "sigmas")
    options = {**{name: PARAMETERS[name] for name in names}, **changed}
    assert (prompt, model) == (Prompt("a red circle", 5, GenerateOptions(**options)), "dev")
    assert read_picture(saved(tmp_path), {**given, "seed": 8})[0].seed == 8


def test_a_picture_that_cannot_be_made_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no prompt in it"):
        read_picture(saved(tmp_path, {"columns": 1, "pictures": [PARAMETERS]}), {})
    own = saved(tmp_path, {**PARAMETERS, "sampler": "mine"})
    with as_flags(), pytest.raises(UserError, match=r"a.webp: unknown sampler 'mine'.*\nfix:   --sampler"):
        read_picture(own, {})
    assert read_picture(own, {"sampler": "euler"})[0].options.sampler == "euler"
    long = saved(tmp_path, {**PARAMETERS, "steps": 5000, "sigmas": None})
    with (
        as_flags(),
        pytest.raises(UserError, match=r'a.webp: "steps" must be from 1 to 1000, got 5000\nfix:   --steps 28'),
    ):
        read_picture(long, {})
    with as_flags(), pytest.raises(UserError, match=r"^--steps must be"):
        read_picture(long, {"steps": 0})


def test_pictures_are_kept_by_and_by() -> None:
    """What is made is not lost if a later picture fails: a request has few of them."""
    prompts = [Prompt.of(f"circle {i}", {"steps": 2}) for i in range(19)]
    requests = make_requests(MODEL, prompts, count=1, seed=5)
    assert [len(request.prompts) for request in requests] == [8, 8, 3]
    assert [text for request in requests for text in request.prompts] == [prompt.text for prompt in prompts]
    assert [seed for request in requests for seed in request.seeds] == list(range(5, 24))
    assert {len(request.prompts) for request in make_requests(MODEL, prompts[:1], count=16)} == {8}
