"""Which sizes of pictures and batches an engine is compiled for.

Some compilers need ranges (TensorRT's optimisation profiles): the smallest, the best and the largest shape of each
input. A server of such engines announces the sizes of the profiles to its clients.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ditforge.engines.compilers import Shape
from ditforge.errors import UserError
from ditforge.manifest import Tensor
from ditforge.model import LEAST_TILE, MAX_BATCH, Model
from ditforge.option import option, setting

DEFAULT_BATCH = 4

Size = tuple[int, int]


@dataclass(frozen=True)
class Profile:
    """A range of sizes in pixels (height, width), fastest at `best`, and batches of 1 to `max_batch`."""

    smallest: Size
    best: Size
    largest: Size
    max_batch: int

    def of(self, network: str, model: Model) -> Profile:
        """The profile of one network. That of the autoencoder ends at the size of a tile, if the model has tiles."""
        smallest, best, largest = (model.piece(network, *size) for size in (self.smallest, self.best, self.largest))
        return replace(self, smallest=smallest, best=best, largest=largest)

    def shapes(self, tensor: Tensor, model: Model) -> tuple[Shape, Shape, Shape]:
        """The smallest, best and largest shape of an input."""
        return (
            _shape(tensor, self.smallest, 1, model),
            _shape(tensor, self.best, 1, model),
            _shape(tensor, self.largest, self.max_batch, model),
        )


def _shape(tensor: Tensor, size: Size, batch: int, model: Model) -> Shape:
    height, width = size
    sizes = {"batch": batch, "height": height, "width": width}
    sizes |= {"latent_height": height // model.vae_factor, "latent_width": width // model.vae_factor}
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in tensor.shape)


def make_profiles(model: Model, resolutions: str | None, static: str | None, batch: int | None) -> list[Profile]:
    """The profiles for the options `--resolutions`, `--static` and `--batch`. None stands for the default.

    Each static size becomes one profile. Raises UserError if the model has no such sizes.
    """
    max_batch = DEFAULT_BATCH if batch is None else batch
    if not 1 <= max_batch <= MAX_BATCH:
        problem = f"the largest batch must be from 1 to {MAX_BATCH}, got {max_batch}"
        raise UserError(problem, setting("batch", DEFAULT_BATCH))
    if static is not None:
        if resolutions is not None:
            raise UserError(f"{option('static')} and {option('resolutions')} exclude each other", "give one of them")
        sizes = [_parse_static(part, model) for part in static.split(",")]
        return [Profile(size, size, size, max_batch) for size in dict.fromkeys(sizes)]
    smallest, best, largest = default_range(model) if resolutions is None else _parse_range(resolutions, model)
    return [Profile((smallest, smallest), (best, best), (largest, largest), max_batch)]


def default_range(model: Model) -> tuple[int, int, int]:
    """Half the model's default size, this size, and one and a half times it, within the sizes that the model makes."""
    multiple, best = model.size_multiple, model.default_size
    smallest = max(best // 2 // multiple, 1) * multiple
    largest = min(best * 3 // 2, model.max_size) // multiple * multiple
    return smallest, best, max(largest, best)


def _parse_range(text: str, model: Model) -> tuple[int, int, int]:
    if not re.fullmatch(r"\d+-\d+(-\d+)?", text):
        raise UserError(f"{setting('resolutions', text)} is not a range", ranges_of(model))
    numbers = [int(number) for number in text.split("-")]
    if problem := next(filter(None, (_problem(number, model) for number in numbers)), ""):
        fix = setting("resolutions", "-".join(map(str, sorted(_nearest(number, model) for number in numbers))))
        raise UserError(f"{option('resolutions')}: {problem}", fix)
    smallest, largest = numbers[0], numbers[-1]
    if smallest > largest:
        raise UserError(
            f"{setting('resolutions', text)}: the smallest, {smallest}, is above the largest, {largest}",
            setting("resolutions", f"{largest}-{smallest}"),
        )
    best = numbers[1] if len(numbers) == 3 else min(max(model.default_size, smallest), largest)
    if not smallest <= best <= largest:
        problem = f"{setting('resolutions', text)}: the best, {best}, is not from {smallest} to {largest}"
        raise UserError(problem, setting("resolutions", f"{smallest}-{largest}"))
    return smallest, best, largest


def ranges_of(model: Model) -> str:
    """Examples of `--resolutions` that the model can make."""
    smallest, best, largest = default_range(model)
    whole, with_best = (
        setting("resolutions", text) for text in (f"{smallest}-{largest}", f"{smallest}-{best}-{largest}")
    )
    return f"{whole}, or with the best one {with_best}, in pixels"


def _parse_static(text: str, model: Model) -> Size:
    if not re.fullmatch(r"\d+x\d+", text.strip().lower()):
        side = model.default_size
        raise UserError(
            f"{setting('static', text)} is not a size",
            f"{setting('static', f'{side}x{side}')} (width x height, in pixels)",
        )
    width, height = (int(number) for number in text.lower().split("x"))
    if problem := _problem(width, model) or _problem(height, model):
        raise UserError(
            f"{option('static')}: {problem}", setting("static", f"{_nearest(width, model)}x{_nearest(height, model)}")
        )
    return height, width


def _problem(size: int, model: Model) -> str:
    """Why a model makes no pictures of that many pixels; empty if it does."""
    multiple, largest = model.size_multiple, model.max_size // model.size_multiple * model.size_multiple
    if not multiple <= size <= largest:
        return f"{model.name} makes {multiple} to {largest} pixels, got {size}"
    return f"sizes must be divisible by {multiple}, got {size}" if size % multiple else ""


def _nearest(size: int, model: Model) -> int:
    """The nearest size that a model makes."""
    multiple = model.size_multiple
    return min(max(round(size / multiple), 1), model.max_size // multiple) * multiple


def tiled(model: Model, vae_tile: int | None) -> Model:
    """The model with tiles of `vae_tile` pixels for the autoencoder. Raises UserError for an impossible size."""
    if vae_tile is not None:
        multiple, least = model.vae_factor, model.vae_factor * LEAST_TILE
        most = max(model.max_size // multiple * multiple, least)
        near = min(max((vae_tile + multiple // 2) // multiple * multiple, least), most)
        if vae_tile != near:
            problem = f"a tile's side must be from {least} to {most} pixels and divisible by {multiple}, got {vae_tile}"
            raise UserError(problem, setting("vae_tile", near))
    return model.model_copy(update={"vae_tile": vae_tile})


def announced(model: Model, profiles: list[Profile]) -> Model:
    """The model as a server of these profiles announces it, with the sizes of the profiles."""
    static = all(profile.smallest == profile.largest for profile in profiles)
    first = profiles[0]
    return model.model_copy(
        update={
            "default_size": max(first.best) if static else first.best[0],
            "min_size": min(min(profile.smallest) for profile in profiles),
            "max_size": max(max(profile.largest) for profile in profiles),
            "sizes": tuple(profile.best for profile in profiles) if static else (),
        }
    )
