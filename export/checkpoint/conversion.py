"""Recipes: how a tensor of diffusers is made from the tensors of a file.

diffusers' own converters run on recipes in place of tensors, so that what they do is recorded and not carried out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from ditforge.errors import UserError
from ditforge.export.checkpoint.lazy_tensors import Lazy, joined

Tensors = Mapping[str, Lazy]


@dataclass(frozen=True)
class Piece:
    """Rows of the tensor `name`. `start` and `stop` are fractions of the number of its rows."""

    name: str
    start: Fraction = Fraction(0)
    stop: Fraction = Fraction(1)


@dataclass(frozen=True)
class Recipe:
    """How one of diffusers' tensors is made: `pieces` are concatenated along their rows.

    Then the last `cut` dimensions, which must be 1, are dropped. `shape` is the shape of the file's tensor.

    diffusers' converters treat a recipe as a tensor: they chunk, split, concatenate and index it, and the recipe
    records these steps. The sizes of a split are taken as proportions, because FLUX's converter has the width of the
    published models built in.
    """

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...] = (0,)
    cut: int = 0

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def split(self, sizes: Sequence[int], dim: int = 0) -> tuple[Recipe, ...]:
        """Split the rows in the proportions of `sizes`."""
        assert dim == 0 and len(self.pieces) == 1, "converters cut whole tensors along their rows"
        piece, total, first, parts = self.pieces[0], sum(sizes), 0, []
        for size in sizes:
            share = (piece.stop - piece.start) / total
            cut = Piece(piece.name, piece.start + first * share, piece.start + (first + size) * share)
            parts.append(Recipe((cut,), self.shape))
            first += size
        return tuple(parts)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Recipe, ...]:
        """Split the rows into `chunks` equal parts."""
        return self.split((1,) * chunks, dim)

    def __getitem__(self, index: tuple[slice | int, ...]) -> Recipe:
        kept = [i for i in index if i == slice(None)]
        assert all(i == 0 for i in index[len(kept) :]), f"converters drop dimensions of 1, not {index}"
        return Recipe(self.pieces, self.shape[: len(kept)], cut=len(index) - len(kept))

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Recipe | tuple[Recipe, ...]:
        kwargs = kwargs or {}
        if function is torch.cat:
            return cls(tuple(piece for part in args[0] for piece in part.pieces), args[0][0].shape)
        if function in (torch.chunk, torch.split):
            result: Recipe | tuple[Recipe, ...] = getattr(args[0], function.__name__)(*args[1:], **kwargs)
            return result
        raise NotImplementedError(f"diffusers' converter uses {function}, which is not recorded")

    def of(self, tensors: Tensors) -> Lazy:
        """Return the tensor that this recipe makes from `tensors`. It is read only when it is used.

        Raises UserError if the rows cannot be divided in these proportions, or if a dimension to drop is not 1.
        """
        parts = []
        for piece in self.pieces:
            tensor = tensors[piece.name]
            start, stop = piece.start * tensor.length, piece.stop * tensor.length
            if start.denominator != 1 or stop.denominator != 1:
                problem = f"{tensor.file}: {piece.name} has {tensor.length} rows, which cannot be divided as they must"
                raise UserError(problem, "the file is of another model: use one of FLUX.1 or Stable Diffusion 3.5")
            parts.append(tensor.rows(int(start), int(stop)))
        whole = joined(parts)
        if not self.cut:
            return whole
        row, dropped = whole.shape[1 : -self.cut], whole.shape[-self.cut :]
        if set(dropped) != {1}:
            problem = (
                f"{whole.file}: {self.pieces[0].name} is {list(whole.shape)}, of which {list(dropped)} should be 1"
            )
            raise UserError(problem, "the file is of another model: use one of FLUX.1 or Stable Diffusion 3.5")
        return whole.each_row(lambda a, b: whole.read_rows(a, b).reshape(b - a, *row), whole.dtype, row)
