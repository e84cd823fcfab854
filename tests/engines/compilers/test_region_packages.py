"""Packages of regions: compiled one after the other or beside each other, they compute the same."""

from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_disk import in_tmpfs
from torch import Tensor, nn
from torch._inductor import codecache, cpu_vec_isa
from torch._subclasses.fake_tensor import FakeTensorMode

from ditforge.engines.compilers import region_packages
from ditforge.engines.compilers.inductor import ENVIRONMENT, do_apart
from ditforge.engines.compilers.package_cache import Example, Package
from ditforge.engines.compilers.region_packages import tasks_of
from ditforge.engines.runtime.inductor import load_package
from ditforge.errors import DitforgeError
from ditforge.regions import Stored

FAST = {"aot_inductor.compile_wrapper_opt_level": "O0"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ditforge" / "packages"


class Doubled(nn.Module):
    """A linear of which the weight is an input, as in a region."""

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (2 * nn.functional.linear(x, weight),)


def program(width: int) -> bytes:
    exported = torch.export.export(Doubled(), (torch.zeros(3, width), torch.zeros(5, width)))
    content = io.BytesIO()
    torch.export.save(exported, content)
    return content.getvalue()


def package(path: Path, content: bytes, width: int) -> Package:
    example = Example((3, width), torch.float32)
    return Package(path, path.stem, content, (example,), (Stored(name="weight"),), "cpu", FAST)


def test_packages_are_compiled_beside_each_other(tmp_path: Path, cache: Path) -> None:
    packages = [package(tmp_path / f"{width}.pt2", program(width), width) for width in (4, 6)]
    said: list[tuple[str, int, int]] = []
    assert do_apart(tasks_of("dit", packages), "cpu", lambda *step: said.append(step)) == [None, None]
    assert {step[0] for step in said} == {"dit: 4", "dit: 6"}
    assert said[-1][1:] == (2, 2)
    for width in (4, 6):
        x, weight = torch.randn(3, width), torch.randn(5, width)
        (made,) = load_package(tmp_path / f"{width}.pt2", torch.device("cpu")).boxed_run([x, weight])
        torch.testing.assert_close(made, 2 * x @ weight.T)
    assert len(list(cache.iterdir())) == 2
    assert not tasks_of("dit", packages), "all of them are in the cache"


def test_equal_packages_are_compiled_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Although there is room for both at a time."""
    content = program(4)
    packages = [package(tmp_path / f"{name}.pt2", content, 4) for name in ("first", "second")]
    with caplog.at_level("INFO", "ditforge"):
        do_apart(tasks_of("t5", packages), "cpu", lambda *_: None)
    assert caplog.text.count(": traced in ") == 1
    assert packages[0].path.read_bytes() == packages[1].path.read_bytes()


def test_what_fails_beside_others_is_an_error_that_names_it(tmp_path: Path) -> None:
    packages = [package(tmp_path / "no" / f"{number}.pt2", program(4), 4) for number in range(2)]
    with pytest.raises(DitforgeError, match=r"Inductor cannot compile [01] of dit") as error:
        do_apart(tasks_of("dit", packages), "cpu", lambda *_: None)
    assert error.value.fix


# Loads a package for the CPU, then compiles another; both fail.
WITHOUT_ROOM = """
import pickle, sys
from pathlib import Path
import torch
from ditforge.engines.compilers.region_packages import compile_package
from ditforge.engines.runtime.inductor import load_package
from ditforge.errors import UserError

made, wanted = pickle.loads(Path(sys.argv[1]).read_bytes())
for attempt in (lambda: load_package(made.path, torch.device("cpu")), lambda: compile_package(wanted, "dit")):
    try:
        attempt()
    except UserError as error:
        print(error)
"""


def test_a_package_without_room_for_temporary_files(tmp_path: Path) -> None:
    """It is neither loaded nor compiled, and it is said why."""
    made, wanted = (package(tmp_path / f"{width}.pt2", program(width), width) for width in (4, 6))
    region_packages.compile_package(made, "dit")
    (tmp_path / "packages").write_bytes(pickle.dumps((made, wanted)))
    small = tmp_path / "small"
    small.mkdir()
    done = in_tmpfs(small, "size=64k", sys.executable, "-c", WITHOUT_ROOM, tmp_path / "packages", cwd=tmp_path)
    assert done.code == 0, done.err
    loading, first, compiling, second = done.out.splitlines()
    assert loading.endswith(f"written in {small}, which TMPDIR names: No space left on device")
    assert f"cannot compile 6 of dit: there is no space left for temporary files in {small}, or" in compiling
    for fix in (first, second):
        assert fix.startswith("fix:   free some space, or TMPDIR=FOLDER")


def test_the_log_of_a_task_is_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "ditforge"):
        do_apart(tasks_of("dit", [package(tmp_path / "4.pt2", program(4), 4)]), "cpu", lambda *_: None)
    assert re.search(r"dit: 4: traced in [\d.]+ s, compiled in [\d.]+ s", caplog.text)


def test_the_gpus_memory_is_shared_by_what_the_largest_kernel_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all operators, in all sizes; a tensor that is taken twice is there once."""
    seen = region_packages.LargestKernel()
    for rows in (8, 4):
        with FakeTensorMode(), seen:
            x, weight = torch.empty(rows, 16), torch.empty(16, 32, dtype=torch.float32)
            product = x @ weight
            product * product
    assert seen.bytes == 4 * (8 * 16 + 16 * 32 + 8 * 32)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (24 << 30, 24 << 30))
    assert region_packages.room_on(torch.device("cpu"), 1 << 40) is None
    assert region_packages.room_on(torch.device("cuda"), 1 << 20) == 23
    assert region_packages.room_on(torch.device("cuda"), 7 << 30) == 1
    assert region_packages.room_on(torch.device("cuda"), 1 << 40) == 0  # one at a time, whatever becomes of it


# Whoever asks for a GPU ends the process.
ASKED = """
import torch
for name in ("is_available", "device_count", "_lazy_init", "current_device", "get_device_properties", "mem_get_info"):
    setattr(torch.cuda, name, lambda *_, name=name: exit(f"torch.cuda.{name} was called"))
from ditforge.engines.compilers import inductor
inductor.prepare("cuda")
assert not torch.cuda.is_initialized() and not torch.cuda._is_in_bad_fork()
"""


def test_imports_before_the_forks_leave_the_gpu_alone(tmp_path: Path) -> None:
    """A process that has used it cannot use it after a fork. Where there is an nvcc, modules of PyTorch ask."""
    environment = os.environ | ENVIRONMENT | {"CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "-c", ASKED]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_packages_are_compiled_beside_each_other_on_a_gpu(tmp_path: Path) -> None:
    device = torch.device("cuda")
    packages = [
        replace(package(tmp_path / f"{width}.pt2", program(width), width), device="cuda", settings={})
        for width in (16, 32, 64)
    ]
    do_apart(tasks_of("dit", packages), "cuda", lambda *_: None)
    for width in (16, 32, 64):
        x, weight = torch.randn(3, width, device=device), torch.randn(5, width, device=device)
        (made,) = load_package(tmp_path / f"{width}.pt2", device).boxed_run([x, weight])
        torch.testing.assert_close(made, 2 * x @ weight.T, rtol=1e-2, atol=1e-2)


def test_a_package_for_a_gpu_does_not_wait_for_the_processors_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    before = cpu_vec_isa.pick_vec_isa()
    with region_packages.processor_unasked(torch.device("cuda")):
        assert cpu_vec_isa.pick_vec_isa() is cpu_vec_isa.invalid_vec_isa
        assert codecache.pick_vec_isa is cpu_vec_isa.pick_vec_isa  # which is what compiles packages
    with region_packages.processor_unasked(torch.device("cpu")):
        assert cpu_vec_isa.pick_vec_isa() == before
    assert cpu_vec_isa.pick_vec_isa() == before
