"""LoKr: the Kronecker product of two matrices is added, of which each can be a product (LyCORIS, arXiv:2309.14859)."""

from __future__ import annotations

import torch

from ditforge.errors import UserError
from ditforge.export.checkpoint.adapters.changes import Parts, computed, misfit, need, shapes
from ditforge.export.checkpoint.lazy_tensors import Lazy


def rank(parts: Parts, module: str) -> int | None:
    """Return the rank; None if both matrices are whole, and so have none.

    Raises UserError if a matrix is missing, has two forms, or has a rank of 0.
    """
    ranks = []
    for side in ("lokr_w1", "lokr_w2"):
        if side in parts and {f"{side}_a", f"{side}_b"} & parts.keys():
            problem = f"{parts[side].file}: {module} has both {side} and {side}_a or {side}_b"
            raise UserError(problem, "use a file with one of them")
        if side not in parts:
            second = need(parts, (f"{side}_a", f"{side}_b"), module)[1]
            ranks.append(second.length if second.shape else 0)
    if ranks and not ranks[0]:
        raise misfit(module, f"{shapes(*parts.values())}, a rank of 0", next(iter(parts.values())).file)
    return ranks[0] if ranks else None


def delta(parts: Parts, module: str, scale: float) -> tuple[Lazy, str]:
    """Return scale * kron(w1, w2), unread, and the shapes as text.

    w1 is [out1, in1] or w1_a @ w1_b; w2 is [out2, in2, …], or w2_a @ w2_b, or these with the Tucker core t2. Raises
    UserError for matrices that do not fit each other.
    """
    used = [tensor for name, tensor in parts.items() if name.startswith("lokr_")]
    sizes, file = shapes(*used), used[0].file
    first, second = _shape(parts, "lokr_w1"), _shape(parts, "lokr_w2")
    if first is None or len(first) != 2 or second is None or len(second) < 2:
        raise misfit(module, sizes, file)

    def compute() -> torch.Tensor:
        left, right = _matrix(parts, "lokr_w1"), _matrix(parts, "lokr_w2")
        return scale * torch.kron(left.reshape(*left.shape, *(1,) * (right.ndim - 2)), right.contiguous())

    shape = (first[0] * second[0], first[1] * second[1], *second[2:])
    return computed(Lazy(shape, torch.float32, file, used[0].read_rows), compute), sizes


def _shape(parts: Parts, side: str) -> tuple[int, ...] | None:
    """Return the shape of one of the two matrices; None if its factors do not fit each other."""
    if side in parts:
        return parts[side].shape
    a, b, core = parts[f"{side}_a"].shape, parts[f"{side}_b"].shape, parts.get("lokr_t2") if side[-1] == "2" else None
    if core is not None:
        fits = len(a) == len(b) == 2 and core.shape[:2] == (a[0], b[0])
        return (a[1], b[1], *core.shape[2:]) if fits else None
    return (a[0], *b[1:]) if len(a) == 2 and len(b) >= 2 and a[1] == b[0] else None


def _matrix(parts: Parts, side: str) -> torch.Tensor:
    if side in parts:
        return parts[side].read().float()
    a, b = parts[f"{side}_a"].read().float(), parts[f"{side}_b"].read().float()
    if side == "lokr_w2" and "lokr_t2" in parts:
        return torch.einsum("i j ..., i p, j r -> p r ...", parts["lokr_t2"].read().float(), a, b)
    return (a @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])
