"""Regions: the functions of which a network consists, each of which is traced once for each of its kinds.

A network of fifty equal blocks is then traced as one block, and compiled as one block. A function marked with `region`
takes a module and tensors. In a network whose `forward` calls any regions, every tensor that one of them takes is an
input of the network or an output of another region. A network that calls none is one region.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar, cast

Function = Callable[..., Any]
Region = TypeVar("Region", bound=Function)
Recorder = Callable[[Function, Any, tuple[Any, ...]], Any]

_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def region(function: Region) -> Region:
    """Mark a function (module, tensor or None, …) → tensor, or tuple of tensors, as a region.

    The module's parameters are its weights; the module is None where it has none. It must compute only with what it is
    given.
    """

    @wraps(function)
    def call(module: Any, *inputs: Any) -> Any:
        recorder = _recorder.get()
        return function(module, *inputs) if recorder is None else recorder(function, module, inputs)

    return cast(Region, call)


@contextmanager
def recorded_by(recorder: Recorder) -> Iterator[None]:
    """Within this context, `recorder` is called in place of each region, and returns what the region returns."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)
