"""8-bit exports: the numbers in the files, what stands around each product, what ONNX Runtime computes from them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from calibrations import CHANGE, ROUNDING, assert_same, largest_change
from onnx import numpy_helper

from ditforge import manifest
from ditforge.engines.verify import compare
from ditforge.errors import UserError
from ditforge.export.checkpoint.diffusers_folder import open_checkpoint
from ditforge.export.checkpoint.source import CheckpointSource
from ditforge.export.families import flux
from ditforge.export.onnx_export import ExportOptions, export_checkpoint, export_network
from ditforge.export.quantisation import calibration, sensitivity
from ditforge.export.quantisation.precision import EIGHT_BIT, parse_precision
from ditforge.export.quantisation.qdq import SCHEMES

# Relative errors of the velocity, about twice those of one random linear: 3.7 %, 2.6 % and 0.9 %.
PLAIN = {"height": 96, "width": 96, "num_inference_steps": 4, "max_sequence_length": 40, "output_type": "latent"}
TOLERANCES = {"fp8": 0.08, "fp8-weights": 0.06, "int8-weights": 0.02}


@pytest.fixture(scope="module")
def exported(dits) -> dict[str, Path]:
    """The DiT in each 8-bit precision, fp16 around it, in a folder of its own."""
    return {name: dits(name, "fp16") for name in EIGHT_BIT}


def intended(checkpoint: Path) -> set[str]:
    """The linears of the blocks, found in PyTorch's module: all but modulation, embedders and the final layers."""
    model = flux.load_pipeline(open_checkpoint(checkpoint)).transformer
    linears = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    blocks = {name for name in linears if "transformer_blocks" in name}
    return {f"{name}.weight" for name in blocks if ".norm" not in name}


@pytest.mark.parametrize("activations", ["fp32", "fp16", "bf16"])
def test_the_same_products_are_8_bit_whatever_surrounds_them(schnell, dits, activations: str) -> None:
    component = manifest.read(dits("int8-weights", activations), "onnx").components["dit"]
    assert component.layers == dict.fromkeys(component.layers, "int8-weights")
    assert set(component.layers) == intended(schnell.checkpoint)


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_every_intended_product_and_no_other_is_8_bit(schnell, exported, name: str) -> None:
    graph = onnx.load(exported[name] / "dit.onnx").graph
    producers = {output: node for node in graph.node for output in node.output}
    eight_bit = set()
    for node in graph.node:
        weight = producers.get(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
        if weight is not None and weight.op_type == "DequantizeLinear":
            assert node.op_type == "MatMul"
            assert weight.input[0] in {tensor.name for tensor in graph.initializer}, "something stands in between"
            eight_bit.add(weight.input[0].removesuffix("_quantized"))
            if name == "fp8":
                back = producers[node.input[0]]
                assert back.op_type == "DequantizeLinear"
                assert producers[back.input[0]].op_type == "QuantizeLinear"
    assert eight_bit == intended(schnell.checkpoint)
    assert manifest.read(exported[name], "onnx").components["dit"].layers == dict.fromkeys(
        manifest.read(exported[name], "onnx").components["dit"].layers, name
    )
    assert set(manifest.read(exported[name], "onnx").components["dit"].layers) == eight_bit


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_weights_are_8_bit_numbers_with_a_scale_a_channel(schnell, exported, name: str) -> None:
    graph = onnx.load(exported[name] / "dit.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    weights = open_checkpoint(schnell.checkpoint).weights("transformer")
    layer = "single_transformer_blocks.1.proj_out.weight"
    numbers = numpy_helper.to_array(tensors[f"{layer}_quantized"])
    scale = numpy_helper.to_array(tensors[f"{layer}_scale"])
    original = weights.read(layer).float().T.numpy()
    assert numbers.dtype == (np.int8 if name == "int8-weights" else ml_dtypes.float8_e4m3fn)
    assert scale.dtype == np.float16
    assert numbers.shape == original.shape
    assert scale.shape == original.shape[1:]
    np.testing.assert_allclose(np.abs(original).max(axis=0) / scale, SCHEMES[name].largest, rtol=2e-3)
    scale = scale.astype(np.float32)
    error = np.abs(numbers.astype(np.float32) * scale - original)
    step = scale / 2 if name == "int8-weights" else np.maximum(np.abs(original) / 16, scale * 2.0**-10)
    assert (error <= step * 1.01 + 1e-7).all()


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_onnx_runtime_computes_nearly_the_same(schnell, exported, name: str) -> None:
    (velocity,) = compare(exported[name], schnell.onnx)
    assert 0.001 < velocity.relative < TOLERANCES[name]  # above zero: it really is quantised
    assert velocity.cosine > 0.997


def test_the_file_is_about_half_of_bf16(exported, dits) -> None:
    folders = {**exported, "bf16": dits("bf16", "bf16")}
    sizes = {name: (folder / "dit.onnx.data").stat().st_size for name, folder in folders.items()}
    for name in EIGHT_BIT:
        assert 0.5 < sizes[name] / sizes["bf16"] < 0.75  # modulation and embedders of so small a model weigh a lot


def test_the_twin_of_bf16_is_what_is_verified(schnell, dits) -> None:
    folder = dits("fp8", "bf16")
    component = manifest.read(folder, "onnx").components["dit"]
    assert (component.precision, component.dtype) == ("fp8", "bf16")
    (velocity,) = compare(folder, schnell.onnx)
    assert 0.001 < velocity.relative < TOLERANCES["fp8"]


def test_the_same_prompts_give_the_same_calibration(random_schnell: Path, ranges: Path, tmp_path: Path) -> None:
    again = calibration.calibrate(
        CheckpointSource(random_schnell), tmp_path / "ranges.json", ["a red circle", "two blue squares"]
    )
    assert_same(again, calibration.Calibration.model_validate_json(ranges.read_bytes()))
    assert set(again.amax) == intended(random_schnell)
    other = calibration.calibrate(CheckpointSource(random_schnell), tmp_path / "other.json", ["nothing"])
    assert other.prompts_sha256 != again.prompts_sha256
    assert largest_change(other, again) > CHANGE


def test_ranges_are_the_largest_inputs(random_schnell: Path, ranges: Path) -> None:
    """Against a plain reference: every input of one layer collected while diffusers runs the first prompt."""
    opened = open_checkpoint(random_schnell)
    pipeline, seen = flux.load_pipeline(opened), []
    layer = pipeline.transformer.single_transformer_blocks[0].proj_out
    layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].abs().max().item()))
    pipeline("a red circle", **PLAIN, generator=torch.Generator().manual_seed(0))
    pipeline("two blue squares", **PLAIN, generator=torch.Generator().manual_seed(1))
    read = calibration.read_ranges(ranges, opened, parse_precision("fp8"))
    assert read is not None
    assert read.amax["single_transformer_blocks.0.proj_out.weight"] == pytest.approx(max(seen), rel=ROUNDING)


def test_fp8_needs_a_calibration(random_schnell: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ranges") as error:
        export_checkpoint(CheckpointSource(random_schnell), tmp_path / "out", ExportOptions("fp8"))
    assert "ditforge calibrate" in error.value.fix
    assert "fp8-weights" in error.value.fix
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: text.replace('"config_sha256": "', '"config_sha256": "0'), "another configuration"),
        (lambda text: text[: len(text) // 2], "no calibration"),
        (lambda text: text.replace('"format": 2', '"format": 1'), "format 1, this version reads format 2"),
        (lambda text: "[]", "no calibration"),
    ],
)
def test_a_calibration_that_does_not_fit(random_schnell: Path, ranges: Path, tmp_path: Path, change, named) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(change(ranges.read_text()))
    with pytest.raises(UserError, match=named):
        calibration.read_ranges(path, open_checkpoint(random_schnell), parse_precision("fp8"))


def test_prompts(tmp_path: Path) -> None:
    shipped = calibration.read_prompts(None)
    assert len(shipped) == len(set(shipped)) == 128
    (tmp_path / "prompts.txt").write_text("one\n\n  two  \n")
    assert calibration.read_prompts(tmp_path / "prompts.txt") == ["one", "two"]
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="no prompts"):
        calibration.read_prompts(tmp_path / "empty.txt")
    with pytest.raises(UserError, match="cannot read"):
        calibration.read_prompts(tmp_path / "missing.txt")


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_that_no_schedule_has(random_schnell: Path, tmp_path: Path, steps: int) -> None:
    with pytest.raises(UserError, match=str(steps)):
        calibration.calibrate(CheckpointSource(random_schnell), tmp_path / "ranges.json", ["a"], steps)
    assert not list(tmp_path.iterdir())


def test_where_the_ranges_cannot_be_written_nothing_is_run(random_schnell: Path) -> None:
    ran = []
    with pytest.raises(UserError, match="cannot write"):
        calibration.calibrate(
            CheckpointSource(random_schnell), Path("/proc/ranges.json"), ["a"], progress=lambda *a: ran.append(a)
        )
    assert not ran


@pytest.fixture(scope="module")
def measured(random_schnell: Path):
    """The random checkpoint's DiT, its linears, and three calls of it."""
    opened = open_checkpoint(random_schnell)
    pipeline, calls = flux.load_pipeline(opened), []
    with sensitivity.recorded_calls(pipeline.transformer, calls):
        flux.run_pipeline(pipeline, flux.model(opened), "a red circle", 3, seed=0)
    return pipeline.transformer, calibration.find_linears(pipeline.transformer, flux.LINEARS), calls


def test_the_worst_linears_are_kept_until_the_velocity_is_good_enough(measured) -> None:
    transformer, linears, calls = measured
    scheme = SCHEMES["fp8-weights"]
    loose = sensitivity.choose_linears(transformer, linears, calls, scheme, {}, max_error=1.0)
    assert loose.keep == ()
    assert 0.005 < loose.velocity < 0.1
    assert list(loose.errors.values()) == sorted(loose.errors.values(), reverse=True)
    assert set(loose.errors) == set(linears)

    wanted = loose.velocity / 2
    tight = sensitivity.choose_linears(transformer, linears, calls, scheme, {}, max_error=wanted)
    assert 0 < len(tight.keep) < len(linears)
    assert tight.velocity <= wanted
    assert tight.keep == tuple(tight.errors)[: len(tight.keep)]
    # Measuring leaves the model as it was: quantised weights would have no error. The same sums may round otherwise.
    assert tight.errors == pytest.approx(loose.errors, rel=1e-4)

    nothing = sensitivity.choose_linears(transformer, linears, calls, scheme, {}, max_error=1e-9)
    assert set(nothing.keep) == set(linears)


@pytest.mark.parametrize("max_error", [0.0, -1.0, float("nan")])
def test_a_largest_error_must_be_positive(measured, max_error: float) -> None:
    transformer, linears, calls = measured
    with pytest.raises(UserError, match="above 0"):
        sensitivity.choose_linears(transformer, linears, calls, SCHEMES["fp8"], {}, max_error)


def test_kept_linears_stay_16_bit_in_the_graph(schnell, tmp_path: Path) -> None:
    keep = "transformer_blocks.0.ff.net.2.weight"
    precision = parse_precision("int8-weights", "fp16")
    opened = open_checkpoint(schnell.checkpoint)
    network = next(n for n in flux.networks(opened, precision) if n.name == "dit")
    component = export_network(network, opened, tmp_path, precision.scheme, None, (keep,))
    names = {tensor.name for tensor in onnx.load(tmp_path / "dit.onnx", load_external_data=False).graph.initializer}
    assert keep in names
    assert f"{keep}_quantized" not in names
    assert component.layers[keep] == "fp16"
    assert list(component.layers.values()).count("int8-weights") == len(component.layers) - 1
