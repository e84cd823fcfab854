"""Choose the linears to quantise: measure the error of each, and leave out the worst until the velocity is good."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditforge.errors import UserError
from ditforge.export.quantisation.qdq import Scheme, quantise_weight, weight_scale
from ditforge.option import setting

SAMPLES = 4  # how many calls of the DiT are recorded for each prompt, spread evenly over the steps

Call = dict[str, Any]  # the keyword arguments of a call of the DiT
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Choice:
    """The linears that are not quantised, and the measured errors.

    errors: the relative error of each linear's output if it alone is quantised, by the name of its weight, the largest
        first.
    keep: the linears that are not quantised.
    velocity: the relative error of the DiT's output with all other linears quantised.
    """

    errors: dict[str, float]
    keep: tuple[str, ...]
    velocity: float


def check_max_error(max_error: float | None) -> None:
    """Raise UserError unless the velocity may err so much; None stands for any error."""
    if max_error is not None and not 0 < max_error < math.inf:
        raise UserError(f"the largest error must be above 0 and finite, got {max_error}", setting("max_error", 0.05))


def choose_linears(
    transformer: nn.Module,
    linears: Mapping[str, nn.Linear],
    calls: list[Call],
    scheme: Scheme,
    amax: Mapping[str, float],
    max_error: float,
    progress: Progress | None = None,
) -> Choice:
    """Find the smallest number of linears to leave unquantised so that the velocity's relative error is ≤ `max_error`.

    Those with the largest errors are left unquantised first. `linears` are the layers of `transformer` to choose from,
    by the names of their weights. `calls` are the calls over which errors are measured. Raises UserError if `max_error`
    is not positive and finite.
    """
    check_max_error(max_error)
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
        while fewest < enough:  # bisection, because keeping more layers lowers the error
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
    """Within this context, append the keyword arguments of every call of `transformer` to `calls`."""

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
    """Within this context, record in `errors` the largest relative error of each linear if it alone were quantised."""

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
    """Within this context, the linears compute with weights rounded to 8 bits, and inputs too if the scheme says so."""

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
    """Return the layer's weight [N, K] after quantising and dequantising, in its own dtype."""
    weight = layer.weight.data.T
    scale = weight_scale(weight, scheme, torch.float32)
    return (quantise_weight(weight, scale, scheme).float() * scale).T.to(layer.weight.dtype)


def rounded_input(x: Tensor, scheme: Scheme, amax: float | None) -> Tensor:
    """Return an input after quantising and dequantising; unchanged if the scheme quantises only weights."""
    if not scheme.activations or amax is None:
        return x
    scale = amax / scheme.largest
    return ((x.float() / scale).clamp(-scheme.largest, scheme.largest).to(scheme.dtype).float() * scale).to(x.dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the L2 norm of the difference, divided by the L2 norm of `expected`."""
    result: float = ((actual - expected).float().norm() / expected.float().norm().clamp(min=1e-30)).item()
    return result
