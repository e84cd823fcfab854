"""Makes a request of what a user asks for, and checks it against the model before anything is sent."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ditforge.client.noise import MAX_SEED, check_seed
from ditforge.client.options import PROMPT, GenerateOptions, check_text
from ditforge.client.samplers import DEFAULT, Sampler, sampler_name
from ditforge.client.schedules import Sigmas, Spacing, check_sigmas, make_sigmas, schedule_name
from ditforge.client.sizes import choose_size, choose_vae_tile
from ditforge.client.t5_policy import needs_t5
from ditforge.client.told import warn
from ditforge.errors import UserError
from ditforge.model import Model
from ditforge.option import option

USUAL_CFG = 4.0  # the scale that errors suggest if the model itself has no default above 1


@dataclass(frozen=True)
class Request:
    """The pictures to make, one for each prompt, with everything that decides what they look like.

    seeds, with_t5: for each prompt, the seed, and whether T5 reads the prompt.
    height, width: in pixels.
    guidance: what the model's own guidance takes; Model.guidance says what it is.
    true_cfg: the scale of classifier-free guidance if `guidance` is another one; 1 or less for none.
    skip_layer_guidance: the scale of skip-layer guidance; 0 for none.
    sigmas: the noise levels [steps + 1].
    schedule: the name of the schedule that made the noise levels, or "given" if the user gave them.
    vae_tile: the side in pixels of the tiles that pictures are decoded in, or None if they are decoded whole.
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
        """The number of sampler steps."""
        return len(self.sigmas) - 1

    def cfg_scale(self, model: Model) -> float:
        """The scale of classifier-free guidance. If it is 1 or less, the negative prompt is not used."""
        return self.guidance if model.guidance == "classifier-free" else self.true_cfg

    def parameters(self, index: int, model: Model) -> dict[str, str | int | float | list[float]]:
        """The parameters with which picture `index` can be made again, as they are written into its file.

        If the sampler or the schedule is a user's own function, its name is written.
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
    """Make a request for pictures of the prompts. Options that are None get the model's defaults, or a random seed.

    Raises UserError for an option that the model does not have or a value that it cannot take. Warns about an option
    that it ignores.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
        raise UserError(
            f"a prompt is of the type {type(prompts).__name__}, and not a string", "give a string, or a list of strings"
        )
    if not prompts:
        raise UserError("no prompt was given", "give one, or a list of at least one")
    for prompt in prompts:
        check_text(PROMPT, prompt)
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
    """A seed for each of `count` prompts: the given seeds, or one seed, given or random, and those that follow it.

    Raises UserError if there are several seeds, but not `count` of them, or for a seed out of range.
    """
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise UserError(f"there are {count} prompts and {len(seed)} seeds", "give one seed, or one for each prompt")
        return tuple(map(check_seed, seed))
    return following(secrets.randbits(32) if seed is None else seed, count)


def following(seed: int, count: int) -> tuple[int, ...]:
    """`count` seeds, from `seed` on. Raises UserError if one of them is too large for a seed."""
    last = check_seed(seed) + count - 1
    if last > MAX_SEED:
        problem = f"{count} pictures with the seeds from {seed} on would end at {last}, above the largest, 2^64 - 1"
        raise UserError(problem, f"{option(f'seed={MAX_SEED - count + 1}')}, or a lower one")
    return tuple(range(seed, last + 1))


def choose_sigmas(options: GenerateOptions, model: Model, spacing: Spacing) -> tuple[str, Sigmas]:
    """The name of the schedule, and its noise levels, float32 [steps + 1]."""
    if options.sigmas is not None:
        return GIVEN, check_sigmas(options.sigmas, option("sigmas"))
    schedule = "default" if options.schedule is None else options.schedule
    steps = model.default_steps if options.steps is None else options.steps
    return schedule_name(schedule), make_sigmas(schedule, steps, spacing)


def check_together(request: Request, model: Model) -> None:
    """Raise UserError, or warn, if an option has no effect because classifier-free guidance is off."""
    if request.cfg_scale(model) > 1:
        return
    scale = model.default_guidance if model.default_guidance > 1 else USUAL_CFG
    fix = option(f"guidance={scale:g}" if model.guidance == "classifier-free" else f"true_cfg={USUAL_CFG:g}")
    if request.skip_layer_guidance:
        problem = f"{option('skip_layer_guidance')} works on top of classifier-free guidance, which is off"
        raise UserError(problem, fix)
    if request.negative_prompt:
        warn(f"the negative prompt is ignored without {fix}")


def choose_guidance(guidance: float | None, model: Model) -> float:
    """The guidance to use, by default the model's. Warns if the model takes none, and returns 0 then."""
    if guidance is None:
        return model.default_guidance
    if guidance and model.guidance == "none":
        warn(f"{model.name} takes no guidance: {guidance:g} is ignored")
        return 0.0
    return float(guidance)


def choose_true_cfg(true_cfg: float | None, model: Model) -> float:
    """The scale of classifier-free guidance beside the model's own guidance; by default 1, which is none.

    Raises UserError if the model's own guidance is classifier-free guidance already.
    """
    if true_cfg is None:
        return 1.0
    if model.guidance == "classifier-free":
        problem = f"the guidance of {model.name} is classifier-free guidance already, without {option('true_cfg')}"
        raise UserError(problem, option(f"guidance={true_cfg}"))
    return float(true_cfg)


def choose_skip_layer_guidance(scale: float | None, model: Model) -> float:
    """The scale of skip-layer guidance; by default 0, which is none. Raises UserError if the model does not have it."""
    if scale and model.skip_layers is None:
        raise UserError(
            f"{model.name} has no skip-layer guidance",
            f"leave out {option('skip_layer_guidance')}",
        )
    return float(scale or 0.0)


def choose_t5(t5: str | None, prompts: Sequence[str], model: Model) -> tuple[bool, ...]:
    """For each prompt, whether T5 reads it and its negative prompt. By default it does, if the model has a T5.

    Raises UserError for "always" if the model has no T5, and for "never" if it cannot do without T5.
    """
    t5_auto = option('t5="auto"', "--t5 auto")
    if t5 == "always" and model.t5 == "absent":
        fix = f"{t5_auto}, or ditforge export CHECKPOINT --text-encoders all"
        raise UserError(f"{model.name} was exported without T5", fix)
    if t5 == "never" and model.t5 == "required":
        raise UserError(f"{model.name} cannot do without T5", t5_auto)
    if t5 == "auto" and model.t5 == "optional":
        return tuple(needs_t5(prompt) for prompt in prompts)
    return (t5 != "never" and model.t5 != "absent",) * len(prompts)
