"""What a user asks for, checked against the model before anything is sent."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

from ditforge.client.noise import check_seed
from ditforge.client.option import option
from ditforge.client.sampling import check_steps, find_sampler
from ditforge.client.t5_policy import needs_t5
from ditforge.client.told import warn
from ditforge.errors import UserError
from ditforge.model import LEAST_TILE, Model

MAX_GUIDANCE = 100.0
USUAL_CFG = 4.0  # what an error suggests where the model itself has no default

T5 = Literal["auto", "always", "never"]
T5_AUTO = option('t5="auto"', "--t5 auto")


@dataclass(frozen=True)
class Request:
    """Pictures to be made, one for each prompt. Sizes in pixels; `seeds` has a seed for each prompt.

    `true_cfg` is the scale of classifier-free guidance (1 or less: none) where `guidance` is something else;
    `skip_layer_guidance` is a scale too, 0 for none. `with_t5` says for each prompt whether T5 reads it. `vae_tile` is
    the side of the tiles that the pictures are decoded in, None where they are decoded whole.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    height: int
    width: int
    guidance: float
    sampler: str
    negative_prompt: str = ""
    true_cfg: float = 1.0
    skip_layer_guidance: float = 0.0
    with_t5: tuple[bool, ...] = ()
    vae_tile: int | None = None

    def cfg_scale(self, model: Model) -> float:
        """The scale of classifier-free guidance; 1 or less: the prompt alone is asked."""
        return self.guidance if model.guidance == "classifier-free" else self.true_cfg

    def parameters(self, index: int, model: Model) -> dict[str, str | int | float]:
        """Everything that makes the picture `index` again, as it is written into the PNG."""
        optional: dict[str, str | int | float] = {}
        if self.cfg_scale(model) > 1:
            optional["negative_prompt"] = self.negative_prompt
            if model.guidance != "classifier-free":
                optional["true_cfg"] = self.true_cfg
        if self.skip_layer_guidance:
            optional["skip_layer_guidance"] = self.skip_layer_guidance
        if model.t5 == "optional":
            optional["t5"] = "always" if self.with_t5[index] else "never"
        if self.vae_tile is not None:
            optional["vae_tile"] = self.vae_tile
        return {
            "prompt": self.prompts[index],
            "seed": self.seeds[index],
            "steps": self.steps,
            "height": self.height,
            "width": self.width,
            "guidance": self.guidance,
            "sampler": self.sampler,
            **optional,
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
    negative_prompt: str | None = None,
    true_cfg: float | None = None,
    skip_layer_guidance: float | None = None,
    t5: T5 | None = None,
    vae_tile: int | None = None,
) -> Request:
    """A request with the model's defaults for what is None (a random seed), or UserError for what the model cannot do.

    The prompt number i gets the seed `seed` + i.
    """
    if not prompts:
        raise UserError("no prompt was given", "give one, or a list of at least one")
    for prompt in prompts:
        check_text("prompt", prompt)
    if negative_prompt is not None:
        check_text("negative prompt", negative_prompt)
    first = secrets.randbits(32) if seed is None else check_seed(seed)
    find_sampler(sampler)
    height, width = choose_size(height, width, model)
    request = Request(
        prompts=tuple(prompts),
        seeds=tuple(check_seed(first + i) for i in range(len(prompts))),
        steps=check_steps(model.default_steps if steps is None else steps),
        height=height,
        width=width,
        guidance=check_guidance(guidance, model),
        sampler=sampler,
        negative_prompt=negative_prompt or "",
        true_cfg=check_true_cfg(true_cfg, model),
        skip_layer_guidance=check_skip_layer_guidance(skip_layer_guidance, model),
        with_t5=choose_t5(t5, prompts, model),
        vae_tile=choose_vae_tile(vae_tile, height, width, model),
    )
    check_together(request, model)
    return request


def check_text(what: str, text: str) -> None:
    """Raise UserError unless `text` is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise UserError(f"a {what} is a {type(text).__name__}, not a string", "give a string, or a list of strings")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the {what} {text!r} is not text: {error.reason}", "give it in UTF-8") from error


def check_together(request: Request, model: Model) -> None:
    """Raise UserError, or warn, where one option does nothing because of another."""
    if request.cfg_scale(model) > 1:
        return
    scale = model.default_guidance if model.default_guidance > 1 else USUAL_CFG
    fix = option(f"guidance={scale:g}" if model.guidance == "classifier-free" else f"true_cfg={USUAL_CFG:g}")
    if request.skip_layer_guidance:
        raise UserError("skip-layer guidance works on top of classifier-free guidance, which is off", fix)
    if request.negative_prompt:
        warn(f"the negative prompt is ignored without {fix}")


def choose_size(height: int | None, width: int | None, model: Model) -> tuple[int, int]:
    """Height and width in pixels, by default the model's, if the model can make a picture of that size."""
    if not model.sizes:
        height = check_size("height", model.default_size if height is None else height, model)
        return height, check_size("width", model.default_size if width is None else width, model)
    for size in model.sizes:
        if height in (None, size[0]) and width in (None, size[1]):
            return size
    made = " or ".join(option(f"height={h}, width={w}", f"--height {h} --width {w}") for h, w in model.sizes)
    asked = f"{'any' if height is None else height} x {'any' if width is None else width}"
    raise UserError(f"the engines were built for fixed sizes, and {asked} (height x width) is none of them", made)


def check_size(name: str, value: int, model: Model) -> int:
    """`value` in pixels, if the model can make a picture of that height or width."""
    multiple = model.size_multiple
    smallest = max(multiple, model.min_size)
    if not isinstance(value, Integral) or isinstance(value, bool) or not smallest <= value <= model.max_size:
        raise UserError(
            f"{name} must be from {smallest} to {model.max_size} pixels, got {value!r}",
            option(f"{name}={model.default_size}"),
        )
    if value % multiple:
        near = min(max(round(value / multiple), 1) * multiple, model.max_size // multiple * multiple)
        raise UserError(f"{name} must be divisible by {multiple}, got {value}", option(f"{name}={near}"))
    return int(value)


def check_scale(name: str, value: float, suggestion: float) -> float:
    """`value` as a number from 0 to MAX_GUIDANCE."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= MAX_GUIDANCE:
        problem = f"{name} must be a number from 0 to {MAX_GUIDANCE:g}, got {value!r}"
        raise UserError(problem, option(f"{name}={suggestion}"))
    return float(value)


def check_guidance(guidance: float | None, model: Model) -> float:
    """The guidance to use: the model's default for None. A model without guidance says so once, and uses none."""
    if guidance is None:
        return model.default_guidance
    guidance = check_scale("guidance", guidance, model.default_guidance)
    if model.guidance == "none":
        warn(f"{model.name} takes no guidance: {guidance:g} is ignored")
        return 0.0
    return guidance


def check_true_cfg(true_cfg: float | None, model: Model) -> float:
    """The scale of classifier-free guidance beside the model's own guidance: 1, which is none, for None."""
    if true_cfg is None:
        return 1.0
    if model.guidance == "classifier-free":
        problem = f"the guidance of {model.name} is classifier-free guidance already"
        raise UserError(problem, option(f"guidance={true_cfg}"))
    return check_scale("true_cfg", true_cfg, USUAL_CFG)


def check_skip_layer_guidance(scale: float | None, model: Model) -> float:
    """The scale of skip-layer guidance: 0, which is none, for None."""
    if scale is None:
        return 0.0
    scale = check_scale("skip_layer_guidance", scale, model.skip_layers.scale if model.skip_layers else 0.0)
    if scale and model.skip_layers is None:
        raise UserError(
            f"{model.name} has no skip-layer guidance", "leave out skip_layer_guidance (--skip-layer-guidance)"
        )
    return scale


def choose_t5(t5: T5 | None, prompts: Sequence[str], model: Model) -> tuple[bool, ...]:
    """For each prompt whether T5 reads it, and its negative prompt with it. None: always, where there is a T5."""
    if t5 is not None and t5 not in get_args(T5):
        raise UserError(f"t5 must be one of {', '.join(get_args(T5))}, got {t5!r}", T5_AUTO)
    if t5 == "always" and model.t5 == "absent":
        fix = f"{T5_AUTO}, or ditforge export CHECKPOINT --text-encoders all"
        raise UserError(f"{model.name} was exported without T5", fix)
    if t5 == "never" and model.t5 == "required":
        raise UserError(f"{model.name} cannot do without T5", T5_AUTO)
    if t5 == "auto" and model.t5 == "optional":
        return tuple(needs_t5(prompt) for prompt in prompts)
    return (t5 != "never" and model.t5 != "absent",) * len(prompts)


def choose_vae_tile(vae_tile: int | None, height: int, width: int, model: Model) -> int | None:
    """The side of the tiles to decode in, by default the largest that the engines take; None: the picture is one."""
    tile = model.vae_tile if vae_tile is None else check_vae_tile(vae_tile, model)
    return None if tile is None or max(height, width) <= tile else tile


def check_vae_tile(vae_tile: int, model: Model) -> int:
    """`vae_tile` in pixels, if the model's decoder takes tiles of that size."""
    multiple, largest = model.vae_factor, model.max_size if model.vae_tile is None else model.vae_tile
    if model.sizes and vae_tile != model.vae_tile:  # fixed shapes: those of the sizes, or of the tile
        fix = "leave it out" if model.vae_tile is None else option(f"vae_tile={model.vae_tile}")
        raise UserError(f"the engines were built for fixed sizes, and decode no tiles of {vae_tile!r}", fix)
    least = min(max(multiple * LEAST_TILE, model.min_size), largest // multiple * multiple)
    if not isinstance(vae_tile, Integral) or isinstance(vae_tile, bool) or not least <= vae_tile <= largest:
        problem = f"vae_tile must be from {least} to {largest} pixels, got {vae_tile!r}"
        raise UserError(problem, option(f"vae_tile={least}"))
    if vae_tile % multiple:
        near = vae_tile // multiple * multiple
        raise UserError(f"vae_tile must be divisible by {multiple}, got {vae_tile}", option(f"vae_tile={near}"))
    return int(vae_tile)
