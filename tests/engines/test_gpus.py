"""The GPU table, what `--gpu` takes, and what is chosen and refused for it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
from command_line import assert_error, ditforge

from ditforge.engines import gpus
from ditforge.engines.compilers import Compiler, choice, compilers
from ditforge.engines.compilers.choice import check_compiler, choose, default_compiler
from ditforge.engines.gpus import GPUS, Target, find_target
from ditforge.errors import UserError
from ditforge.local_gpu import LocalGpu, local_gpus


@pytest.mark.parametrize(
    ("name", "capabilities", "memory"),
    [
        ("rtx4090", ("sm_89",), 24),
        ("RTX 4090", ("sm_89",), 24),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", ("sm_89",), 16),
        ("NVIDIA L40S", ("sm_89",), 48),
        ("a100-80gb", ("sm_80",), 80),
        ("h100", ("sm_90",), 80),
        ("rtx-5090", ("sm_120",), 32),
        ("sm_89", ("sm_89",), None),
        ("SM120", ("sm_120",), None),
        ("sm_120,sm_86,sm_89,sm_86", ("sm_86", "sm_89", "sm_120"), None),
        ("rtx4090,rtx3060", ("sm_86", "sm_89"), 12),
        ("rtx4090,sm_86", ("sm_86", "sm_89"), None),
        ("cpu", (), None),
    ],
)
def test_names(name: str, capabilities: tuple[str, ...], memory: int | None) -> None:
    target = find_target(name)
    assert (target.capabilities, target.memory_gb) == (capabilities, memory)
    assert str(target) == (",".join(capabilities) or "cpu")


@pytest.mark.parametrize(
    ("name", "nearest"), [("rtx4091", "rtx4090"), ("rtx 3900", "rtx3090"), ("h10", "h100"), ("sm_88", "sm_89")]
)
def test_an_unknown_gpu_gets_the_nearest_name(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"unknown GPU '{name}' .*did you mean.*{nearest}") as error:
        find_target(name)
    assert "ditforge gpus" in error.value.fix


@pytest.mark.parametrize("name", ["", "quantum", "cpu,sm_89", "sm_89,"])
def test_no_gpu_at_all(name: str) -> None:
    with pytest.raises(UserError, match="unknown GPU"):
        find_target(name)


def test_names_are_found_by_what_the_shop_calls_them() -> None:
    assert len({gpu.name for gpu in GPUS}) == len(GPUS) > 60
    for gpu in GPUS:
        assert find_target(gpu.name) == find_target(f"NVIDIA {gpu.product}") == find_target(gpu.name.upper())


GpuOfDriver = tuple[tuple[int, int], str, int]


def driver(monkeypatch: pytest.MonkeyPatch, *found: GpuOfDriver) -> None:
    """A driver that describes GPUs: the compute capability, name and bytes of memory of each."""
    nvml = ModuleType("pynvml")
    calls = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.95.05",
        "nvmlDeviceGetCount": lambda: len(found),
        "nvmlDeviceGetHandleByIndex": lambda index: found[index],
        "nvmlDeviceGetCudaComputeCapability": lambda device: device[0],
        "nvmlDeviceGetMemoryInfo": lambda device: SimpleNamespace(total=device[2], free=device[2] - 2**30),
        "nvmlDeviceGetName": lambda device: device[1],
        "NVMLError": RuntimeError,
    }
    for key, value in calls.items():
        setattr(nvml, key, value)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


def test_the_local_gpu_is_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, ((12, 0), "NVIDIA RTX of Next Year", 34_190_000_000), ((8, 9), "another one", 2**34))
    assert find_target("local") == Target("NVIDIA RTX of Next Year", ("sm_120",), 32)  # GiB, as data sheets count
    assert local_gpus()[1] == LocalGpu("another one", "sm_89", 2**34, 15 * 2**30, "580.95.05")


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    pynvml = pytest.importorskip("pynvml")

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    with pytest.raises(UserError, match=r"no NVIDIA GPU.*Not Found") as error:
        find_target("local")
    assert 'gpu="rtx4090"' in error.value.fix
    driver(monkeypatch)
    with pytest.raises(UserError, match="finds none"):
        find_target("local")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(UserError, match="nvidia-ml-py is not installed"):
        find_target("local")


@pytest.mark.parametrize(
    ("name", "compiler", "precision"),
    [
        ("rtx2080ti", "tensorrt-rtx", "int8-weights"),
        ("rtx3090", "tensorrt-rtx", "int8-weights"),
        ("a40", "tensorrt-rtx", "bf16"),
        ("a100", "tensorrt-rtx", "bf16"),
        ("quadrortx8000", "tensorrt-rtx", "int8-weights"),  # large, but without bf16
        ("rtx4090", "tensorrt-rtx", "fp8-weights"),
        ("l4", "tensorrt-rtx", "fp8-weights"),
        ("h100", "tensorrt", "fp8-weights"),
        ("b200", "tensorrt", "fp8-weights"),
        ("rtx5070", "tensorrt-rtx", "fp8-weights"),
        ("rtx3060,rtx5090", "tensorrt-rtx", "int8-weights"),  # the oldest decides
        ("cpu", "onnxruntime", "fp32"),
    ],
)
def test_what_is_chosen(name: str, compiler: str, precision: str) -> None:
    target = find_target(name)
    assert default_compiler(target) == compiler
    chosen, reason = gpus.default_precision(target)
    assert chosen == precision and reason
    gpus.check_precision("dit", chosen, gpus.default_activations(target), target)


@pytest.mark.parametrize(
    ("name", "precision", "dtype", "problem", "fix"),
    [
        ("rtx3090", "fp8", "bf16", "sm_86 has no FP8 tensor cores", "int8-weights   (or bf16)"),
        ("a100", "fp8-weights", "bf16", "sm_80 has no FP8 tensor cores", "int8-weights   (or bf16)"),
        ("rtx2080", "fp8", "fp16", "sm_75 has no FP8 tensor cores", "int8-weights --activations fp16   (or fp16)"),
        ("rtx2080", "bf16", "bf16", "sm_75 has no bf16 arithmetic", "int8-weights --activations fp16   (or fp16)"),
        ("t4", "int8-weights", "bf16", "sm_75 has no bf16 arithmetic, and dit is int8-weights in bf16", "fp16"),
        ("sm_86,sm_89", "fp8", "bf16", "sm_86 has no FP8 tensor cores", "int8-weights"),
    ],
)
def test_a_precision_that_the_gpu_lacks(name: str, precision: str, dtype: str, problem: str, fix: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        gpus.check_precision("dit", precision, dtype, find_target(name))
    assert fix in error.value.fix


@pytest.mark.parametrize(
    ("compiler", "name", "problem", "fix"),
    [
        ("tensorrt-rtx", "h100", r"tensorrt-rtx do not run on sm_90 \(h100\)", 'compiler="tensorrt" on that machine'),
        ("tensorrt-rtx", "b200", "sm_100", 'compiler="tensorrt" on that machine'),
        ("tensorrt", "rtx2080", "sm_75", 'compiler="tensorrt-rtx"'),
        ("tensorrt-rtx", "cpu", "not for the CPU", 'compiler="onnxruntime"'),
    ],
)
def test_a_compiler_whose_engines_do_not_run_there(compiler: str, name: str, problem: str, fix: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        check_compiler(compiler, find_target(name))
    assert fix in error.value.fix


def test_one_engine_for_all_is_a_graph() -> None:
    assert default_compiler(find_target("t4,h100")) == "onnxruntime"


def test_a_compiler_that_is_not_installed_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise UserError("TensorRT is not installed", "pip install tensorrt")

    def installed(**changes: object) -> list[Compiler]:
        names = "tensorrt-rtx", "tensorrt", "onnxruntime"
        found = {compiler.name: compiler for compiler in compilers() if compiler.name in names}
        found["tensorrt"] = replace(found["tensorrt"], **changes)
        return sorted(found.values(), key=lambda compiler: compiler.rank)

    h100 = find_target("h100")
    monkeypatch.setattr(choice, "compilers", lambda: installed(version=missing))
    assert choose(h100) == ("onnxruntime", "tensorrt: TensorRT is not installed")
    monkeypatch.setattr(choice, "compilers", lambda: installed(version=lambda: "11.0"))
    compiler, why = choose(h100)  # it compiles on the GPU itself, and there is none here
    assert compiler == "onnxruntime" and why.startswith("tensorrt: this machine has no NVIDIA GPU")
    monkeypatch.setattr(choice.gpus, "local_target", lambda: h100)
    assert choose(h100) == ("tensorrt", "")
    assert choose(find_target("rtx4090")) == ("tensorrt-rtx", "")
    assert choose(find_target("cpu")) == ("onnxruntime", "")


def test_the_command_prints_the_table(tmp_path) -> None:
    result = ditforge("gpus", cwd=tmp_path)
    assert result.code == 0
    lines = result.out.splitlines()
    assert max(map(len, lines)) < 80
    block = next(i for i, line in enumerate(lines) if line.startswith("sm_89 "))
    assert "fp8" in lines[block] and "compiled by tensorrt-rtx (the default), tensorrt, " in lines[block + 1]
    assert lines[block + 1].endswith(", onnxruntime")
    row = next(line for line in lines[block:] if line.startswith("  rtx4090 "))
    assert row.split() == ["rtx4090", "GeForce", "RTX", "4090", "24", "GiB", "fp8-weights"]
    assert {line.split()[0] for line in lines if line.startswith("  ")} >= {gpu.name for gpu in GPUS}


def test_the_table_as_json(tmp_path) -> None:
    found = json.loads(ditforge("gpus", "--json", cwd=tmp_path).out)["gpus"]
    assert [gpu["name"] for gpu in found] == [gpu.name for gpu in GPUS]
    h100 = next(gpu for gpu in found if gpu["name"] == "h100")
    compilers = h100.pop("compilers")
    assert (compilers[0], compilers[-1]) == ("tensorrt", "onnxruntime")
    assert h100 == {
        "name": "h100",
        "product": "H100",
        "capability": "sm_90",
        "memory_gb": 80,
        "precisions": ["fp32", "fp16", "int8-weights", "bf16", "fp8", "fp8-weights"],
        "default_precision": "fp8-weights",
        "default_compiler": "tensorrt",
    }


@pytest.mark.parametrize(
    ("gpu", "options", "mentions"),
    [
        ("rtx3090", ("--precision", "fp8"), ("sm_86 has no FP8 tensor cores", "int8-weights   (or bf16)")),
        (
            "h100",
            ("--compiler", "tensorrt-rtx", "--precision", "bf16"),
            ("sm_90 (h100)", "use --compiler tensorrt on that machine"),
        ),
        ("rtx3091", (), ("'rtx3091'", "did you mean rtx3090", "ditforge gpus")),
    ],
)
def test_up_refuses_before_the_export(flux_tiny, tmp_path, gpu: str, options: tuple[str, ...], mentions) -> None:
    result = ditforge("up", flux_tiny, "--gpu", gpu, *options, "--cache", "cache", cwd=tmp_path)
    assert_error(result, *mentions)
    assert not list(tmp_path.iterdir())
