"""Reshapes of Reshapes. They move no data, but each costs the CPU some microseconds, and passes leave hundreds."""

from __future__ import annotations

import onnx_ir as ir

from ditforge.engines.compilers.onnx_passes.graph import constant, dimension, node, number, rank, replace, source

MERGED = [0, 0, -1]  # the target of a Reshape that makes [B, tokens, hidden] of [B, tokens, heads, head_dim]


def merged(graph: ir.Graph) -> int:
    """A Reshape into heads and the one that merges them become nothing, or one Reshape."""
    targets: dict[tuple[ir.Value, int], ir.Value] = {}
    count = 0
    for found in list(graph):
        if (found.op_type, found.domain) != ("Reshape", "") or not is_constant(found.inputs[1], MERGED):
            continue
        split = source(found.inputs[0], "Reshape")
        if split is None or rank(split.outputs[0]) != 4:
            continue
        given, heads, head_dim = split.inputs[0], dimension(split.outputs[0], 2), dimension(split.outputs[0], 3)
        if given is None or heads is None or head_dim is None:
            continue
        if is_constant(split.inputs[1], [0, 0, heads, head_dim]):
            if rank(given) != 3:
                continue
            ir.convenience.replace_all_uses_with(found.outputs[0], given)
            graph.remove(found, safe=True)
        else:
            sizes = target(graph, split, heads * head_dim, targets)
            if sizes is None:
                continue
            one = node("Reshape", [given, sizes], like=given, shape=ir.Shape([None, None, heads * head_dim]))
            replace(graph, found, [one])
        count += 1
    return count


def is_constant(value: ir.Value | None, sizes: list[int]) -> bool:
    """Whether a Reshape's target is these sizes."""
    found = number(value)
    return found is not None and found.tolist() == sizes


def target(graph: ir.Graph, split: ir.Node, hidden: int, made: dict[tuple[ir.Value, int], ir.Value]) -> ir.Value | None:
    """The target [B, tokens, hidden] in the place of that of `split`, into heads; `made` has those that were made."""
    sizes = split.inputs[1]
    known = number(sizes)
    if known is not None:
        whole = [*map(int, known[:2]), hidden]
        return None if 0 in whole else constant(graph, "shape_" + "_".join(map(str, whole)), whole)
    joined = source(sizes, "Concat")
    if sizes is None or joined is None or len(joined.inputs) != 4:
        return None
    if (sizes, hidden) not in made:
        last = constant(graph, f"size_{hidden}", [hidden])
        concat = node("Concat", [*joined.inputs[:2], last], {"axis": 0}, like=sizes, shape=ir.Shape([3]))
        graph.insert_after(joined, concat)
        made[sizes, hidden] = concat.outputs[0]
    return made[sizes, hidden]
