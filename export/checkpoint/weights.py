"""Weights in safetensors files, found by name and read one at a time.

A file's header says where its tensors are; nothing that it claims is believed, or allocated, before it is checked.
Format: https://huggingface.co/docs/safetensors, "Format"; the limits are those of safetensors' own reader.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ditforge.errors import UserError
from ditforge.export.checkpoint.refused_formats import check_packing, check_start
from ditforge.small_files import read_bytes

if TYPE_CHECKING:
    import torch

SINGLE_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
LENGTH_BYTES = 8  # of the header's length, little-endian, at the beginning of a file
MAX_HEADER = 100_000_000
METADATA = "__metadata__"
MAX_COUNT = 2**63  # of elements or bytes, which PyTorch counts in 64 bits with a sign
# Bytes of an element, and PyTorch's name for the type.
DTYPES = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "U16": (2, "uint16"),
    "I16": (2, "int16"),
    "U32": (4, "uint32"),
    "I32": (4, "int32"),
    "U64": (8, "uint64"),
    "I64": (8, "int64"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F32": (4, "float32"),
    "F64": (8, "float64"),
}

Read = Callable[[], "torch.Tensor"]


@dataclass(frozen=True)
class Weights:
    """The tensors of one network, of which none is in memory.

    By name: `shards` says which file holds a tensor, `shapes` how large it is, and `reads` makes it, anew with each
    call, in its own dtype: from a file, or from what another `Weights` reads (a slice, several side by side).
    """

    folder: Path
    shards: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    reads: dict[str, Read]

    def find(self, names: Iterable[str], prefixes: Iterable[str] = ()) -> str | None:
        """The first of `names` that is there, as it is or behind one of the prefixes; None if none is."""
        prefixes = ("", *prefixes)
        return next((p + name for name in names for p in prefixes if p + name in self.shards), None)

    def read(self, name: str, factor: float = 1.0) -> torch.Tensor:
        """The tensor `name` in its own dtype; times `factor` in float32, so that a power of two loses no digit.

        Raises UserError if its file is no longer what it was when it was opened.
        """
        tensor = self.reads[name]()
        return tensor if factor == 1 else tensor.float() * factor


@dataclass(frozen=True)
class Entry:
    """Where a tensor is in its file: the type's name in DTYPES, the shape, and the place of its first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def open_weights(folder: Path) -> Weights:
    """The weights in `folder`: one safetensors file, or shards with an index. No tensor is read.

    Raises UserError if a file is missing, truncated or damaged, or if only pickled weights are there.
    """
    single = [folder / name for name in SINGLE_FILES if (folder / name).is_file()]
    return open_files(folder, single) if single else _open_shards(folder)


def open_files(folder: Path, files: Iterable[Path]) -> Weights:
    """The tensors of all `files`, which are in safetensors' format. Raises UserError for one that is not."""
    weights = Weights(folder, {}, {}, {})
    for file in files:
        for name, entry in read_header(file).items():
            weights.shards[name], weights.shapes[name] = file, entry.shape
            weights.reads[name] = partial(read_tensor, file, entry)
    return weights


def read_tensor(file: Path, entry: Entry) -> torch.Tensor:
    """One tensor of `file`, read into memory of its size (a mapped file would count as memory in use, and stay).

    Raises UserError if the file cannot be read, or ends before the tensor does.
    """
    import torch

    size, kind = DTYPES[entry.dtype]
    dtype: torch.dtype = getattr(torch, kind)
    tensor = torch.empty(_count(entry.shape), dtype=dtype)
    rest = tensor.view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
    assert len(rest) == size * tensor.numel(), f"{entry} takes {len(rest)} bytes"
    try:
        with file.open("rb", buffering=0) as opened:
            offset = entry.offset
            while rest:
                count = os.preadv(opened.fileno(), [rest], offset)
                if not count:
                    raise UserError(f"{file} became shorter while it was read", "copy the file again")
                rest, offset = rest[count:], offset + count
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}", "check the file and its permissions") from error
    return tensor.reshape(entry.shape)


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, by name. Raises UserError for whatever safetensors' reader would refuse.

    That is: an impossible length, no JSON, an unknown type, a size that is not what type and shape make, and bytes
    that belong to no tensor or to two. Stricter than that reader: a name that occurs twice, and packed weights.
    """
    size = 0
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            start = opened.read(LENGTH_BYTES)
            check_start(file, start)
            length = int.from_bytes(start, "little")
            if size < LENGTH_BYTES:
                raise ValueError("there is no header")
            if length > MAX_HEADER:
                raise ValueError(f"its header claims {length} bytes, at most {MAX_HEADER} are allowed")
            if length > size - LENGTH_BYTES:
                raise ValueError(f"its header claims {length} bytes, {size - LENGTH_BYTES} are there")
            text = opened.read(length)
        header = json.loads(text.decode(), object_pairs_hook=_without_twins, parse_constant=_refuse)
        entries = _entries(header, LENGTH_BYTES + length, size)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}", "check the file and its permissions") from error
    except (ValueError, RecursionError) as error:
        problem = f"{file} ({size} bytes) is truncated or damaged: {_short(error)}"
        raise UserError(problem, "copy the file again") from error
    check_packing(file, entries)
    return entries


def _entries(header: Any, start: int, size: int) -> dict[str, Entry]:
    """The header's tensors, whose data begin at the place `start` of a file of `size` bytes. Raises ValueError."""
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop(METADATA, None)
    if metadata is not None and not (isinstance(metadata, dict) and all(type(v) is str for v in metadata.values())):
        raise ValueError(f"{METADATA} in its header is not an object of strings")
    for text in metadata.values() if metadata else ():
        text.encode()  # half of a surrogate pair is no text
    places: list[tuple[int, int, str]] = []
    entries: dict[str, Entry] = {}
    for name, said in header.items():
        dtype, shape, begin, end = _entry(name, said)
        if _count(shape) * DTYPES[dtype][0] != end - begin:
            problem = f"{dtype} {list(shape)[:8]} does not take the {end - begin} bytes from {begin} to {end}"
            raise ValueError(f"{name}: {problem}")
        places.append((begin, end, name))
        entries[name] = Entry(dtype, shape, start + begin)
    last = 0
    for begin, end, name in sorted(places):
        if begin != last:
            problem = "overlaps another tensor" if begin < last else "leaves a gap before it"
            raise ValueError(f"{name}: {problem}: it begins at {begin}, the one before ends at {last}")
        last = end
    if last != size - start:
        raise ValueError(f"its tensors take {last} bytes, {size - start} are there")
    return entries


def _entry(name: str, said: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, first byte and the one after the last, as the header has them. Raises ValueError."""
    if not isinstance(said, dict):
        raise ValueError(f"{name} is not described by an object")
    dtype, shape, offsets = said.get("dtype"), said.get("shape"), said.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} has type {str(dtype)[:20]!r}, known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise ValueError(f"{name} has no valid shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"{name} has no valid data_offsets")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _is_count(number: object) -> bool:
    return type(number) is int and 0 <= number < MAX_COUNT  # true and false are integers to Python


def _count(shape: Iterable[int]) -> int:
    """Elements of a tensor of that shape. Raises ValueError if they cannot be counted, on the way to a 0 as well."""
    count = 1
    for size in shape:
        count *= size
        if count >= MAX_COUNT:
            raise ValueError(f"a shape of {count} elements or more")
    return count


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these names, each of which is text. Raises ValueError for half of a surrogate pair, and twins."""
    made = dict(pairs)
    for name in made:
        name.encode()
    if len(made) != len(pairs):
        seen: set[str] = set()
        twin = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twin!r} occurs twice in its header")
    return made


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _open_shards(folder: Path) -> Weights:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        pickled = next((path for pattern in ("*.bin", "*.pt", "*.ckpt") for path in folder.glob(pattern)), None)
        found = f"only {pickled.name}, which is pickled and can run code when opened" if pickled else "no weights"
        raise UserError(f"{folder} has {found}", f"copy {SINGLE_FILES[0]} or {SINGLE_FILES[1]} into it")
    try:
        weight_map = json.loads(read_bytes(indices[0]))["weight_map"]
        files = sorted(set(weight_map.values()))
        foreign = next((name for name in files if Path(name).name != name), None)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{indices[0]} is damaged: {_short(error)!r}", "copy it again") from error
    if foreign is not None:
        raise UserError(f"{indices[0]} names {foreign!r}, which is no file beside it", "copy it again")
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: {indices[0].name} names it", "copy the shard again")
    weights = open_files(folder, [folder / name for name in files])
    for name, file in weight_map.items():
        if weights.shards.get(name) != folder / file:
            raise UserError(f"{folder / file} lacks {name}, which {indices[0].name} says it holds", "copy both again")
    return weights
