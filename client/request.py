"""What a user asks for, checked against the model before anything is sent."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ditforge.client.noise import check_seed
from ditforge.client.options import GenerateOptions, check_text
from ditforge.client.samplers import DEFAULT, Sampler, sampler_name
from ditforge.client.schedules import Sigmas, Spacing, check_sigmas, make_sigmas, schedule_name
from ditforge.client.sizes import choose_size, choose_vae_tile
from ditforge.client.t5_policy import needs_t5
from ditforge.client.told import warn
from ditforge.errors import UserError
from ditforge.model import Model
from ditforge.option import option

USUAL_CFG = 4.0  # what an error suggests where the model itself has no default


@dataclass(frozen=True)
class Request:
    """Pictures to be made, one for each prompt. Sizes in pixels; `seeds` has a seed for each prompt.

    `true_cfg` is the scale of classifier-free guidance (1 or less: none) where `guidance` is something else;
    `skip_layer_guidance` is a scale too, 0 for none. `with_t5` says for each prompt whether T5 reads it. `vae_tile` is
    the side of the tiles that the pictures are decoded in, None where they are decoded whole. `sigmas` are the noise
    levels [steps + 1] that the schedule called `schedule` has made; "given" is one that the user has made.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    height: int
    width: int
    guidance: float
    sigmas: tuple[float, ...]
    sampler: str | Sampler = DEFAULT
    sampler_options: Mapping[str, float] = field(default_factory=dict)
    schedule: str = "default"
    negative_prompt: str = ""
    true_cfg: float = 1.0
    skip_layer_guidance: float = 0.0
    with_t5: tuple[bool, ...] = ()
    vae_tile: int | None = None

    @property
    def steps(self) -> int:
        """How many steps the sampler goes."""
        return len(self.sigmas) - 1

    def cfg_scale(self, model: Model) -> float:
        """The scale of classifier-free guidance; 1 or less: the prompt alone is asked."""
        return self.guidance if model.guidance == "classifier-free" else self.true_cfg

    def parameters(self, index: int, model: Model) -> dict[str, str | int | float | list[float]]:
        """Everything that makes the picture `index` again, as it is written into the file.

        A sampler or schedule that is a function of the user's is there by its name.
        """
        optional: dict[str, str | int | float | list[float]] = dict(self.sampler_options)
        if self.schedule == GIVEN:
            optional["sigmas"] = [float(f"{sigma:.9g}") for sigma in self.sigmas]
        elif self.schedule != "default":
            optional["schedule"] = self.schedule
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
            "sampler": sampler_name(self.sampler),
            **optional,
            "model": model.name,
        }


GIVEN = "given"


def make_request(model: Model, prompts: Sequence[str], options: GenerateOptions) -> Request:
    """A request, with the model's defaults and a random seed for what is None.

    Raises UserError for what the model cannot do, or warns of what it ignores.
    """
    if not prompts:
        raise UserError("no prompt was given", "give one, or a list of at least one")
    for prompt in prompts:
        check_text("prompt", prompt)
    height, width = choose_size(options.height, options.width, options.size, model)
    spacing = Spacing(model.schedule, height // model.vae_factor, width // model.vae_factor)
    schedule, sigmas = choose_sigmas(options, model, spacing)
    request = Request(
        prompts=tuple(prompts),
        seeds=choose_seeds(options.seed, len(prompts)),
        height=height,
        width=width,
        guidance=choose_guidance(options.guidance, model),
        sigmas=tuple(map(float, sigmas)),
        sampler=options.used_sampler,
        sampler_options=options.sampler_options(),
        schedule=schedule,
        negative_prompt=options.negative_prompt or "",
        true_cfg=choose_true_cfg(options.true_cfg, model),
        skip_layer_guidance=choose_skip_layer_guidance(options.skip_layer_guidance, model),
        with_t5=choose_t5(options.t5, prompts, model),
        vae_tile=choose_vae_tile(options.vae_tile, height, width, model),
    )
    check_together(request, model)
    return request


def choose_seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """A seed for each of `count` prompts: those given, or the one given and those after it; by default a random one."""
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise UserError(f"there are {count} prompts and {len(seed)} seeds", "give one seed, or one for each prompt")
        return tuple(map(check_seed, seed))
    first = secrets.randbits(32) if seed is None else check_seed(seed)
    return tuple(check_seed(first + i) for i in range(count))


def choose_sigmas(options: GenerateOptions, model: Model, spacing: Spacing) -> tuple[str, Sigmas]:
    """The name of the schedule, and its noise levels."""
    if options.sigmas is not None:
        return GIVEN, check_sigmas(options.sigmas, "sigmas")
    schedule = "default" if options.schedule is None else options.schedule
    steps = model.default_steps if options.steps is None else options.steps
    return schedule_name(schedule), make_sigmas(schedule, steps, spacing)


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


def choose_guidance(guidance: float | None, model: Model) -> float:
    """The guidance to use: the model's default for None. A model without guidance says so once, and uses none."""
    if guidance is None:
        return model.default_guidance
    if guidance and model.guidance == "none":
        warn(f"{model.name} takes no guidance: {guidance:g} is ignored")
        return 0.0
    return float(guidance)


def choose_true_cfg(true_cfg: float | None, model: Model) -> float:
    """The scale of classifier-free guidance beside the model's own guidance: 1, which is none, for None."""
    if true_cfg is None:
        return 1.0
    if model.guidance == "classifier-free":
        problem = f"the guidance of {model.name} is classifier-free guidance already"
        raise UserError(problem, option(f"guidance={true_cfg}"))
    return float(true_cfg)


def choose_skip_layer_guidance(scale: float | None, model: Model) -> float:
    """The scale of skip-layer guidance: 0, which is none, for None."""
    if scale and model.skip_layers is None:
        raise UserError(
            f"{model.name} has no skip-layer guidance",
            option("leave out skip_layer_guidance", "leave out --skip-layer-guidance"),
        )
    return float(scale or 0.0)


def choose_t5(t5: str | None, prompts: Sequence[str], model: Model) -> tuple[bool, ...]:
    """For each prompt whether T5 reads it, and its negative prompt with it. None: always, where there is a T5."""
    t5_auto = option('t5="auto"', "--t5 auto")
    if t5 == "always" and model.t5 == "absent":
        fix = f"{t5_auto}, or ditforge export CHECKPOINT --text-encoders all"
        raise UserError(f"{model.name} was exported without T5", fix)
    if t5 == "never" and model.t5 == "required":
        raise UserError(f"{model.name} cannot do without T5", t5_auto)
    if t5 == "auto" and model.t5 == "optional":
        return tuple(needs_t5(prompt) for prompt in prompts)
    return (t5 != "never" and model.t5 != "absent",) * len(prompts)
