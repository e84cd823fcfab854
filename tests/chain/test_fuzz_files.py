"""Mutated checkpoint files: for each, an error that can be read, or weights; soon, and in little memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import random_flux
import single_files
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from safetensors.torch import save

from ditforge.errors import UserError
from ditforge.export.checkpoint.dequantising import dequantised
from ditforge.export.checkpoint.layouts import open_single_file
from ditforge.export.checkpoint.lazy_tensors import as_weights, open_tensors
from ditforge.export.checkpoint.load_report import LoadReport

SECONDS = 5.0  # a hundred times what it takes
QUIET = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
NUMBERS = [0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def safetensors_header(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: object, data: bytes, claimed: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text + data


def seeds() -> dict[str, bytes]:
    """Files of the kinds that people have."""
    pipeline = random_flux.schnell()
    dit = {name: tensor.clone() for name, tensor in single_files.flux_dit(pipeline.transformer.state_dict()).items()}
    float8 = single_files.in_float8(dit, 0.1)
    four_bits = {
        "a.weight": torch.zeros(16, 16, dtype=torch.uint8),
        "a.weight_scale": torch.ones(16, 2).to(torch.float8_e4m3fn),
        "a.weight_scale_2": torch.tensor(1.0),
        "b.weight": torch.ones(32, 32).to(torch.float8_e4m3fn),
        "b.weight_scale": torch.full((32, 1), 127, dtype=torch.uint8),
        "c.comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8),
    }
    return {"dit": save(dit), "float8": save(float8), "four bits": save(four_bits)}


@pytest.fixture(scope="module")
def corpus() -> dict[str, bytes]:
    return seeds()


@pytest.fixture(scope="module")
def gguf_corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    file = tmp_path_factory.mktemp("gguf") / "a.gguf"
    found = {}
    for name in ("flux", "t5encoder"):
        writer = gguf.GGUFWriter(file, name)
        writer.add_array("comfy.gguf.orig_shape.b.weight", (4, 16, 4))
        writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
        writer.add_array("tokenizer.ggml.scores", [0.5] * 20)
        writer.add_float32("some.number", 1.5)
        for key in ("a.weight", "b.weight", "enc.blk.0.attn_q.weight"):
            values = numpy.ones((4, 64), numpy.float32)
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(key, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("c", numpy.ones(7, numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found[name] = file.read_bytes()
    return found


def attempt(file: Path) -> None:
    """Open the file in each way and read all of it: weights, or an error with a cause and a fix."""

    def everything() -> None:
        tensors = dequantised(open_tensors(file), LoadReport())
        weights = as_weights(file.parent, tensors)
        for name in weights.shapes:
            assert tuple(weights.read(name).shape) == weights.shapes[name]

    ways: list[Callable[[], object]] = [everything, lambda: open_single_file(file)]
    started, errors = time.process_time(), []
    for way in ways:
        try:
            way()
        except UserError as error:
            errors.append(error)
    assert all(error.fix and len(error.problem) < 2000 for error in errors)
    assert time.process_time() - started < SECONDS


CHANGES = st.tuples(
    st.sampled_from(["dtype", "shape", "data_offsets", "rename", "drop", "copy"]),
    st.integers(0, 10_000),
    st.one_of(
        st.sampled_from(["F4", "F8_E8M0", "F8_E4M3", "U8", "I64", "BOOL", "F32", "X"]),
        st.lists(st.sampled_from(NUMBERS), max_size=4),
        st.sampled_from(["a.weight", "a.weight_scale", "a.weight_scale_2", "a.comfy_quant", "x.SCB", "", "ä\u0000\n"]),
    ),
)


@given(name=st.sampled_from(["dit", "float8", "four bits"]), changes=st.lists(CHANGES, min_size=1, max_size=3))
@example(name="four bits", changes=[("dtype", 1, "F32")])
@QUIET
def test_headers_of_safetensors(
    corpus: dict[str, bytes], tmp_path: Path, name: str, changes: list[tuple[str, int, Any]]
) -> None:
    header, data = safetensors_header(corpus[name])
    for kind, place, value in changes:
        keys = sorted(key for key in header if key != "__metadata__")
        key = keys[place % len(keys)]
        if kind == "drop":
            del header[key]
        elif kind == "rename":
            header[str(value)] = header.pop(key)
        elif kind == "copy":
            header[str(value)] = header[key]
        else:
            header[key] = {**header[key], kind: value}
        if not header:
            break
    file = tmp_path / "a.safetensors"
    file.write_bytes(joined(header, data))
    attempt(file)


@given(
    name=st.sampled_from(["dit", "float8", "four bits"]),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    cut=st.one_of(st.none(), st.integers(0, 10**6)),
)
@QUIET
def test_bytes_of_safetensors(
    corpus: dict[str, bytes], tmp_path: Path, name: str, flips: list[tuple[int, int]], cut: int | None
) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(flipped(corpus[name], flips, cut))
    attempt(file)


@given(
    name=st.sampled_from(["flux", "t5encoder"]),
    flips=st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), min_size=1, max_size=4),
    number=st.tuples(st.integers(0, 900), st.sampled_from(NUMBERS)),
    cut=st.one_of(st.none(), st.integers(0, 2000)),
)
@settings(QUIET, max_examples=400)
def test_gguf(
    gguf_corpus: dict[str, bytes],
    tmp_path: Path,
    name: str,
    flips: list[tuple[int, int]],
    number: tuple[int, int],
    cut: int | None,
) -> None:
    content = bytearray(flipped(gguf_corpus[name], flips, cut))
    at, value = number
    if len(content) > at + 8:
        content[at : at + 8] = value.to_bytes(8, "little")
    content[:4] = b"GGUF"
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    attempt(file)


def flipped(content: bytes, flips: list[tuple[int, int]], cut: int | None) -> bytes:
    changed = bytearray(content)
    for place, value in flips:
        changed[place % len(changed)] = value
    return bytes(changed if cut is None else changed[: cut % len(changed)])


@pytest.mark.parametrize("claimed", [2**32, 4 * 10**9, 2**63, 2**64 - 1])
def test_headers_of_4_gb(claimed: int, tmp_path: Path) -> None:
    """In a file that is as large as it claims, of holes."""
    file = tmp_path / "a.safetensors"
    file.write_bytes(joined({}, b"", claimed))
    with file.open("r+b") as opened:
        opened.truncate(min(claimed + 100, 5 * 10**9))
    attempt(file)


def test_gguf_with_a_billion_values(tmp_path: Path) -> None:
    """An array of so many strings, in a file of holes, would be read for hours."""
    file = tmp_path / "a.gguf"
    key = b"tokenizer.ggml.tokens"
    start = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little")
    start += len(key).to_bytes(8, "little") + key + (9).to_bytes(4, "little") + (8).to_bytes(4, "little")
    file.write_bytes(start + (10**9).to_bytes(8, "little"))
    with file.open("r+b") as opened:
        opened.truncate(20 * 10**9)
    attempt(file)
    with pytest.raises(UserError, match="claims more than"):
        open_tensors(file)
