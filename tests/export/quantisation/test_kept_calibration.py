"""A calibration is kept for the same files, prompts and steps, and for no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from command_line import run_here

from ditforge.export.checkpoint.source import CheckpointSource
from ditforge.export.quantisation import kept_calibration
from ditforge.export.quantisation.calibration import Calibration
from ditforge.export.quantisation.kept_calibration import calibrate_once, kept_file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ditforge" / "calibrations"


@pytest.fixture
def runs(ranges: Path, monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The steps of each calibration that is made; the session's stands for all."""
    seen: list[int | None] = []

    def calibrate(source: object, out: Path, prompts: object, steps: int | None, progress: object) -> Calibration:
        seen.append(steps)
        out.write_bytes(ranges.read_bytes())
        return Calibration.model_validate_json(ranges.read_bytes())

    monkeypatch.setattr(kept_calibration, "calibrate", calibrate)
    return seen


def test_the_second_time_it_is_there(
    random_schnell: Path,
    runs: list[int | None],
    ranges: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = ["calibrate", str(random_schnell), "--steps", "3", "--out"]
    first = run_here([*arguments, str(tmp_path / "first.json")], monkeypatch, capfd)
    second = run_here([*arguments, str(tmp_path / "second.json")], monkeypatch, capfd)
    assert (first.code, second.code, runs) == (0, 0, [3])
    assert "kept from an earlier run" in second.out and "kept" not in first.out
    assert (tmp_path / "second.json").read_bytes() == (tmp_path / "first.json").read_bytes() == ranges.read_bytes()


def test_what_is_damaged_or_cannot_be_kept_is_made_again(
    random_schnell: Path, runs: list[int | None], cache: Path, tmp_path: Path
) -> None:
    source = CheckpointSource(random_schnell)
    assert calibrate_once(source, tmp_path / "a.json", ["a"])[1] is False
    (kept,) = cache.iterdir()
    kept.write_text("{")
    assert calibrate_once(source, tmp_path / "b.json", ["a"])[1] is False
    assert calibrate_once(source, tmp_path / "c.json", ["a"])[1] is True
    kept.unlink()
    cache.rmdir()
    cache.touch()
    assert calibrate_once(source, tmp_path / "d.json", ["a"])[1] is False
    assert len(runs) == 3 and (tmp_path / "d.json").is_file()


def test_whatever_changes_it_has_a_place_of_its_own(random_schnell: Path, tmp_path: Path) -> None:
    source, lora = CheckpointSource(random_schnell), tmp_path / "style.safetensors"
    lora.touch()
    sources = [
        source,
        replace(source, loras=((lora, 1.0),)),
        replace(source, loras=((lora, 0.5),)),
        replace(source, base=tmp_path),
        replace(source, text_encoders="clip"),
    ]
    places = [kept_file(each, ["a"], None) for each in sources]
    places += [kept_file(source, ["b"], None), kept_file(source, ["a"], 4)]
    lora.write_bytes(b"changed")
    places.append(kept_file(sources[1], ["a"], None))
    assert len(set(places)) == len(places)
    assert kept_file(source, ["a"], None) == places[0]
