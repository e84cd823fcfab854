"""Samplers: from noise to latents, down the noise levels of a flow-matching model. One file each.

A sample at noise level sigma is (1 - sigma) * data + sigma * noise, and the model predicts its velocity, noise - data.
Every sampler has the signature of `Sampler`. To add one, write `sample_NAME` in the new file NAME.py of this folder; it
is found there. Its keyword-only parameters are its options, of those that `ditforge.client.GenerateOptions` has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ditforge.errors import UserError
from ditforge.option import option

Array = npt.NDArray[np.floating[Any]]
Denoise = Callable[[Array, float], Array]  # (latents [B, C, h, w], sigma) -> velocity [B, C, h, w]
Noise = Callable[[], Array]  # () -> fresh standard normal noise [B, C, h, w], each picture's from its own seed
DEFAULT = "euler"


@dataclass(frozen=True)
class Step:
    """What a sampler knows in step `index` of `total` (from 0), for a progress bar or a preview.

    denoised [B, C, h, w]: the model's estimate, at noise level sigma, of the finished latents.
    """

    index: int
    total: int
    sigma: float
    denoised: Array


Callback = Callable[[Step], object]


class Sampler(Protocol):
    """The signature that every sampler shares.

    latents [B, C, h, w] at noise level sigmas[0]; sigmas [N + 1], falling to 0; both of one floating dtype. Returns
    latents at sigmas[-1] and leaves its arguments as they are. It calls `denoise` for velocities, `noise` for noise of
    the latents' shape where it adds any, and `callback` once a step.
    """

    def __call__(
        self, denoise: Denoise, latents: Array, sigmas: Array, noise: Noise, callback: Callback | None = None
    ) -> Array: ...


SAMPLERS: tuple[str, ...] = tuple(sorted(module.name for module in iter_modules(__path__)))


def find_sampler(sampler: str | Sampler) -> Sampler:
    """The sampler of that name, or a function that is one as it is.

    Raises UserError, with the closest name, where there is none, and for a function that cannot be called like one.
    """
    if callable(sampler):
        check_signature(sampler)
        return sampler
    if sampler in SAMPLERS:
        found: Sampler = getattr(import_module(f"{__name__}.{sampler}"), f"sample_{sampler}")
        return found
    wanted = str(sampler).lower().replace("++", "pp").replace(" ", "_")
    close = get_close_matches(wanted, SAMPLERS, n=1) or [DEFAULT]
    problem = f"unknown sampler {sampler!r}, known are {', '.join(SAMPLERS)}"
    raise UserError(problem, option(f'sampler="{close[0]}"', f"--sampler {close[0]}"))


def check_signature(sampler: Sampler) -> None:
    """Raise UserError where a user's function does not take what samplers are given."""
    try:
        signature = inspect.signature(sampler)
    except ValueError:  # of some functions written in C
        return
    try:
        signature.bind(None, None, None, None, None)
    except TypeError as error:
        problem = f"the sampler {sampler_name(sampler)}{signature} cannot be called as one: {error}"
        raise UserError(problem, "def sampler(denoise, latents, sigmas, noise, callback=None): …") from None


def sampler_name(sampler: str | Sampler) -> str:
    """What a sampler is called in a picture's parameters. A user's function has its own name."""
    if isinstance(sampler, str):
        return sampler
    function = getattr(sampler, "func", sampler)  # of a functools.partial
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
