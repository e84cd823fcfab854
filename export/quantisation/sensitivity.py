"""Which linears bear 8 bits: each one's error is measured, the worst stay 16-bit until the velocity is good enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditforge.errors import UserError
from ditforge.export.quantisation.qdq import Scheme, quantise_weight, weight_scale
from ditforge.option import setting

SAMPLES = 4  # calls of the DiT that are kept from each prompt, evenly over the steps

Call = dict[str, Any]  # the keyword arguments of a call of the DiT
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Choice:
    """errors: relative error of each linear's output, quantised alone, by its weight's name, the worst first.

    keep: the linears that stay 16-bit. velocity: the relative error of the DiT's output with all others quantised.
    """

    errors: dict[str, float]
    keep: tuple[str, ...]
    velocity: float


def choose_linears(
    transformer: nn.Module,
    linears: Mapping[str, nn.Linear],
    calls: list[Call],
    scheme: Scheme,
    amax: Mapping[str, float],
    max_error: float,
    progress: Progress | None = None,
) -> Choice:
    """The fewest linears to keep, worst first, so that the velocity's relative error over `calls` is ≤ `max_error`.

    `linears` are the layers of `transformer` in question, by their weights' names. Raises UserError if `max_error` is
    not positive.
    """
    if not max_error > 0:
        raise UserError(f"the largest error must be above 0, got {max_error}", setting("max_error", 0.05))
    report = progress or (lambda doing, done, total: None)
    reference, errors = [], dict.fromkeys(linears, 0.0)
    with torch.no_grad():
        with output_errors(linears, scheme, amax, errors):
            for done, call in enumerate(calls):
                report("layers", done, len(calls))
                reference.append(transformer(**call, return_dict=False)[0])
        ranked = sorted(errors, key=lambda name: -errors[name])

        def velocity_error(kept: int) -> float:
            chosen = {name: linears[name] for name in ranked[kept:]}
            with quantised(chosen, scheme, amax):
                outputs = [transformer(**call, return_dict=False)[0] for call in calls]
            return relative(torch.stack(outputs), torch.stack(reference))

        fewest, enough, error = 0, len(ranked), 0.0
        while fewest < enough:  # keeping more layers lowers the error: bisection
            report("velocity", fewest, len(ranked))
            kept = (fewest + enough) // 2
            measured = velocity_error(kept)
            if measured <= max_error:
                enough, error = kept, measured
            else:
                fewest = kept + 1
    report("done", 1, 1)
    return Choice({name: errors[name] for name in ranked}, tuple(ranked[:enough]), error)


@contextmanager
def recorded_calls(transformer: nn.Module, calls: list[Call]) -> Iterator[None]:
    """While inside, `calls` gets the keyword arguments of every call of `transformer`."""

    def note(module: nn.Module, args: tuple[()], kwargs: Call) -> None:
        calls.append({key: value for key, value in kwargs.items() if key != "return_dict"})

    handle = transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def output_errors(
    linears: Mapping[str, nn.Linear], scheme: Scheme, amax: Mapping[str, float], errors: dict[str, float]
) -> Iterator[None]:
    """While inside, `errors` keeps each linear's worst relative error if it alone were quantised."""

    def note(name: str) -> Callable[[nn.Linear, tuple[Tensor, ...], Tensor], None]:
        weight = rounded_weight(linears[name], scheme)

        def hook(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = rounded_input(inputs[0], scheme, amax.get(name))
            bias = 0 if layer.bias is None else layer.bias
            errors[name] = max(errors[name], relative(nn.functional.linear(x, weight), output - bias))

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def quantised(linears: Mapping[str, nn.Linear], scheme: Scheme, amax: Mapping[str, float]) -> Iterator[None]:
    """While inside, the linears compute with 8-bit weights, and inputs where the scheme says so."""

    def narrow(name: str) -> Callable[[nn.Linear, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda layer, inputs: (rounded_input(inputs[0], scheme, amax.get(name)), *inputs[1:])

    before = {name: layer.weight.data for name, layer in linears.items()}
    handles = [layer.register_forward_pre_hook(narrow(name)) for name, layer in linears.items()]
    try:
        for layer in linears.values():
            layer.weight.data = rounded_weight(layer, scheme)
        yield
    finally:
        for name, layer in linears.items():
            layer.weight.data = before[name]
        for handle in handles:
            handle.remove()


def rounded_weight(layer: nn.Linear, scheme: Scheme) -> Tensor:
    """The layer's weight [N, K] as its 8-bit numbers stand for it."""
    weight = layer.weight.data.T
    scale = weight_scale(weight, scheme, torch.float32)
    return (quantise_weight(weight, scale, scheme).float() * scale).T.to(layer.weight.dtype)


def rounded_input(x: Tensor, scheme: Scheme, amax: float | None) -> Tensor:
    """An input as the scheme rounds it: unchanged where only weights are 8-bit."""
    if not scheme.activations or amax is None:
        return x
    scale = amax / scheme.largest
    return ((x.float() / scale).clamp(-scheme.largest, scheme.largest).to(scheme.dtype).float() * scale).to(x.dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of `expected`."""
    result: float = ((actual - expected).float().norm() / expected.float().norm().clamp(min=1e-30)).item()
    return result
