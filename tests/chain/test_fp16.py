"""T5 and the autoencoder in fp16: streams that would overflow are held at a fraction of their size, exactly."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from ditforge.errors import DitforgeError
from ditforge.export import vae
from ditforge.export.checkpoint import consistency
from ditforge.export.checkpoint.diffusers_folder import open_checkpoint
from ditforge.export.families import flux
from ditforge.export.graph.tracing import PREFIX, default_dtype, dry_run
from ditforge.export.network import OF_THE_EXPORT, Network
from ditforge.export.onnx_export import export_network
from ditforge.export.quantisation.precision import FP32, parse_precision
from ditforge.export.text_encoders import t5

FP16 = parse_precision("fp16")
RESCALED = ("t5", "vae_decoder", "vae_encoder")
# Relative errors. fp16 rounds each number to within 2^-11 of it; some tens of roundings in a row add up like a random
# walk, to about twice that here.
TOLERANCE = 2**-8
# The same numbers times a power of two are rounded alike, so rescaling changes no bit where sums have the same order.
# Of two graphs, or two runs with MKL, that is not promised on every CPU; these are float32's roundings, 2^-24, of some
# tens of terms and layers. Were one factor missing, in one norm's epsilon, 1e-4 and more would be off.
ROUNDING = 1e-5
T5_FILE, VAE_FILE = "text_encoder_2/model.safetensors", "vae/diffusion_pytorch_model.safetensors"
WRITES_TO_A_STREAM = r".*\.(conv1|conv2|conv_in|to_out\.0)\..*"
# What weights of the random checkpoint are multiplied by, so that streams are about as large as can be (1e5 to 1e6), or
# about as small: weights of the sizes that they have in a model a hundred times as wide.
CHANGES: dict[str, dict[str, dict[str, float]]] = {
    "loud": {
        T5_FILE: {r"shared\..*|.*\.o\..*": 1e5, r".*\.wi_1\..*": 5e4, r".*\.wo\..*": 10},
        VAE_FILE: {WRITES_TO_A_STREAM: 3e5},
    },
    "quiet": {
        T5_FILE: {r"shared\..*|.*\.(o|wi_1|wo)\..*": 0.05},
        VAE_FILE: {WRITES_TO_A_STREAM: 0.05},
    },
}


def networks(checkpoint: Path, precision=FP16) -> dict[str, Network]:
    found = flux.networks(open_checkpoint(checkpoint), precision)
    return {network.name: network for network in found if network.name in RESCALED}


def plain_fp16(checkpoint: Path, name: str) -> Network:
    """The network in fp16 with nothing done about its range."""
    return replace(networks(checkpoint, FP32)[name], dtype=torch.float16)


Run = Callable[[Network, Path], np.ndarray]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """Exports the network of a checkpoint, and runs it in ONNX Runtime on `inputs`."""

    def run(network: Network, checkpoint: Path) -> np.ndarray:
        folder = tmp_path_factory.mktemp(network.name)
        component = export_network(network, open_checkpoint(checkpoint), folder)
        assert component.reason == network.reason
        return execute(folder, network.name)

    return run


@torch.no_grad()
def computed(network: Network, checkpoint: Path) -> np.ndarray:
    """What PyTorch computes with the network and the checkpoint's weights, each times its factor."""
    with default_dtype(network.dtype):
        module = network.build().eval()
    weights = open_checkpoint(checkpoint).weights(network.weights)
    state = {}
    for names, _ in dry_run(network):
        key = weights.find(names, network.key_prefixes)
        assert key is not None
        tensor = weights.read(key, network.factor(names)).to(network.dtype)
        state |= {f"{PREFIX}{name}": tensor for name in names}
    assert not module.load_state_dict(state, strict=False).unexpected_keys
    made = module(**inputs(network.name))
    return (made[0] if isinstance(made, tuple) else made).numpy()


def execute(folder: Path, name: str) -> np.ndarray:
    session = ort.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {key: value.numpy() for key, value in inputs(name).items()})[0]


def inputs(name: str) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "t5": {"t5_ids": torch.randint(0, 100, (2, 40), dtype=torch.int32, generator=random)},
        "vae_decoder": {"latents": torch.randn(2, 16, 8, 12, generator=random)},
        "vae_encoder": {"image": torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8, generator=random)},
    }[name]


@torch.no_grad()
def reference(checkpoint: Path, name: str) -> np.ndarray:
    """What transformers and diffusers compute in fp32."""
    (value,) = inputs(name).values()
    if name == "t5":
        encoder = T5EncoderModel.from_pretrained(checkpoint / "text_encoder_2", dtype=torch.float32)
        return encoder(value).last_hidden_state.numpy()
    module = AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32)
    shift, scale = module.config.shift_factor, module.config.scaling_factor
    if name == "vae_decoder":
        image = module.decode(value / scale + shift).sample
        return ((image / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    pixels = value.permute(0, 3, 1, 2) / 127.5 - 1
    return ((module.encode(pixels).latent_dist.mode() - shift) * scale).numpy()


@pytest.fixture(scope="module")
def changed(random_schnell: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The random checkpoint with CHANGES."""
    folders = {}
    for change, files in CHANGES.items():
        folders[change] = shutil.copytree(random_schnell, tmp_path_factory.mktemp(change) / "checkpoint")
        for file, factors in files.items():
            tensors = load_file(folders[change] / file)
            for pattern, factor in factors.items():
                fitting = [name for name in tensors if re.fullmatch(pattern, name)]
                assert fitting
                tensors |= {name: tensors[name] * factor for name in fitting}
            save_file(tensors, folders[change] / file)
    return folders


@pytest.mark.parametrize("name", RESCALED)
def test_what_overflows_fp16_does_not_when_it_is_rescaled(changed, run: Run, name: str) -> None:
    overflowed = computed(plain_fp16(changed["loud"], name), changed["loud"]).astype(np.float32)
    if name == "vae_decoder":
        assert np.ptp(overflowed) == 0  # pixels have no NaN: it comes out as black
    else:
        assert np.isnan(overflowed).any()
    assert_close(run(networks(changed["loud"])[name], changed["loud"]), reference(changed["loud"], name))


@pytest.mark.parametrize("name", RESCALED)
def test_small_numbers_do_not_underflow(changed, run: Run, name: str) -> None:
    assert_close(run(networks(changed["quiet"])[name], changed["quiet"]), reference(changed["quiet"], name))


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    actual = actual.astype(np.float32)
    assert np.isfinite(actual).all()
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < TOLERANCE  # not zero: it really is computed in 16 bits


@pytest.mark.parametrize("name", RESCALED)
def test_in_fp32_rescaling_changes_nothing(random_schnell: Path, name: str) -> None:
    """But for rounding: of 16-bit text embeddings and 8-bit pixels, one in a hundred may be its neighbour."""
    actual = computed(replace(networks(random_schnell)[name], dtype=torch.float32), random_schnell)
    expected = computed(networks(random_schnell, FP32)[name], random_schnell).astype(actual.dtype)  # text is in fp16
    if name == "vae_encoder":
        np.testing.assert_allclose(actual, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())
        return
    assert actual.dtype == {"t5": np.float16, "vae_decoder": np.uint8}[name]
    spacing = np.spacing(np.abs(expected)) if name == "t5" else 1
    assert (np.abs(actual.astype(np.float32) - expected) <= spacing).all()
    assert (actual != expected).mean() < 0.01


@pytest.mark.parametrize("feed_forward", ["gated-gelu", "gated-silu", "relu", "gelu"])
@torch.no_grad()
def test_each_kind_of_feed_forward_layer(feed_forward: str) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=100, d_model=48, d_kv=12, d_ff=80, num_layers=3, num_heads=4, feed_forward_proj=feed_forward
    )
    config._attn_implementation = "eager"  # as in the network: the other one adds up in another order
    original = T5EncoderModel(config).eval()
    network = t5.t5_hidden_states(config.to_dict(), "text_encoder", 40, FP16)
    module = network.build().eval()
    module.module.load_state_dict(original.state_dict())
    for name, parameter in module.module.named_parameters():
        parameter.mul_(network.factor([name]))
    ids = inputs("t5")
    streams: list[torch.Tensor] = []
    module.module.encoder.final_layer_norm.register_forward_pre_hook(lambda norm, args: streams.append(args[0]))
    torch.testing.assert_close(module(**ids), original(*ids.values()).last_hidden_state.half())
    # The hook comes after the one that gives the stream its size back.
    original.encoder.final_layer_norm.register_forward_pre_hook(lambda norm, args: streams.append(args[0]))
    original(*ids.values())
    rescaled, stream = streams
    torch.testing.assert_close(rescaled, stream, rtol=0, atol=ROUNDING * stream.abs().max().item())


@pytest.mark.parametrize("checkpoint", ["random_schnell", "flux_tiny"])
def test_every_weight_that_writes_to_a_stream_is_rescaled_and_no_other(
    checkpoint: str, request: pytest.FixtureRequest
) -> None:
    opened = open_checkpoint(request.getfixturevalue(checkpoint))
    found = networks(opened.folder)
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config.from_dict(opened.config("text_encoder_2")))
        autoencoder = AutoencoderKL.from_config(vae.read_config(opened))
    expected = {"shared.weight": t5.STREAM}
    for block in range(encoder.config.num_layers):
        attention, feed_forward = (f"encoder.block.{block}.layer.{i}" for i in (0, 1))
        expected |= {f"{attention}.SelfAttention.{linear}.weight": t5.HALF for linear in ("v", "o")}
        expected |= {f"{feed_forward}.DenseReluDense.{linear}.weight": t5.HALF for linear in ("wi_1", "wo")}
    assert scaled(found["t5"], encoder) == expected

    whole, biases = ["encoder.conv_in", "decoder.conv_in"], []
    for name, layer in autoencoder.named_modules():
        if isinstance(layer, ResnetBlock2D):
            whole += [f"{name}.conv1", f"{name}.conv2"]
            biases += [f"{name}.conv_shortcut"] if layer.conv_shortcut is not None else []
        elif isinstance(layer, Attention):
            whole.append(f"{name}.to_out.0")
        elif isinstance(layer, Upsample2D | Downsample2D):
            biases.append(f"{name}.conv")
    names = {f"{name}.{part}" for name in whole for part in ("weight", "bias")} | {f"{name}.bias" for name in biases}
    assert len(whole) > 20 and len(biases) > 6
    for name in ("vae_decoder", "vae_encoder"):
        assert scaled(found[name], autoencoder) == dict.fromkeys(names, vae.STREAM)


def scaled(network: Network, module: torch.nn.Module) -> dict[str, float]:
    """The parameters that have a factor, and it."""
    factors = {name: network.factor([name]) for name, _ in module.named_parameters()}
    assert all(math.frexp(factor)[0] == 0.5 and factor <= 1 for factor in factors.values()), "not powers of two"
    return {name: factor for name, factor in factors.items() if factor != 1}


def test_only_fp16_is_rescaled_and_the_reason_says_so(random_schnell: Path) -> None:
    for precision in ("fp32", "bf16", "int8-weights"):  # the last one with bf16 around it
        for network in networks(random_schnell, parse_precision(precision)).values():
            assert not network.factors
            assert network.reason == OF_THE_EXPORT
    for precision in (FP16, parse_precision("int8-weights", "fp16")):
        reasons = {name: network.reason for name, network in networks(random_schnell, precision).items()}
        assert "stream, which would overflow, is held at 1/256 of its size" in reasons["t5"]
        assert "held at 1/64 of their size" in reasons["vae_decoder"]
        assert reasons["vae_decoder"] == reasons["vae_encoder"]
        assert all(network.dtype == torch.float16 for network in networks(random_schnell, precision).values())


@pytest.mark.parametrize("name", RESCALED)
def test_a_factor_that_fits_no_weight(random_schnell: Path, name: str) -> None:
    network = networks(random_schnell)[name]
    weights = open_checkpoint(random_schnell).weights(network.weights)
    consistency.check_weights(network, weights)
    wrong = replace(network, factors={**network.factors, re.compile(r"misspelt\.weight"): 0.5})
    with pytest.raises(DitforgeError, match=rf"{name} has no weights like misspelt"):
        consistency.check_weights(wrong, weights)
