"""Programs by region, lowered for a device, beside the ONNX graphs that were joined of the same traces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.onnx.ops
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ditforge import manifest, regions
from ditforge.engines.compilers import Arrays, inductor, onnxruntime
from ditforge.engines.compilers.region_lowering import Lowered, in_heads, lower, rotated, run_fake, tanh_gelu
from ditforge.engines.compilers.region_weights import as_torch, read_operand
from ditforge.engines.verify import example

SIZES = {"batch": 2, "latent_height": 6, "latent_width": 10, "height": 32, "width": 48}
CPU = torch.device("cpu")


def inputs_of(folder: Path, name: str) -> Arrays:
    """Inputs of a network whose sizes are unlike those that it was traced with."""
    found = manifest.read(folder, "onnx")
    made = {}
    for key, tensor in found.components[name].inputs.items():
        shape = tuple(SIZES.get(str(dim), dim) for dim in tensor.shape)
        if tensor.dtype in ("INT32", "UINT8"):
            made[key] = np.random.default_rng(3).integers(0, 50, shape).astype(tensor.dtype.lower())
        else:
            made[key] = example(key, tensor, SIZES, found.model)
    return made


def by_graph(folder: Path, name: str, inputs: Arrays) -> Arrays:
    """What ONNX Runtime computes."""
    options = onnxruntime.session_options()
    session = ort.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
    outputs = [tensor.name for tensor in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, inputs), strict=True))


def by_programs(folder: Path, name: str, inputs: Arrays) -> tuple[Arrays, dict[str, Lowered]]:
    """What PyTorch computes of the lowered programs, with the graph's weights."""
    archive, initializers = folder / f"{name}.programs", ir.load(folder / f"{name}.onnx").graph.initializers
    found = regions.read(archive)
    kinds, lowered, _ = inductor.lower_kinds(found, lambda kind: regions.read_program(archive, kind), CPU)
    known = {key: torch.from_numpy(array) for key, array in inputs.items()}
    for call, kind in zip(found.calls, kinds, strict=True):
        weights = []
        for operand in lowered[kind].operands:
            stored = [found.weights[call.weights[place]] for place in operand.places]
            weights.append(read_operand(operand, stored, lambda key: as_torch(initializers[key])))
        with torch.no_grad():
            results = lowered[kind](*(known[key] for key in call.inputs), *weights)
        known |= dict(zip(call.outputs, results, strict=True))
    return {key: known[key].numpy() for key in found.outputs}, lowered


def check_equal(folder: Path, name: str, within: float = 2e-5) -> dict[str, Lowered]:
    """Assert that both compute the same: float32 is summed in another order, and pixels may be rounded so."""
    inputs = inputs_of(folder, name)
    actual, lowered = by_programs(folder, name, inputs)
    for key, expected in by_graph(folder, name, inputs).items():
        tolerance = 1.0 if expected.dtype == np.uint8 else within * float(np.abs(expected).max())
        np.testing.assert_allclose(actual[key].astype(float), expected.astype(float), rtol=0, atol=tolerance)
        assert actual[key].dtype == expected.dtype
    return lowered


@pytest.mark.parametrize("stages", ["schnell", "sd3"])
def test_programs_compute_what_graphs_compute(stages: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(stages).onnx
    names = [name for name in manifest.read(folder, "onnx").components if name != "tokenizer"]
    assert {"dit", "vae_decoder", "vae_encoder"} <= {*names}
    for name in names:
        check_equal(folder, name)


@pytest.mark.parametrize("scheme", ["fp8", "fp8-weights", "int8-weights"])
def test_quantised_linears_have_one_definition(scheme: str, dits) -> None:
    # With other sums, an activation may be rounded to the next number of E4M3, which is up to an eighth away.
    lowered = check_equal(dits(scheme, "fp32"), "dit", within=2e-3 if scheme == "fp8" else 2e-5)
    contents = [operand.content for operand in lowered["single_block"].operands]
    assert contents.count("numbers") == contents.count("scales") == 2
    assert contents.count("activation") == (2 if scheme == "fp8" else 0)


def test_linears_that_read_the_same_are_one_product(schnell) -> None:
    _, lowered = by_programs(schnell.onnx, "dit", inputs_of(schnell.onnx, "dit"))
    names = {kind: [len(product.nodes) for product in part.products] for kind, part in lowered.items()}
    assert names["single_block"] == [1, 4, 1]  # the modulation; query, key, value and the MLP; both results
    assert sorted(names["double_block"]) == [1, 1, 1, 1, 1, 1, 2, 3, 3]  # modulations are of text and image


def test_attention_reads_values_where_their_product_wrote_them(schnell) -> None:
    """A single block's values are some heads of one product that was split into heads as a whole. See `in_heads`."""
    archive = schnell.onnx / "dit.programs"
    found = regions.read(archive)
    _, lowered, _ = inductor.lower_kinds(found, lambda kind: regions.read_program(archive, kind), CPU)
    block = lowered["single_block"]
    traced = [node.meta["val"] for node in block.nodes[: block.inputs]]
    shapes = [
        [size if isinstance(size, int) else (2, 8)[axis] for axis, size in enumerate(one.shape)] for one in traced
    ]
    examples = [torch.zeros(shape, dtype=one.dtype) for shape, one in zip(shapes, traced, strict=True)]
    program = lower(block, examples, [() for _ in examples])
    (attention,) = [node for node in program.graph.nodes if "scaled_dot_product" in str(node.target)]
    chain, node = [], attention.args[2]
    while len(node.args) and "linear" not in str(node.target):
        chain.append(str(node.target).removeprefix("aten.").partition(".")[0])
        node = node.args[0]
    assert chain == ["transpose", "narrow", "view"]


def test_a_part_of_a_product_in_heads() -> None:
    """Only where the product as a whole can be split into such heads."""
    whole = torch.arange(2.0 * 3 * 12).reshape(2, 3, 12)
    for start, rows, width, shared in (
        (4, 4, 2, True),
        (8, 4, 4, True),
        (0, 12, 3, True),
        (2, 4, 4, False),
        (0, 10, 5, False),
    ):
        part = whole.narrow(-1, start, rows).unflatten(-1, (-1, width))
        found = in_heads(part, whole, start)
        assert torch.equal(found, part) and (found is not part) == shared
    turned = whole.narrow(-1, 0, 6).reshape(3, 2, 2, 3)
    assert in_heads(turned, whole, 0) is turned


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_is_that_of_onnx(interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    x, cos, sin = (torch.randn(shape, generator=generator) for shape in ((2, 3, 5, 8), (2, 5, 4), (2, 5, 4)))
    expected = torch.onnx.ops.rotary_embedding(x, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(rotated(x, cos, sin, interleaved=interleaved), expected)


def test_gelu_is_the_tanh_formula() -> None:
    x = torch.linspace(-9, 9, 2000)
    torch.testing.assert_close(tanh_gelu(x), torch.nn.functional.gelu(x, approximate="tanh"), atol=2e-6, rtol=0)


class Position(nn.Module):
    """What CLIP does with its ids: a copy on the device where they are, which a trace writes down by name."""

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (ids.to(dtype=torch.int64, device=ids.device).argmax(-1),)


def test_what_was_traced_on_the_processor_stays_on_no_other_device() -> None:
    program = torch.export.export(Position(), (torch.zeros(1, 7, dtype=torch.int32),))
    assert any(torch.device("cpu") in node.args for node in program.graph.nodes)
    device = torch.device("meta")  # between it and the processor nothing can be copied, as in a CUDA graph
    (made,) = Lowered(program, 1, (), device, exact=False)(torch.zeros(1, 7, dtype=torch.int32, device=device))
    assert made.device == device


class Devices(TorchDispatchMode):
    """Notes on which devices the results of operators are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.seen |= {leaf.device.type for leaf in tree_leaves(made) if isinstance(leaf, Tensor)}
        return made


@pytest.mark.parametrize("stages", ["schnell", "sd3"])
def test_programs_for_a_gpu_compute_nothing_on_the_processor(stages: str, request: pytest.FixtureRequest) -> None:
    """PyTorch without CUDA traces for it too, as long as nothing is computed."""
    folder, gpu = request.getfixturevalue(stages).onnx, torch.device("cuda", 0)
    archives = sorted(folder.glob("*.programs"))
    assert archives
    for archive in archives:
        found = regions.read(archive)
        kinds, lowered, _ = inductor.lower_kinds(found, lambda kind, a=archive: regions.read_program(a, kind), CPU)
        with FakeTensorMode(allow_non_fake_inputs=True):
            for part in lowered.values():
                part.device, part.constants = gpu, {node: value.to(gpu) for node, value in part.constants.items()}
            given = {k: torch.from_numpy(v).to(gpu) for k, v in inputs_of(folder, archive.stem).items()}
            with Devices() as devices:
                run_fake(lowered, found.calls, kinds, given)
        assert devices.seen == {"cuda"}, archive.name
