"""Checkpoints from the Hub: what is downloaded, when it is not, and what is said where it cannot be.

A server on this machine takes the Hub's place (tests/support/hub_server.py); huggingface_hub is the real one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hub_server
import pytest
import single_files
import torch
from command_line import ditforge
from hub_server import Hub, folder_files
from huggingface_hub import constants
from safetensors.torch import save

from ditforge.errors import DitforgeError, DitforgeWarning, UserError
from ditforge.export.checkpoint import hub_repository
from ditforge.export.checkpoint.hub import Wanted, local, local_lora, reference_of
from ditforge.export.checkpoint.source import CheckpointSource, fingerprint, localised, open_files, opened
from ditforge.export.onnx_export import export_checkpoint
from ditforge.options import path_or_repository

Files = dict[str, bytes | Path]
FLUX, SD3, FLUX_ID = Path("tiny-labs/FLUX.1-tiny"), Path("tiny-labs/sd3.5-tiny-turbo"), "tiny-labs/FLUX.1-tiny"
DIT = "transformer/diffusion_pytorch_model.safetensors"
# What repositories hold besides, and nobody here reads.
DECOYS: Files = {
    ".gitattributes": b"*.safetensors filter=lfs",
    "README.md": b"# A model",
    "preview.png": b"PNG",
    "flux1-tiny.safetensors": b"all of it once more",
    "ae.safetensors": b"the autoencoder once more",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"a variant",
    "transformer/diffusion_pytorch_model.bin": b"pickled",
    "text_encoder/flax_model.msgpack": b"flax",
    "text_encoder/model.fp16.safetensors": b"a variant",
    "text_encoder/model.safetensors.index.fp16.json": b"{}",
    "text_encoder_2/model.fp16.safetensors.index.json": b"{}",
    "vae/model.onnx": b"onnx",
    "vae_1_0/config.json": b"{}",
    "onnx/transformer/config.json": b"{}",
}
NOT_MODEL = {"README.md", "evaluation.json", "training.json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with hub_server.serve() as made:
        yield made


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub with flux-tiny and sd35-tiny, an empty cache in tmp_path/home, and a working folder that is empty."""
    server.repositories.clear()
    server.requests.clear()
    models = Path(__file__).parents[3] / "models"
    server.add(str(FLUX), folder_files(models / "flux-tiny") | DECOYS)
    server.add(str(SD3), folder_files(models / "sd35-tiny") | DECOYS)
    at(monkeypatch, server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # bytes that are lost where a connection breaks
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return server


def at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The Hub is at `url`, as HF_ENDPOINT says to a new process."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub cannot be reached: nobody listens at a port of number 1."""
    at(monkeypatch, "http://127.0.0.1:1")


def tiny(folder: Path, leave_out: str = "") -> set[str]:
    """The files of the small model in `folder` but its documents, and what begins with `leave_out`."""
    return {name for name in folder_files(folder) if name not in NOT_MODEL and not (leave_out and leave_out in name)}


def sharded(folder: Path) -> Files:
    """The folder with a DiT in two shards, of which the index names one."""
    files = folder_files(folder)
    whole = files.pop(DIT)
    assert isinstance(whole, Path)
    header = json.loads(whole.read_bytes()[8:][: int.from_bytes(whole.read_bytes()[:8], "little")])
    names = [name for name in header if name != "__metadata__"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "diffusion_pytorch_model-00001-of-00001.safetensors")}
    files["transformer/diffusion_pytorch_model.safetensors.index.json"] = json.dumps(index).encode()
    files["transformer/diffusion_pytorch_model-00001-of-00001.safetensors"] = whole
    files["transformer/diffusion_pytorch_model-00002-of-00002.safetensors"] = b"of an earlier commit"
    return files


def test_only_what_is_needed_is_downloaded(hub: Hub, flux_tiny: Path) -> None:
    checkpoint = open_files(CheckpointSource(FLUX))
    assert hub.touched() == tiny(flux_tiny)
    assert hub.asked()[0] == "model_index.json"
    assert checkpoint.name == "FLUX.1-tiny"
    assert checkpoint.repositories == f"{FLUX}@{hub.repositories[FLUX_ID].branches['main']}"
    weights, expected = (
        checkpoint.weights("transformer"),
        open_files(CheckpointSource(flux_tiny)).weights("transformer"),
    )
    assert weights.shapes == expected.shapes
    assert torch.equal(weights.read("x_embedder.weight"), expected.read("x_embedder.weight"))


def test_the_shards_that_an_index_names(hub: Hub, flux_tiny: Path) -> None:
    hub.add("tiny-labs/sharded", sharded(flux_tiny) | DECOYS)
    checkpoint = open_files(CheckpointSource(Path("tiny-labs/sharded")))
    assert {Path(name).name for name in hub.asked() if name.startswith("transformer/")} == {
        "config.json",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model-00001-of-00001.safetensors",
    }
    assert (
        checkpoint.weights("transformer").shapes
        == open_files(CheckpointSource(flux_tiny)).weights("transformer").shapes
    )


def test_without_t5(hub: Hub) -> None:
    checkpoint = open_files(CheckpointSource(SD3, text_encoders="clip"))
    sd35_tiny = Path(__file__).parents[3] / "models" / "sd35-tiny"
    assert hub.touched() == tiny(sd35_tiny, "_3/")
    assert checkpoint.settings.text_length == 64
    with pytest.raises(UserError, match="unknown text encoders 'clap'"):
        localised(CheckpointSource(SD3, text_encoders="clap"))
    assert set(open_files(CheckpointSource(SD3)).folder.iterdir()) > {checkpoint.folder / "text_encoder_3"}


def test_without_weights(hub: Hub, flux_tiny: Path) -> None:
    folder = localised(CheckpointSource(FLUX), weights=False).path
    assert hub.touched() == tiny(flux_tiny, ".safetensors")
    with opened(CheckpointSource(FLUX, random_weights=True)) as checkpoint:
        assert checkpoint.name == "FLUX.1-tiny" and checkpoint.seed is not None
    assert hub.touched() == tiny(flux_tiny, ".safetensors")
    assert (folder / "tokenizer" / "vocab.json").read_bytes() == (flux_tiny / "tokenizer" / "vocab.json").read_bytes()


def test_one_file_and_what_it_lacks_from_another_repository(hub: Hub, flux_tiny: Path) -> None:
    """As with a fine-tune's DiT and FLUX.1-dev: the gigabytes of the base's own DiT stay where they are."""
    state = open_files(CheckpointSource(flux_tiny)).weights("transformer")
    tensors = single_files.flux_dit({name: state.read(name) for name in state.shapes})
    content = save({name: tensor.clone().contiguous() for name, tensor in tensors.items()})
    hub.add("someone/tuned", {"tuned-v1.safetensors": content, "tuned-v2.safetensors": b"another"})
    checkpoint = open_files(CheckpointSource(Path("someone/tuned/tuned-v1.safetensors"), FLUX))
    assert hub.touched() == {"tuned-v1.safetensors", *tiny(flux_tiny, DIT)}
    assert checkpoint.name == "tuned-v1"
    assert torch.equal(checkpoint.weights("transformer").read("x_embedder.weight"), state.read("x_embedder.weight"))
    said = checkpoint.repositories.split(", ")
    assert said[0].startswith("someone/tuned/tuned-v1.safetensors@") and said[1].startswith(f"base {FLUX}@")


def test_a_lora_is_a_file_or_the_only_one(hub: Hub) -> None:
    hub.add("someone/style", {"style.safetensors": b"lora", "README.md": b""})
    hub.add("someone/styles", {"a.safetensors": b"a", "b.safetensors": b"b"})
    assert local_lora(Path("someone/style")).read_bytes() == b"lora"
    assert local_lora(Path("someone/styles/b.safetensors")).read_bytes() == b"b"
    with pytest.raises(UserError, match=r"2 .safetensors files: a.safetensors, b[\s\S]*name one: someone/styles/a.saf"):
        local_lora(Path("someone/styles"))
    with pytest.raises(UserError, match=r"has no c.safetensors; it has a.safetensors, b.safetensors"):
        local_lora(Path("someone/styles/c.safetensors"))
    assert hub.touched() == {"style.safetensors", "b.safetensors"}


def test_an_adapter_of_peft_comes_with_its_configuration(hub: Hub) -> None:
    files: Files = {"adapter_model.safetensors": b"lora", "adapter_config.json": b"{}", "optimizer.safetensors": b"no"}
    hub.add("someone/peft", files)
    file = local_lora(Path("someone/peft"))
    assert (file.name, file.read_bytes()) == ("adapter_model.safetensors", b"lora")
    assert (file.parent / "adapter_config.json").read_bytes() == b"{}"
    assert hub.touched() == {"adapter_model.safetensors", "adapter_config.json"}


def test_a_revision_is_a_branch_or_a_commit_and_a_source_of_its_own(hub: Hub, flux_tiny: Path) -> None:
    repository = hub.repositories[FLUX_ID]
    (first,) = repository.commits
    other = folder_files(flux_tiny) | {"scheduler/scheduler_config.json": b'{"shift": 1.0}'}
    second = hub_server.commit_of(other)
    repository.commits[second], repository.branches["refs/pr/1"] = other, second
    found = {
        name: open_files(CheckpointSource(Path(f"{FLUX}{name}")))
        for name in ("", "@refs/pr/1", f"@{first}", f"@{second}")
    }
    assert found[""].folder == found[f"@{first}"].folder != found["@refs/pr/1"].folder == found[f"@{second}"].folder
    assert found["@refs/pr/1"].config("scheduler", "scheduler_config.json") == {"shift": 1.0}
    assert hub.asked().count(DIT) == 1  # which is the same in both
    assert fingerprint(CheckpointSource(found[""].folder)) != fingerprint(CheckpointSource(found[f"@{second}"].folder))
    with pytest.raises(UserError, match=r"tiny-labs/FLUX.1-tiny has no revision v2[\s\S]*/commits/main"):
        local(Path(f"{FLUX}@v2"))


def test_the_digest_of_a_commit_stays_when_files_come_to_it(hub: Hub) -> None:
    folder = localised(CheckpointSource(FLUX), weights=False).path
    before = fingerprint(CheckpointSource(folder))
    assert local(FLUX) == folder
    os.utime(folder / "model_index.json", ns=(0, 0))
    assert fingerprint(CheckpointSource(folder)) == before


@pytest.mark.slow
def test_the_commit_is_in_the_manifest(hub: Hub, tmp_path: Path) -> None:
    out, commit = tmp_path / "onnx", hub.repositories[FLUX_ID].branches["main"]
    exported = export_checkpoint(CheckpointSource(FLUX), out)
    assert exported.manifest.source["repositories"] == f"{FLUX}@{commit}"
    assert exported.manifest.model.name == "FLUX.1-tiny"
    hub.requests.clear()
    assert export_checkpoint(CheckpointSource(FLUX), out).fresh
    assert hub.asked() == []


def test_the_token_is_sent_to_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[FLUX_ID].gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    local(FLUX)
    assert {request.token for request in hub.requests if "/FLUX.1-tiny" in request.path} == {"hf_right", None}
    assert {request.token for request in hub.requests if request.path.startswith("/cdn/")} == {None}


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: Hub, flux_tiny: Path) -> None:
    hub.repositories[FLUX_ID].cut[DIT] = [5 << 20, 1 << 20]
    seen: list[tuple[str, int, int]] = []
    folder = local(FLUX, progress=lambda *now: seen.append(now))
    assert (folder / DIT).read_bytes() == (flux_tiny / DIT).read_bytes()
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in hub.ranges()]
    assert len(starts) == 2 and 4 << 20 < starts[0] < starts[1] <= 6 << 20
    counts = [done for _, done, _ in seen]
    assert counts == sorted(counts) and seen[-1] == ("done", counts[-1], counts[-1])
    assert counts[-1] == sum((flux_tiny / name).stat().st_size for name in tiny(flux_tiny))


def interrupted(hub: Hub, after: int) -> list[str]:
    """Begin to download flux-tiny, and be interrupted by Ctrl-C after so many bytes of its DiT; what was said."""

    def stop(doing: str, done: int, total: int) -> None:
        if doing == "transformer" and done > after:
            raise KeyboardInterrupt

    with pytest.warns(DitforgeWarning) as said, pytest.raises(KeyboardInterrupt):
        local(FLUX, progress=stop)
    return [str(warning.message) for warning in said]


def test_after_ctrl_c_the_same_command_goes_on(hub: Hub, flux_tiny: Path) -> None:
    said = interrupted(hub, 6 << 20)
    assert len(said) == 1 and "for the same command again" in said[0]
    hub.requests.clear()
    folder = local(FLUX)
    assert (folder / DIT).read_bytes() == (flux_tiny / DIT).read_bytes()
    (asked,) = hub.ranges()
    assert int(asked.removeprefix("bytes=").removesuffix("-")) > 1 << 20
    assert "vae/config.json" not in hub.asked()  # what was whole is not asked for again


def test_a_damaged_part_is_not_taken_for_the_file(hub: Hub, tmp_path: Path) -> None:
    interrupted(hub, 6 << 20)
    (partial,) = tmp_path.rglob("*.incomplete")
    with partial.open("r+b") as file:
        file.write(b"something else")
    with pytest.raises(DitforgeError, match=f"{DIT} is damaged[\\s\\S]*the same command again"):
        local(FLUX)
    assert (local(FLUX) / DIT).is_file()


def test_two_at_once_download_each_file_once(hub: Hub) -> None:
    with ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(local, [FLUX, FLUX]))
    assert len(folders) == 1
    assert hub.asked().count(DIT) == 1


def test_offline_from_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """With HF_HUB_OFFLINE; without it, said once, where nothing answers; and always for a commit that is whole."""
    commit = hub.repositories[FLUX_ID].branches["main"]
    folder = local(FLUX)
    hub.requests.clear()
    assert local(Path(f"{FLUX}@{commit}")) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_files(CheckpointSource(FLUX)).name == "FLUX.1-tiny"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub.requests == []
    hub.repositories[FLUX_ID].status = 503
    with pytest.warns(DitforgeWarning, match=f"answered 503.*{FLUX} is taken from the cache: {commit}"):
        assert local(FLUX) == folder
    gone(monkeypatch)
    with pytest.warns(DitforgeWarning, match=f"connection to .* failed: .*{FLUX} is taken from the cache: {commit}"):
        assert local(FLUX) == folder


def test_offline_with_half_or_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    local(FLUX, Wanted(weights=False))
    interrupted(hub, 6 << 20)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"only in part in .*transformer[\s\S]*HF_HUB_OFFLINE unset"):
        local(FLUX)
    assert local(FLUX, Wanted(weights=False)).is_dir()
    with pytest.raises(UserError, match=r"sd3.5-tiny-turbo is no file or folder here, and offline: .* does not have"):
        local(SD3)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    gone(monkeypatch)
    for repository in (FLUX, SD3):
        with pytest.raises(DitforgeError, match=r"connection to http://127.0.0.1:1 failed") as raised:
            local(repository)
        assert raised.value.exit_code == 1


def test_a_gated_repository_says_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[FLUX_ID].gated = True
    with pytest.raises(UserError, match=rf"is gated[\s\S]*{hub.url}/{FLUX}, then: hf auth login"):
        local(FLUX)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"your token's account has not been given access[\s\S]*with that account"):
        local(FLUX)


def test_a_repository_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no file or folder here, and .* has no repository tiny-labs/none[\s\S]*auth"):
        local(Path("tiny-labs/none"))
    hub.repositories[FLUX_ID].private = True
    with pytest.raises(UserError, match=r"has no repository tiny-labs/FLUX.1-tiny"):
        local(FLUX)
    for name, meant in {
        "someone/FLUX.1-dev": "black-forest-labs/FLUX.1-dev",
        "flux/flux1-schnell": "black-forest-labs/FLUX.1-schnell",
        "stability/sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    }.items():
        with pytest.raises(UserError, match=rf"has no repository {name}[\s\S]*{meant} "):
            local(Path(name))
    with pytest.raises(UserError, match=r"stabilityai/stable-diffusion-3.5-large-turbo "):
        local(Path("SD3.5-large-turbo"))


def test_a_repository_that_is_no_checkpoint(hub: Hub, flux_tiny: Path) -> None:
    hub.add("someone/merges", {"a.safetensors": b"a", "sub/b.safetensors": b"b", "model.ckpt": b"pickled"})
    with pytest.raises(
        UserError, match=r"no model_index.json.* it has a.safetensors, sub/b[\s\S]*someone/merges/a.saf"
    ):
        local(Path("someone/merges"))
    hub.add("someone/empty", {"README.md": b""})
    with pytest.raises(UserError, match=r"no model_index.json, and no .safetensors file"):
        local(Path("someone/empty"))
    index = json.dumps({"_class_name": "StableDiffusionXLPipeline"}).encode()
    hub.add("someone/sdxl", folder_files(flux_tiny) | {"model_index.json": index})
    with pytest.raises(UserError, match=r"someone/sdxl is a StableDiffusionXLPipeline[\s\S]*FluxPipeline"):
        local(Path("someone/sdxl"))
    files = folder_files(flux_tiny)
    files["transformer/diffusion_pytorch_model.bin"] = files.pop(DIT)
    hub.add("someone/pickled", files)
    with pytest.raises(UserError, match=r"weights of transformer are not there .*only transformer/diff.*\.bin"):
        local(Path("someone/pickled"))
    files = sharded(flux_tiny)
    del files["transformer/diffusion_pytorch_model-00001-of-00001.safetensors"]
    hub.add("someone/lost", files)
    with pytest.raises(UserError, match=r"00001-of-00001.safetensors is missing: .* names it"):
        local(Path("someone/lost"))
    assert not [name for name in hub.asked() if name.endswith((".safetensors", ".bin", ".ckpt"))]


def test_a_disk_that_is_too_small(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only what is missing counts, and it is found out before anything large is downloaded."""
    usage, whole = shutil.disk_usage(tmp_path), shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**8 + 10**7))
    with pytest.raises(UserError, match=r"takes 0.02 GB .* has 0.11 GB free: 0.01 GB are missing[\s\S]*HF_HOME=DIR"):
        local(FLUX)
    assert not [name for name in hub.asked() if name.endswith(".safetensors")]
    monkeypatch.setattr(shutil, "disk_usage", whole)
    local(FLUX)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    local(FLUX)


def test_a_disk_that_becomes_full(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(hub_repository, "http_get", full)
        with pytest.raises(UserError, match=r"became full while .*[\s\S]*the same command again[\s\S]*HF_HOME=DIR"):
            local(FLUX)
    assert (local(FLUX) / DIT).is_file()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*/file/hub: Not a directory[\s\S]*HF_HOME=DIR"):
        local(FLUX)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("black-forest-labs/FLUX.1-dev", ("black-forest-labs/FLUX.1-dev", None, None)),
        ("a/b@v1.0", ("a/b", None, "v1.0")),
        ("a/b@refs/pr/1", ("a/b", None, "refs/pr/1")),
        ("a/b/c.safetensors", ("a/b", "c.safetensors", None)),
        ("a/b/c/d e.safetensors@main", ("a/b", "c/d e.safetensors", "main")),
        ("loras/style.safetensors", None),
        ("models/README.md", None),
        ("/a/b", None),
        ("../a/b", None),
        ("a", None),
        ("a/b/c", None),
        ("a/b/c.ckpt", None),
        ("here/there", None),
    ],
)
def test_what_is_meant_by_a_path(text: str, meant: tuple[object, ...] | None, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "there").mkdir(parents=True)
    found = reference_of(Path(text))
    assert (None if found is None else (found.repository, found.file, found.revision)) == meant
    assert found is None or str(found) == text


def test_a_path_that_begins_with_a_dot_is_none_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert path_or_repository("./a/b") == tmp_path / "a" / "b"
    assert reference_of(path_or_repository("./a/b")) is None
    assert reference_of(path_or_repository("a/b")) is not None


def test_a_path_on_this_machine_is_never_looked_for(hub: Hub, flux_tiny: Path) -> None:
    shutil.copytree(flux_tiny, FLUX)
    assert local(FLUX) == FLUX
    assert open_files(CheckpointSource(FLUX)).repositories == ""
    with pytest.raises(
        UserError, match=r"FLUX.1-tinny does not exist; it is taken for a path[\s\S]*tiny-labs/FLUX.1-tiny"
    ):
        local(Path("tiny-labs/FLUX.1-tinny"))
    assert hub.requests == []


def test_the_command(server: Hub, tmp_path: Path, flux_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, by environment variables alone; `plan` takes no weights."""
    server.repositories.clear()
    server.requests.clear()
    server.add(str(FLUX), folder_files(flux_tiny) | DECOYS, gated=True)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("hf_right")  # as hf auth login leaves it
    result = ditforge("plan", FLUX, "--gpu", "rtx4090", "--size", "128", cwd=tmp_path)
    assert result.code == 0, result.err
    assert result.out.startswith("FLUX.1-tiny on rtx4090")
    assert result.err.startswith("[download] from the Hugging Face Hub\n") and "[download] done" in result.err
    assert server.touched() == tiny(flux_tiny, ".safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
