"""The noise of a picture, at its start and where a sampler adds any: torch.randn's values for a seed, from NumPy alone.

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
    """torch.Generator("cpu").manual_seed(seed), as far as torch.randn draws from it.

    Raises UserError unless seed is an integer from 0 to 2^64 - 1. As in torch, only its low 32 bits count.
    """

    def __init__(self, seed: int) -> None:
        self._engine = np.random.RandomState(check_seed(seed) & 0xFFFFFFFF)
        self._spare = np.empty(0, np.float64)  # the second of a pair of normals, where only the first was asked for

    def randn(self, shape: Sequence[int]) -> Array:
        """Standard normal noise, float32: what torch.randn(shape, generator=self) would draw next.

        Equal to torch's AVX2 kernel (which AVX-512 CPUs run too) within 1e-6, to its portable kernel within 3e-6, which
        is how far torch's two are apart; the same bits with NumPy 1.24 to 2.5.
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
    """Noise for a batch of pictures: a call is float32 [B, *shape], with a generator for each picture, of its own seed.

    So a picture of a batch is the one that it would be alone. The first call is the noise that diffusers starts from.
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
    """`seed` as it is; raises UserError unless it is an integer from 0 to 2^64 - 1."""
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise UserError(
            f"{option('seed')} must be an integer from 0 to {MAX_SEED} (2^64 - 1), got {seed!r}",
            f"{option('seed=0')}, or any number up to that",
        )
    return int(seed)


def normal_blocks(engine: np.random.RandomState, size: int) -> Array:
    """[size] normals for size >= 16, as ATen's normal_fill: Box-Muller on blocks of 16 uniforms of 24 bits.

    Where size is no multiple of 16, the last 16 values come from 16 fresh uniforms, over part of the block before.
    """
    whole = size - size % BLOCK
    values = np.empty(size, np.float32)
    draws = random32(engine, size)
    values[:whole] = box_muller(draws[:whole])
    if whole < size:
        values[-BLOCK:] = box_muller(random32(engine, BLOCK))
    return values


def box_muller(draws: npt.NDArray[np.uint32]) -> Array:
    """[n] normals from [n] draws: of each 16, the first 8 give the radii and the cosines, the last 8 the angles."""
    uniforms = ((draws & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)).reshape(-1, 2, BLOCK // 2)
    # Arithmetic is torch's float32. The functions are float64 and then rounded, because NumPy's float32 ones change
    # their last bits from one CPU and release to the next, and a seed should not.
    log = np.log(1 - uniforms[:, 0], dtype=np.float64).astype(np.float32)
    radius = np.sqrt(np.float32(-2) * log)
    theta = (np.float32(2 * math.pi) * uniforms[:, 1]).astype(np.float64)
    cosine, sine = np.cos(theta).astype(np.float32), np.sin(theta).astype(np.float32)
    normals: Array = np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)
    return normals


def normal_pairs(engine: np.random.RandomState, size: int) -> npt.NDArray[np.float64]:
    """At least [size] normals for size < 16, in pairs, as ATen's normal_distribution<double>: 53-bit uniforms, cosine
    first, then sine.
    """
    draws = random32(engine, 4 * math.ceil(size / 2)).astype(np.uint64).reshape(-1, 2, 2)
    words = (draws[..., 0] << np.uint64(32)) | draws[..., 1]
    uniforms = (words & np.uint64(2**53 - 1)) * 2.0**-53
    radius = np.sqrt(-2 * np.log1p(-uniforms[:, 1]))
    theta = 2 * math.pi * uniforms[:, 0]
    normals: npt.NDArray[np.float64] = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1).reshape(-1)
    return normals


def random32(engine: np.random.RandomState, size: int) -> npt.NDArray[np.uint32]:
    """The next [size] outputs of the Mersenne Twister (NEP 19 freezes RandomState's stream)."""
    return engine.randint(0, 2**32, size, dtype=np.uint32)
