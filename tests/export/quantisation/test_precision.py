"""T5 in a precision of its own: what is written, and what it computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from ditforge.engines.compilers.onnxruntime import session_options
from ditforge.errors import UserError
from ditforge.export.checkpoint.diffusers_folder import open_checkpoint
from ditforge.export.checkpoint.source import CheckpointSource
from ditforge.export.families import read_networks
from ditforge.export.onnx_export import ExportOptions, export_checkpoint, export_network, scheme_of
from ditforge.export.quantisation.precision import Precision, parse_precision, with_t5

IDS = np.random.default_rng(0).integers(3, 60, (2, 1024)).astype(np.int32)


def hidden_states(checkpoint: Path, precision: Precision, folder: Path) -> tuple[dict[str, str], np.ndarray]:
    """The precision of each linear, and what T5 makes of some ids."""
    opened = open_checkpoint(checkpoint)
    t5 = next(network for network in read_networks(opened, precision)[2] if network.name == "t5")
    component = export_network(t5, opened, folder, scheme_of(t5, precision))
    session = ort.InferenceSession(folder / "t5.onnx", session_options(), providers=["CPUExecutionProvider"])
    (states,) = session.run(None, {"t5_ids": IDS[:, : component.inputs["t5_ids"].shape[1]]})
    assert states.dtype == (np.float32 if precision.base == "fp32" else np.float16)
    return component.layers, states.astype(np.float32)


@pytest.mark.parametrize("base", ["fp32", "fp16"])
def test_8_bit_weights_of_t5(base: str, flux_tiny: Path, tmp_path: Path) -> None:
    """The trained model's T5, also where its weights are rescaled for fp16."""
    folders = [tmp_path / name for name in ("reference", "int8-weights")]
    for folder in folders:
        folder.mkdir()
    _, reference = hidden_states(flux_tiny, Precision("fp32"), folders[0])
    layers, states = hidden_states(flux_tiny, with_t5(parse_precision(base), "int8-weights"), folders[1])
    assert len(layers) == 3 * 7  # query, key, value, output; and three of the gated feed-forward layer
    assert set(layers.values()) == {"int8-weights"}
    assert np.linalg.norm(states - reference) < 0.02 * np.linalg.norm(reference)


def test_t5_alone_has_another_precision(random_schnell: Path) -> None:
    precision = with_t5(parse_precision("fp8-weights", "bf16"), "fp32")
    networks = {network.name: network for network in read_networks(open_checkpoint(random_schnell), precision)[2]}
    assert {name: str(network.dtype) for name, network in networks.items() if network.dtype.itemsize == 4} == {
        "t5": "torch.float32"
    }
    assert networks["t5"].outputs["prompt_embeds"] == networks["dit"].inputs["prompt_embeds"]
    assert (scheme_of(networks["t5"], precision), scheme_of(networks["dit"], precision)) == (None, "fp8-weights")


@pytest.mark.parametrize("name", ["fp8", "int4", ""])
def test_precisions_that_t5_cannot_have(name: str) -> None:
    with pytest.raises(UserError, match="T5 cannot be exported"):
        with_t5(Precision("bf16"), name)


def test_a_model_without_t5_has_no_precision_for_it(tmp_path: Path) -> None:
    import random_sd3

    random_sd3.save_large_turbo(tmp_path)
    source = CheckpointSource(tmp_path / "random-sd3-turbo", t5_precision="int8-weights")
    with pytest.raises(UserError, match="without T5"):
        export_checkpoint(source, tmp_path / "onnx", ExportOptions("fp32"))
    assert not (tmp_path / "onnx").exists()
