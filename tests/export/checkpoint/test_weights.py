"""Safetensors files, whole and hostile: safetensors' own reader is the judge of what may be read, and of the values."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import PATIENCE
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ditforge.errors import UserError
from ditforge.export.checkpoint.refused_formats import PACKERS
from ditforge.export.checkpoint.weights import DTYPES, open_files, open_weights, read_header

LIMIT = 1 << 30  # of memory for a process that reads a hostile file
# The peak is the kernel's of this program: what getrusage says of a forked process begins with its parent's.
LIMITED = f"""
import resource, sys
from pathlib import Path
from ditforge.errors import UserError
from ditforge.export.checkpoint.weights import open_files
resource.setrlimit(resource.RLIMIT_AS, ({LIMIT}, {LIMIT}))
try:
    open_files(Path(), [Path(sys.argv[1])])
except UserError as error:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(peak.split()[1], error)
"""


def pack(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with that header, as JSON if it is not bytes, and that length of it claimed."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def theirs(path: Path) -> dict[str, torch.Tensor] | None:
    """What safetensors reads; None if it refuses."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError):
        return None


def ours(path: Path) -> dict[str, torch.Tensor] | None:
    """What ditforge reads; None if it refuses."""
    try:
        weights = open_files(path.parent, [path])
    except UserError:
        return None
    return {name: weights.read(name) for name in weights.shapes}


def assert_same(path: Path) -> None:
    """Both refuse the file, or both read the same bytes."""
    expected, actual = theirs(path), ours(path)
    assert (expected is None) == (actual is None), path.read_bytes()[:500]
    if expected is not None and actual is not None:
        assert {name: (t.dtype, t.shape) for name, t in actual.items()} == {
            name: (t.dtype, t.shape) for name, t in expected.items()
        }
        for name, tensor in expected.items():
            assert torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (actual[name], tensor)))


def size(dtype: str, shape: tuple[int, ...]) -> int:
    return getattr(torch, DTYPES[dtype]).itemsize * int(torch.Size(shape).numel())


@st.composite
def honest(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A header that tells the truth, in any order, and its data."""
    header, end = {}, 0
    for name in draw(st.lists(st.text(max_size=8), max_size=4, unique=True)):
        if name == "__metadata__" or any(re.search(packed, name) for packed, _ in PACKERS):
            continue
        dtype, shape = draw(st.sampled_from(sorted(DTYPES))), tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        header[name] = entry(dtype, list(shape), [end, end + size(dtype, shape)])
        end += size(dtype, shape)
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
    order = draw(st.permutations(sorted(header)))
    return {name: header[name] for name in order}, draw(st.binary(min_size=end, max_size=end))


NUMBERS = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]),
    st.sampled_from([1.0, 1.5, True, None, "1", [], {}]),
)
LIES = st.one_of(
    st.tuples(st.just("dtype"), st.sampled_from(["F32", "F16", "BF16", "I4", "f32", "", "Q8", None, 3, ["F32"]])),
    st.tuples(st.just("shape"), st.one_of(st.lists(NUMBERS, max_size=4), NUMBERS)),
    st.tuples(st.just("data_offsets"), st.one_of(st.lists(NUMBERS, max_size=3), NUMBERS)),
)
QUIET = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(file=honest())
@QUIET
def test_an_honest_file_is_read_as_safetensors_reads_it(tmp_path: Path, file: tuple[dict[str, Any], bytes]) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack(*file))
    assert theirs(path) is not None
    assert_same(path)


@given(file=honest(), lies=st.lists(st.tuples(st.integers(0, 3), LIES), min_size=1, max_size=2), drop=st.booleans())
@QUIET
def test_a_header_that_lies(
    tmp_path: Path, file: tuple[dict[str, Any], bytes], lies: list[tuple[int, tuple[str, Any]]], drop: bool
) -> None:
    header, data = file
    names = [name for name in header if name != "__metadata__"]
    for index, (field, value) in lies:
        if names:
            header[names[index % len(names)]][field] = value
    if drop and names:
        del header[names[0]][lies[0][1][0]]
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack(header, data))
    assert_same(path)


@given(file=honest(), data=st.data())
@QUIET
def test_a_byte_that_changed_or_bytes_that_are_missing(
    tmp_path: Path, file: tuple[dict[str, Any], bytes], data: st.DataObject
) -> None:
    whole = pack(*file)
    place = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    byte = data.draw(st.binary(min_size=1, max_size=1))
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole[:place] if cut else whole[:place] + byte + whole[place + 1 :])
    expected, actual = theirs(path), ours(path)
    if cut:
        assert (expected, actual) == (None, None)
    if expected is None:
        assert actual is None
    elif actual is not None:  # a changed name may be another's, or a type one that PyTorch has and we do not
        assert_same(path)


@given(junk=st.one_of(st.binary(max_size=64), st.binary(max_size=64).map(lambda text: pack(text))))
@QUIET
def test_a_file_of_anything(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(junk)
    assert_same(path)


DATA = bytes(range(16))
REFUSED = {
    "half a length": b"\x02\0\0",
    "no header": pack(b""),
    "array": pack([]),
    "metadata that is no text": pack({"__metadata__": {"a": 1}}),
    "metadata that is a list": pack({"__metadata__": []}),
    "metadata that is a word": pack({"__metadata__": "pt"}),
    "metadata that is a number": pack({"__metadata__": 0}),
    "UTF-16": pack(json.dumps({}).encode("utf-16")),
    "byte-order mark": pack(b"\xef\xbb\xbf{}"),
    "not UTF-8": pack(b'{"\xff": 1}'),
    "half a surrogate pair": pack(b'{"\\ud800": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}}', DATA),
    "half a surrogate pair in metadata": pack(b'{"__metadata__": {"a": "\\ud800 udc00"}}'),
    "half a surrogate pair as a name in metadata": pack(b'{"__metadata__": {"\\udc00": "a"}}'),
    "half a surrogate pair as a field": pack(
        b'{"a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16], "\\ud800": 1}}', DATA
    ),
    "NaN": pack(b'{"a": NaN}'),
    "deep": pack(b"[" * 100_000),
    "overlap": pack({"a": entry(), "b": entry(offsets=[4, 12])}, DATA[:12]),
    "the same bytes twice": pack({"a": entry(), "b": entry()}, DATA[:8]),
    "gap": pack({"a": entry(), "b": entry(offsets=[12, 20])}, DATA + DATA[:4]),
    "gap at the beginning": pack({"a": entry(offsets=[4, 12])}, DATA[:12]),
    "gap at the end": pack({"a": entry()}, DATA),
    "ends before it begins": pack({"a": entry(offsets=[8, 0])}, DATA[:8]),
    "product beyond 64 bits": pack({"a": entry("U8", [2**32, 2**32, 1], [0, 0])}),
    "product beyond 64 bits, and a zero": pack({"a": entry("U8", [2**40, 2**40, 0], [0, 0])}),
    "true for a size": pack({"a": entry("U8", [True], [0, 1])}, b"a"),
    "fraction for a size": pack({"a": entry("U8", [1.0], [0, 1])}, b"a"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_both(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(REFUSED[name])
    assert theirs(path) is None
    with pytest.raises(UserError, match=r"a\.safetensors \(\d+ bytes\) is truncated or damaged") as error:
        read_header(path)
    assert error.value.fix == "copy the file again"


HUGE = 10 * 10**9
CLAIMS = {
    "header of 10 GB": pack(b"{}", length=HUGE),
    "header of 2^64 - 1 bytes": pack(b"{}", length=2**64 - 1),
    "header of 100 MB": pack(b"{}", length=100_000_000),
    "tensor of 10 GB": pack({"a": entry("U8", [HUGE], [0, HUGE])}, DATA),
    "tensor of 10 GB in 16 bytes": pack({"a": entry("U8", [HUGE], [0, 16])}, DATA),
    "many dimensions": pack({"a": entry("U8", [2] * 100_000, [0, 16])}, DATA),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_huge_claim_in_a_small_file_allocates_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(CLAIMS[name])
    run = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr
    peak, problem = run.stdout.split(maxsplit=1)
    assert int(peak) < 100_000  # kB, most of them Python's own
    assert "truncated or damaged" in problem
    assert len(problem) < 1000


def test_tensors_are_not_mapped_and_may_be_changed(tmp_path: Path) -> None:
    path, tensor = tmp_path / "model.safetensors", torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    save_file({"a": tensor}, path)
    weights = open_weights(tmp_path)
    read = weights.read("a")
    read += 1
    assert torch.equal(weights.read("a"), tensor)
    assert torch.equal(weights.read("a", 0.5), tensor.float() / 2)
    assert weights.shapes == {"a": (2, 3)}


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    weights = open_weights(tmp_path)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(UserError, match="truncated or damaged"):
        weights.read("a")
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        weights.read("a")


def test_a_file_that_became_another(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    weights = open_weights(tmp_path)
    save_file({"a": torch.zeros(1000, dtype=torch.float16)}, path)
    with pytest.raises(UserError, match="a is another"):
        weights.read("a")


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        ({"a": "1.safetensors", "b": "2.safetensors"}, r"2\.safetensors is missing"),
        ({"a": "1.safetensors", "b": "1.safetensors"}, r"1\.safetensors lacks b"),
        ({"a": "../1.safetensors"}, "no file beside it"),
        ({"a": "/etc/passwd"}, "no file beside it"),
        ({"a": 1}, "damaged"),
        ([], "damaged"),
        (None, "damaged"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, weight_map: object, problem: str) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=problem):
        open_weights(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("number", "named"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")]
)
def test_a_weight_that_is_no_number(number: float, named: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every picture of it would be black."""
    tensor = torch.ones(3, 5, dtype=dtype)
    tensor[1, 2] = number
    save_file({"a": torch.ones(2), "b.weight": tensor}, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    weights.read("a")
    with pytest.raises(UserError, match=rf"model\.safetensors: b\.weight holds {named}"):
        weights.read("b.weight")


def test_a_name_twice(tmp_path: Path) -> None:
    """safetensors reads the last of them without a word."""
    part = b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    file = tmp_path / "model.safetensors"
    file.write_bytes(pack(b"{" + part + b", " + part + b"}", DATA[:8]))
    assert theirs(file) is not None
    with pytest.raises(UserError, match="its header has 'a' twice"):
        open_weights(tmp_path)
