"""Makes a picture's noise with NumPy alone: the same values as torch.randn for the same seed.

It is the noise that a picture starts from, and the noise that some samplers add.

Sources, in PyTorch: aten/src/ATen/core/MT19937RNGEngine.h (the engine), core/TransformationHelper.h (bits to
uniforms), native/cpu/DistributionTemplates.h (`normal_fill`, from 16 values up) and core/DistributionsHelper.h
(`normal_distribution`, below 16).
"""

import math
from collections.abc import Sequence
from numbers import Integral

import numpy as np
import numpy.typing as npt

from ditforge.errors import UserError
from ditforge.option import option

MAX_SEED = 2**64 - 1
BLOCK = 16

Array = npt.NDArray[np.float32]


class Generator:
    """Draws what torch.randn draws from torch.Generator("cpu").manual_seed(seed).

    As in torch, only the low 32 bits of the seed count. Raises UserError unless it is an integer from 0 to 2^64 - 1.
    """

    def __init__(self, seed: int) -> None:
        self._engine = np.random.RandomState(check_seed(seed) & 0xFFFFFFFF)
        self._spare = np.empty(0, np.float64)  # normals are drawn in pairs; this is one that was not needed so far

    def randn(self, shape: Sequence[int]) -> Array:
        """Draw standard normal noise, float32 [*shape]: what torch.randn(shape, generator=self) would draw next.

        The values differ by at most 1e-6 from those of torch's AVX2 kernel, which AVX-512 CPUs run too. They differ by
        at most 3e-6 from those of its portable kernel, as torch's two kernels do from each other. NumPy 1.24 to 2.5
        give the same bits.
        """
        values = np.empty(shape, np.float32)
        flat = values.reshape(-1)
        if values.size >= BLOCK:
            flat[:] = normal_blocks(self._engine, values.size)
            return values
        spare = self._spare[: values.size]
        pairs = normal_pairs(self._engine, values.size - spare.size)
        drawn = np.concatenate([spare, pairs])
        flat[:] = drawn[: values.size]
        self._spare = np.concatenate([self._spare[values.size :], drawn[values.size :]])
        return values


class BatchNoise:
    """Noise for a batch of B pictures. Each call returns new noise, float32 [B, *shape].

    Each picture has a generator of its own, with its own seed, so it is the same as if it were made alone. The first
    call returns the noise that diffusers starts from.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        self._generators = [Generator(seed) for seed in seeds]
        self._shape = tuple(shape)

    def __call__(self) -> Array:
        return np.stack([generator.randn(self._shape) for generator in self._generators])


def noise(shape: Sequence[int], seed: int) -> Array:
    """The first noise of a seed, float32 [*shape]: Generator(seed).randn(shape)."""
    return Generator(seed).randn(shape)


def check_seed(seed: int) -> int:
    """Return `seed` unchanged. Raises UserError unless it is an integer from 0 to 2^64 - 1."""
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise UserError(
            f"{option('seed')} must be an integer from 0 to {MAX_SEED} (2^64 - 1), got {seed!r}",
            f"{option('seed=0')}, or any number up to that",
        )
    return int(seed)


def normal_blocks(engine: np.random.RandomState, size: int) -> Array:
    """Draw [size] normals, for size >= 16, like ATen's normal_fill: Box-Muller on blocks of 16 uniforms of 24 bits.

    If size is not a multiple of 16, the last 16 values are made from 16 more uniforms. They overwrite a part of the
    block before.
    """
    whole = size - size % BLOCK
    values = np.empty(size, np.float32)
    draws = random32(engine, size)
    values[:whole] = box_muller(draws[:whole])
    if whole < size:
        values[-BLOCK:] = box_muller(random32(engine, BLOCK))
    return values


def box_muller(draws: npt.NDArray[np.uint32]) -> Array:
    """Make [n] normals from [n] draws, in blocks of 16, by the Box-Muller transform.

    In each block, the first 8 draws give radii and the last 8 give angles. The first 8 normals are radius * cos(angle),
    and the last 8 are radius * sin(angle).
    """
    uniforms = ((draws & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)).reshape(-1, 2, BLOCK // 2)
    # The arithmetic is in float32, as in torch. Functions are computed in float64 and then rounded. The last bits of
    # NumPy's float32 functions depend on the CPU and the release, but a seed should give the same picture everywhere.
    log = np.log(1 - uniforms[:, 0], dtype=np.float64).astype(np.float32)
    radius = np.sqrt(np.float32(-2) * log)
    theta = (np.float32(2 * math.pi) * uniforms[:, 1]).astype(np.float64)
    cosine, sine = np.cos(theta).astype(np.float32), np.sin(theta).astype(np.float32)
    normals: Array = np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)
    return normals


def normal_pairs(engine: np.random.RandomState, size: int) -> npt.NDArray[np.float64]:
    """Draw at least [size] normals, for size < 16, like ATen's normal_distribution<double>.

    They come in pairs, made from two uniforms of 53 bits: first the cosine of the Box-Muller transform, then the sine.
    """
    draws = random32(engine, 4 * math.ceil(size / 2)).astype(np.uint64).reshape(-1, 2, 2)
    words = (draws[..., 0] << np.uint64(32)) | draws[..., 1]
    uniforms = (words & np.uint64(2**53 - 1)) * 2.0**-53
    radius = np.sqrt(-2 * np.log1p(-uniforms[:, 1]))
    theta = 2 * math.pi * uniforms[:, 0]
    normals: npt.NDArray[np.float64] = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1).reshape(-1)
    return normals


def random32(engine: np.random.RandomState, size: int) -> npt.NDArray[np.uint32]:
    """The next [size] outputs of the Mersenne Twister. NEP 19 guarantees that RandomState's stream never changes."""
    return engine.randint(0, 2**32, size, dtype=np.uint32)
