"""Lower the programs of regions to what Inductor compiles: for one device, with 8-bit weights, in given shapes.

Linears that read the same tensor become one product, whose weights are stored as one matrix. Attention, norms and
everything else stay as they were traced; Inductor fuses them.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from ditforge.engines.compilers import Shape
from ditforge.regions import Call, Stored

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
EIGHT_BIT = {"fp8": E4M3, "fp8-weights": E4M3, "int8-weights": torch.int8}
INTO_HEADS = (torch.ops.aten.unflatten.int, torch.ops.aten.view.default, torch.ops.aten.reshape.default)
# What only checks what was true when the program was traced.
CHECKS = ("aten._assert_tensor_metadata.default", "aten._assert_scalar.default", "aten.sym_constrain_range.default")


@dataclass(frozen=True)
class Product:
    """Linears of a program that read the same tensor: one product.

    nodes: the linears in the program, and rows: how many output channels each has.
    weights, biases: the places of their weights and biases among the weights of the call. There may be no biases.
    """

    nodes: tuple[Node, ...]
    rows: tuple[int, ...]
    weights: tuple[int, ...]
    biases: tuple[int, ...]


@dataclass(frozen=True)
class Operand:
    """One tensor of weights that a lowered program takes: one or several weights of a call, row below row.

    places: the places of the weights in the call.
    content: what of them it holds: "values"; or of an 8-bit weight its "numbers", the "scales" of its output channels,
        or the scale of the "activation".
    dtype, shape: as the lowered program takes it.
    """

    places: tuple[int, ...]
    content: str
    dtype: torch.dtype
    shape: Shape


def load_program(content: bytes) -> ExportedProgram:
    """Load a program as torch.export saved it. Raises what torch.export raises if this version cannot read it."""
    import torch.onnx.ops  # which defines the operators of ONNX that a program may call

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(io.BytesIO(content))


def placeholders_of(program: ExportedProgram) -> tuple[list[Node], dict[Node, Tensor]]:
    """Return the placeholders of a program's inputs and then of its weights, and those of its constants with these."""
    lifted = program.graph_signature.inputs_to_lifted_tensor_constants
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    constants = {node: program.constants[lifted[node.name]] for node in nodes if node.name in lifted}
    return [node for node in nodes if node not in constants], constants


def formats_of(stored: Sequence[Stored]) -> tuple[object, ...]:
    """Return what of the formats of a call's weights decides its program: which are 8-bit, and which share a scale."""
    scales = [weight.activation_scale for weight in stored]
    return tuple((weight.scheme, scales.index(weight.activation_scale)) for weight in stored)


def products_of(program: ExportedProgram, inputs: int, stored: Sequence[Stored]) -> list[Product]:
    """Return the products of a program that takes `inputs` tensors and then weights, which are `stored` so.

    Linears are joined if they read the same tensor, all or none of them have a bias, and their 8-bit formats are equal.
    """
    nodes, _ = placeholders_of(program)
    places = {node: place for place, node in enumerate(nodes[inputs:])}
    groups: dict[object, list[Any]] = {}
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.linear.default:
            continue
        source, weight, bias = (*node.args, None)[:3]
        if weight not in places or (bias is not None and bias not in places) or len(weight.users) != 1:
            continue
        format = stored[places[weight]]
        key = (source, bias is None, format.scheme, format.activation_scale, weight.meta["val"].dtype)
        groups.setdefault(key, []).append(node)
    return [
        Product(
            tuple(group),
            tuple(node.args[1].meta["val"].shape[0] for node in group),
            tuple(places[node.args[1]] for node in group),
            tuple(places[node.args[2]] for node in group if (*node.args, None)[2] is not None),
        )
        for group in groups.values()
    ]


def operands_of(
    program: ExportedProgram, inputs: int, stored: Sequence[Stored], products: Sequence[Product]
) -> list[Operand]:
    """Return the weights that the lowered program takes, in their order: those of products, and then all others."""
    weights = [node.meta["val"] for node in placeholders_of(program)[0][inputs:]]
    found: list[Operand] = []
    for product in products:
        first = product.weights[0]
        rows, width = sum(product.rows), weights[first].shape[1]
        scheme = stored[first].scheme
        dtype = weights[first].dtype
        if scheme:
            found.append(Operand(product.weights, "numbers", EIGHT_BIT[scheme], (rows, width)))
            found.append(Operand(product.weights, "scales", torch.float32, (rows,)))
        else:
            found.append(Operand(product.weights, "values", dtype, (rows, width)))
        if stored[first].activation_scale is not None:
            found.append(Operand(product.weights[:1], "activation", torch.float32, (1,)))
        if product.biases:
            found.append(Operand(product.biases, "values", weights[product.biases[0]].dtype, (rows,)))
    taken = {place for product in products for place in (*product.weights, *product.biases)}
    for place, weight in enumerate(weights):
        if place not in taken:
            assert not stored[place].scheme, f"{stored[place].name} is 8-bit, and no linear reads it"
            found.append(Operand((place,), "values", weight.dtype, tuple(weight.shape)))
    return found


class Lowered(nn.Module):
    """A region's program for one device. It takes the region's inputs, and then its operands."""

    def __init__(
        self, program: ExportedProgram, inputs: int, stored: Sequence[Stored], device: torch.device, exact: bool
    ) -> None:
        super().__init__()
        self.program, self.inputs, self.device, self.exact = program, inputs, device, exact
        self.products = products_of(program, inputs, stored)
        self.operands = operands_of(program, inputs, stored, self.products)
        self.schemes = [stored[product.weights[0]].scheme for product in self.products]
        self.nodes, constants = placeholders_of(program)
        self.constants = {node: constant.to(device) for node, constant in constants.items()}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        values: dict[Node, Any] = {**self.constants, **dict(zip(self.nodes[: self.inputs], tensors, strict=False))}
        operands = iter(tensors[self.inputs :])
        takers: dict[Node, tuple[int, int]] = {}
        given: list[list[Tensor]] = []
        for number, (product, scheme) in enumerate(zip(self.products, self.schemes, strict=True)):
            count = 1 + bool(scheme) + (scheme == "fp8") + bool(product.biases)
            given.append([next(operands) for _ in range(count)])
            for place, node in enumerate(product.nodes):
                takers[node] = number, place
        own = {place for product in self.products for place in (*product.weights, *product.biases)}
        for place, node in enumerate(self.nodes[self.inputs :]):
            if place not in own:
                values[node] = next(operands)
        results: dict[int, Tensor] = {}
        parts: dict[Node, tuple[Tensor, int]] = {}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return tuple(values[value] for value in node.args[0])
            if node in takers:
                number, place = takers[node]
                if number not in results:
                    results[number] = multiplied(values[node.args[0]], self.schemes[number], given[number], self.exact)
                rows = self.products[number].rows
                parts[node] = whole, start = results[number], sum(rows[:place])
                values[node] = whole.narrow(-1, start, rows[place])
            elif node.target in INTO_HEADS and node.args[0] in parts:
                values[node] = in_heads(self.called(node, values), *parts[node.args[0]])
            elif str(node.target) not in CHECKS:
                values[node] = self.called(node, values)
        raise AssertionError("a program without outputs")

    def called(self, node: Any, values: Mapping[Node, Any]) -> Any:
        """Run one operator on this device."""

        def here(argument: Any) -> Any:
            if isinstance(argument, Node):
                return values[argument]
            return self.device if isinstance(argument, torch.device) else argument

        args: Any = torch.fx.node.map_aggregate(node.args, here)
        kwargs: dict[str, Any] = {**torch.fx.node.map_aggregate(node.kwargs, here)}
        if node.target is torch.ops.aten.detach_.default:  # of a constant, which is no view where it was traced
            return args[0]
        if str(node.target) == "onnx.RotaryEmbedding.opset23":
            return rotated(*args, **kwargs)
        if node.target is torch.ops.aten.gelu.default and kwargs.get("approximate") == "tanh" and not self.exact:
            return tanh_gelu(args[0])
        return node.target(*args, **kwargs)


def in_heads(made: Tensor, whole: Tensor, start: int) -> Tensor:
    """Return `made`, which is a part of the tensor `whole` in another shape, in a way that copies nothing.

    The part is the last dimension of `whole` from `start` on. Where it was split into heads, [..., heads, width], all
    of `whole` is, and some of the heads are taken: Inductor knows how these lie in memory, and attention reads them
    there. Of a part that is split afterwards, it does not, and makes a copy.
    """
    *front, heads, width = made.shape
    if front != list(whole.shape[:-1]) or start % width or whole.shape[-1] % width:
        return made
    return whole.view(*front, whole.shape[-1] // width, width).narrow(-2, start // width, heads)


def multiplied(x: Tensor, scheme: str, operands: Sequence[Tensor], exact: bool) -> Tensor:
    """Multiply x [..., K] with a matrix [N, K], and add a bias [N] if there is one.

    `operands` are the matrix, or its 8-bit numbers and their scales [N], with the scale of x's 8-bit numbers for fp8;
    and then the bias. Where `exact`, a product in 8 bits is computed in floats, as ONNX's operators define it.
    """
    if not scheme:
        return nn.functional.linear(x, *operands)
    numbers, scales, *more = operands
    if scheme != "fp8":
        weight = numbers.to(x.dtype) * scales.to(x.dtype)[:, None]
        return nn.functional.linear(x, weight, *more)
    activation, *bias = more
    if exact:
        weight = numbers.to(x.dtype) * scales.to(x.dtype)[:, None]
        return nn.functional.linear(rounded(x, activation).to(x.dtype) * activation.to(x.dtype), weight, *bias)
    rows = rounded(x, activation).reshape(-1, x.shape[-1])
    if x.dtype == torch.bfloat16:
        y = torch._scaled_mm(
            rows,
            numbers.t(),
            scale_a=activation.expand(rows.shape[0], 1).contiguous(),
            scale_b=scales[None],
            bias=bias[0] if bias else None,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
    else:  # scales of rows need bf16 results, so the scales of channels are multiplied afterwards
        one = torch.ones((), dtype=torch.float32, device=rows.device)
        y = torch._scaled_mm(rows, numbers.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True)
        y = y * (activation * scales)
        y = (y + bias[0].float() if bias else y).to(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """Divide x by a scale [1], and round it to E4M3."""
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3)


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU by its tanh formula (Hendrycks and Gimpel 2016, arXiv:1606.08415), as a sigmoid, which takes one exp.

    0.5 x (1 + tanh(u)) = x sigmoid(2 u)
    """
    wide = x.float()
    return (wide * torch.sigmoid(1.5957691216057308 * (wide + 0.044715 * wide * wide * wide))).to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """RotaryEmbedding of ONNX (opset 23) for x [B, heads, tokens, D] and cos, sin [B, tokens, D / 2].

    It is x cos + y sin, where y has the two channels of each pair exchanged, and the sign of one of them changed.
    Written so, Inductor computes it together with what comes before; halves that are put together again would go
    through memory. So would heads before tokens: x is a transposed [B, tokens, heads, D], and is computed as that.
    """
    tokens = x.transpose(1, 2)
    pairs, axis = ((-1, 2), -1) if interleaved else ((2, -1), -2)
    split = tokens.reshape(*tokens.shape[:-1], *pairs)
    cos, sin = cos.unsqueeze(2).unsqueeze(axis), sin.unsqueeze(2).unsqueeze(axis)
    sign = 2.0 * torch.arange(2, device=x.device, dtype=x.dtype) - 1  # the first channel of a pair loses
    sign = sign if interleaved else sign[:, None]
    return (split * cos + split.flip(axis) * (sin * sign)).reshape(tokens.shape).transpose(1, 2)


def lower(lowered: Lowered, examples: Sequence[Tensor], varying: Sequence[Iterable[int]]) -> ExportedProgram:
    """Trace a lowered program for inputs like `examples`, of which the dimensions in `varying` may vary."""
    weights = [torch.empty(part.shape, dtype=part.dtype, device=lowered.device) for part in lowered.operands]
    shapes = ((*(dict.fromkeys(axes, Dim.DYNAMIC) for axes in varying), *({} for _ in weights)),)
    with torch.no_grad():
        return torch.export.export(lowered, (*examples, *weights), dynamic_shapes=shapes, strict=False)


def run_fake(
    lowered: Mapping[str, Lowered], calls: Sequence[Call], kinds: Sequence[str], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return all tensors that calls give to each other for these inputs. With fake tensors, nothing is computed."""
    known = dict(inputs)
    for call, kind in zip(calls, kinds, strict=True):
        part = lowered[kind]
        weights = [torch.empty(o.shape, dtype=o.dtype, device=part.device) for o in part.operands]
        with torch.no_grad():
            results = part(*(known[name] for name in call.inputs), *weights)
        known |= dict(zip(call.outputs, results, strict=True))
    return known
