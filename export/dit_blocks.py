"""The parts that the blocks of all diffusion transformers share, written so that they become a small graph.

A modulated norm, an RMS norm and an attention each become one or a few ONNX operators (opset 23) that compilers know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention

EPSILON = 1e-6  # of every layer norm

Heads = tuple[Tensor, Tensor, Tensor]  # query, key and value, each [B, tokens, heads, head_dim]


def modulation(linear: nn.Linear, signal: Tensor, parts: int, opened: Tensor | None = None) -> tuple[Tensor, ...]:
    """Compute the modulation of all tokens from the signal [B, D]: `parts` shifts, scales and gates, each [B, 1, D].

    `opened` [B, 1, 1] is 1 or 0 for each sample. Where it is 0, all results are 0, so a block that multiplies what it
    adds by a gate adds nothing to that sample.
    """
    said = linear(signal)[:, None]
    result: tuple[Tensor, ...] = (said if opened is None else said * opened).chunk(parts, dim=2)
    return result


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm with a shift and scale for each sample (Peebles and Xie 2022, arXiv:2212.09748)."""
    return layer_norm(x, x.shape[-1:], eps=EPSILON) * (1 + scale) + shift


def attention_inputs(x: Tensor, attn: Any) -> Heads:
    """Return query, key and value of x [B, tokens, D], computed with the weights of diffusers' attention module `attn`.

    Query and key are normalised where the module has norms for them.
    """
    return _heads(x, attn.heads, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))


def added_inputs(x: Tensor, attn: Any) -> Heads:
    """Return query, key and value as attention_inputs does, with the weights that `attn` has for its second stream."""
    linears = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    return _heads(x, attn.heads, linears, (attn.norm_added_q, attn.norm_added_k))


def _heads(x: Tensor, heads: int, linears: tuple[nn.Linear, ...], norms: tuple[Any, Any]) -> Heads:
    query, key, value = (linear(x).unflatten(2, (heads, -1)) for linear in linears)
    return _normed(query, norms[0]), _normed(key, norms[1]), value


def _normed(x: Tensor, norm: Any) -> Tensor:
    """Apply the RMS norm over each head, with a module of PyTorch or diffusers; None, in some models, applies none."""
    return x if norm is None else rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def joined(first: Heads, second: Heads) -> Heads:
    """Concatenate the tokens of two streams: first those of `first`, then those of `second`."""
    query, key, value = (torch.cat(pair, dim=1) for pair in zip(first, second, strict=True))
    return query, key, value


def attention(inputs: Heads, rotate: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Return the attention's result [B, tokens, D].

    `rotate` is applied to query and key [B, heads, tokens, head_dim], for rotary position embeddings.
    """
    query, key, value = (x.transpose(1, 2) for x in inputs)
    return scaled_dot_product_attention(rotate(query), rotate(key), value).transpose(1, 2).flatten(2)
