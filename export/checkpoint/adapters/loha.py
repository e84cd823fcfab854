"""LoHa: the elementwise product of two low-rank products is added (arXiv:2108.06098), as LyCORIS and PEFT write it."""

from __future__ import annotations

import torch

from ditforge.export.checkpoint.adapters.changes import Parts, computed, misfit, need, shapes
from ditforge.export.checkpoint.lazy_tensors import Lazy

MATRICES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def rank(parts: Parts, module: str) -> int:
    """Return the rank. Raises UserError if a matrix is missing, or if the rank is 0."""
    down = need(parts, MATRICES, module)[1]
    if not down.shape or not down.length:
        raise misfit(module, f"{shapes(down)}, a rank of 0", down.file)
    return down.length


def delta(parts: Parts, module: str, scale: float) -> tuple[Lazy, str]:
    """Return scale * (w1_a @ w1_b) * (w2_a @ w2_b), unread, and the shapes as text.

    w1_a, w2_a are [out, rank] and w1_b, w2_b [rank, in]. A Tucker decomposition also has t1, t2 [rank, rank, height,
    width], and [rank, out] in place of [out, rank]. Raises UserError for matrices that do not fit each other.
    """
    a1, b1, a2, b2 = need(parts, MATRICES, module)
    tucker = "hada_t1" in parts or "hada_t2" in parts
    sizes = shapes(a1, b1, a2, b2)
    if any(len(part.shape) != 2 for part in (a1, b1, a2, b2)):
        raise misfit(module, sizes, a1.file)
    ranks = [(a.shape[0 if tucker else 1], b.shape[0]) for a, b in ((a1, b1), (a2, b2))]
    outs = {a.shape[1 if tucker else 0] for a in (a1, a2)}
    if any(left != right for left, right in ranks) or len(outs) != 1 or b1.shape[1] != b2.shape[1]:
        raise misfit(module, sizes, a1.file)
    if tucker:
        return _tucker(parts, module, scale), sizes

    def read(start: int, stop: int) -> torch.Tensor:
        first = a1.read_rows(start, stop).float() @ b1.read().float()
        return scale * first * (a2.read_rows(start, stop).float() @ b2.read().float())

    return a1.each_row(read, torch.float32, b1.shape[1:]), sizes


def _tucker(parts: Parts, module: str, scale: float) -> Lazy:
    a1, b1, a2, b2 = need(parts, MATRICES, module)
    t1, t2 = need(parts, ("hada_t1", "hada_t2"), module)
    if t1.shape[:2] != (a1.shape[0],) * 2 or t2.shape[:2] != (a2.shape[0],) * 2 or t1.shape[2:] != t2.shape[2:]:
        raise misfit(module, shapes(t1, a1, b1, t2, a2, b2), a1.file)

    def compute() -> torch.Tensor:
        halves = ((part.read().float() for part in half) for half in ((t1, b1, a1), (t2, b2, a2)))
        first, second = (torch.einsum("i j ..., j r, i p -> p r ...", *half) for half in halves)
        return scale * first * second

    shape = (a1.shape[1], b1.shape[1], *t1.shape[2:])
    return computed(Lazy(shape, torch.float32, a1.file, a1.read_rows), compute)
