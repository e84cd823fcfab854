"""What a model accepts: shapes, dtypes and values of its inputs. They are checked before native code sees a tensor.

The limits are written into each model's configuration when the repository is made. The front checks every request
against them as it arrives. The models check it again, because Triton can also be run without the front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ditforge.manifest import Component, Tensor
from ditforge.model import MAX_CHARACTERS, TILED, Model

DTYPES: dict[str, type[np.generic]] = {
    "FP64": np.float64,
    "FP32": np.float32,
    "FP16": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT16": np.int16,
    "INT8": np.int8,
    "UINT64": np.uint64,
    "UINT32": np.uint32,
    "UINT16": np.uint16,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}  # of Triton's names; BYTES and BF16 have no NumPy type
ITEM_BYTES = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()} | {"BF16": 2}
VALUES: dict[str, tuple[float, float]] = {
    "timestep": (0, 1),
    "guidance": (0, math.inf),
    "skip_layers": (0, 1),
}  # by the contract's names: which values mean something


class BadRequest(ValueError):
    """A request that the model does not accept. The message says what is wrong, and what the model accepts."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Axis(_Record):
    """The sizes that a dimension may have: multiples of `multiple` from `least` to `most`."""

    least: int
    most: int
    multiple: int = 1

    def __contains__(self, size: int) -> bool:
        return self.least <= size <= self.most and size % self.multiple == 0

    def __str__(self) -> str:
        if self.least == self.most:
            return str(self.least)
        return f"{self.least} to {self.most}" + (f" in steps of {self.multiple}" if self.multiple > 1 else "")


class InputLimits(_Record):
    """The limits of one input.

    dtype: its dtype, with Triton's name.
    shapes: the shapes that it may have, without the batch, which is the first dimension.
    lowest, highest: the range of its values. Floating-point numbers must be finite in any case.
    characters: the largest number of characters of a text.
    """

    dtype: str
    shapes: tuple[tuple[Axis, ...], ...]
    lowest: float | None = None
    highest: float | None = None
    characters: int | None = None

    @property
    def item_bytes(self) -> int:
        """The largest number of bytes of one element in a message."""
        return 4 * (self.characters or 0) + 4 if self.dtype == "BYTES" else ITEM_BYTES[self.dtype]

    @property
    def sample_bytes(self) -> int:
        """The largest number of bytes of one sample in a message."""
        return self.item_bytes * max(math.prod(axis.most for axis in shape) for shape in self.shapes)


class Limits(_Record):
    """What a model accepts in one request: up to `max_batch` samples of each of the `inputs`, by name."""

    max_batch: int
    inputs: dict[str, InputLimits]

    @property
    def request_bytes(self) -> int:
        """The largest number of bytes of the tensors of one request in a message."""
        return max(self.max_batch, 1) * sum(limits.sample_bytes for limits in self.inputs.values())

    def check_names(self, names: Sequence[str]) -> None:
        """Raise BadRequest unless `names` has each of the inputs once, and nothing else."""
        if sorted(names) != sorted(self.inputs):
            got = ", ".join(map(shown, names[:5])) or "none"
            raise BadRequest(f"the inputs are {', '.join(self.inputs)}, got {got}")

    def check_shape(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Raise BadRequest unless the input called `name` may have that dtype, and that shape, its batch first."""
        limits = self.inputs[name]
        if dtype != limits.dtype:
            raise BadRequest(f"{name} is {limits.dtype}, got {shown(dtype)}")
        if len(shape) > 8 or not any(len(shape) == 1 + len(allowed) for allowed in limits.shapes):
            allowed = " or ".join(f"[batch, {', '.join(map(str, axes))}]" for axes in limits.shapes)
            raise BadRequest(f"{name} has the shape {allowed}, got {len(shape)} dimensions")
        if not 1 <= shape[0] <= self.max_batch:
            raise BadRequest(f"the batch of {name} is from 1 to {self.max_batch}, got {shape[0]}")
        if not any(fits(shape[1:], axes) for axes in limits.shapes):
            allowed = " or ".join(f"[batch, {', '.join(map(str, axes))}]" for axes in limits.shapes)
            raise BadRequest(f"{name} has the shape {allowed}, got {list(shape)}")

    def check_values(self, name: str, array: NDArray[Any]) -> None:
        """Raise BadRequest if the values of the input called `name` are outside its limits."""
        limits = self.inputs[name]
        if limits.dtype == "BYTES":
            for text in array.ravel():
                check_text(name, text, limits.characters)
            return
        lowest, highest = limits.lowest, limits.highest
        if lowest is not None and array.min() < lowest:
            raise BadRequest(f"{name} is {at_least(lowest, highest)}, got {array.min()}")
        if highest is not None and array.max() > highest:
            raise BadRequest(f"{name} is {at_least(lowest, highest)}, got {array.max()}")

    def check_finite(self, name: str, array: NDArray[Any]) -> None:
        """Raise BadRequest if the input called `name` contains a NaN or an infinity."""
        if array.dtype.kind == "f" and not is_finite(array):
            raise BadRequest(f"{name} holds values that are not finite numbers (NaN or infinity)")

    def check_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Raise BadRequest unless the model accepts the arrays as a request. Triton has already checked their dtypes.

        An input that the network takes as [B] and clients send as [B, 1] arrives here as [B]. Whether large tensors are
        finite is not checked again, because a NaN spoils only the pictures of its own request.
        """
        sizes = set()
        for name, array in arrays.items():
            shape = array.shape if array.ndim > 1 else (*array.shape, 1)
            self.check_shape(name, self.inputs[name].dtype, shape)
            sizes.add(shape[0])
            self.check_values(name, array)
        check_batches(sizes)


def is_finite(array: NDArray[Any]) -> bool:
    """Return whether no value is a NaN or an infinity.

    For float16, the bits are tested: that takes 0.3 ns per number, and NumPy's isfinite takes 2 ns.
    """
    if array.dtype == np.float16:
        return bool((array.view(np.uint16) & 0x7FFF).max() < 0x7C00)
    return bool(np.isfinite(array).all())


def fits(shape: Sequence[int], axes: Sequence[Axis]) -> bool:
    """Return whether a shape, without its batch, is allowed by `axes`."""
    return len(shape) == len(axes) and all(size in axis for size, axis in zip(shape, axes, strict=True))


def check_batches(sizes: set[int]) -> None:
    """Raise BadRequest unless all inputs have the same number of samples. `sizes` are the batch sizes of the inputs."""
    if len(sizes) > 1:
        raise BadRequest(f"all inputs have the same batch, got {', '.join(map(str, sorted(sizes)))}")


def check_text(name: str, text: bytes, characters: int | None) -> None:
    """Raise BadRequest unless `text` is UTF-8 and no longer than `characters`."""
    try:
        length = len(text.decode())
    except UnicodeDecodeError as error:
        raise BadRequest(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None
    if characters is not None and length > characters:
        raise BadRequest(f"{name} has at most {characters:,} characters, got {length:,}")


def at_least(lowest: float | None, highest: float | None) -> str:
    """Return a range of values as text."""
    if highest is None or highest == math.inf:
        return f"at least {lowest:g}"
    return f"from {lowest:g} to {highest:g}"


def shown(text: str) -> str:
    """Return a text from a request, shortened for an error message."""
    return repr(text if len(text) <= 60 else text[:60] + "…")


def limits_of(name: str, component: Component, model: Model, max_batch: int, vocabularies: Mapping[str, int]) -> Limits:
    """Return the limits of the network or tokenizer called `name`.

    `vocabularies` has the number of token ids for each tensor of ids, by the tensor's name.
    """
    inputs = {}
    for tensor, described in component.inputs.items():
        lowest, highest = VALUES.get(tensor, (None, None))
        if tensor in vocabularies:
            lowest, highest = 0, vocabularies[tensor] - 1
        inputs[tensor] = InputLimits(
            dtype=described.dtype,
            shapes=tuple(shapes_of(name, described, model)),
            lowest=lowest,
            highest=None if highest == math.inf else highest,
            characters=MAX_CHARACTERS if described.dtype == "BYTES" else None,
        )
    return Limits(max_batch=max_batch, inputs=inputs)


def shapes_of(name: str, tensor: Tensor, model: Model) -> list[tuple[Axis, ...]]:
    """Return the shapes, without the batch, that an input of the network called `name` may have for all pictures."""
    dims = tensor.shape[1:] or (1,)  # a number a sample travels as [B, 1]
    shapes = []
    for height, width in sizes_of(name, model):
        sides = {"height": height, "width": width}
        sides |= {f"latent_{side}": latents(pixels, model.vae_factor) for side, pixels in sides.items()}
        shapes.append(tuple(Axis(least=dim, most=dim) if isinstance(dim, int) else sides[dim] for dim in dims))
    return list(dict.fromkeys(shapes))


def sizes_of(name: str, model: Model) -> list[tuple[Axis, Axis]]:
    """Return the heights and widths in pixels that the network called `name` takes, of whole pictures or of tiles."""
    if model.sizes:
        pieces = [model.piece(name, height, width) for height, width in model.sizes]
        return [(Axis(least=height, most=height), Axis(least=width, most=width)) for height, width in pieces]
    step = model.vae_factor if name in TILED else model.size_multiple
    most = model.piece(name, model.max_size, model.max_size)[0] // step * step
    pixels = Axis(least=min(max(-(-model.min_size // step) * step, step), most), most=most, multiple=step)
    return [(pixels, pixels)]


def latents(pixels: Axis, factor: int) -> Axis:
    """Convert an axis from pixels to latents, which are `factor` pixels wide."""
    return Axis(least=pixels.least // factor, most=pixels.most // factor, multiple=max(pixels.multiple // factor, 1))
