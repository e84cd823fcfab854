"""What a user asks for, checked against the model before anything is sent."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from ditforge.client.noise import check_seed
from ditforge.client.sampling import check_steps, find_sampler
from ditforge.errors import DitforgeWarning, UserError
from ditforge.model import Model

MAX_GUIDANCE = 100.0


@dataclass(frozen=True)
class Request:
    """Pictures to be made, one for each prompt. Sizes in pixels; `seeds` has a seed for each prompt."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    height: int
    width: int
    guidance: float
    sampler: str

    def parameters(self, index: int, model: Model) -> dict[str, str | int | float]:
        """Everything that makes the picture `index` again, as it is written into the PNG."""
        return {
            "prompt": self.prompts[index],
            "seed": self.seeds[index],
            "steps": self.steps,
            "height": self.height,
            "width": self.width,
            "guidance": self.guidance,
            "sampler": self.sampler,
            "model": model.name,
        }


def make_request(
    model: Model,
    prompts: Sequence[str],
    *,
    seed: int | None,
    steps: int | None,
    height: int | None,
    width: int | None,
    guidance: float | None,
    sampler: str,
) -> Request:
    """A request with the model's defaults for what is None (a random seed), or UserError for what the model cannot do.

    The prompt number i gets the seed `seed` + i.
    """
    if not prompts:
        raise UserError("no prompt was given", "give one, or a list of at least one")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise UserError(
                f"a prompt is a {type(prompt).__name__}, not a string", "give a string, or a list of strings"
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt {prompt!r} is not text: {error.reason}", "give it in UTF-8") from error
    first = secrets.randbits(32) if seed is None else check_seed(seed)
    find_sampler(sampler)
    height, width = choose_size(height, width, model)
    return Request(
        prompts=tuple(prompts),
        seeds=tuple(check_seed(first + i) for i in range(len(prompts))),
        steps=check_steps(model.default_steps if steps is None else steps),
        height=height,
        width=width,
        guidance=check_guidance(guidance, model),
        sampler=sampler,
    )


def choose_size(height: int | None, width: int | None, model: Model) -> tuple[int, int]:
    """Height and width in pixels, by default the model's, if the model can make a picture of that size."""
    if not model.sizes:
        height = check_size("height", model.default_size if height is None else height, model)
        return height, check_size("width", model.default_size if width is None else width, model)
    for size in model.sizes:
        if height in (None, size[0]) and width in (None, size[1]):
            return size
    made = " or ".join(f"--height {height} --width {width}" for height, width in model.sizes)
    asked = f"{'any' if height is None else height} x {'any' if width is None else width}"
    raise UserError(f"the engines were built for fixed sizes, and {asked} (height x width) is none of them", made)


def check_size(name: str, value: int, model: Model) -> int:
    """`value` in pixels, if the model can make a picture of that height or width."""
    multiple = model.size_multiple
    smallest = max(multiple, model.min_size)
    if not isinstance(value, Integral) or isinstance(value, bool) or not smallest <= value <= model.max_size:
        raise UserError(
            f"{name} must be from {smallest} to {model.max_size} pixels, got {value!r}",
            f"--{name} {model.default_size}",
        )
    if value % multiple:
        near = min(max(round(value / multiple), 1) * multiple, model.max_size // multiple * multiple)
        raise UserError(f"{name} must be divisible by {multiple}, got {value}", f"--{name} {near}")
    return int(value)


def check_guidance(guidance: float | None, model: Model) -> float:
    """The guidance to use: the model's default for None. A model without guidance says so once, and uses none."""
    if guidance is None:
        return model.default_guidance
    if not isinstance(guidance, Real) or isinstance(guidance, bool) or not 0 <= guidance <= MAX_GUIDANCE:
        fix = f"--guidance {model.default_guidance}"
        raise UserError(f"guidance must be a number from 0 to {MAX_GUIDANCE:g}, got {guidance!r}", fix)
    if model.guidance == "none":
        warnings.warn(f"{model.name} takes no guidance: {guidance:g} is ignored", DitforgeWarning, stacklevel=4)
        return 0.0
    return float(guidance)
