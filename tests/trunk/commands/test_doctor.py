"""What `doctor` finds on a machine, and says about it."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

import pytest
from command_line import ditforge

from ditforge import local_gpu
from ditforge.commands import doctor
from ditforge.commands.doctor import Finding
from ditforge.engines.compilers import inductor, tensorrt_common, tensorrt_rtx
from ditforge.errors import UserError
from ditforge.local_gpu import LocalGpu
from ditforge.machine_memory import Memory


def found(name: str) -> Finding:
    """The finding of that name."""
    (finding,) = [finding for finding in doctor.examine().findings if finding.name == name]
    return finding


def test_doctor(tmp_path: Path) -> None:
    result = ditforge("doctor", cwd=tmp_path)
    assert result.code == 0
    rows = dict(line.split(maxsplit=1) for line in result.out.splitlines() if line[:1].strip())
    assert rows["python"].strip() == platform.python_version()
    assert f"torch {version('torch')}, " in rows["[export]"]
    assert all(word in result.out for word in ("tritonserver", "[client]", "GPU", "free disk"))


@pytest.mark.parametrize("minor", [9, 10, 11, 13, 14])
def test_pythons_that_are_supported(monkeypatch: pytest.MonkeyPatch, minor: int) -> None:
    monkeypatch.setattr(sys, "version_info", (3, minor, 0, "final", 0))
    assert bool(found("python").fix) == (minor not in (11, 13))
    assert metadata("ditforge")["Requires-Python"] == ">=3.11"


def test_the_same_as_json(tmp_path: Path) -> None:
    machine = json.loads(ditforge("doctor", "--json", cwd=tmp_path).out)
    assert list(machine) == ["findings", "memory", "disk_free", "shm_free", "gpus"]
    assert {tuple(finding) for finding in machine["findings"]} == {("name", "found", "fix")}
    assert 0 < machine["memory"]["available"] <= machine["memory"]["total"]
    assert machine["disk_free"] > 0


@pytest.mark.parametrize("columns", [60, 80, 132])
def test_it_fits_the_terminal(columns: int) -> None:
    findings = doctor.examine().findings
    shown = list(doctor.lines(findings, columns))
    assert max(map(len, shown)) < columns
    words = " ".join(" ".join(shown).split())
    for finding in findings:
        for text in (finding.name, finding.found, finding.fix):
            assert " ".join(text.split()) in words


@pytest.mark.parametrize(("free", "short"), [(64 << 20, True), (1 << 30, False)])
def test_what_serving_needs_of_shared_memory(monkeypatch: pytest.MonkeyPatch, free: int, short: bool) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    shm = found("/dev/shm")
    assert f"{free >> 20} MiB free; serve takes up to 72 MiB from the start" in shm.found
    assert ("--shm-size" in shm.fix) == short


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> list[LocalGpu]:
        raise UserError("this machine has no NVIDIA GPU", "")

    monkeypatch.setattr(local_gpu, "local_gpus", nothing)
    assert "engines run on the CPU here" in found("GPU").found
    assert doctor.examine().gpus == ()


def test_each_compiler_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them compile for GPUs that are not there; the others do so on the GPU itself."""

    def nothing() -> list[LocalGpu]:
        raise UserError("this machine has no NVIDIA GPU", "")

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(local_gpu, "local_gpus", nothing)
    rtx, onnxruntime, inductor = (found(f"compiler {name}") for name in ("tensorrt-rtx", "onnxruntime", "inductor"))
    version_of = tensorrt_rtx.version()
    assert rtx == Finding(
        "compiler tensorrt-rtx", f"{version_of}: compiles here for sm_75, sm_80, sm_86, sm_89, sm_120, sm_121"
    )
    assert onnxruntime.found.startswith(f"{version('onnxruntime')}: compiles here for cpu, sm_75, ")
    assert inductor.found == f"{version('torch')}: compiles here for cpu; for a GPU, on that GPU itself"
    assert not rtx.fix and not onnxruntime.fix and not inductor.fix
    monkeypatch.setenv("CXX", "no-such-compiler")
    lacking = found("compiler inductor")
    assert "compiles here for nothing; it needs a C++ compiler" in lacking.found and "CXX" in lacking.fix


def test_how_each_compiler_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_common, "version", no_package)
    monkeypatch.setattr(inductor, "installed_version", no_package)
    for name, extra in (("tensorrt-rtx", "tensorrt-rtx"), ("tensorrt", "tensorrt"), ("inductor", "inductor")):
        lacking = found(f"compiler {name}")
        assert "is not installed; it compiles for " in lacking.found
        assert f"[{extra}]" in lacking.fix
        assert lacking.found.endswith("on that GPU itself") == (name != "tensorrt-rtx")


def test_inductor_compiles_for_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    card = LocalGpu("NVIDIA H100 80GB HBM3", "sm_90", 80 * 2**30, 78 * 2**30, "580.95.05")
    monkeypatch.setattr(local_gpu, "local_gpus", lambda: [card])
    for cuda, devices in (("13.0", "cpu, sm_90"), ("", "cpu")):
        monkeypatch.setattr(doctor, "torch_cuda", lambda cuda=cuda: cuda)
        assert f"compiles here for {devices}; for a GPU, on that GPU itself" in found("compiler inductor").found


def test_a_gpu_its_memory_and_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    card = LocalGpu("NVIDIA H100 80GB HBM3", "sm_90", 80 * 2**30, 78 * 2**30, "580.95.05")
    monkeypatch.setattr(local_gpu, "local_gpus", lambda: [card])
    said = "NVIDIA H100 80GB HBM3, sm_90, 80 GiB, 78 GiB free; driver 580.95.05"
    assert found("GPU") == Finding("GPU", said)
    monkeypatch.setattr(local_gpu, "local_gpus", lambda: [card, card])
    assert found("GPU 0").found == found("GPU 1").found == said
    assert doctor.examine().gpus == (card, card)


def test_what_inductor_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card = LocalGpu("NVIDIA H100 80GB HBM3", "sm_90", 80 * 2**30, 78 * 2**30, "580.95.05")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(local_gpu, "local_gpus", lambda: [card])
    monkeypatch.setattr(doctor, "find_spec", lambda name: ModuleSpec(name, None, origin=str(tmp_path / "__init__.py")))
    build = tmp_path / "version.py"
    build.write_text("cuda: Optional[str] = None\n")
    assert "for the CPU alone" in found("inductor").found
    assert "pytorch.org/get-started" in found("inductor").fix
    build.write_text("cuda: Optional[str] = '13.0'\n")
    assert found("inductor").found.endswith("for CUDA 13.0; C++ compiler g++")
    assert not found("inductor").fix
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler is missing" in found("inductor").found
    assert "CXX" in found("inductor").fix


def test_what_onnxruntime_executes_on(tmp_path: Path) -> None:
    """Its engines need no PyTorch, and neither does finding out what it executes on."""
    assert found("ONNX Runtime").found == f"onnxruntime {version('onnxruntime')}: Azure, CPU; its engines need no torch"
    code = "from ditforge.commands import doctor; doctor.examine(); import sys; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_which_compilers_suit_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    card = LocalGpu("NVIDIA H100 80GB HBM3", "sm_90", 80 * 2**30, 78 * 2**30, "580.95.05")
    monkeypatch.setattr(local_gpu, "local_gpus", lambda: [card])
    monkeypatch.setattr(inductor, "installed_version", no_package)
    finding = found("compilers")
    able, *unable = finding.found.split("; ")
    assert able == "onnxruntime for sm_90" and not finding.fix
    assert "inductor: PyTorch is not installed" in unable and "tensorrt-rtx" not in finding.found


def no_package(name: str) -> str:
    """What importlib.metadata says of a package that is not installed."""
    raise PackageNotFoundError(name)


def test_memory_is_what_the_control_group_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "read_memory", lambda: Memory(64 * 2**30, 3 * 2**30, 8 * 2**30))
    assert (
        found("memory").found == "64.0 GiB, of which this process's control group may have 8.0 GiB; 3.0 GiB available"
    )
    monkeypatch.setattr(doctor, "read_memory", lambda: Memory(64 * 2**30, 3 * 2**30))
    assert found("memory").found == "64.0 GiB; 3.0 GiB available"
