"""What networks take of memory: against counts by hand, PyTorch's allocations, files written, and TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import published
import pytest
import torch
from compiled_sizes import compiled_sizes, sample_shapes
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ditforge import manifest
from ditforge.engines.memory.memory_plan import SPARE
from ditforge.export.checkpoint.diffusers_folder import open_checkpoint
from ditforge.export.checkpoint.random_weights import random_checkpoint
from ditforge.export.families import read_networks
from ditforge.export.graph.measure_footprint import Measured, measure, measured_sides
from ditforge.export.network import BATCH, Dim, Network, Port
from ditforge.export.onnx_export import export_network
from ditforge.export.quantisation.precision import Precision, parse_precision
from ditforge.footprint import Footprint
from ditforge.model import Model

MODEL = published.MODEL.model_copy(update={"latent_channels": 4, "default_size": 512, "max_size": 1024})


def network(forward: Callable[[Tensor, nn.Module], Tensor], **modules: Callable[[], nn.Module]) -> Network:
    """A network of `latents` [B, 4, h, w] float32, with parameters of bfloat16."""

    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.ModuleDict({name: make() for name, make in modules.items()})

        def forward(self, latents: Tensor) -> Tensor:
            return forward(latents, self.module)

    latents = Port(torch.float32, (BATCH, 4, Dim("latent_height", 2), Dim("latent_width", 2)))
    return Network("made", Made, {"latents": latents}, {}, "", torch.bfloat16, "")


def activations(forward: Callable[[Tensor, nn.Module], Tensor], **modules: Callable[[], nn.Module]) -> int:
    """Bytes at 512 x 512 pixels, of which the input takes 4 * 64 * 64 * 4."""
    return measure(network(forward, **modules), MODEL).activations[512]


INPUT = 4 * 64 * 64 * 4


def test_counts_by_hand() -> None:
    assert activations(lambda x, _: x * 2) == 2 * INPUT
    assert activations(lambda x, _: x * 2 + 1) == 3 * INPUT
    assert activations(lambda x, _: (x * 2 + 1) * x) == 3 * INPUT  # the first product is gone by then
    assert activations(lambda x, _: (x * 2).reshape(4, -1).T[:7]) == 2 * INPUT  # views are free
    assert activations(lambda x, _: (x * 2).add_(1)) == 2 * INPUT
    assert activations(lambda x, _: (x * 2) + (x * 3)) == 4 * INPUT
    assert activations(lambda x, _: x.bfloat16()) == 1.5 * INPUT


def test_parameters_are_weights_and_no_activations() -> None:
    made = network(
        lambda x, module: module["linear"](x.bfloat16()),
        linear=lambda: nn.Linear(64, 32),
        unused=lambda: nn.Linear(1000, 1000),
    )
    inputs = {"latents": Port(torch.float32, (BATCH, 4, 64, 64))}
    measured = measure(replace(made, inputs=inputs), MODEL)
    assert measured.activations == {512: INPUT + INPUT // 2 + 4 * 64 * 32 * 2}
    assert set(measured.parameters) == {"linear.weight", "linear.bias"}
    assert measured.footprint().weights == 2 * (64 * 32 + 32)


@pytest.mark.parametrize(("channels", "scores"), [(128, 0), (512, 2 * 4096 * 4096 * 4)])
def test_scores_of_attention_count_where_no_fused_kernel_is_for_the_heads(channels: int, scores: int) -> None:
    def attend(x: Tensor, _: nn.Module) -> Tensor:
        heads = x[:, :1].flatten(2).transpose(1, 2)[:, None].expand(-1, -1, -1, channels).contiguous()
        return scaled_dot_product_attention(heads, heads, heads)

    expected = INPUT + 2 * 4096 * channels * 4 + scores
    assert activations(attend) == pytest.approx(expected, rel=0.01)  # the kernel returns a row's sums too


@pytest.fixture(scope="session")
def measured(flux_tiny: Path) -> tuple[Model, dict[str, Measured]]:
    """flux-tiny's networks in fp32."""
    model, _, networks = read_networks(open_checkpoint(flux_tiny), Precision("fp32"))
    return model, {network.name: measure(network, model) for network in networks}


def allocated(module: nn.Module, inputs: dict[str, Tensor]) -> int:
    """The most bytes that PyTorch's allocator for the CPU hands out at a time while the module runs, and the inputs."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        module(**inputs)
    events = sorted(
        (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return peak + sum(tensor.nbytes for tensor in inputs.values())


@pytest.mark.parametrize("name", ["clip", "t5", "dit", "vae_decoder", "vae_encoder"])
def test_activations_are_what_pytorch_allocates(name: str, measured: tuple[Model, dict[str, Measured]]) -> None:
    model, networks = measured
    side = model.default_size * 2 if name not in ("clip", "t5") else model.default_size
    network = networks[name].network
    shapes = sample_shapes(network, side, model)
    inputs = {key: torch.zeros(shapes[key], dtype=port.dtype) for key, port in network.inputs.items()}
    real = allocated(network.build().eval(), inputs)
    assert networks[name].footprint().activations_at(side) == pytest.approx(real, rel=0.1)


def test_the_dits_activations_are_linear_in_pixels(measured: tuple[Model, dict[str, Measured]]) -> None:
    model, networks = measured
    footprint = networks["dit"].footprint()
    sides = measured_sides(model)[-3:]
    first, second, third = (footprint.activations[side] for side in sides)
    slopes = (second - first) / (sides[1] ** 2 - sides[0] ** 2), (third - second) / (sides[2] ** 2 - sides[1] ** 2)
    assert slopes[0] == pytest.approx(slopes[1], rel=0.05)


def test_equal_blocks_that_are_left_out_change_nothing() -> None:
    """Neither memory nor operations, which PyTorch's own counter counts too; where a row grows, nothing is left out."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(interpolate(x, scale_factor=2.0))

    def through(x: Tensor, module: nn.Module) -> Tensor:
        x = x.bfloat16()
        for block in module["blocks"]:
            x = block(x)
        return x

    for block, count in ((lambda: nn.Conv2d(4, 4, 3, padding=1), 9), (Growing, 3)):
        made = network(through, blocks=lambda block=block, count=count: nn.ModuleList(block() for _ in range(count)))
        measured = measure(made, MODEL)
        assert len(measured.parameters) == 2 * count
        for side, counted in measured.flops.items():
            module, x = made.build().to(torch.bfloat16), torch.zeros(1, 4, side // 8, side // 8)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                module(x)
            assert counter.get_total_flops() == counted
    grown = 4 * (8 * 512 // 8) ** 2 * 2  # the last picture, before and after its product, and what made it
    assert measured.activations[512] >= 2 * grown


def test_operations_between_what_was_counted() -> None:
    measured = Footprint(weights=1, largest_block=1, activations={1: 1}, flops={256: 10, 512: 22, 1024: 74, 2048: 415})
    assert measured.flops_at(1024) == pytest.approx(74)
    assert 74 < (measured.flops_at(1200) or 0) < 120
    assert Footprint(weights=1, largest_block=1, activations={1: 1}).flops_at(512) is None


def test_what_of_the_operations_is_attention() -> None:
    """Only attention grows with the square of the tokens, which are 512 of text and one for 16 x 16 pixels."""

    def tokens(side: float) -> float:
        return 512 + (side / 16) ** 2

    flops = {side: round(7e6 + 3e6 * tokens(side) + 5e3 * tokens(side) ** 2) for side in (256, 512, 1024, 2048)}
    measured = Footprint(weights=1, largest_block=1, activations={1: 1}, flops=flops)
    for side in (512, 800, 1024, 1536):
        assert measured.attention_at(side, 512, 16) == pytest.approx(5e3 * tokens(side) ** 2, rel=1e-4)
    few = Footprint(weights=1, largest_block=1, activations={1: 1}, flops={512: flops[512], 1024: flops[1024]})
    assert few.attention_at(1024, 512, 16) is None


def test_between_and_beyond_what_was_measured() -> None:
    def quadratic(side: float) -> float:
        return 1000 + 5 * side**2 + side**4 / 1e3

    footprint = Footprint(weights=8, largest_block=1, activations={s: round(quadratic(s)) for s in (100, 200, 300)})
    assert footprint.activations_at(50) == footprint.activations_at(100) == round(quadratic(100))
    assert quadratic(250) <= footprint.activations_at(250) <= 1.3 * quadratic(250)
    assert footprint.activations_at(600) == pytest.approx(quadratic(600), rel=1e-6)
    assert [footprint.segment(count) for count in (1, 2, 4)] == [8, 5, 3]


@pytest.mark.parametrize(("precision", "base"), [("bf16", "bf16"), ("fp8-weights", "bf16"), ("int8-weights", "fp16")])
def test_weights_are_what_is_written(
    precision: str, base: str, dits: Callable[[str, str], Path], random_schnell: Path
) -> None:
    folder = dits(precision, base)
    written = ir.load(folder / "dit.onnx").graph.initializers.values()
    size = sum(value.const_value.nbytes for value in written if value.const_value is not None)
    model, _, networks = read_networks(open_checkpoint(random_schnell), parse_precision(precision, base))
    dit = next(network for network in networks if network.name == "dit")
    scheme = parse_precision(precision, base).scheme
    assert measure(dit, model).footprint(scheme).weights == pytest.approx(size, rel=0.02)


def test_an_export_says_what_its_networks_take(
    schnell, random_schnell: Path, measured: tuple[Model, dict[str, Measured]]
) -> None:
    found = manifest.read(schnell.onnx, "onnx")
    model, _, networks = read_networks(open_checkpoint(random_schnell), Precision("fp32"))
    for network in networks:
        component = found.components[network.name]
        assert component.footprint == measure(network, model).footprint()
        assert component.footprint.weights == pytest.approx(sum(f.size for f in component.files.values()), rel=0.35)
    assert found.components["tokenizer"].footprint is None


@pytest.mark.matrix
def test_tensorrt_wants_no_more(tmp_path: Path) -> None:
    """TensorRT-RTX says how much its engine takes, which no GPU is needed for; here of the published autoencoder."""
    with random_checkpoint(Path("flux.1-dev")) as opened:
        model, _, networks = read_networks(opened, parse_precision("bf16"))
        decoder = next(network for network in networks if network.name == "vae_decoder")
        export_network(decoder, opened, tmp_path)
    footprint, side = measure(decoder, model).footprint(), 512
    weights, taken = compiled_sizes(tmp_path / "vae_decoder.onnx", sample_shapes(decoder, side, model))
    assert footprint.weights == pytest.approx(weights, rel=0.01)
    assert 0.8 * footprint.activations_at(side) < taken < SPARE * footprint.activations_at(side)
