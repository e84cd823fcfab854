"""Prompts with options of their own, read from a file or from a picture, and put together into batches."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ditforge.client.options import NAMES, GenerateOptions, check_names, check_text, combined
from ditforge.client.picture_file import read_parameters
from ditforge.client.request import Request, make_request
from ditforge.errors import UserError
from ditforge.model import Model
from ditforge.option import option
from ditforge.small_files import read_bytes

FILE = option("path", "--prompts FILE")
MOST_DIGITS = 20  # of 2^64 - 1, the largest seed
FORM = "one prompt a line, with a tab and a seed behind it where it has one; or lines of JSON, with any option"


@dataclass(frozen=True)
class Prompt:
    """A prompt, the seed of its first picture (None: not given), and its other options."""

    text: str
    seed: int | None
    options: GenerateOptions

    @classmethod
    def of(cls, text: str, values: Mapping[str, Any]) -> Prompt:
        """Make a prompt with options, `values` by name, which may include a seed. Raises UserError for a bad value."""
        check_text("prompt", text)
        options = GenerateOptions(**values)
        if options.seed is not None and not isinstance(options.seed, int):
            raise UserError(f"a prompt has one seed, got {options.seed!r}", '{"prompt": "a red circle", "seed": 1}')
        return cls(text, options.seed, replace(options, seed=None))


def read_prompts(path: Path, given: Mapping[str, Any]) -> list[Prompt]:
    """Read the prompts in a file. The options `given` count for a line that does not have its own.

    A line is a prompt, or a prompt, a tab and a seed, or a JSON object with a "prompt" and any options. Empty lines are
    ignored. Raises UserError for anything else, with the number of the line.
    """
    try:
        text = read_bytes(path).decode()
    except OSError as error:
        raise UserError(f"cannot read the prompts {path}: {error.strerror}", f"{FILE} has {FORM}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}", f"{FILE} has {FORM}") from None
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                prompts.append(read_line(line, given))
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error.problem}", error.fix) from None
    if not prompts:
        raise UserError(f"there is no prompt in {path}", f"{FILE} has {FORM}")
    return prompts


def read_line(line: str, given: Mapping[str, Any]) -> Prompt:
    """Read one line of a prompt file."""
    if not line.lstrip().startswith("{"):
        text, tab, seed = line.rpartition("\t")
        if not tab:
            return Prompt.of(line.strip(), given)
        if not seed.strip().isdecimal() or len(seed.strip()) > MOST_DIGITS:
            raise UserError(f"behind the tab is {seed.strip()[:40]!r}, not a seed", f"write {FORM}")
        return Prompt.of(text.strip(), {**given, "seed": int(seed)})
    try:
        values = json.loads(line)
        text = values.pop("prompt")
    except (ValueError, RecursionError) as error:
        raise UserError(f"this is not JSON: {error}", f"write {FORM}") from None
    except KeyError:
        raise UserError('there is no "prompt"', '{"prompt": "a red circle", "seed": 1}') from None
    check_names(values, NAMES)
    return Prompt.of(text, combined(given, values))


def read_picture(path: Path, given: Mapping[str, Any]) -> tuple[Prompt, str]:
    """Read from a picture its prompt, its options and the name of its model. The options `given` replace its own.

    Raises UserError for a picture that ditforge did not make.
    """
    parameters = read_parameters(path)
    text = parameters.get("prompt")
    if not isinstance(text, str):
        raise UserError(
            f"{path} has no prompt in it", f"{option('path', '--from PICTURE')} is a single picture that ditforge made"
        )
    values = {name: value for name, value in parameters.items() if name in NAMES}
    return Prompt.of(text, combined(values, given)), str(parameters.get("model"))


def make_requests(model: Model, prompts: list[Prompt], count: int = 1, seed: int | None = None) -> list[Request]:
    """Requests for `count` pictures of each prompt, in their order. Neighbours that differ in nothing else are one.

    The pictures of a prompt have its seed and the next ones. Where it has none, picture number i of all has `seed` + i,
    by default from a random one.
    """
    first = secrets.randbits(32) if seed is None else seed
    seeded = [
        replace(prompt, seed=first + i * count) if prompt.seed is None else prompt for i, prompt in enumerate(prompts)
    ]
    requests = []
    for options, alike in groupby(seeded, key=lambda prompt: prompt.options):
        pictures = [(prompt.text, (prompt.seed or 0) + k) for prompt in alike for k in range(count)]
        seeds = tuple(picture_seed for _, picture_seed in pictures)
        requests.append(make_request(model, [text for text, _ in pictures], replace(options, seed=seeds)))
    return requests
