"""What goes wrong with checkpoints in files and with LoRAs, by the command line: a clear error, and nothing is left."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import random_flux
import random_sd3
import single_files
import torch
from command_line import PATIENCE, Result, assert_error, run_here
from safetensors.torch import save_file

from ditforge.export import onnx_export

Refused = Callable[..., None]
HUGE = 10 * 10**9
LIMIT = 4 * 10**9  # bytes of address space for a process that exports; PyTorch and diffusers take less than half
# The peak is the kernel's of this program: what getrusage says of a forked process begins with its parent's.
LIMITED = f"""
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({LIMIT}, {LIMIT}))
from ditforge.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["ditforge", *arguments]
    try:
        main()
    except SystemExit as ended:
        print(ended.code)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs `ditforge export ARGS` in this process (importing PyTorch takes seconds); fails if a network gets traced."""

    def traced(*args: object) -> None:
        pytest.fail("found out only after tracing began")

    def run(*args: str | Path, mentions: tuple[str | Path, ...]) -> None:
        out, before = tmp_path / "out" / "onnx", sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(onnx_export, "export_network", traced)
        arguments = ["export", *map(str, args), "--out", str(out)]
        assert_error(run_here(arguments, monkeypatch, capfd), *mentions)
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A DiT in BFL's layout."""
    tensors = single_files.flux_dit(random_flux.schnell().transformer.state_dict())
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, tmp_path / "dit.safetensors")
    return tmp_path / "dit.safetensors"


def save_lora(file: Path, module: str = "double_blocks.0.img_attn.qkv", width: int = 72) -> Path:
    down, up = torch.ones(2, width), torch.ones(3 * width, 2)
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, file)
    return file


def write_claim(file: Path, name: str = "x") -> Path:
    """A header that claims a tensor of 10 GB, in less than 1 kB."""
    header = json.dumps({name: {"dtype": "U8", "shape": [HUGE], "data_offsets": [0, HUGE]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    return file


def test_a_damaged_single_file(refused: Refused, random_schnell: Path, single: Path) -> None:
    whole = single.read_bytes()
    lie = whole.replace(b'"F32"', b'"F64"', 1)
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:4], lie):
        single.write_bytes(damaged)
        mentions = (single, f"({len(damaged)} bytes) is truncated or damaged", "copy the file again")
        refused(single, "--base", random_schnell, mentions=mentions)
    write_claim(single)
    refused(single, "--base", random_schnell, mentions=(single, "truncated or damaged"))
    single.write_bytes(b"")
    refused(single, "--base", random_schnell, mentions=(single, "is empty", "download the file again"))


def test_a_single_file_without_what_belongs_to_it(refused: Refused, random_schnell: Path, single: Path) -> None:
    missing = "text_encoder, text_encoder_2, tokenizer, tokenizer_2, vae missing"
    refused(single, mentions=(missing, "--base FOLDER"))
    refused(single, "--base", "nowhere", mentions=("nowhere", "not a folder"))
    refused(random_schnell, "--base", random_schnell, mentions=("--base is for a checkpoint in one file",))


def test_loras_that_do_not_fit(refused: Refused, random_schnell: Path, tmp_path: Path) -> None:
    other = save_lora(tmp_path / "other.safetensors", "joint_blocks.0.x_block.attn.qkv")
    refused(random_schnell, "--lora", f"{other}:0.8", mentions=(other, "fit nothing", "LoRA of another model"))
    wide = save_lora(tmp_path / "wide.safetensors", width=96)
    refused(random_schnell, "--lora", wide, mentions=(wide, "[2, 96]", "[72, 72]", "a LoRA of another model"))
    content = wide.read_bytes()
    wide.write_bytes(content[:-1])
    refused(random_schnell, "--lora", wide, mentions=(wide, "truncated or damaged", "copy the file again"))
    refused(random_schnell, "--lora", "none.safetensors:1", mentions=("none.safetensors does not exist", "OWNER/NAME"))
    refused(random_schnell, "--lora", f"{wide}:much", mentions=("FILE:STRENGTH", "--lora style.safetensors:0.8"))


def test_a_single_file_of_another_family(refused: Refused, random_schnell: Path, tmp_path: Path) -> None:
    tensors = single_files.sd3_dit(random_sd3.medium().transformer.state_dict())
    file = tmp_path / "sd3.safetensors"
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file)
    refused(file, "--base", random_schnell, mentions=(file, "StableDiffusion3Pipeline", "FluxPipeline", "--base"))


def test_other_formats(refused: Refused, random_schnell: Path, tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt", mentions=("model.ckpt is a pickled checkpoint", ".safetensors"))
    refused(random_schnell, "--lora", tmp_path / "model.ckpt", mentions=("model.ckpt is a pickled checkpoint",))
    save_file({"lycoris_img_in.a1.weight": torch.ones(2, 2)}, tmp_path / "glora.safetensors")
    refused(random_schnell, "--lora", tmp_path / "glora.safetensors", mentions=("is a GLoRA", "merge it"))
    folder = tmp_path / "nf4"
    shutil.copytree(random_schnell, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({"a.weight": torch.zeros(4, dtype=torch.uint8), "a.weight.absmax": torch.zeros(1)}, file)
    refused(folder, mentions=(file, "bitsandbytes in 4 bits", "quantises it itself"))


def test_a_disk_that_is_too_small(
    refused: Refused, random_schnell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50 * 10**6))
    refused(random_schnell, mentions=("this export takes 0.05 GB", "has 0.05 GB free", "a larger disk"))


def test_claims_of_10_gb_take_no_memory(random_schnell: Path, tmp_path: Path) -> None:
    """In a single file, a LoRA and a folder, to a process that has 4 GB of address space at most."""
    file, folder = write_claim(tmp_path / "claim.safetensors"), tmp_path / "folder"
    shutil.copytree(random_schnell, folder)
    inside = write_claim(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    cases = {(file, "--base", random_schnell): file, (random_schnell, "--lora", file): file, (folder,): inside}
    before = sorted(tmp_path.rglob("*"))
    arguments = json.dumps([["export", *map(str, case), "--out", str(tmp_path / "onnx")] for case in cases])
    command = [sys.executable, "-c", LIMITED, arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    *codes, peak = map(int, done.stdout.split())
    errors = [f"error: {error}" for error in done.stderr.split("error: ")[1:]]
    assert len(errors) == len(cases)
    for code, error, claim in zip(codes, errors, cases.values(), strict=True):
        assert_error(Result(code, "", error), claim, "truncated or damaged")
    assert peak < 1_000_000  # kB, nearly all of it libraries
    assert sorted(tmp_path.rglob("*")) == before
