"""Regions of networks as they are recorded: which share a program, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditforge.errors import DitforgeError
from ditforge.export.graph.tracing import Traced, trace
from ditforge.export.network import BATCH, Dim, Network, Port
from ditforge.export.region import region

WIDTH = 4


class Block(nn.Module):
    def __init__(self, factor: float = 1.0, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.factor = factor


@region
def block(module: Block, x: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
    return x + module.factor * module.linear(x), signal


@region
def begin(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return module.first(x), x.mean(dim=1)


@region
def finish(module: None, x: Tensor, signal: Tensor) -> Tensor:
    return x * signal[:, None]


class Chain(nn.Module):
    """`x` [B, T, D] → `y` [B, T, D], in regions."""

    def __init__(self, blocks: list[Block], between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.module = nn.Module()
        self.module.first = nn.Linear(WIDTH, WIDTH)
        self.module.unread = nn.Linear(WIDTH, WIDTH)
        self.module.blocks = nn.ModuleList(blocks)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        hidden, signal = begin(self.module, x)
        for part in self.module.blocks:
            hidden, signal = block(part, self.between(hidden), signal)
        return finish(None, hidden, signal)


def traced(build: Callable[[], nn.Module]) -> Traced:
    x = Port(torch.float32, (BATCH, Dim("latent_height"), WIDTH))
    return trace(Network("toy", build, {"x": x}, {"y": x}, "weights", torch.float32))


def test_equal_blocks_share_a_program() -> None:
    found = traced(lambda: Chain([Block(), Block(), Block()]))
    assert [call.kind for call in found.calls] == ["begin", "block", "block", "block", "finish"]
    assert list(found.programs) == ["begin", "block", "finish"]
    assert found.calls[1].weights == ("blocks.0.linear.weight", "blocks.0.linear.bias")
    assert found.calls[3].weights == ("blocks.2.linear.weight", "blocks.2.linear.bias")


def test_what_is_handed_on_unchanged_is_no_output() -> None:
    calls = traced(lambda: Chain([Block(), Block()])).calls
    assert calls[0].outputs == ("0.0", "0.1")
    assert [(call.inputs, call.outputs) for call in calls[1:]] == [
        (("0.0", "0.1"), ("1.0",)),
        (("1.0", "0.1"), ("2.0",)),
        (("2.0", "0.1"), ("y",)),
    ]


@pytest.mark.parametrize("other", [lambda: Block(factor=2.0), lambda: Block(bias=False)], ids=["attribute", "weights"])
def test_blocks_that_differ_have_programs_of_their_own(other: Callable[[], Block]) -> None:
    found = traced(lambda: Chain([Block(), other(), Block()]))
    assert [call.kind for call in found.calls[1:4]] == ["block", "block-2", "block"]


def test_weights_that_no_region_reads_are_left_out() -> None:
    found = traced(lambda: Chain([Block()]))
    assert set(found.aliases) == {"first.weight", "first.bias", "blocks.0.linear.weight", "blocks.0.linear.bias"}
    assert set(found.model.graph.initializers) >= set(found.aliases)


def test_a_network_without_regions_is_one() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    (call,) = traced(Whole).calls
    assert (call.inputs, call.outputs, call.weights) == (("x",), ("y",), ("weight", "bias"))


def test_what_is_computed_outside_of_regions_is_refused() -> None:
    with pytest.raises(DitforgeError, match=r"block, a region of toy, takes a tensor \[2, 4, 4\] that no region made"):
        traced(lambda: Chain([Block()], between=lambda x: 2 * x))

    class Outside(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    with pytest.raises(DitforgeError, match="toy computes its output y outside of its regions"):
        traced(lambda: Outside([Block()]))


def test_a_traced_graph_has_the_values_of_its_constants() -> None:
    """They lie in memory of the programs, which is gone when the graph is written."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x * torch.tensor([1.0, 2.0, 3.0, 4.0]).clone()

    graph = traced(Scaled).model.graph
    (values,) = [value.const_value for value in graph.initializers.values() if value.const_value is not None]
    assert values.numpy().tolist() == [1, 2, 3, 4]
