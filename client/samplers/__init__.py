"""Samplers go from noise to latents, down the noise levels of a flow-matching model. There is one file for each.

A sample at noise level sigma is (1 - sigma) * data + sigma * noise, and the model predicts its velocity, noise - data.
Every sampler has the signature of `Sampler`. To add one, write the function `sample_NAME` in a new file NAME.py in this
folder, where it is found. Its keyword-only parameters are its options, which must be fields of
`ditforge.client.GenerateOptions`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ditforge.arguments import check_takes
from ditforge.errors import UserError
from ditforge.option import setting

Array = npt.NDArray[np.floating[Any]]
Denoise = Callable[[Array, float], Array]  # (latents [B, C, h, w], sigma) -> velocity [B, C, h, w]
Noise = Callable[[], Array]  # () -> fresh standard normal noise [B, C, h, w], each picture's from its own seed
DEFAULT = "euler"


@dataclass(frozen=True)
class Step:
    """The state of a sampler in one step, for a progress bar or a preview.

    index: the number of the step, from 0 to total - 1.
    total: the number of steps.
    sigma: the noise level at which the step begins.
    latents: those at which it begins, [B, C, h, w].
    velocity: what the model predicts for them, of the same shape.
    """

    index: int
    total: int
    sigma: float
    latents: Array
    velocity: Array

    @cached_property
    def denoised(self) -> Array:
        """The model's estimate of the finished latents, [B, C, h, w]. It is computed when it is first asked for."""
        return self.latents - self.sigma * self.velocity


Callback = Callable[[Step], object]


class Sampler(Protocol):
    """The signature that every sampler shares.

    It takes latents [B, C, h, w] at noise level sigmas[0], and sigmas [N + 1] that fall to 0, both of the same floating
    dtype. It returns latents at sigmas[-1], and does not change its arguments. It calls `denoise` for the velocity,
    `noise` if it adds noise, which has the latents' shape, and `callback` once a step.
    """

    def __call__(
        self, denoise: Denoise, latents: Array, sigmas: Array, noise: Noise, callback: Callback | None = None
    ) -> Array: ...


SAMPLERS: tuple[str, ...] = tuple(sorted(module.name for module in iter_modules(__path__)))


def find_sampler(sampler: str | Sampler) -> Sampler:
    """Return the sampler of that name; a function is returned unchanged.

    Raises UserError for an unknown name, with the closest one, and for a function that cannot be called as a sampler.
    """
    if callable(sampler):
        fix = "def sampler(denoise, latents, sigmas, noise, callback=None): …"
        check_takes(sampler, 5, f"the sampler {sampler_name(sampler)}", fix)
        return sampler
    if sampler in SAMPLERS:
        module = import_module(f"{__name__}.{sampler}")
        found: Sampler | None = getattr(module, f"sample_{sampler}", None)
        if found is None:
            raise UserError(f"{module.__file__} has no function sample_{sampler}", "see CONTRIBUTING.md, Add a sampler")
        return found
    wanted = str(sampler).lower().replace("++", "pp").replace(" ", "_")
    close = get_close_matches(wanted, SAMPLERS, n=1) or [DEFAULT]
    problem = f"unknown sampler {sampler!r}, known are {', '.join(SAMPLERS)}"
    raise UserError(problem, setting("sampler", close[0]))


def sampler_name(sampler: str | Sampler) -> str:
    """The name of a sampler in a picture's parameters. For a user's function, it is the function's name."""
    if isinstance(sampler, str):
        return sampler
    function = getattr(sampler, "func", sampler)  # the function that a functools.partial calls
    name = str(getattr(function, "__name__", type(function).__name__))
    module = str(getattr(function, "__module__", ""))
    if module.startswith(f"{__name__}."):
        return module.rpartition(".")[2]
    return f"{module}.{name}" if name in SAMPLERS else name


def sampler_options(sampler: str | Sampler) -> dict[str, Any]:
    """The options that a sampler takes, and their defaults: its keyword-only parameters."""
    try:
        parameters = inspect.signature(find_sampler(sampler)).parameters.values()
    except ValueError:
        return {}
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
