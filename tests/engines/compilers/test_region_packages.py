"""Packages of regions: compiled one after the other or beside each other, they compute the same."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import codecache, cpu_vec_isa

from ditforge.engines.compilers import region_packages
from ditforge.engines.compilers.package_cache import Example, Package
from ditforge.engines.compilers.region_packages import compile_packages, how_many
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


def test_packages_are_compiled_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_packages, "PROCESSORS", 0.5)
    packages = [package(tmp_path / f"{width}.pt2", program(width), width) for width in (4, 6)]
    assert how_many(packages) == 2
    said: list[tuple[str, int, int]] = []
    compile_packages("dit", packages, lambda *step: said.append(step))
    assert {step[0] for step in said} == {"dit: 4", "dit: 6"}
    assert [step[1:] for step in said] == [(1, 2), (2, 2)]
    for width in (4, 6):
        x, weight = torch.randn(3, width), torch.randn(5, width)
        (made,) = load_package(tmp_path / f"{width}.pt2", torch.device("cpu")).boxed_run([x, weight])
        torch.testing.assert_close(made, 2 * x @ weight.T)


def test_what_fails_beside_others_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_packages, "PROCESSORS", 0.5)
    packages = [package(tmp_path / "no" / f"{number}.pt2", program(4), 4) for number in range(2)]
    with pytest.raises(DitforgeError, match=r"Inductor cannot compile [01] of dit") as error:
        compile_packages("dit", packages, lambda *_: None)
    assert error.value.fix


def test_one_is_compiled_at_a_time_on_few_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = [package(tmp_path / "a.pt2", b"", 4)] * 20
    monkeypatch.setattr(region_packages.os, "sched_getaffinity", lambda _: {0, 1})
    assert how_many(packages) == 1
    monkeypatch.setattr(region_packages.os, "sched_getaffinity", lambda _: set(range(64)))
    assert how_many(packages) == region_packages.MOST
    assert how_many(packages[:3]) == 3


def test_a_package_for_a_gpu_does_not_wait_for_the_processors_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    before = cpu_vec_isa.pick_vec_isa()
    with region_packages.processor_unasked(torch.device("cuda")):
        assert cpu_vec_isa.pick_vec_isa() is cpu_vec_isa.invalid_vec_isa
        assert codecache.pick_vec_isa is cpu_vec_isa.pick_vec_isa  # which is what compiles packages
    with region_packages.processor_unasked(torch.device("cpu")):
        assert cpu_vec_isa.pick_vec_isa() == before
    assert cpu_vec_isa.pick_vec_isa() == before
