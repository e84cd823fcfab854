"""`GenerateOptions`: the options that a picture is made with, one record for the command line, the clients and HTTP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal, TypedDict, get_args

from ditforge.arguments import bound_fields, check_takes
from ditforge.client.noise import check_seed
from ditforge.client.samplers import DEFAULT, SAMPLERS, Callback, Sampler, sampler_name, sampler_options
from ditforge.client.schedules import ScheduleFunction, check_sigmas, check_steps, find_schedule
from ditforge.client.sizes import parse_size
from ditforge.errors import UserError
from ditforge.model import MAX_CHARACTERS
from ditforge.option import check_names as check_known, option, setting

MAX_GUIDANCE = 100.0
MAX_NOISE = 10.0
PROMPT = option("prompt", "the prompt")
T5 = Literal["auto", "always", "never"]
T5_NAMES: tuple[str, ...] = get_args(T5)

# Names that other tools use → the name of the option here. INSTEAD says what to do where there is no such option.
ELSEWHERE = {
    "num_inference_steps": "steps",
    "sampling_steps": "steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "cfg": "guidance",
    "true_cfg_scale": "true_cfg",
    "neg_prompt": "negative_prompt",
    "negative": "negative_prompt",
    "generator": "seed",
    "sampler_name": "sampler",
    "scheduler": "schedule",
    "schedule_type": "schedule",
    "timesteps": "sigmas",
    "aspect_ratio": "size",
    "image_size": "size",
    "resolution": "size",
    "slg_scale": "skip_layer_guidance",
    "callback_on_step_end": "callback",
}
INSTEAD = dict.fromkeys(
    ("num_images_per_prompt", "num_images", "batch_size", "batch_count", "n_iter", "count", "n"),
    option(
        "give a list with the prompt as often as wanted: generate([prompt] * 4, seed=0)",
        "--count 4 makes so many pictures of each prompt; or write the line as often as wanted",
    ),
) | {"prompt": "give the prompt, or a list of prompts, first: generate(prompt, …)"}


class Options(TypedDict, total=False):
    """The fields of GenerateOptions, and `callback`, as keywords of `generate`."""

    seed: int | Sequence[int] | None
    steps: int | None
    height: int | None
    width: int | None
    size: str | None
    guidance: float | None
    negative_prompt: str | None
    true_cfg: float | None
    skip_layer_guidance: float | None
    t5: T5 | None
    vae_tile: int | None
    sampler: str | Sampler | None
    schedule: str | ScheduleFunction | None
    sigmas: Sequence[float] | None
    eta: float | None
    s_noise: float | None
    callback: Callback | None


@bound_fields
@dataclass(frozen=True)
class GenerateOptions:
    """The options that pictures are made with. A field that is not given, or None, means the model's default.

    seed: an integer from 0 to 2^64 - 1, by default random; prompt number i gets seed + i. Or a list, with a seed for
        each prompt.
    steps: an integer from 1 to 1000.
    height, width: in pixels.
    size: replaces height and width: "WIDTHxHEIGHT", or a shape that gets about as many pixels as the model's default
        size: "square", "portrait" (3:4), "landscape" (4:3), or a ratio such as "16:9".
    guidance: how strictly the prompt is followed, for models that take it.
    negative_prompt: what the picture should not show; it needs classifier-free guidance above 1, which is `guidance` in
        Stable Diffusion 3.5, and `true_cfg` in FLUX.1.
    true_cfg: the scale of classifier-free guidance, for models that have another guidance built in; by default 1, off.
    skip_layer_guidance: the scale of skip-layer guidance, for models that have it; by default 0, off.
    t5: whether T5 reads the prompt, for models that can do without it: "always", "never", or "auto", which leaves it
        out for short and plain prompts.
    vae_tile: the side of the tiles in which pictures are decoded, in pixels, which saves memory in the server; by
        default, tiles are used only if the engines need them.
    sampler: a name in ditforge.client.SAMPLERS, by default "euler"; or a function with the signature of
        ditforge.client.Sampler.
    schedule: how noise levels are spaced: a name in ditforge.client.SCHEDULES, by default the model's own; or a
        function of (steps, ditforge.client.Spacing) that returns steps + 1 levels, from 1 down to 0.
    sigmas: the noise levels themselves, from 1 down to 0, instead of a schedule.
    eta: how much noise a stochastic sampler adds, from 0 to 1.
    s_noise: multiplies the noise that a stochastic sampler adds, from 0 to 10; by default 1.

    Raises UserError for values that no model takes, and for options that the sampler does not have.
    """

    seed: int | Sequence[int] | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    size: str | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    true_cfg: float | None = None
    skip_layer_guidance: float | None = None
    t5: T5 | None = None
    vae_tile: int | None = None
    sampler: str | Sampler | None = None
    schedule: str | ScheduleFunction | None = None
    sigmas: Sequence[float] | None = None
    eta: float | None = None
    s_noise: float | None = None

    def __post_init__(self) -> None:
        for seed in listed(self.seed):
            check_seed(seed)
        if self.negative_prompt is not None:
            check_text(option("negative_prompt"), self.negative_prompt)
        check_scale("guidance", self.guidance, MAX_GUIDANCE, 3.5)
        check_scale("true_cfg", self.true_cfg, MAX_GUIDANCE, 4.0)
        check_scale("skip_layer_guidance", self.skip_layer_guidance, MAX_GUIDANCE, 2.8)
        if self.t5 is not None and (not isinstance(self.t5, str) or self.t5 not in T5_NAMES):
            raise UserError(
                f"{option('t5')} must be one of {', '.join(T5_NAMES)}, got {self.t5!r}",
                option('t5="auto"', "--t5 auto"),
            )
        if self.size is not None:
            parse_size(self.size)
            if self.height is not None or self.width is not None:
                given = [option(name) for name in ("height", "width") if getattr(self, name) is not None]
                problem = f"{setting('size', self.size)} is both the height and the width"
                raise UserError(problem, f"leave out {' and '.join(map(str, given))}")
        self._check_levels()
        self._check_sampler()

    def _check_levels(self) -> None:
        if self.steps is not None:
            check_steps(self.steps)
        if self.schedule is not None:
            find_schedule(self.schedule)
        if self.sigmas is None:
            return
        sigmas = option("sigmas")
        steps = len(check_sigmas(self.sigmas, sigmas)) - 1
        if self.schedule is not None:
            schedule = option("schedule")
            problem = f"{sigmas} are the noise levels that {schedule} would make"
            raise UserError(problem, f"leave out {schedule}, or {sigmas}")
        if self.steps not in (None, steps):
            problem = f"{len(self.sigmas)} {sigmas} are {steps} steps, and {option('steps')} is {self.steps}"
            raise UserError(problem, f"leave out {option('steps')}")

    def _check_sampler(self) -> None:
        sampler = self.used_sampler
        taken = sampler_options(sampler)
        for name in SAMPLER_OPTIONS:
            if getattr(self, name) is None:
                continue
            if name not in taken:
                takers = [str(setting("sampler", each)) for each in SAMPLERS if name in sampler_options(each)]
                problem = f"the sampler {sampler_name(sampler)} takes no {option(name)}"
                raise UserError(problem, f"leave it out, or take one of {', '.join(takers)}")
        check_scale("eta", self.eta, 1.0, 1.0)
        check_scale("s_noise", self.s_noise, MAX_NOISE, 1.0)

    @property
    def used_sampler(self) -> str | Sampler:
        """The sampler that is used: the given one, or "euler", since models have no default of their own."""
        return DEFAULT if self.sampler is None else self.sampler

    def sampler_options(self) -> dict[str, float]:
        """The values of all options that the sampler takes: the given ones, or else its defaults."""
        taken = sampler_options(self.used_sampler)
        given = {name: getattr(self, name) for name in SAMPLER_OPTIONS if name in taken}
        return {name: float(taken[name] if value is None else value) for name, value in given.items()}


NAMES = tuple(field.name for field in fields(GenerateOptions))
SAMPLER_OPTIONS = ("eta", "s_noise")


def make_options(options: GenerateOptions | None, keywords: Options) -> tuple[GenerateOptions, Callback | None]:
    """Combine `options` with `keywords`, which take precedence. Returns the options and the callback.

    Raises UserError for a keyword that is not an option, and for `options` of another type.
    """
    check_names(keywords, [*NAMES, "callback"])
    if options is not None and not isinstance(options, GenerateOptions):
        problem = f"options are a {type(options).__name__}, not GenerateOptions"
        raise UserError(problem, "generate(prompt, GenerateOptions(steps=20)), or generate(prompt, steps=20)")
    given: dict[str, Any] = {name: value for name, value in keywords.items() if value is not None}
    callback: Callback | None = given.pop("callback", None)
    check_callback(callback)
    older = {name: getattr(options, name) for name in NAMES} if options else {}
    return GenerateOptions(**combined(older, given)), callback


# An option → the options that say the same in another way. If it is given anew, their older values are dropped.
REPLACES = {
    "size": ("height", "width"),
    "height": ("size",),
    "width": ("size",),
    "steps": ("sigmas",),
    "schedule": ("sigmas",),
    "sigmas": ("steps", "schedule"),
}


def combined(older: Mapping[str, Any], newer: Mapping[str, Any]) -> dict[str, Any]:
    """Combine options by name: the newer ones, and those of the older ones that no newer one replaces.

    If there is a newer sampler, older options that it does not take are dropped too.
    """
    gone = {name for each in newer for name in REPLACES.get(each, ())}
    if "sampler" in newer:
        taken = sampler_options(newer["sampler"])
        gone |= {name for name in SAMPLER_OPTIONS if name not in taken}
    return {**{name: value for name, value in older.items() if name not in gone}, **newer}


def check_names(names: Iterable[str], known: Sequence[str]) -> None:
    """Raise UserError if one of the names is not a known option. The error suggests the nearest name."""
    for name in names:
        if name in INSTEAD and name not in known:
            raise UserError(f"there is no option {name!r}", INSTEAD[name])
    check_known(names, known, ELSEWHERE)


def listed(seed: int | Sequence[int] | None) -> tuple[int, ...]:
    """The given seeds as a tuple, which is empty for None."""
    if isinstance(seed, Sequence):
        return tuple(seed)
    return () if seed is None else (seed,)


def check_callback(callback: Callback | None) -> None:
    """Raise UserError unless `callback` is None, or a function that takes a step."""
    if callback is None:
        return
    fix = "callback=lambda step: print(step.index)"
    if not callable(callback):
        raise UserError(f"callback must be a function, got {callback!r}", fix)
    check_takes(callback, 1, "the callback ", fix)


def check_text(what: str, text: str) -> None:
    """Raise UserError unless `text`, which errors call `what`, is a string in UTF-8, and not too long."""
    if not isinstance(text, str):
        raise UserError(f"{what} must be a string, got {text!r:.60}", "write it as text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} {text!r:.60} is not text: {error.reason}", "give it in UTF-8") from error
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{what} has at most {MAX_CHARACTERS:,} characters, got {len(text):,}", "write a shorter one")


def check_scale(name: str, value: float | None, largest: float, suggestion: float) -> None:
    """Raise UserError unless `value` is None or a number from 0 to `largest`."""
    if value is not None and (not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= largest):
        problem = f"{option(name)} must be a number from 0 to {largest:g}, got {value!r}"
        raise UserError(problem, option(f"{name}={suggestion}"))
