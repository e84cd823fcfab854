"""Exports that are killed, or run out of disk: what is finished is kept, nothing else, and the result is the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import COMMAND, PATIENCE, Result, assert_error

from ditforge import manifest, stage_folder
from ditforge.errors import UserError
from ditforge.export.checkpoint.source import CheckpointSource
from ditforge.export.families import flux
from ditforge.export.graph import resuming
from ditforge.export.onnx_export import export_checkpoint
from ditforge.unfinished_folder import partial_folder

# Exports T5, which is large enough to be kept, and is killed when it comes to CLIP.
KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from ditforge.export import onnx_export
from ditforge.export.families import flux
from ditforge.export.checkpoint.source import CheckpointSource
flux.FAMILY = replace(flux.FAMILY, networks=lambda *args: flux.networks(*args)[1::-1])
def report(component, done, total):
    if component.startswith("clip "):
        os.kill(os.getpid(), signal.SIGKILL)
onnx_export.export_checkpoint(
    CheckpointSource(Path(sys.argv[1]), random_weights=True), Path(sys.argv[2]), progress=report
)
"""


@pytest.fixture
def bare(random_schnell: Path, tmp_path: Path) -> Path:
    """Configurations alone, with a T5 of two layers that is so wide that it is kept."""
    folder = tmp_path / "bare"
    shutil.copytree(random_schnell, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    for component, changes in {
        "text_encoder": {"vocab_size": 600, "eos_token_id": 2},
        "text_encoder_2": {"vocab_size": 300, "d_ff": 200_000},
    }.items():
        path = folder / component / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_killed_between_components(
    bare: Path, tmp_path: Path, traced_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal that nobody can catch; the same command again takes what was finished, byte for byte."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    out = tmp_path / "killed" / "onnx"
    killed = subprocess.run([sys.executable, "-c", KILLED, bare, out], check=False, timeout=PATIENCE)
    assert killed.returncode == -signal.SIGKILL
    kept = tmp_path / "killed" / ".onnx.unfinished" / "t5.onnx.data"
    inode, left = kept.stat().st_ino, sorted(os.listdir(tmp_path / "killed"))
    assert kept.stat().st_size > resuming.WORTH
    assert len(left) == 2 and "onnx" not in left  # and a folder that was being written
    family = replace(flux.FAMILY, networks=lambda *args: flux.networks(*args)[1::-1])
    monkeypatch.setattr(flux, "FAMILY", family)
    export_checkpoint(CheckpointSource(bare, random_weights=True), out)
    assert os.listdir(tmp_path / "killed") == ["onnx"]
    assert (out / "t5.onnx.data").stat().st_ino == inode  # not written again
    expected = export_checkpoint(CheckpointSource(bare, random_weights=True), tmp_path / "whole" / "onnx").manifest
    assert list(expected.components) == ["tokenizer", "t5", "clip"]
    assert manifest.read(out, "onnx") == expected  # every file's SHA-256
    for component in expected.components.values():
        manifest.check_files(out, component.files, "")


def test_a_folder_that_is_being_written_is_nobody_elses_to_remove(tmp_path: Path) -> None:
    """Two processes with one target: the later one leaves the other's folder alone."""
    mine = tmp_path / ".onnx.notes"
    mine.mkdir()
    with stage_folder.written_whole(tmp_path / "onnx", "onnx") as first:
        (first / "a").touch()
        with stage_folder.written_whole(tmp_path / "onnx", "onnx") as second:
            assert second != first
            assert (first / "a").exists()
        (tmp_path / "onnx").rmdir()
    abandoned = tmp_path / ".onnx.abc.partial"
    shutil.copytree(tmp_path / "onnx", abandoned)
    shutil.rmtree(tmp_path / "onnx")
    with stage_folder.written_whole(tmp_path / "onnx", "onnx"):
        assert not abandoned.exists()
    assert sorted(os.listdir(tmp_path)) == [mine.name, "onnx"]


def test_many_write_the_same_folder_at_once(tmp_path: Path) -> None:
    """The last one's is there, and whole; none of them fails."""

    def write(number: int) -> None:
        for _ in range(30):
            with partial_folder(tmp_path / "onnx") as folder:
                (folder / "a").write_text(str(number))
                (folder / "b").write_text(str(number))
                stage_folder.put_in_place(folder, tmp_path / "onnx")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert os.listdir(tmp_path) == ["onnx"]
    assert (tmp_path / "onnx" / "a").read_text() == (tmp_path / "onnx" / "b").read_text()


def test_a_disk_that_fills_up_in_the_middle(random_schnell: Path, tmp_path: Path) -> None:
    """The kernel refuses to make files larger than 100 kB, and CLIP's weights are."""
    command = ["prlimit", "--fsize=100000", *COMMAND, "export", str(random_schnell), "--out", "onnx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert_error(
        Result(done.returncode, done.stdout, done.stderr), "cannot write", "more than 100,000 bytes", "ulimit -f"
    )
    assert os.listdir(tmp_path) == []


def test_a_place_where_nothing_can_be_written() -> None:
    """Which no free space would help."""
    with (
        pytest.raises(UserError, match="cannot write /proc/onnx") as caught,
        stage_folder.written_whole(Path("/proc/onnx"), "onnx"),
    ):
        pass
    assert "space" not in caught.value.fix
