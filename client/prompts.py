"""What is asked for at once: prompts with options of their own, from a file or from a picture, in batches."""

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
from ditforge.errors import UserError
from ditforge.option import option
from ditforge.small_files import read_bytes

FILE = option("path", "--prompts FILE")
FORM = "one prompt a line, with a tab and a seed behind it where it has one; or lines of JSON, with any option"


@dataclass(frozen=True)
class Prompt:
    """A prompt, the seed of its first picture, and its other options."""

    text: str
    seed: int | None
    options: GenerateOptions

    @classmethod
    def of(cls, text: str, values: Mapping[str, Any]) -> Prompt:
        """The prompt with options by their names, one of which may be a seed. Raises UserError where one cannot be."""
        check_text("prompt", text)
        options = GenerateOptions(**values)
        if options.seed is not None and not isinstance(options.seed, int):
            raise UserError(f"a prompt has one seed, got {options.seed!r}", '{"prompt": "a red circle", "seed": 1}')
        return cls(text, options.seed, replace(options, seed=None))


def read_prompts(path: Path, given: Mapping[str, Any]) -> list[Prompt]:
    """The prompts in a file, with the options `given` where a line does not have its own.

    A line is a prompt, or a prompt, a tab and a seed, or a JSON object with a "prompt" and any options. Empty lines do
    not count. Raises UserError, which names the line, for anything else.
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
    """A line of a prompt file."""
    if not line.lstrip().startswith("{"):
        text, tab, seed = line.rpartition("\t")
        if not tab:
            return Prompt.of(line.strip(), given)
        if not seed.strip().isdecimal():
            raise UserError(f"behind the tab is {seed.strip()!r}, not a seed", f"write {FORM}")
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
    """The prompt and the options that made a picture, with the options `given` instead of its own; and its model.

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


@dataclass(frozen=True)
class Batch:
    """Pictures that `Client.generate` makes in one call: a prompt for each, and their options with a seed for each."""

    prompts: list[str]
    options: GenerateOptions


def make_batches(prompts: list[Prompt], count: int = 1, seed: int | None = None) -> list[Batch]:
    """`count` pictures of each prompt, in their order. Neighbours with the same options are one batch.

    The pictures of a prompt have its seed and the next ones. Where it has none, picture number i of all has `seed` + i,
    by default from a random one.
    """
    first = secrets.randbits(32) if seed is None else seed
    seeded = [
        replace(prompt, seed=first + i * count) if prompt.seed is None else prompt for i, prompt in enumerate(prompts)
    ]
    batches = []
    for options, alike in groupby(seeded, key=lambda prompt: prompt.options):
        pictures = [(prompt.text, (prompt.seed or 0) + k) for prompt in alike for k in range(count)]
        seeds = tuple(picture_seed for _, picture_seed in pictures)
        batches.append(Batch([text for text, _ in pictures], replace(options, seed=seeds)))
    return batches
