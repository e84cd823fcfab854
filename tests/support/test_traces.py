"""What tests share of each other's tracing is what they would have traced themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import traces
from torch import Tensor, nn
from traces import Unknown, digest

from ditforge.export import onnx_export
from ditforge.export.checkpoint.diffusers_folder import open_checkpoint
from ditforge.export.families import family_of
from ditforge.export.graph import measure_footprint, tracing
from ditforge.export.network import BATCH, Dim, Network, Port
from ditforge.export.quantisation.precision import parse_precision

DIGESTS = """
import sys
from pathlib import Path
from ditforge.export.checkpoint.diffusers_folder import open_checkpoint
from ditforge.export.families import family_of
from ditforge.export.quantisation.precision import parse_precision
sys.path.append(sys.argv[1])
import traces
for folder in sys.argv[2:]:
    opened = open_checkpoint(Path(folder))
    for network in family_of(opened).networks(opened, parse_precision("bf16")):
        print(traces.digest(network))
"""


def networks(checkpoint: Path, precision: str) -> dict[str, Network]:
    opened = open_checkpoint(checkpoint)
    return {network.name: network for network in family_of(opened).networks(opened, parse_precision(precision))}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of traces of its own."""
    monkeypatch.setenv(traces.FOLDER, str(tmp_path / "traces"))
    return tmp_path / "traces"


def test_every_network_has_a_digest_of_its_own(flux_tiny: Path, sd35_tiny: Path, random_schnell: Path) -> None:
    """So that all of them are shared, and none is taken for another one; the autoencoder is that of both models."""
    for precision in ("fp32", "fp16", "bf16"):
        flux, sd3, other = (networks(folder, precision) for folder in (flux_tiny, sd35_tiny, random_schnell))
        digests = [digest(network) for found in (flux, sd3, other) for network in found.values()]
        assert len(set(digests)) == len(digests) - 2
        assert all(digest(flux[name]) == digest(sd3[name]) for name in ("vae_decoder", "vae_encoder"))
    every = [digest(networks(flux_tiny, precision)["dit"]) for precision in ("fp32", "fp16", "bf16")]
    assert len(set(every)) == 3
    assert digest(networks(flux_tiny, "fp8-weights")["dit"]) == every[2]


def test_processes_agree_on_digests(flux_tiny: Path, sd35_tiny: Path) -> None:
    command = [sys.executable, "-c", DIGESTS, str(Path(traces.__file__).parent), str(flux_tiny), str(sd35_tiny)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    here = [digest(network) for folder in (flux_tiny, sd35_tiny) for network in networks(folder, "bf16").values()]
    assert said == here


def test_where_a_checkpoint_lies_makes_no_difference(random_schnell: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(random_schnell, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    path = copy / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": "/elsewhere"}))
    before, after = networks(random_schnell, "fp32"), networks(copy, "fp32")
    assert digest(before["dit"]) == digest(after["dit"])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 2}))
    assert digest(before["dit"]) != digest(networks(copy, "fp32")["dit"])


class Scaled(nn.Module):
    """Its input, times a number, through a linear layer."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.module = nn.Linear(4, 4)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x * self.scale)


def toy(build: Callable[[], nn.Module]) -> Network:
    x = Port(torch.float32, (BATCH, Dim("latent_height", 2), 4))
    return Network("toy", build, {"x": x}, {"y": x}, "weights", torch.float32, "")


def test_all_that_is_traced_counts() -> None:
    def closure(scale: float) -> Network:
        return toy(lambda: Scaled(scale))

    first = digest(closure(2.0))
    assert digest(closure(2.0)) == first
    assert first != digest(closure(3.0))
    assert first != digest(toy(lambda: Scaled(2.0)))  # other code
    assert first != digest(replace(closure(2.0), dtype=torch.bfloat16))
    assert first != digest(replace(closure(2.0), outputs={"z": Port(torch.float32, (BATCH, 4))}))
    assert digest(replace(closure(2.0), weights="elsewhere", reason="another")) == first
    assert digest(toy(partial(Scaled, 2.0))) != digest(toy(partial(Scaled, 3.0)))


def test_what_nobody_can_compare_is_not_shared(folder: Path) -> None:
    module = Scaled(2.0)
    with pytest.raises(Unknown, match="Scaled"):
        digest(toy(lambda: module))

    class Local(Scaled):
        pass

    with pytest.raises(Unknown):
        digest(toy(partial(Local, 2.0)))
    traced = onnx_export.trace(toy(partial(Local, 2.0)))
    assert "bias" in traced.model.graph.initializers
    assert not folder.exists()


def test_a_network_is_traced_and_measured_once(folder: Path, monkeypatch: pytest.MonkeyPatch, random_schnell) -> None:
    opened = open_checkpoint(random_schnell)
    clip, model = networks(random_schnell, "fp32")["clip"], family_of(opened).model(opened)
    measured = onnx_export.measure(clip, model)
    first = onnx_export.trace(clip)
    assert len([name for name in os.listdir(folder) if len(name) == 64]) == 2
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("it was traced again"))
    again = onnx_export.trace(networks(random_schnell, "fp32")["clip"])
    assert (again.aliases, again.calls, again.programs) == (first.aliases, first.calls, first.programs)
    assert [node.name for node in again.model.graph] == [node.name for node in first.model.graph]
    assert onnx_export.measure(clip, model) == measured == measure_footprint.measure(clip, model)


def test_a_shared_trace_is_what_would_have_been_traced(
    random_schnell: Path, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """The same graph but for the names of values in it; and so the same numbers."""
    t5, opened = networks(random_schnell, "fp32")["t5"], open_checkpoint(random_schnell)
    shared, anew = onnx_export.trace(t5), tracing.trace(t5)
    assert (shared.aliases, shared.calls) == (anew.aliases, anew.calls)
    assert [node.op_type for node in shared.model.graph] == [node.op_type for node in anew.model.graph]
    for name, value in anew.model.graph.initializers.items():
        found = shared.model.graph.initializers[name]
        assert (found.dtype, found.shape, found.const_value is None) == (
            value.dtype, value.shape, value.const_value is None
        )  # fmt: skip
    made = []
    for number, variable in enumerate((str(folder), "")):
        monkeypatch.setenv(traces.FOLDER, variable)
        (tmp_path / str(number)).mkdir()
        onnx_export.export_network(t5, opened, tmp_path / str(number))
        session = ort.InferenceSession(tmp_path / str(number) / "t5.onnx", providers=["CPUExecutionProvider"])
        made.append(session.run(None, {"t5_ids": np.arange(80, dtype=np.int32).reshape(2, 40)})[0])
    np.testing.assert_array_equal(*made)
