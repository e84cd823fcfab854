import math
import os
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ditforge.client.noise import BatchNoise, Generator, noise
from ditforge.errors import UserError

# torch's SIMD kernel computes in float32, its portable one rounds the angle only once, from float64.
PORTABLE = {"rtol": 0, "atol": 3e-6}
SIMD = {"rtol": 1e-7, "atol": 5e-7}
TOLERANCE = SIMD if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else PORTABLE

seeds = st.integers(0, 2**64 - 1) | st.integers(0, 1000)


def torch_noise(shape, seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32).numpy()


def assert_equals_torch(shape, seed):
    ours, reference = noise(shape, seed), torch_noise(shape, seed)
    assert ours.dtype == np.float32
    assert ours.shape == reference.shape
    np.testing.assert_allclose(ours, reference, **TOLERANCE)


@pytest.mark.parametrize("size", range(65))
def test_equals_torch_at_every_small_size(size):
    for seed in (0, 1, 42):
        assert_equals_torch((size,), seed)


@given(st.lists(st.integers(0, 9), max_size=4), seeds)
@settings(max_examples=300, deadline=None)
def test_equals_torch_in_small_shapes(shape, seed):
    assert_equals_torch(shape, seed)


@given(st.integers(65, 100_000), seeds)
@settings(max_examples=100, deadline=None)
def test_equals_torch_in_long_ones(size, seed):
    assert_equals_torch((size,), seed)


@pytest.mark.parametrize(
    "shape", [(1, 16, 128, 128), (2, 16, 96, 168), (1, 16, 256, 256), (3, 5, 7, 11), (4, 16, 256, 256)]
)
def test_equals_torch_in_latent_shapes(shape):
    assert_equals_torch(shape, 1234)


@pytest.mark.parametrize("size", [7, 15])
def test_small_sizes_are_equal_to_the_last_bit_or_so(size):
    for seed in range(200):
        np.testing.assert_array_max_ulp(noise((size,), seed), torch_noise((size,), seed), maxulp=1)


@given(st.lists(st.integers(0, 40), max_size=6), seeds)
@settings(max_examples=200, deadline=None)
def test_a_generator_goes_on_as_torchs_does(sizes, seed):
    """Below 16 numbers, torch draws them in pairs and keeps the second of one for later."""
    ours, theirs = Generator(seed), torch.Generator("cpu").manual_seed(seed)
    for size in sizes:
        np.testing.assert_allclose(ours.randn((size,)), torch.randn(size, generator=theirs).numpy(), **TOLERANCE)


def test_pictures_of_a_batch_have_generators_of_their_own():
    batch = BatchNoise([5, 6], (4, 3, 2))
    first, second = batch(), batch()
    assert first.shape == second.shape == (2, 4, 3, 2)
    for i, seed in enumerate((5, 6)):
        alone = BatchNoise([seed], (4, 3, 2))
        np.testing.assert_array_equal(alone()[0], first[i])
        np.testing.assert_array_equal(alone()[0], second[i])
        np.testing.assert_array_equal(noise((1, 4, 3, 2), seed)[0], first[i])


@pytest.mark.parametrize("size", [5, 16, 33])
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_equals_torch_at_the_edges_of_the_seed(size, seed):
    assert_equals_torch((size,), seed)
    assert np.array_equal(noise((size,), seed), noise((size,), seed % 2**32))


def test_a_numpy_integer_is_a_seed():
    assert np.array_equal(noise((20,), np.int64(7)), noise((20,), 7))
    assert np.array_equal(noise((20,), np.uint64(2**64 - 1)), noise((20,), 2**64 - 1))


def test_neither_reads_nor_moves_numpys_global_generator():
    np.random.seed(3)
    first = noise((32,), 0)
    after = np.random.random()
    np.random.seed(3)
    assert np.random.random() == after
    assert np.array_equal(noise((32,), 0), first)


def test_equals_torchs_portable_kernel():
    """The kernel that torch runs where there is no AVX2; a process chooses its kernels once, at its start."""
    script = (
        "import sys, torch; assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'; "
        "sys.stdout.buffer.write(torch.randn(100_003, generator=torch.Generator().manual_seed(5)).numpy().tobytes())"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    out = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True).stdout
    np.testing.assert_allclose(noise((100_003,), 5), np.frombuffer(out, np.float32), **PORTABLE)


def test_has_the_same_bits_with_every_numpy():
    assert zlib.crc32(noise((1, 16, 64, 64), 0).astype("<f4").tobytes()) == 815221603


def test_is_standard_normal():
    values = noise((1 << 18,), 11).astype(np.float64)
    assert abs(values.mean()) < 5 / math.sqrt(values.size)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / values.size)


def test_a_large_latent_takes_as_long_as_a_few_of_numpys_own():
    """It takes 0.06 s on a CPU where NumPy's take half of that; a loop in Python would take a hundred times as long."""

    def duration(draw):
        start = time.process_time()
        draw()
        return time.process_time() - start

    ours = min(duration(lambda: noise((16, 256, 256), 0)) for _ in range(5))
    numpys = min(duration(lambda: np.random.RandomState(0).standard_normal((16, 256, 256))) for _ in range(5))
    assert ours < 10 * numpys


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64, 1.5, 1.0, "1", None, True, np.float32(1), np.int64(-1)])
def test_another_seed_is_refused_with_the_range(seed):
    with pytest.raises(UserError) as error:
        noise((4,), seed)
    assert "from 0 to 18446744073709551615" in error.value.problem
    assert repr(seed) in error.value.problem
    assert "seed=0" in error.value.fix


@pytest.mark.parametrize("shape", [(-1,), (-1, 0), (-2, -8), (-1, 16)])
def test_a_negative_size_is_refused(shape):
    with pytest.raises(ValueError, match="negative dimensions"):
        noise(shape, 0)
