"""Cuts an ONNX graph into segments that run one after the other, each of which fits where the whole does not.

The code knows only the graph, and nothing else of the model. It cuts where the fewest bytes have to be passed on. In a
transformer, that is between the blocks, where the hidden states and the conditioning vector are passed on. Whatever
costs next to nothing to compute (shapes, positions, rotary tables) is computed again in each segment that needs it.
Weights are
neither read nor copied: the segments refer to the whole graph's file of weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditforge.engines.compilers import Ranges, Shape
from ditforge.engines.memory.shapes import infer_shapes
from ditforge.errors import UserError
from ditforge.manifest import Component, Tensor
from ditforge.option import setting

HEAVY = {"Attention", "Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"}  # never computed again for its own sake
SMALL = 1 << 16  # bytes of constants that what is computed again may need
THROAT = 1.25  # how much more than at the narrowest place may be passed on
BALANCED = 1.2  # how much larger than the mean the largest segment may be, if fewer bytes are passed on for it
PASSED = {ir.DataType.FLOAT: "FP32", ir.DataType.FLOAT16: "FP16", ir.DataType.BFLOAT16: "BF16"}  # as Triton calls them


@dataclass(frozen=True)
class Segment:
    """A part of a graph. `component` has its inputs and outputs, `shapes` are those of a Job, `weights` is in bytes."""

    model: ir.Model
    component: Component
    shapes: list[Ranges]
    weights: int

    def save(self, path: Path) -> Path:
        """Write the segment to the file `path`. Its weights stay in the folder of the whole graph."""
        ir.save(self.model, path)
        return path


@dataclass(frozen=True)
class Cut:
    """A place between two nodes: the values that are computed before it and needed behind it, and their bytes."""

    position: int
    values: tuple[ir.Value, ...]
    size: int


def cut(path: Path, component: Component, count: int, probe: Ranges, shapes: list[Ranges]) -> list[Segment]:
    """Cut the graph of `component` in the file `path` into `count` segments with about equal bytes of weights.

    `shapes` are those of the inputs that vary, for each profile; `probe` is a profile in which each dimension varies in
    a proportion of its own. Raises UserError if the graph cannot be cut into so many segments.
    """
    model = ir.load(path)
    probed, *inferred = [infer_profile(model.graph, component, ranges) for ranges in (probe, *shapes)]
    light = find_light(model.graph)
    heavy = [node for node in model.graph if node not in light]
    before = np.cumsum([0, *weigh(heavy, light)])
    cuts = find_cuts(heavy, before, inferred[0][1])
    most = len(cuts) + 1
    if not 1 <= count <= most:
        raise UserError(
            f"{path} can be cut into 1 to {most} segments, not {count}", setting("segments", min(max(count, 1), most))
        )
    chosen = choose_cuts(cuts, before, count)
    passed = list(dict.fromkeys(value for place in chosen for value in place.values))
    ports = {**component.inputs, **component.outputs, **describe(component, passed, probe, probed)}
    ranges = [
        {**given, **{v.name or "": (low[v], best[v], high[v]) for v in passed if varies(ports[v.name or ""])}}
        for given, (low, best, high) in zip(shapes, inferred, strict=True)
    ]
    segments = []
    for start, end in pairwise([0, *(place.position for place in chosen), len(heavy)]):
        mine = {*heavy[start:end], *(light if end == len(heavy) else ())}  # what light nodes give, the last one gives
        results = [value for value in model.graph.outputs if value.producer() in mine]
        part = extract(model.graph, heavy[start:end], passed, results)
        inputs, outputs = ({v.name or "": ports[v.name or ""] for v in side} for side in (part.inputs, part.outputs))
        for value in (*part.inputs, *part.outputs):
            value.shape = ir.Shape(ports[value.name or ""].shape)
        segments.append(
            Segment(
                ir.Model(part, ir_version=model.ir_version),
                component.model_copy(update={"inputs": inputs, "outputs": outputs}),
                [{name: profile[name] for name in inputs if name in profile} for profile in ranges],
                int(before[end] - before[start]),
            )
        )
    return segments


def infer_profile(graph: ir.Graph, component: Component, ranges: Ranges) -> list[dict[ir.Value, Shape]]:
    """The shapes of all values at a profile's smallest, best and largest."""
    fixed = {name: tuple(int(dim) for dim in t.shape) for name, t in component.inputs.items() if not varies(t)}
    return [infer_shapes(graph, {**fixed, **{name: of[i] for name, of in ranges.items()}}) for i in range(3)]


def varies(tensor: Tensor) -> bool:
    """Whether a tensor has a dimension that varies."""
    return any(isinstance(dim, str) for dim in tensor.shape)


def describe(
    component: Component, values: Sequence[ir.Value], probe: Ranges, probed: list[dict[ir.Value, Shape]]
) -> dict[str, Tensor]:
    """The tensors that are passed on, by name. Dimensions that vary together share a name, an input's if possible.

    `probed` has the shapes of all values where the inputs are `probe`.
    """
    names: dict[tuple[int, ...], str] = {}
    for name, shapes in probe.items():
        for sizes, dim in zip(zip(*shapes, strict=True), component.inputs[name].shape, strict=True):
            if isinstance(dim, str):
                names.setdefault(sizes, dim)
    described = {}
    for value in values:
        dims: list[int | str] = []
        for sizes in zip(*(shapes[value] for shapes in probed), strict=True):
            dims.append(sizes[0] if len(set(sizes)) == 1 else names.setdefault(sizes, f"dim_{len(names)}"))
        dtype = PASSED[value.dtype or ir.DataType.UNDEFINED]
        described[value.name or ""] = Tensor(dtype=dtype, shape=tuple(dims))
    return described


@dataclass(frozen=True)
class Origin:
    """What a value is computed from: its constants, and whether inputs or heavy operators are among it."""

    constants: frozenset[ir.Value] = frozenset()
    inputs: bool = False
    heavy: bool = False

    @property
    def size(self) -> int:
        """The number of bytes of the constants."""
        return sum(size_of(value) for value in self.constants)


def find_light(graph: ir.Graph) -> dict[ir.Node, Origin]:
    """The nodes that each segment computes again if it needs them, instead of taking their results from another one.

    These are nodes that depend on no input, such as dequantised weights; nodes that depend on inputs and small
    constants without a heavy operator; and integers, which are computed from shapes.
    """
    light: dict[ir.Node, Origin] = {}
    origins = {value: Origin(inputs=True) for value in graph.inputs}
    origins |= {value: Origin(constants=frozenset([value])) for value in graph.initializers.values()}
    largest = sum(size_of(value) for value in graph.initializers.values()) // 100
    for node in graph:
        sources = [origins.get(value) for value in node.inputs if value is not None]
        found = [source for source in sources if source is not None]
        if len(found) < len(sources):
            continue  # it needs what took too much to compute
        constants = frozenset().union(*(source.constants for source in found))
        heavy = node.op_type in HEAVY or any(source.heavy for source in found)
        origin = Origin(constants, any(source.inputs for source in found), heavy)
        integers = all(value.dtype not in PASSED for value in node.outputs)
        if not origin.inputs or (not heavy and origin.size <= SMALL) or (integers and origin.size <= largest):
            light[node] = origin
        if not origin.inputs or origin.size <= largest:
            origins |= dict.fromkeys(node.outputs, origin)
    return light


def size_of(value: ir.Value) -> int:
    """The number of bytes that an initializer takes."""
    return value.const_value.nbytes if value.const_value is not None else 0


def weigh(heavy: Sequence[ir.Node], light: dict[ir.Node, Origin]) -> list[int]:
    """For each node, the bytes of the weights that it is the first to need."""
    seen: set[ir.Value] = set()
    weights = []
    for node in heavy:
        needed: set[ir.Value] = set()
        for value in node.inputs:
            if value is not None and value.is_initializer():
                needed.add(value)
            elif value is not None and (producer := value.producer()) in light:
                needed |= light[producer].constants
        weights.append(sum(size_of(value) for value in needed - seen))
        seen |= needed
    return weights


def find_cuts(heavy: Sequence[ir.Node], before: NDArray[Any], shapes: dict[ir.Value, Shape]) -> list[Cut]:
    """The places where a graph of the nodes `heavy` can be cut, at most one between two nodes with weights.

    `before` has the bytes of weights before each position. Only floating-point values may be passed on. A place must
    pass on no more bytes than the places beside it, and hardly more than the narrowest place in the middle half of the
    weights.
    """
    place = {node: position for position, node in enumerate(heavy)}
    opens: dict[int, list[ir.Value]] = {}
    closes: dict[int, list[ir.Value]] = {}
    for node, position in place.items():
        for value in node.outputs:
            last = max((place[user] for user in value.consumers() if user in place), default=position)
            if last > position:
                opens.setdefault(position, []).append(value)
                closes.setdefault(last, []).append(value)
    live: dict[ir.Value, int] = {}
    narrowest = {0: Cut(0, (), 0), int(before[-1]): Cut(len(heavy), (), 0)}  # by the weights before it
    for position in range(1, len(heavy)):
        for value in closes.get(position - 1, ()):
            del live[value]
        live |= {value: bytes_of(value, shapes[value]) for value in opens.get(position - 1, ())}
        found, weight = Cut(position, tuple(live), sum(live.values())), int(before[position])
        if not all(value.dtype in PASSED and not value.is_graph_output() for value in live):
            continue
        if weight not in narrowest or found.size < narrowest[weight].size:
            narrowest[weight] = found
    places = [narrowest[weight] for weight in sorted(narrowest)]
    middle = [found.size for weight, found in narrowest.items() if before[-1] <= 4 * weight <= 3 * before[-1]]
    return [
        found
        for left, found, right in zip(places, places[1:], places[2:], strict=False)
        if found.size <= min(left.size, right.size, THROAT * min(middle, default=0))
    ]


def bytes_of(value: ir.Value, shape: Shape) -> int:
    """The number of bytes that a value of that shape takes."""
    return math.ceil(math.prod(shape) * value.dtype.itemsize) if value.dtype else 0


def choose_cuts(cuts: Sequence[Cut], before: NDArray[Any], count: int) -> list[Cut]:
    """The `count` - 1 cuts that pass on the fewest bytes and leave no segment too large.

    A segment is too large if it exceeds both BALANCED times the mean and the largest segment of the most even cuts.
    """
    edges = np.array([0, *(before[found.position] for found in cuts), before[-1]], float)
    weights = edges[None, :] - edges[:, None]  # from one edge to another
    weights[np.tril_indices(len(edges))] = np.inf
    even = weights[0]
    for _ in range(count - 1):
        even = np.maximum(even[:, None], weights).min(axis=0)
    mean = edges[-1] / count
    allowed = np.where(weights <= max(even[-1], BALANCED * mean), weights, np.inf)
    sizes = np.array([0, *(found.size for found in cuts), 0], float)
    uneven = (allowed / edges[-1]) ** 2 / count  # below one byte in all: it decides between equal sizes
    best, came = uneven[0], []
    for _ in range(count - 1):
        costs = (best + sizes)[:, None] + uneven
        came.append(costs.argmin(axis=0))
        best = costs.min(axis=0)
    chosen, edge = [], len(edges) - 1
    for step in reversed(came):
        edge = int(step[edge])
        chosen.append(cuts[edge - 1])
    return chosen[::-1]


def extract(
    graph: ir.Graph, nodes: Sequence[ir.Node], passed: Sequence[ir.Value], results: Sequence[ir.Value]
) -> ir.Graph:
    """The graph of `nodes`, with the nodes that are computed again for them.

    Its inputs are the values of `passed` and of the whole graph's inputs that it needs. Its outputs are values of
    `passed`, and `results`.
    """
    mine = set(nodes)
    needed = {value for node in nodes for value in node.inputs}
    taken = [value for value in passed if value in needed and value.producer() not in mine]
    given = [value for value in passed if value.producer() in mine]
    part = ir.convenience.extract(graph, [*graph.inputs, *taken], [*given, *results])
    for value in [value for value in part.inputs if not value.uses()]:
        part.inputs.remove(value)
    return part
