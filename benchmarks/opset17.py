"""An export whose graphs are of opset 17 and of elementary operators, which TensorRT 8.6 reads.

    python benchmarks/opset17.py models/flux-tiny --precision fp16 --out out/opset17/flux-tiny-fp16

TensorRT 8.6 is the only TensorRT for data-centre GPUs whose wheel on the public index has its libraries in it. Its
parser ends at opset 17, which lacks the operators for attention, rotary embeddings and RMS norms of `ditforge export`.
Here, the same modules with the same weights are traced by PyTorch's older exporter, with those operators spelled out.
The manifest is that of `ditforge export`, so `ditforge build` takes the folder. Every graph is executed once by ONNX
Runtime, beside PyTorch with the operators as they are; a difference above TOLERANCE ends the script.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from ditforge import manifest
from ditforge.contract import TOKENIZER
from ditforge.export.checkpoint.diffusers_folder import Checkpoint
from ditforge.export.checkpoint.source import CheckpointSource, opened
from ditforge.export.families import read_networks
from ditforge.export.graph.tracing import default_dtype
from ditforge.export.network import Dim, Network
from ditforge.export.onnx_export import ExportOptions, export_checkpoint, weights_of
from ditforge.export.quantisation.precision import parse_precision

OPSET = 17
BATCH, LATENTS, PIXELS = 2, 16, 128  # of the example; all of them vary in the graph
TOKENS = 100  # ids are below: every vocabulary has as many
TOLERANCE = {"fp32": 5e-3, "fp16": 0.1}  # of the largest number of an output; of 8-bit pixels, of 255


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """torch.onnx.ops.rotary_embedding of neighbouring channels."""
    assert interleaved
    cos, sin = cos[:, None], sin[:, None]
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """torch.nn.functional.rms_norm over the last dimension, in float32."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + (eps or torch.finfo(x.dtype).eps))
    return (normed if weight is None else normed * weight.float()).to(x.dtype)


def layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """torch.nn.functional.layer_norm over the last dimension, in float32."""
    centred = x.float() - x.float().mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None and bias is not None:
        normed = normed * weight.float() + bias.float()
    return normed.to(x.dtype)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """torch.nn.functional.group_norm, in float32."""
    grouped = x.float().reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normed = (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)).reshape(x.shape)
    each = [1, -1] + [1] * (x.dim() - 2)
    return (normed * weight.float().reshape(each) + bias.float().reshape(each)).to(x.dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **rest: Any
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, whose causal mask becomes a constant of the graph."""
    tokens, channels = (int(size) for size in query.shape[-2:])
    scores = (query * (rest.get("scale") or channels**-0.5)) @ key.transpose(-1, -2)
    if is_causal:
        least = float(torch.finfo(query.dtype).min)
        attn_mask = torch.from_numpy(np.triu(np.full((tokens, tokens), least), 1)).to(query.dtype)
    return torch.softmax(scores if attn_mask is None else scores + attn_mask, -1) @ value


def clamped(x: Tensor) -> Tensor:
    """The clamp of a residual stream to fp16's range, without ONNX's Clip, whose limits 8.6 takes in fp32 alone."""
    if x.dtype != torch.float16:
        return x
    limit = torch.tensor(torch.finfo(x.dtype).max, dtype=x.dtype)
    return torch.minimum(torch.maximum(x, -limit), limit)


def unclamped(x: Tensor, min: Tensor, max: Tensor) -> Tensor:
    """torch.clamp as transformers' T5 calls it in fp16: without effect, because the export keeps its stream small."""
    return x


def never_infinite(x: Tensor) -> Tensor:
    """torch.isinf, from which transformers' T5 takes the limits of that clamp."""
    return torch.zeros(1, dtype=torch.bool)


@contextmanager
def spelled_out() -> Iterator[None]:
    """Within this context, the modules of all networks call elementary operators."""
    blocks = "ditforge.export.dit_blocks"
    with (
        patch(f"{blocks}.rms_norm", rms_norm),
        patch(f"{blocks}.layer_norm", layer_norm),
        patch(f"{blocks}.scaled_dot_product_attention", attention),
        patch("ditforge.export.families.flux_dit.rotary_embedding", rotary_embedding),
        patch("ditforge.export.families.flux_dit.clamped", clamped),
        patch("torch.nn.functional.group_norm", group_norm),
        patch("torch.nn.functional.layer_norm", layer_norm),
        patch("torch.nn.functional.scaled_dot_product_attention", attention),
        patch("torch.isinf", never_infinite),
        patch("torch.clamp", unclamped),
    ):
        yield


def filled(network: Network, checkpoint: Checkpoint) -> torch.nn.Module:
    """The module of a network with the checkpoint's weights. The default dtype must be the network's."""
    module = network.build().eval()
    weights = weights_of(network, checkpoint)
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.removeprefix("module."))
    for parameter in module.parameters():
        called = names[id(parameter)]
        key = weights.find(called, network.key_prefixes)
        assert key is not None, f"{weights.folder} lacks {called[0]}"
        parameter.data = weights.read(key, network.factor(called)).to(parameter.dtype)
    return module


def examples(network: Network) -> list[Tensor]:
    """Inputs of a network, in their order."""
    torch.manual_seed(0)
    sizes = {"batch": BATCH, "height": PIXELS, "width": PIXELS, "latent_height": LATENTS, "latent_width": LATENTS}
    made = []
    for name, port in network.inputs.items():
        shape = [sizes[dim.name] if isinstance(dim, Dim) else dim for dim in port.shape]
        if port.dtype.is_floating_point:
            numbers = torch.rand(shape) if name in ("timestep", "skip_layers") else torch.randn(shape)
            made.append(numbers.to(port.dtype))
        else:
            made.append(torch.randint(0, 256 if port.dtype == torch.uint8 else TOKENS, shape).to(port.dtype))
    return made


def write_graph(network: Network, checkpoint: Checkpoint, path: Path) -> float:
    """Write a network's graph with its weights. Returns its error beside PyTorch, relative to the largest number."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer and of the older exporter
        inputs = examples(network)
        with default_dtype(network.dtype):
            module = filled(network, checkpoint)
            expected = module(*inputs)
            varying = {
                name: {place: dim.name for place, dim in enumerate(port.shape) if isinstance(dim, Dim)}
                for name, port in {**network.inputs, **network.outputs}.items()
            }
            with spelled_out():
                torch.onnx.export(
                    module, tuple(inputs), str(path), opset_version=OPSET, dynamo=False, dynamic_axes=varying,
                    input_names=list(network.inputs), output_names=list(network.outputs),
                )  # fmt: skip
    onnx.save(named(onnx.shape_inference.infer_shapes(onnx.load(path)), network), path)
    options = onnxruntime.SessionOptions()
    # Its optimiser makes layer norms of two dtypes, which it then refuses.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {name: tensor.numpy() for name, tensor in zip(network.inputs, inputs, strict=True)}
    outputs = session.run(list(network.outputs), {put.name: feeds[put.name] for put in session.get_inputs()})
    expected = expected if isinstance(expected, tuple) else (expected,)
    return max(relative(made, right.numpy()) for made, right in zip(outputs, expected, strict=True))


def named(model: onnx.ModelProto, network: Network) -> onnx.ModelProto:
    """The model with the ports of the network as its inputs and outputs have them: dtypes and shapes."""
    for put in (*model.graph.input, *model.graph.output):
        port = {**network.inputs, **network.outputs}[put.name]
        for dim, said in zip(put.type.tensor_type.shape.dim, port.names(), strict=True):
            dim.Clear()
            if isinstance(said, int):
                dim.dim_value = said
            else:
                dim.dim_param = said
    return model


def relative(made: Any, right: Any) -> float:
    """The largest difference, relative to the largest number; of 8-bit pixels, to all levels."""
    whole = 255.0 if right.dtype == np.uint8 else max(float(np.abs(right).max()), 1e-9)
    error = float(np.abs(made.astype(np.float64) - right).max()) / whole
    return error if math.isfinite(error) else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--precision", choices=list(TOLERANCE), default="fp32")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} is there already: remove it first")
    source = CheckpointSource(args.checkpoint.resolve())
    args.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder) / "onnx"
        described = export_checkpoint(source, export, ExportOptions(precision=args.precision)).manifest
        shutil.copytree(export / TOKENIZER, args.out / TOKENIZER)
    components = dict(described.components)
    with opened(source) as checkpoint:
        for network in read_networks(checkpoint, parse_precision(args.precision))[2]:
            path = args.out / f"{network.name}.onnx"
            error = write_graph(network, checkpoint, path)
            print(f"{network.name}: {path.stat().st_size} bytes, error {error:.1e}", flush=True)
            if error > TOLERANCE[args.precision]:
                raise SystemExit(f"{path} is not what PyTorch computes")
            files = {path.name: manifest.describe(path)}
            components[network.name] = components[network.name].model_copy(update={"files": files})
    manifest.write(described.model_copy(update={"components": components}), args.out)


if __name__ == "__main__":
    main()
