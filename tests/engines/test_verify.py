"""What `verify` compares lies within the shapes of the engines; ONNX Runtime, which takes any, stands in for them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ditforge import manifest
from ditforge.engines import verify
from ditforge.engines.compilers import Arrays, LoadedEngine
from ditforge.engines.profile import Profile, announced, make_profiles
from ditforge.engines.runtime.loading import load_engine
from ditforge.errors import UserError
from ditforge.manifest import Component
from ditforge.model import Model


class Within:
    """An engine that takes what the profiles have, as TensorRT's do; it notes the shapes."""

    def __init__(self, engine: LoadedEngine, component: Component, profiles: list[Profile], model: Model) -> None:
        self.engine, self.seen = engine, {}
        self.taken = [{name: p.shapes(tensor, model) for name, tensor in component.inputs.items()} for p in profiles]

    def run(self, inputs: Arrays) -> Arrays:
        self.seen = {name: value.shape for name, value in inputs.items()}
        assert any(
            all(
                low <= size <= high
                for name, shape in self.seen.items()
                for low, size, high in zip(taken[name][0], shape, taken[name][2], strict=True)
            )
            for taken in self.taken
        ), self.seen
        return self.engine.run(inputs)

    def close(self) -> None:
        self.engine.close()


@pytest.mark.parametrize(
    ("resolutions", "static", "batch", "compared"),
    [
        ("48-256", None, 4, (2, 128, 192)),
        ("160-352", None, 4, (2, 160, 192)),
        ("224-352", None, 1, (1, 224, 240)),
        ("48-96", None, 2, (2, 80, 96)),
        ("96-96", None, 1, (1, 96, 96)),
        (None, "96x96,320x64,64x96", 1, (1, 96, 64)),
        (None, "112x112", 4, (2, 112, 112)),
    ],
)
def test_sizes_and_batches_are_those_of_the_engines(
    schnell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resolutions, static, batch, compared
) -> None:
    engines = shutil.copytree(schnell.engines, tmp_path / "engines")
    found = manifest.read(engines, "engines")
    profiles = make_profiles(found.model, resolutions, static, batch)
    made = {name: engine.model_copy(update={"max_batch": batch}) for name, engine in found.engines.items()}
    manifest.write(found.model_copy(update={"model": announced(found.model, profiles), "engines": made}), engines)
    loaded: dict[str, Within] = {}

    def load(folder: Path, files: dict[str, manifest.File], made: manifest.Engine) -> LoadedEngine:
        name = Path(next(iter(files))).stem
        loaded[name] = Within(load_engine(folder, files, made), found.components[name], profiles, found.model)
        return loaded[name]

    monkeypatch.setattr(verify, "load_engine", load)
    differences = verify.compare(engines, schnell.onnx)
    assert all(difference.relative < 1e-4 for difference in differences)
    assert {name: engine.seen != {} for name, engine in loaded.items()} == dict.fromkeys(made, True)
    count, height, width = compared
    assert loaded["dit"].seen["latents"] == (count, 16, height // 8, width // 8)
    assert loaded["vae_encoder"].seen["image"] == (count, height, width, 3)
    assert loaded["t5"].seen["t5_ids"][0] == count


def test_a_repository_is_not_compared(schnell) -> None:
    with pytest.raises(UserError, match="is a repository, which is not compared") as caught:
        verify.compare(schnell.repository, schnell.onnx)
    assert "ditforge verify ENGINE_DIR" in caught.value.fix


def test_what_is_no_reference(schnell, tiny, tmp_path: Path) -> None:
    """schnell and flux-tiny read prompts of different lengths."""
    with pytest.raises(UserError, match=r"two models .*: the tokenizer of random-schnell in .*, and flux-tiny in "):
        verify.compare(schnell.engines, tiny.onnx)
    other = shutil.copytree(schnell.onnx, tmp_path / "bf16")
    found = manifest.read(other, "onnx")
    dit = found.components["dit"].model_copy(update={"precision": "fp8-weights"})
    manifest.write(found.model_copy(update={"components": {**found.components, "dit": dit}}), other)
    with pytest.raises(UserError, match=r"dit in .* is fp8-weights: the reference has to be fp32"):
        verify.compare(schnell.engines, other)
