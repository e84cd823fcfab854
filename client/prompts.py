"""Prompts with options of their own, read from a file or from a picture, and put together into batches."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ditforge.client.noise import MAX_SEED
from ditforge.client.options import NAMES, PROMPT, GenerateOptions, check_names, check_text, combined
from ditforge.client.picture_file import read_parameters
from ditforge.client.request import Request, following, make_request
from ditforge.errors import UserError
from ditforge.model import Model
from ditforge.option import as_keys, option
from ditforge.small_files import KeyTwice, no_key_twice, read_lines

FILE = option("path", "--prompts FILE")
AT_ONCE = 8  # as many as a server takes into one call by default
MOST_DIGITS = len(str(MAX_SEED))
FORM = "one prompt a line, with a tab and a seed behind it where it has one; or lines of JSON, with any option"


@dataclass(frozen=True)
class Origin:
    """Where a prompt comes from.

    place: the line of a file, or the picture, as errors name it; empty for the command line.
    names: the options that were read there.
    replaceable: whether options of the command line replace those.
    """

    place: str = ""
    names: Collection[str] = ()
    replaceable: bool = False

    @contextmanager
    def named(self) -> Iterator[None]:
        """Name the place in a UserError about an option that was read there, and write the option as it is there."""
        with as_keys(self.names, self.replaceable) as written:
            try:
                yield
            except UserError as error:
                if not written:
                    raise
                raise UserError(f"{self.place}: {error.problem}", error.fix) from None


@dataclass(frozen=True)
class Prompt:
    """A prompt, the seed of its first picture (None: not given), its other options, and where it comes from."""

    text: str
    seed: int | None
    options: GenerateOptions
    origin: Origin = field(default=Origin(), compare=False)

    @classmethod
    def of(cls, text: str, values: Mapping[str, Any], origin: Origin | None = None) -> Prompt:
        """Make a prompt with options, `values` by name, which may include a seed. Raises UserError for a bad value."""
        origin = origin or Origin()
        with origin.named():
            check_text(PROMPT, text)
            options = GenerateOptions(**values)
            if options.seed is not None and not isinstance(options.seed, int):
                raise UserError(f"{option('seed')} must be one seed, got {options.seed!r:.60}", option("seed=1"))
        return cls(text, options.seed, replace(options, seed=None), origin)


def read_prompts(path: Path, given: Mapping[str, Any]) -> list[Prompt]:
    """Read the prompts in a file. The options `given` count for a line that does not have its own.

    A line is a prompt, or a prompt, a tab and a seed, or a JSON object with a "prompt" and any options. Empty lines are
    ignored, and so are comments, which begin with #. Raises UserError for anything else, with the number of the line.
    """
    lines = read_lines(path, "prompts", f"{FILE} has {FORM}")
    return [read_line(line, f"{path}, line {number}", given) for number, line in lines]


def read_line(line: str, place: str, given: Mapping[str, Any]) -> Prompt:
    """Read one line of a prompt file, which errors call `place`."""
    try:
        with as_keys(NAMES):
            text, values = parse_line(line)
    except UserError as error:
        raise UserError(f"{place}: {error.problem}", error.fix) from None
    origin = Origin(place, ("prompt", *values))
    with origin.named():
        together = combined(given, values)
    return Prompt.of(text, together, origin)


def parse_line(line: str) -> tuple[str, dict[str, Any]]:
    """The prompt in a line, and its options by name. Raises UserError if there is no prompt, or an unknown option."""
    if not line.lstrip().startswith("{"):
        text, tab, seed = line.rpartition("\t")
        seed = seed.strip()
        if not tab:
            return line.strip(), {}
        if not seed.isdecimal() or len(seed) > MOST_DIGITS or int(seed) > MAX_SEED:
            raise UserError(f"behind the tab is {seed[:40]!r}, not a seed from 0 to 2^64 - 1", f"write {FORM}")
        return text.strip(), {"seed": int(seed)}
    try:
        values: dict[str, Any] = json.loads(line, object_pairs_hook=no_key_twice)
        prompt: str = values.pop("prompt")
    except KeyTwice as error:
        raise UserError(str(error), "leave one of them out") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"this is not JSON: {error}", f"write {FORM}") from None
    except ValueError:  # of int(): Python reads no more digits than it can read fast
        raise UserError("it holds a number of more than 4300 digits", "write a shorter number") from None
    except KeyError:
        raise UserError('there is no "prompt"', '{"prompt": "a red circle", "seed": 1}') from None
    check_names(values, NAMES)
    return prompt, values


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
    origin = Origin(str(path), {"prompt", *values} - given.keys(), replaceable=True)
    with origin.named():
        together = combined(values, given)
    return Prompt.of(text, together, origin), str(parameters.get("model"))


def make_requests(model: Model, prompts: list[Prompt], count: int = 1, seed: int | None = None) -> list[Request]:
    """Requests for `count` pictures of each prompt, in their order.

    Neighbours that differ in nothing else are one, of up to AT_ONCE pictures: those of a request are finished, and can
    be kept, at the same time.

    The pictures of a prompt have its seed and the next ones. Where it has none, picture number i of all has `seed` + i,
    by default from a random one.
    """
    numbered = following(secrets.randbits(32) if seed is None else seed, len(prompts) * count)
    seeded: list[tuple[Prompt, tuple[int, ...]]] = []
    for i, prompt in enumerate(prompts):
        with prompt.origin.named():
            own = None if prompt.seed is None else following(prompt.seed, count)
        seeded.append((prompt, own or numbered[i * count : (i + 1) * count]))
    requests = []
    for options, group in groupby(seeded, key=lambda pair: pair[0].options):
        alike = list(group)
        texts = [prompt.text for prompt, _ in alike for _ in range(count)]
        seeds = [picture_seed for _, seeds in alike for picture_seed in seeds]
        with alike[0][0].origin.named():
            for first in range(0, len(texts), AT_ONCE):
                some = slice(first, first + AT_ONCE)
                requests.append(make_request(model, texts[some], replace(options, seed=seeds[some])))
    return requests
