"""The options of `ditforge generate` that concern pictures: how they are made, and where they are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditforge import completion
from ditforge.errors import UserError

if TYPE_CHECKING:
    from ditforge.client.prompts import Prompt

MAX_COUNT = 1000  # all pictures can be in memory at the same time
SAMPLER_HELP = f"By default euler; there are {', '.join(completion.samplers())}. docs/client.md describes them."
SCHEDULE_HELP = (
    f"By default the model's own; there are {', '.join(completion.schedules())}. docs/client.md describes them."
)
SIZE_HELP = "Both at once: WxH, square, portrait, landscape, or a ratio such as 16:9."
OUT_HELP = (
    "A .png, .jpg or .webp file, by default picture-SEED.png; of several, FILE-0, FILE-1, … One there is replaced."
)
COUNT_HELP = "How many pictures of each prompt, of the seeds SEED, SEED + 1, …"
GRID_HELP = "One image of all the pictures, beside them."
PROMPTS_HELP = (
    "A file of prompts, one a line, with a tab and a seed where it has one; or JSON lines with any option. "
    "Lines that begin with # are comments."
)
FROM_HELP = "Repeat a picture that ditforge made; other options, and a prompt, are used instead of its own."


@dataclass(frozen=True)
class PictureFlags:
    """The fields of `ditforge.client.GenerateOptions`, which describes them. None stands for the model's default."""

    seed: Annotated[int | None, typer.Option(help="The same seed, the same picture; by default random.")] = None
    steps: Annotated[int | None, typer.Option(help="Sampler steps; by default the model's.")] = None
    height: Annotated[int | None, typer.Option(help="In pixels; by default the model's.")] = None
    width: Annotated[int | None, typer.Option(help="In pixels; by default the model's.")] = None
    size: Annotated[str | None, typer.Option(metavar="SIZE", help=SIZE_HELP)] = None
    guidance: Annotated[float | None, typer.Option(help="How strictly the prompt is followed.")] = None
    sampler: Annotated[
        str | None, typer.Option(metavar="NAME", help=SAMPLER_HELP, autocompletion=completion.SAMPLER)
    ] = None
    eta: Annotated[float | None, typer.Option(help="How much noise the sampler adds, from 0 to 1.")] = None
    s_noise: Annotated[float | None, typer.Option(help="A factor of the noise that the sampler adds.")] = None
    schedule: Annotated[
        str | None, typer.Option(metavar="NAME", help=SCHEDULE_HELP, autocompletion=completion.SCHEDULE)
    ] = None
    sigmas: Annotated[
        str | None, typer.Option(metavar="1,…,0", help="The noise levels themselves, instead of a schedule.")
    ] = None
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the picture should not be; needs guidance above 1.")
    ] = None
    true_cfg: Annotated[
        float | None,
        typer.Option(help="The negative prompt's scale in models that have guidance built in; by default 1, off."),
    ] = None
    skip_layer_guidance: Annotated[
        float | None, typer.Option(help="Its scale, for models that have it; 2.8 is usual, by default 0, off.")
    ] = None
    t5: Annotated[
        str | None, typer.Option(metavar="WHEN", help="always, never, or auto: not for short and plain prompts.")
    ] = None
    vae_tile: Annotated[
        int | None, typer.Option(help="Decode in tiles of this many pixels, to save memory; by default as need be.")
    ] = None

    def values(self) -> dict[str, Any]:
        """The options that were given, by their names in Python. Raises UserError if sigmas are not numbers."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {name: value for name, value in given.items() if value is not None}
        if self.sigmas is not None:
            try:
                values["sigmas"] = [float(sigma) for sigma in self.sigmas.split(",")]
            except ValueError:
                raise UserError(
                    f"--sigmas must be numbers, got {self.sigmas!r}", "--sigmas 1,0.75,0.5,0.25,0"
                ) from None
        return values


@dataclass(frozen=True)
class OutputFlags:
    """How many pictures are made, and where they are written."""

    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help=OUT_HELP)] = None
    count: Annotated[int, typer.Option(help=COUNT_HELP)] = 1
    grid: Annotated[Path | None, typer.Option(metavar="FILE", help=GRID_HELP)] = None

    def check(self, prompts: int) -> None:
        """Raise UserError for mistakes that can be found without a server."""
        from ditforge.client.picture_file import check_writable

        if not 1 <= self.count <= MAX_COUNT:
            raise UserError(f"the number of pictures must be from 1 to {MAX_COUNT}, got {self.count}", "--count 1")
        if self.out is not None and not self.out.name:
            check_writable(self.out)  # a path without a name is a folder, and cannot be numbered; this raises the error
        for path in self.paths([None] * (prompts * self.count), prompts):
            check_writable(path)
        if self.grid:
            check_writable(self.grid, "grid")

    def paths(self, seeds: Sequence[int | None], prompts: int) -> list[Path]:
        """The paths of the pictures with these seeds. Several pictures are numbered, or named by their seeds."""
        if self.out is None:
            several = prompts > 1
            return [
                Path(f"picture-{i}-{seed}.png" if several else f"picture-{seed}.png") for i, seed in enumerate(seeds)
            ]
        if len(seeds) == 1:
            return [self.out]
        return [self.out.with_stem(f"{self.out.stem}-{i}") for i in range(len(seeds))]


@dataclass(frozen=True)
class PromptFlags:
    """The files that prompts come from, if not from the command line."""

    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help=PROMPTS_HELP)] = None
    from_: Annotated[Path | None, typer.Option("--from", metavar="PICTURE", help=FROM_HELP)] = None

    def read(self, prompt: str | None, values: dict[str, Any]) -> tuple[list[Prompt], str | None]:
        """The prompts with their options, and the model of a repeated picture. Raises UserError without a prompt."""
        from ditforge.client.prompts import Prompt, read_picture, read_prompts

        if self.prompts and (self.from_ or prompt is not None):
            other = "--from" if self.from_ else "a prompt"
            raise UserError(f"there are --prompts, and {other} as well", "leave out one of them")
        if self.prompts:
            return read_prompts(self.prompts, {name: value for name, value in values.items() if name != "seed"}), None
        if self.from_:
            repeated, model = read_picture(self.from_, values)
            return [repeated if prompt is None else replace(repeated, text=prompt)], model
        if prompt is None:
            raise UserError(
                "no prompt was given", 'ditforge generate "a large red circle", or see ditforge generate --help'
            )
        return [Prompt.of(prompt, values)], None
