"""Weights in other formats than those that are read: each is called by its name, and nothing in it is opened."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ditforge.errors import UserError
from ditforge.export.checkpoint.lazy_tensors import open_tensors
from ditforge.export.checkpoint.weights import open_weights


class Trap:
    """Whoever unpickles it makes the file `sprung`."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.sprung,)


LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"
FILES = {
    "pickled": lambda file: torch.save({"a.weight": torch.zeros(2, 2), "trap": Trap(file.with_name("sprung"))}, file),
    "pickled, old": lambda file: torch.save(
        {"a": Trap(file.with_name("sprung"))}, file, _use_new_zipfile_serialization=False
    ),
    "pickled by itself": lambda file: file.write_bytes(pickle.dumps({str(i): Trap(file) for i in range(99)}, 4)),
    "Git LFS": lambda file: file.write_text(LFS),
    "web page": lambda file: file.write_text("<!DOCTYPE html><html><body>Please log in</body></html>"),
}
NAMES = {"pickled, old": "pickled", "pickled by itself": "pickled"}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".gguf"])
def test_files_of_other_formats(kind: str, suffix: str, tmp_path: Path) -> None:
    """What a file begins with tells, not its name."""
    file = tmp_path / f"a{suffix}"
    FILES[kind](file)
    with pytest.raises(UserError, match=NAMES.get(kind, kind)) as error:
        open_tensors(file)
    assert str(file) in error.value.problem
    assert any(word in error.value.fix for word in (".safetensors", "bf16", "download"))
    shutil.copy(file, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=NAMES.get(kind, kind)):
        open_weights(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("key", "packer"),
    [
        ("weight.quant_state.bitsandbytes__nf4", r"bitsandbytes in 4 bits \(nf4, fp4\)"),
        ("weight.absmax", "bitsandbytes in 4 bits"),
        ("SCB", "bitsandbytes in 8 bits"),
        ("wscales", "Nunchaku"),
        ("qweight", "GPTQ or AWQ"),
        ("weight._data", "Quanto"),
    ],
)
def test_packed_weights(key: str, packer: str, tmp_path: Path) -> None:
    """In a single file and in a folder, whose shapes would only seem to be wrong."""
    tensors = {"blocks.0.attn.weight": torch.zeros(32, 1, dtype=torch.uint8), f"blocks.0.attn.{key}": torch.zeros(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    for read in (lambda: open_tensors(tmp_path / "model.safetensors"), lambda: open_weights(tmp_path)):
        with pytest.raises(UserError, match=packer) as error:
            read()
        assert f"it holds blocks.0.attn.{key}" in error.value.problem
        assert "ditforge export quantises it" in error.value.fix


def save_tar(file: Path) -> None:
    with tarfile.open(file, "w") as archive:
        archive.add(__file__, "a.py")


def save_zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "a")


def save_onnx(file: Path) -> None:
    tensor = onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["a"], ["b"])
    graph = onnx.helper.make_graph([node], "g", [tensor], [tensor])
    onnx.save(onnx.helper.make_model(graph, producer_name="test"), file)


OTHERS = {
    "is empty": lambda file: file.write_bytes(b""),
    "which are zeros": lambda file: file.write_bytes(bytes(10_000)),
    "a tar archive": save_tar,
    "a zip archive": save_zip,
    "an ONNX file": save_onnx,
    "a picture": lambda file: Image.new("RGB", (4, 4)).save(file, "PNG"),
    "an engine of TensorRT": lambda file: file.write_bytes(b"ftrt" + bytes(100)),
    "a JSON file": lambda file: file.write_text(json.dumps({"weight_map": {"a": "b"}})),
    "a text file: 'Entry not found'": lambda file: file.write_text("Entry not found"),
    "a web page": lambda file: file.write_text("\n<html><head><title>403 Forbidden</title>"),
    "a compressed archive": lambda file: file.write_bytes(gzip.compress(b"a" * 1000)),
    "an array of NumPy": lambda file: file.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_files_that_are_something_else(kind: str, tmp_path: Path) -> None:
    """None of them is called damaged, whatever its name says."""
    file = tmp_path / "a.safetensors"
    OTHERS[kind](file)
    with pytest.raises(UserError, match=kind) as error:
        open_tensors(file)
    assert "damaged" not in error.value.problem
    assert error.value.fix


@pytest.mark.parametrize(
    ("key", "packer"),
    [
        ("_weight_qdata", "torchao"),
        ("weight:qdata", "torchao"),
        ("encoded_exponent", "DFloat11"),
        ("svd_up", "SDNQ"),
        ("weight_shape", "compressed-tensors"),
        ("W_q", "HQQ"),
        ("biases", "MLX"),
    ],
)
def test_more_packers(key: str, packer: str, tmp_path: Path) -> None:
    save_file({f"blocks.0.attn.{key}": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=packer):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "shape", "size", "named"),
    [("F4", [4, 4], 8, "4 bits"), ("F6_E2M3", [4, 4], 12, "6 bits"), ("F8_E4M3FNUZ", [4, 4], 16, "AMD")],
)
def test_element_types(dtype: str, shape: list[int], size: int, named: str, tmp_path: Path) -> None:
    header = json.dumps({"a.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(UserError, match=f"a.weight has type {dtype}, .*{named}"):
        open_weights(tmp_path)
