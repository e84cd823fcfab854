"""What an export writes: names, dimensions, precisions and reasons; and that it writes all of it or nothing."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from ditforge import manifest
from ditforge.errors import UserError
from ditforge.export.checkpoint.diffusers_folder import open_checkpoint
from ditforge.export.checkpoint.source import CheckpointSource
from ditforge.export.families import flux
from ditforge.export.graph.tracing import OPSET
from ditforge.export.network import Network
from ditforge.export.onnx_export import ExportOptions, export_checkpoint, export_network
from ditforge.export.quantisation.precision import FP32, parse_precision


def network(checkpoint: Path, name: str, precision: str) -> Network:
    return next(n for n in flux.networks(open_checkpoint(checkpoint), parse_precision(precision)) if n.name == name)


def graphs(folder: Path) -> list[onnx.ModelProto]:
    names = [name for name in manifest.read(folder, "onnx").components if name != "tokenizer"]
    return [onnx.load(folder / f"{name}.onnx") for name in names]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (ExportOptions("fp32", "fp16"), "fp32 has no 8-bit weights, which activations is for"),
        (ExportOptions("bf16", max_error=0.1), "bf16 has no 8-bit weights, which max_error is for"),
        (ExportOptions(activations="fp16"), "fp32 has no 8-bit weights, which activations is for"),
        (ExportOptions("fp8-weights", ""), "unknown type of activations ''"),
        (ExportOptions(""), "unknown precision ''"),
        (ExportOptions("fp8-weights", max_error=-1), "the largest error must be above 0 and finite, got -1"),
        (ExportOptions("fp8-weights", max_error=float("inf")), "the largest error must be above 0 and finite, got inf"),
        (ExportOptions("fp8-weights", max_error=float("nan")), "the largest error must be above 0 and finite, got nan"),
    ],
)
def test_options_are_checked_before_anything_is_read(options: ExportOptions, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        export_checkpoint(CheckpointSource(tmp_path / "nowhere"), tmp_path / "onnx", options)


def test_components_and_tensors_are_the_contract(schnell) -> None:
    found = manifest.read(schnell.onnx, "onnx")
    assert list(found.components) == ["tokenizer", "clip", "t5", "dit", "vae_decoder", "vae_encoder"]
    tensors = {name: (list(c.inputs), list(c.outputs)) for name, c in found.components.items()}
    assert tensors["tokenizer"] == (["prompt"], ["clip_ids", "t5_ids", "prompt_tokens"])
    assert tensors["clip"] == (["clip_ids"], ["pooled_embeds"])
    assert tensors["t5"] == (["t5_ids"], ["prompt_embeds"])
    assert tensors["dit"] == (["latents", "timestep", "prompt_embeds", "pooled_embeds"], ["velocity"])
    assert tensors["vae_decoder"] == (["latents"], ["image"])
    assert tensors["vae_encoder"] == (["image"], ["latents"])
    assert found.components["vae_decoder"].outputs["image"].dtype == "UINT8"
    assert found.model.guidance == "none"
    assert found.model.default_size == 96
    assert found.model.max_tokens == {"clip": 33, "t5": 40}


def test_graphs_hold_nothing_of_the_tracers_own(schnell) -> None:
    """Stack traces of the machine, and sets in another order in each process: the same export would be another one."""
    for name in [name for name in manifest.read(schnell.onnx, "onnx").components if name != "tokenizer"]:
        graph = onnx.load(schnell.onnx / f"{name}.onnx", load_external_data=False)
        assert "metadata_props" not in str(graph)
        assert graph.doc_string == graph.graph.doc_string == ""


def test_guidance_is_an_input_where_it_is_embedded(random_schnell: Path) -> None:
    checkpoint = open_checkpoint(random_schnell)
    config = flux.read_config(checkpoint) | {"guidance_embeds": True}
    assert "guidance" in flux.dit(config, 40, FP32).inputs
    assert "guidance" not in flux.dit(flux.read_config(checkpoint), 40, FP32).inputs


def test_graphs_name_their_dimensions_as_the_manifest_does(schnell) -> None:
    found = manifest.read(schnell.onnx, "onnx").components
    for name, graph in zip([n for n in found if n != "tokenizer"], graphs(schnell.onnx), strict=True):
        described = found[name].inputs | found[name].outputs
        for value in (*graph.graph.input, *graph.graph.output):
            dims = value.type.tensor_type.shape.dim
            assert tuple(dim.dim_param or dim.dim_value for dim in dims) == described[value.name].shape
        assert graph.opset_import[0].version == OPSET >= 20


def test_no_float64_is_left(schnell) -> None:
    for graph in graphs(schnell.onnx):
        inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True).graph
        types = {value.type.tensor_type.elem_type for value in inferred.value_info}
        types |= {tensor.data_type for tensor in inferred.initializer}
        casts = {a.i for node in inferred.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"}
        assert len(inferred.value_info) > 50, "shape inference found nothing to check"
        assert onnx.TensorProto.DOUBLE not in types | casts


def test_rotations_norms_and_attention_are_an_operator_each(schnell) -> None:
    """Compilers know these operators; spelled out, they are three quarters of the nodes, and most of the copies."""
    nodes = onnx.load(schnell.onnx / "dit.onnx", load_external_data=False).graph.node
    found = Counter(node.op_type for node in nodes)
    double, single = 1, 3  # blocks of the random checkpoint
    assert found["Attention"] == double + single
    assert found["RotaryEmbedding"] == 2 * (double + single)  # query and key
    assert found["RMSNormalization"] == 4 * double + 2 * single  # query and key, and those of the text
    assert found["LayerNormalization"] == 4 * double + single + 1
    assert not found.keys() & {"Softmax", "ReduceMean", "Pow", "Neg"}
    assert len(nodes) < 100 * (double + single)


def test_nothing_stands_between_a_weight_and_its_product(schnell) -> None:
    for graph in graphs(schnell.onnx):
        matrices = {tensor.name for tensor in graph.graph.initializer if len(tensor.dims) == 2}
        consumers = {node.op_type for node in graph.graph.node for name in node.input if name in matrices}
        assert "Transpose" not in consumers
        assert consumers & {"MatMul", "Gemm", "Gather"}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_each_network_gets_the_precision_that_is_asked_for(random_schnell: Path, precision: str) -> None:
    networks = flux.networks(open_checkpoint(random_schnell), parse_precision(precision))
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert {n.name: n.dtype for n in networks} == dict.fromkeys(
        ("clip", "t5", "dit", "vae_decoder", "vae_encoder"), dtype
    )
    text = torch.float32 if precision == "fp32" else torch.float16
    assert {n.name: p.dtype for n in networks for k, p in n.outputs.items() if k.endswith("_embeds")} == {
        "clip": text,
        "t5": text,
    }


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.01), ("bf16", 0.05)])
def test_16_bit_dit_is_close_to_fp32(schnell, tmp_path: Path, precision: str, tolerance: float) -> None:
    """Executed by ONNX's reference implementation: ONNX Runtime has no bf16 kernels on a CPU."""
    component = export_network(
        network(schnell.checkpoint, "dit", precision), open_checkpoint(schnell.checkpoint), tmp_path
    )
    assert component.precision == precision
    operators = [node.op_type for node in onnx.load(tmp_path / "dit.onnx", load_external_data=False).graph.node]
    assert operators.count("Clip") == (4 if precision == "fp16" else 0)  # where diffusers clamps: once in each block
    random = np.random.default_rng(0)
    inputs = {
        "latents": random.standard_normal((2, 16, 4, 6)).astype(np.float32),
        "timestep": np.array([0.9, 0.4], np.float32),
        "prompt_embeds": random.standard_normal((2, 40, 56)).astype(np.float16),
        "pooled_embeds": random.standard_normal((2, 48)).astype(np.float16),
    }
    actual = ReferenceEvaluator(str(tmp_path / "dit.onnx")).run(["velocity"], inputs)[0]
    wide = {name: value.astype(np.float32) for name, value in inputs.items()}
    expected = ReferenceEvaluator(str(schnell.onnx / "dit.onnx")).run(["velocity"], wide)[0]
    assert actual.dtype == np.float32
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < tolerance  # not zero: it really is computed in 16 bits


def test_the_same_checkpoint_gives_the_same_bytes(schnell, tmp_path: Path) -> None:
    written = export_network(network(schnell.checkpoint, "clip", "fp32"), open_checkpoint(schnell.checkpoint), tmp_path)
    before = manifest.read(schnell.onnx, "onnx").components["clip"]
    assert written == before.model_copy(update={"footprint": None})


def test_an_export_is_not_made_twice(schnell) -> None:
    before = (schnell.onnx / "manifest.json").stat().st_mtime_ns
    assert export_checkpoint(CheckpointSource(schnell.checkpoint), schnell.onnx).fresh
    assert (schnell.onnx / "manifest.json").stat().st_mtime_ns == before


def test_an_interrupted_export_leaves_what_was_there(random_schnell: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx"

    def interrupt(component: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(CheckpointSource(random_schnell), out, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_changed_checkpoint_is_exported_again(schnell, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(schnell.checkpoint, tmp_path / "checkpoint")
    (checkpoint / "transformer" / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):  # it looks, instead of trusting the export that is there
        export_checkpoint(CheckpointSource(checkpoint), schnell.onnx)
    assert manifest.read(schnell.onnx, "onnx")


def test_unknown_precision() -> None:
    with pytest.raises(UserError, match="fp7") as error:
        parse_precision("fp7")
    assert "int8-weights" in error.value.fix
    with pytest.raises(UserError, match="fp64"):
        parse_precision("fp8", "fp64")
