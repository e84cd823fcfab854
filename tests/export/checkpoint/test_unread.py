"""Nothing that a checkpoint holds is left out without a word: reported, warned of, or an error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import random_flux
import random_sd3
import single_files
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, T5Config, T5ForConditionalGeneration

from ditforge.errors import UserError
from ditforge.export.checkpoint.consistency import check_checkpoint
from ditforge.export.checkpoint.diffusers_folder import Checkpoint
from ditforge.export.checkpoint.random_weights import random_checkpoint, random_weights
from ditforge.export.checkpoint.source import CheckpointSource, open_files
from ditforge.export.families import read_networks
from ditforge.export.quantisation.precision import FP32


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def add(file: Path, *names: str) -> None:
    save_file(load_file(file) | {name: torch.zeros(2) for name in names}, file, {"format": "pt"})


def checked(source: CheckpointSource | Path) -> Checkpoint:
    checkpoint = open_files(source if isinstance(source, CheckpointSource) else CheckpointSource(source))
    networks = read_networks(checkpoint, FP32)[2]
    check_checkpoint(checkpoint, networks, lambda network: checkpoint.weights(network.weights))
    return checkpoint


def warned(source: CheckpointSource | Path) -> list[str]:
    return [str(note) for note in checked(source).report.unexpected]


def expected_notes(source: CheckpointSource | Path) -> str:
    """What is reported without a warning; there is none."""
    report = checked(source).report
    assert not report.unexpected
    return "\n".join(str(note) for note in report.notes)


@pytest.fixture
def folder(random_schnell: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_schnell, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def saved_turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_sd3.save_large_turbo(tmp_path_factory.mktemp("turbo"), with_t5=True)


def test_the_checkpoints_of_this_repository(flux_tiny: Path, sd35_tiny: Path) -> None:
    for path, parts in ((flux_tiny, 4), (sd35_tiny, 5)):
        report = checked(path).report
        assert not report.unexpected
        assert len(report.read) == parts
        for component, count in report.read.items():
            (file,) = (path / component).glob("*.safetensors")
            twins = "encoder.embed_tokens.weight" in load_file(file)
            assert count == len(load_file(file)) - twins


@pytest.mark.parametrize("name", ["flux.1-dev", "sd3.5-large", "sd3.5-medium"])
def test_published_configurations(name: str) -> None:
    with random_checkpoint(Path(name)) as checkpoint:
        networks = read_networks(checkpoint, FP32)[2]
        check_checkpoint(checkpoint, networks, lambda network: random_weights(network, checkpoint))
        assert not checkpoint.report.unexpected


def test_parts_of_text_encoders_that_are_not_used(folder: Path) -> None:
    """T5 with its decoder and CLIP with its half for pictures, as transformers saves the whole models."""
    t5 = T5ForConditionalGeneration(T5Config.from_pretrained(folder / "text_encoder_2", tie_word_embeddings=False))
    clip = CLIPModel(CLIPConfig(text_config=CLIPTextConfig.from_pretrained(folder / "text_encoder").to_dict()))
    for model, name in ((t5, "text_encoder_2"), (clip, "text_encoder")):
        tensors = {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}
        save_file(tensors, folder / name / "model.safetensors")
    add(folder / "text_encoder" / "model.safetensors", "text_model.embeddings.position_ids")
    notes = expected_notes(folder)
    for part in ("decoder.", "vision_model.", "text_projection.weight", "position_ids"):
        assert part in notes


def test_a_whole_clips_configuration(folder: Path) -> None:
    """CLIPTextModel.from_pretrained takes the text encoder's part of it."""
    text = json.loads((folder / "text_encoder" / "config.json").read_text())
    whole = CLIPConfig(text_config=text).to_dict() | {"text_config": text}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(whole))
    checked(folder)


@pytest.mark.parametrize(
    ("component", "field"),
    [("transformer", "num_single_layers"), ("text_encoder", "num_hidden_layers"), ("text_encoder_2", "num_layers")],
)
def test_more_layers_than_the_configuration_says(folder: Path, component: str, field: str) -> None:
    config = folder / component / "config.json"
    edit(config, **{field: json.loads(config.read_text())[field] - 1})
    with pytest.raises(UserError, match=rf"{component} holds .* which the network that config.json describes does not"):
        checked(folder)


@pytest.mark.parametrize(
    ("component", "name", "error"),
    [
        ("transformer", "controlnet.weight", True),
        ("vae", "decoder.extra.weight", True),
        ("vae", "quant_conv.weight", True),
        ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q.bias", True),
        ("text_encoder_2", "encoder.block.1.adapter.weight", True),
        ("text_encoder_2", "classifier.weight", False),
    ],
)
def test_unknown_tensors(folder: Path, component: str, name: str, error: bool) -> None:
    (file,) = (folder / component).glob("*.safetensors")
    add(file, name)
    if error:
        with pytest.raises(UserError, match=f"holds .*{name}"):
            checked(folder)
    else:
        (note,) = warned(folder)
        assert note.startswith(f"{name} in ")


@pytest.mark.parametrize(
    ("file", "field", "warns"),
    [
        ("transformer/config.json", "rope_scaling", True),
        ("vae/config.json", "latents_mean", True),
        ("vae/config.json", "spectral_norm", True),
        ("text_encoder_2/config.json", "rope_theta", True),
        ("scheduler/scheduler_config.json", "prediction_type", True),
        ("model_index.json", "is_distilled", True),
        ("model_index.json", "image_encoder", False),
        ("text_encoder_2/config.json", "num_beams", False),
        ("text_encoder/config.json", "torch_dtype", False),
        ("vae/config.json", "_name_or_path", False),
    ],
)
def test_fields_of_configurations(folder: Path, file: str, field: str, warns: bool) -> None:
    value = ["transformers", "CLIPVisionModelWithProjection"] if field == "image_encoder" else [0.5]
    edit(folder / file, **{field: value if field != "is_distilled" else True})
    notes = warned(folder)
    assert [field in note for note in notes] == [True] * warns
    assert any(field in str(note) for note in checked(folder).report.notes)


@pytest.mark.parametrize(("field", "value"), [("stochastic_sampling", True), ("num_train_timesteps", 500)])
def test_a_scheduler_that_is_not_followed(folder: Path, field: str, value: object) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", **{field: value})
    with pytest.raises(UserError, match=field):
        checked(folder)


def test_options_and_files_without_effect(folder: Path, saved_turbo: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 72), f"{name}.lora_up.weight": torch.ones(216, 2)}, lora)
    (note,) = warned(CheckpointSource(folder, loras=((lora, 0.0),)))
    assert "its strength is 0" in note
    shutil.copy(lora, folder / "pytorch_lora_weights.safetensors")
    shutil.copy(lora, folder / "flux1-schnell.safetensors")
    (note,) = warned(folder)
    assert "pytorch_lora_weights" in note
    without = Path(shutil.copytree(saved_turbo, tmp_path / "without", ignore=shutil.ignore_patterns("*_3")))
    edit(without / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    (note,) = warned(CheckpointSource(without, text_encoders="clip"))
    assert "comes without T5" in note
    assert not warned(CheckpointSource(saved_turbo, text_encoders="clip"))
    with pytest.raises(UserError, match=r"without T5[\s\S]*text_length"):
        checked(CheckpointSource(saved_turbo, text_encoders="clip", text_length=50))


# T5's length


@pytest.mark.parametrize(("length", "problem"), [(0, "from 1 to 512 tokens, got 0"), (513, "got 513")])
def test_impossible_text_lengths(folder: Path, length: int, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        open_files(CheckpointSource(folder, text_length=length))


def test_text_length(folder: Path, flux_tiny: Path) -> None:
    """The option, then ditforge.json, then the variant's; never the tokenizer's."""

    def length(source: CheckpointSource) -> tuple[int, int]:
        model, _, networks = read_networks(open_files(source), FP32)
        (t5,) = (network for network in networks if network.name == "t5")
        (dit,) = (network for network in networks if network.name == "dit")
        assert t5.inputs["t5_ids"].shape[1] == dit.inputs["prompt_embeds"].shape[1]
        return model.max_tokens["t5"], int(str(dit.inputs["prompt_embeds"].shape[1]))

    assert length(CheckpointSource(flux_tiny)) == (64, 64)
    assert length(CheckpointSource(flux_tiny, text_length=100)) == (100, 100)
    assert length(CheckpointSource(folder)) == (random_flux.TEXT_LENGTH, random_flux.TEXT_LENGTH)
    (folder / "ditforge.json").unlink()
    edit(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=7)
    assert length(CheckpointSource(folder)) == (256, 256)
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=1000)
    tokenizers = read_networks(open_files(CheckpointSource(folder)), FP32)[1]
    assert tokenizers[0].max_tokens == 33  # the positions that CLIP has


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"text_lenght": 64}, r"field 'text_lenght', which is not known[\s\S]*write 'text_length'"),
        ({"text_length": 0}, "text_length is 0"),
        ({"steps": "4"}, "steps is '4'"),
        ({"guidance": -1}, "guidance is -1"),
        ([], "holds a list"),
    ],
)
def test_a_ditforge_json_that_is_wrong(folder: Path, content: object, problem: str) -> None:
    (folder / "ditforge.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"ditforge\.json[\s\S]*{problem}|{problem}"):
        open_files(CheckpointSource(folder))


# Single files, and folders with some networks


def save(tensors: dict[str, torch.Tensor], file: Path) -> Path:
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, file)
    return file


def all_in_one(seed: int = 5) -> dict[str, torch.Tensor]:
    """Stable Diffusion 3's file with CLIP inside: CLIP-L without a projection."""
    pipeline = random_sd3.large(seed=seed, with_t5=True)
    tensors = single_files.prefixed("model.diffusion_model.", single_files.sd3_dit(pipeline.transformer.state_dict()))
    for name, encoder in (("clip_l", pipeline.text_encoder), ("clip_g", pipeline.text_encoder_2)):
        state = single_files.text_model(encoder.state_dict())
        tensors |= single_files.prefixed(f"text_encoders.{name}.transformer.", state)
    del tensors["text_encoders.clip_l.transformer.text_projection.weight"]
    return tensors


@pytest.fixture
def square(saved_turbo: Path, tmp_path: Path) -> Path:
    """A base whose CLIP-L has as many channels behind its projection as before, as all published ones have."""
    base = Path(shutil.copytree(saved_turbo, tmp_path / "base", ignore=shutil.ignore_patterns("*_3")))
    edit(base / "text_encoder" / "config.json", projection_dim=40)
    return base


def test_an_all_in_one_file_without_a_projection(square: Path, tmp_path: Path) -> None:
    """It is the identity, as diffusers' create_diffusers_clip_model_from_ldm() takes it."""
    file = save(all_in_one() | {"text_encoders.clip_l.logit_scale": torch.tensor(4.6)}, tmp_path / "sd3.safetensors")
    checkpoint = open_files(CheckpointSource(file, square, text_encoders="clip"))
    projection = checkpoint.weights("text_encoder").read("text_projection.weight")
    assert torch.equal(projection, torch.eye(40))
    notes = "\n".join(str(note) for note in checkpoint.report.notes if note.expected)
    assert "clip_l: " in notes
    assert "logit_scale" in notes
    networks = read_networks(checkpoint, FP32)[2]
    (clip_l,) = (network for network in networks if network.name == "clip_l")
    check_checkpoint(checkpoint, [clip_l], lambda network: checkpoint.weights(network.weights))


def test_projections_in_other_places(saved_turbo: Path, tmp_path: Path) -> None:
    """Beside the transformer, and transposed without `.weight`, as OpenCLIP and older versions of ComfyUI have it."""
    tensors, wide = all_in_one(), torch.randn(44, 64)
    del tensors["text_encoders.clip_g.transformer.text_projection.weight"]
    for place in ("text_encoders.clip_g.text_projection", "text_encoders.clip_g.transformer.text_projection"):
        for name, tensor in ((place, wide.T), (f"{place}.weight", wide)):
            file = save(tensors | {name: tensor}, tmp_path / "file.safetensors")
            opened = open_files(CheckpointSource(file, saved_turbo))
            assert torch.equal(opened.weights("text_encoder_2").read("text_projection.weight"), wide)
            assert not opened.report.unexpected


def test_a_text_encoder_or_an_autoencoder_alone(saved_turbo: Path, tmp_path: Path) -> None:
    """The base says which of its encoders a CLIP is."""
    pipeline = random_sd3.large(seed=9, with_t5=True)
    files = {
        "text_encoder": single_files.text_model(pipeline.text_encoder.state_dict()),
        "text_encoder_2": single_files.text_model(pipeline.text_encoder_2.state_dict()),
        "text_encoder_3": pipeline.text_encoder_3.state_dict(),
        "vae": single_files.autoencoder(pipeline.vae.state_dict()) | {"loss.logvar": torch.zeros(1)},
    }
    for component, tensors in files.items():
        file = save(tensors, tmp_path / f"{component}.safetensors")
        with pytest.raises(UserError, match=r"holds no DiT|is of no known layout"):
            open_files(CheckpointSource(file))
        checkpoint = checked(CheckpointSource(file, saved_turbo))
        assert set(checkpoint.tensors) == {component}
        assert not checkpoint.report.unexpected
        state = getattr(pipeline, component).state_dict()
        weights = checkpoint.weights(component)
        assert all(torch.equal(weights.read(weights.find([key], ("text_model.",)) or key), state[key]) for key in state)


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_with_only_a_transformer(random_schnell: Path, tmp_path: Path, whole: bool) -> None:
    """As diffusers' training scripts save it."""
    tuned = random_flux.schnell(seed=5).transformer
    tuned.save_pretrained(tmp_path / "run" / "transformer")
    folder = tmp_path / "run" if whole else tmp_path / "run" / "transformer"
    with pytest.raises(UserError, match=r"has no model_index.json[\s\S]*base=.FOLDER"):
        open_files(CheckpointSource(folder))
    checkpoint = checked(CheckpointSource(folder, random_schnell))
    assert not checkpoint.report.unexpected
    weights, state = checkpoint.weights("transformer"), tuned.state_dict()
    assert all(torch.equal(weights.read(key), tensor) for key, tensor in state.items())


def test_a_folder_with_a_file_that_should_be_given_itself(random_schnell: Path, tmp_path: Path) -> None:
    shutil.copy(random_schnell / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "ae.safetensors")
    for base in (None, random_schnell):
        with pytest.raises(
            UserError, match=r"has no model_index.json[\s\S]*give the file itself, such as .*ae.safeten"
        ):
            open_files(CheckpointSource(tmp_path, base=base))


def test_a_folder_around_or_inside_of_a_checkpoint(random_schnell: Path) -> None:
    with pytest.raises(UserError, match=rf"has no model_index.json[\s\S]*give one that has it: {random_schnell}"):
        open_files(CheckpointSource(random_schnell.parent))
    with pytest.raises(UserError, match=rf"give the whole checkpoint: {random_schnell}"):
        open_files(CheckpointSource(random_schnell / "transformer"))


def test_strict_concludes_with_an_error(folder: Path) -> None:
    edit(folder / "vae" / "config.json", spectral_norm=True)
    report = checked(CheckpointSource(folder, strict=True)).report
    with pytest.raises(UserError, match=r"spectral_norm in .*vae/config.json"):
        report.conclude()
    assert any(line.startswith("vae: ") for line in report.lines())


def test_a_text_encoder_that_is_left_out(saved_turbo: Path, tmp_path: Path) -> None:
    tensors = single_files.sd3_dit(random_sd3.large().transformer.state_dict())
    t5 = random_sd3.t5().state_dict()
    tensors |= single_files.prefixed("text_encoders.t5xxl.transformer.", t5)
    file = save(tensors, tmp_path / "all.safetensors")
    assert f"text_encoder_3 in {file}" in expected_notes(CheckpointSource(file, saved_turbo, text_encoders="clip"))
    assert "text_encoder_3 in" not in expected_notes(CheckpointSource(file, saved_turbo))
