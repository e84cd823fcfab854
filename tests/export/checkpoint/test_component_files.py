"""Which files of a component's folder are read where there are several: stale ones, variants, two libraries' names."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import random_flux
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from ditforge.api import ExportKeywords, keywords
from ditforge.errors import UserError
from ditforge.export.checkpoint.component_files import file_sets, variants
from ditforge.export.checkpoint.hub_files import descriptions, weights as hub_weights
from ditforge.export.checkpoint.load_report import LoadReport
from ditforge.export.checkpoint.source import CheckpointSource, fingerprint, open_files
from ditforge.export.checkpoint.weights import component_files, open_weights
from ditforge.options import SourceFlags

DIT, TEXT = "diffusion_pytorch_model", "model"


def value(folder: Path, report: LoadReport | None = None) -> float:
    """The number that the files that are read hold in their tensor `a`."""
    return float(open_weights(folder, report).read("a")[0])


def save(folder: Path, name: str, number: float, *keys: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: torch.full((2,), number) for key in keys or ("a", "b")}, folder / name)


def save_shards(folder: Path, number: float, names: tuple[str, str], index: str | None) -> None:
    for key, name in zip("ab", names, strict=True):
        save(folder, name, number, key)
    if index:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict(zip("ab", names, strict=True))}))


def shards(stem: str, total: int = 2) -> tuple[str, str]:
    return f"{stem}-00001-of-{total:05}.safetensors", f"{stem}-00002-of-{total:05}.safetensors"


def test_the_index_wins_over_a_stale_single_file(tmp_path: Path) -> None:
    save(tmp_path, f"{DIT}.safetensors", 1)
    save_shards(tmp_path, 2, shards(DIT), f"{DIT}.safetensors.index.json")
    report = LoadReport()
    assert value(tmp_path, report) == 2
    (note,) = report.unexpected
    assert f"{DIT}.safetensors in {tmp_path}" in note.what
    assert "index.json names other files" in note.why


def test_the_single_file_is_read_if_nothing_of_the_index_is_there(tmp_path: Path) -> None:
    save(tmp_path, f"{DIT}.safetensors", 1)
    save_shards(tmp_path, 2, shards(DIT), f"{DIT}.safetensors.index.json")
    for name in shards(DIT):
        (tmp_path / name).unlink()
    report = LoadReport()
    assert value(tmp_path, report) == 1
    assert ["index.json in" in note.what for note in report.unexpected] == [True]


def test_an_incomplete_set_is_an_error_even_beside_a_single_file(tmp_path: Path) -> None:
    save(tmp_path, f"{DIT}.safetensors", 1)
    save_shards(tmp_path, 2, shards(DIT), f"{DIT}.safetensors.index.json")
    (tmp_path / shards(DIT)[1]).unlink()
    with pytest.raises(
        UserError, match=r"00002-of-00002.safetensors is missing: .* names it \(1 of 2 files\)"
    ) as error:
        open_weights(tmp_path)
    assert f"for {DIT}.safetensors to be read" in error.value.fix


def test_shards_without_an_index(tmp_path: Path) -> None:
    save_shards(tmp_path, 2, shards(DIT), None)
    assert value(tmp_path) == 2
    save(tmp_path, shards(DIT, 3)[0], 3, "a")
    with pytest.raises(UserError, match="shards of 2 and of 3, and no index"):
        open_weights(tmp_path)
    for name in shards(DIT):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="1 of 3 shards, and no index"):
        open_weights(tmp_path)


def test_two_indices_of_two_variants(tmp_path: Path) -> None:
    save_shards(tmp_path, 1, shards(DIT), f"{DIT}.safetensors.index.json")
    save_shards(tmp_path, 2, shards(f"{DIT}.fp16"), f"{DIT}.safetensors.index.fp16.json")
    assert value(tmp_path) == 1
    assert value(tmp_path, LoadReport(variants=("fp16",))) == 2


@pytest.mark.parametrize(("component", "stem"), [("transformer", DIT), ("vae", DIT), ("text_encoder_2", TEXT)])
def test_both_libraries_names_in_one_folder(component: str, stem: str, tmp_path: Path) -> None:
    """A component of diffusers has diffusers' name, a text encoder transformers'; the other one is not mixed in."""
    folder, report = tmp_path / component, LoadReport()
    for name, number in ((DIT, 1), (TEXT, 2)):
        save(folder, f"{name}.safetensors", number)
    assert value(folder, report) == {DIT: 1, TEXT: 2}[stem]
    (note,) = report.unexpected
    assert {DIT: TEXT, TEXT: DIT}[stem] in note.what


def test_one_variant_alone_is_read_and_several_are_a_question(tmp_path: Path) -> None:
    report = LoadReport()
    save(tmp_path, f"{DIT}.fp16.safetensors", 1)
    assert value(tmp_path, report) == 1
    assert not report.unexpected
    assert "only in the variant fp16" in report.notes[0].what
    save(tmp_path, f"{DIT}.bf16.safetensors", 2)
    with pytest.raises(UserError, match=r"variants bf16, fp16[\s\S]*variant=.bf16., or variant=.fp16"):
        open_weights(tmp_path)
    assert value(tmp_path, LoadReport(variants=("bf16", "dev"))) == 2
    with pytest.raises(UserError, match="exclude each other"):
        value(tmp_path, LoadReport(variants=("bf16", "fp16")))
    save(tmp_path, f"{DIT}.safetensors", 3)
    assert value(tmp_path) == 3


@pytest.mark.parametrize(
    ("index", "stems"),
    [
        ("model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors"),
        ("model.safetensors.fp16.index.json", "model-0000{}-of-00002.fp16.safetensors"),
        ("model.fp16.safetensors.index.json", "model.fp16-0000{}-of-00002.safetensors"),
    ],
)
def test_spellings_of_variants(index: str, stems: str, tmp_path: Path) -> None:
    save_shards(tmp_path, 1, (stems.format(1), stems.format(2)), index)
    names = [path.name for path in tmp_path.iterdir()]
    assert variants(names) == ["fp16"]
    assert len(file_sets(names)) == 1
    assert value(tmp_path) == 1


def test_what_diffusers_and_transformers_write(tmp_path: Path) -> None:
    """Their own names of a variant, in one file and in shards; read as they read it."""
    pipeline = random_flux.schnell()
    for size in ("10GB", "20KB"):
        for module, folder in ((pipeline.transformer, "transformer"), (pipeline.text_encoder_2, "text_encoder_2")):
            path = tmp_path / size / folder
            module.save_pretrained(path, variant="fp16", max_shard_size=size)
            assert variants([file.name for file in path.iterdir()]) == ["fp16"]
            assert (len(component_files(path)) > 1) == (size == "20KB")
            read = FluxTransformer2DModel if folder == "transformer" else T5EncoderModel
            theirs = read.from_pretrained(path, variant="fp16").state_dict()
            ours = open_weights(path)
            assert all(torch.equal(ours.read(name), theirs[name]) for name in ours.shapes)


@pytest.fixture
def with_variant(random_schnell: Path, tmp_path: Path) -> Path:
    """A checkpoint whose DiT is there a second time, in the variant fp16, with other numbers."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(random_schnell, folder)
    file = folder / "transformer" / f"{DIT}.safetensors"
    save_file(
        {name: (tensor + 1).half() for name, tensor in load_file(file).items()},
        file.with_name(f"{DIT}.fp16.safetensors"),
    )
    return folder


def test_the_option(with_variant: Path) -> None:
    plain = open_files(CheckpointSource(with_variant))
    chosen = open_files(CheckpointSource(with_variant, variant=("fp16",)))
    name = "proj_out.weight"
    ours, theirs = (checkpoint.weights("transformer").read(name) for checkpoint in (plain, chosen))
    assert torch.equal(theirs, (ours + 1).half())
    chosen.weights("vae")
    (note,) = chosen.report.unexpected
    assert "vae has no files of the variant fp16" in note.what
    with pytest.warns(UserWarning, match="vae has no files of the variant"):
        chosen.report.conclude()


def test_a_variant_that_nothing_offers_is_an_error(with_variant: Path) -> None:
    checkpoint = open_files(CheckpointSource(with_variant, variant=("fp61",)))
    checkpoint.weights("transformer")
    with pytest.raises(UserError, match=r"no variant 'fp61'[\s\S]*variant=.fp16"):
        checkpoint.report.conclude()


def test_only_the_chosen_files_are_downloaded(tmp_path: Path) -> None:
    names = [
        "transformer/config.json",
        *(f"transformer/{name}" for name in (*shards(DIT), *shards(f"{DIT}.fp16"), f"{DIT}.bf16.safetensors")),
        f"transformer/{DIT}.safetensors.index.json",
        f"transformer/{DIT}.safetensors.index.fp16.json",
        "vae/config.json",
        f"vae/{DIT}.safetensors",
        f"vae/{DIT}.fp16.safetensors",
    ]
    save_shards(tmp_path / "transformer", 1, shards(DIT), f"{DIT}.safetensors.index.json")
    save_shards(tmp_path / "transformer", 1, shards(f"{DIT}.fp16"), f"{DIT}.safetensors.index.fp16.json")
    for variant, stem, index in (((), DIT, "index"), (("fp16",), f"{DIT}.fp16", "index.fp16")):
        assert hub_weights(tmp_path, names, ["transformer", "vae"], variant) == [
            *(f"transformer/{name}" for name in shards(stem)),
            f"vae/{stem}.safetensors",
        ]
        described = descriptions(names, ["transformer", "vae"], variant)
        assert [name for name in described if "index" in name] == [f"transformer/{DIT}.safetensors.{index}.json"]


def test_links_out_of_the_folder_and_unusual_names(tmp_path: Path) -> None:
    """The Hub's snapshots are links to files elsewhere."""
    folder = tmp_path / ("ä ö " + "x" * 240)
    save(tmp_path / "blobs", "0" * 64, 5)
    folder.mkdir()
    (folder / f"{DIT}.safetensors").symlink_to(Path("..") / "blobs" / ("0" * 64))
    assert value(folder) == 5


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("pytorch_model.bin", "pickled"),
        ("flux1-dev-Q4_K_S.gguf", r"weights as GGUF[\s\S]*base="),
        ("flux1-dev.safetensors", r"only flux1-dev.safetensors[\s\S]*rename it to diffusion_pytorch_model"),
        ("model.msgpack", "only model.msgpack"),
    ],
)
def test_folders_without_weights_that_can_be_read(name: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=problem):
        open_weights(tmp_path)


@pytest.mark.parametrize("given", ["fp16", ["fp16"], ("fp16", "dev")])
def test_the_option_in_python(given: str | list[str]) -> None:
    read = keywords(ExportKeywords, {"variant": given})["variant"]
    assert read == ((given,) if isinstance(given, str) else tuple(given))


def test_the_flag_and_what_depends_on_it(random_schnell: Path) -> None:
    source = SourceFlags(variant=["fp16", "dev"]).of(random_schnell)
    assert source.variant == ("fp16", "dev")
    assert fingerprint(source) != fingerprint(replace(source, variant=()))
    assert fingerprint(source) == fingerprint(replace(source, variant=("dev", "fp16")))
