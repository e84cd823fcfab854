"""Rotary embeddings in the number format of queries and keys, on [B, tokens, hidden].

The traced graph rotates [B, heads, tokens, head_dim] in fp32, between two Casts. The CUDA kernel computes 16-bit
numbers from 16-bit tables; docs/onnxruntime.md has what that costs in accuracy. A rotation acts on each head of each
token by itself, so it can be done before heads and tokens change places.
"""

from __future__ import annotations

import onnx_ir as ir

from ditforge.engines.compilers.onnx_passes.graph import (
    HALVES,
    axes,
    dimension,
    is_used_once,
    node,
    replace,
    reshape,
    sole_source,
    sole_user,
)

HEADS_FIRST = (0, 2, 1, 3)


def narrow(graph: ir.Graph) -> int:
    """Cast, RotaryEmbedding and Cast back become one RotaryEmbedding; its tables are cast once for all of them."""
    tables: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    count = 0
    for found in list(graph):
        if (found.op_type, found.domain) != ("RotaryEmbedding", "") or len(found.inputs) != 3:
            continue
        wide, back = sole_source(found.inputs[0], "Cast"), sole_user(found.outputs[0], "Cast")
        if wide is None or back is None:
            continue
        given = wide.inputs[0]
        if given is None or given.dtype not in HALVES or back.outputs[0].dtype != given.dtype:
            continue
        inputs = [given]
        for table in found.inputs[1:]:
            assert table is not None, "RotaryEmbedding without a table"
            key = table, given.dtype
            if key not in tables:
                cast = node("Cast", [table], {"to": int(given.dtype)}, like=table, shape=table.shape)
                cast.outputs[0].dtype = given.dtype
                producer = table.producer()
                if producer is None:
                    graph.insert_before(graph[0], cast)
                else:
                    graph.insert_after(producer, cast)
                tables[key] = cast.outputs[0]
            inputs.append(tables[key])
        attributes = {name: attribute.value for name, attribute in found.attributes.items()}
        replace(graph, back, [node("RotaryEmbedding", inputs, attributes, like=given)])
        count += 1
    return count


def tokens_first(graph: ir.Graph) -> int:
    """RotaryEmbedding of a Transpose becomes the Transpose of a RotaryEmbedding on [B, tokens, hidden]."""
    count = 0
    for found in list(graph):
        if (found.op_type, found.domain) != ("RotaryEmbedding", "") or len(found.inputs) != 3:
            continue
        transpose = sole_source(found.inputs[0], "Transpose")
        if transpose is None or axes(transpose) != HEADS_FIRST or not is_used_once(found.outputs[0]):
            continue
        given = transpose.inputs[0]
        heads, head_dim = dimension(given, 2), dimension(given, 3)
        if given is None or heads is None or head_dim is None:
            continue
        flat = reshape(graph, given, (0, 0, heads * head_dim))
        attributes = {name: attribute.value for name, attribute in found.attributes.items()}
        attributes["num_heads"] = heads
        rotated = node("RotaryEmbedding", [flat.outputs[0], *found.inputs[1:]], attributes, like=given)
        rotated.outputs[0].shape = flat.outputs[0].shape
        split = reshape(graph, rotated.outputs[0], (0, 0, heads, head_dim))
        replace(graph, found, [flat, rotated, split, node("Transpose", [split.outputs[0]], {"perm": HEADS_FIRST})])
        count += 1
    return count
