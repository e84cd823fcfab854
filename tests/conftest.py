"""Shared between the rooms' tests: checkpoints, and what the stages make of them, each made once a session.

Where pytest-xdist runs several processes, folders are made by the first one that needs them, and used by all.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import traces
from filelock import FileLock, Timeout
from hypothesis import settings

from ditforge.export.checkpoint.source import CheckpointSource
from ditforge.triton_repo.server import Server, start

if "SLIPCOVER_ENABLED" in os.environ and sys.version_info < (3, 12):
    # To take probes out that were hit, SlipCover looks for code in the locals of every frame. Python 3.11 keeps what it
    # looked at until the frame ends: a tensor that a network has done with counts as memory that the network takes.
    from slipcover import Slipcover

    Slipcover.deinstrument_seen = lambda self: None  # type: ignore[method-assign]
MODELS = Path(__file__).parent.parent / "models"
STARTUP = Path(traces.__file__).parent / "startup"
OTHER = {"fp32": "fp16", "fp16": "bf16", "bf16": "fp16"}  # which exports to make while those are being made
# The same examples each time, however long one takes on a busy machine, so that a submission is not refused for what an
# earlier one brought. For others: pytest --hypothesis-profile default
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")
# What `make test-quick` leaves out, beside tests marked as slow: tests that need one of these fixtures, and these files
# or folders, which trace, compile, train or serve by themselves.
SLOW_FIXTURES = {
    *("schnell", "tiny", "sd3", "sd3_turbo", "sd3_clip", "dits", "exports", "sd3_exports", "ranges"),
    *("schnell_server", "tiny_server", "sd3_server", "sd3_turbo_server", "sd3_clip_server"),
}
SLOW_PATHS = (
    "chain",
    "client/test_tls.py",
    "engines/compilers/test_tensorrt_rtx.py",
    "engines/memory/test_segments.py",
    "export/checkpoint/test_layouts.py",
    "export/checkpoint/test_random_weights.py",
    "export/checkpoint/test_source.py",
    "export/configs",
    "export/families/test_flux.py",
    "export/families/test_sd3.py",
    "export/graph",
    "export/quantisation",
    "export/test_onnx_export.py",
    "support",
    "toy",
    "triton_repo/models",
    "triton_repo/test_front.py",
    "triton_repo/test_server.py",
    "triton_repo/test_tritonserver.py",
    "trunk/commands",
    "trunk/test_plan_report.py",
)

traces.install()

Shared = Callable[..., Path]
Exports = Callable[[str, str], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow, for `-m "not slow"`."""
    folders = [Path(__file__).parent / path for path in SLOW_PATHS]
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if SLOW_FIXTURES.intersection(fixtures) or any(item.path.is_relative_to(folder) for folder in folders):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the lines that ran in the test processes, by folder; SlipCover's plugin has put them together by now."""
    merged = Path(os.environ.get("SLIPCOVER_COVERAGE_DIR", "")) / "merged.json"
    if "PYTEST_XDIST_WORKER" in os.environ or not merged.is_file():
        return
    covered, lines = Counter[str](), Counter[str]()
    for file, found in json.loads(merged.read_text())["files"].items():
        for folder in (os.path.dirname(file), "all"):
            covered[folder] += len(found["executed_lines"])
            lines[folder] += len(found["executed_lines"]) + len(found["missing_lines"])
    terminalreporter.section("lines run, but for processes that tests start")
    for folder in sorted(lines, key=lambda folder: (folder == "all", folder)):
        terminalreporter.line(
            f"{folder:32}{covered[folder]:6} of {lines[folder]:6} {covered[folder] / lines[folder]:7.1%}"
        )


@pytest.fixture(scope="session")
def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the session that all its processes know."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session", autouse=True)
def shared_traces(shared_root: Path) -> Iterator[None]:
    """Exports of this session, also in processes that tests start, take what has been traced in it: see traces.py."""
    path = os.pathsep.join(filter(None, [str(STARTUP), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", path)
        monkeypatch.setenv(traces.FOLDER, str(shared_root / "traces"))
        yield


@pytest.fixture
def traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of this test, also in processes that it starts, trace by themselves."""
    monkeypatch.delenv(traces.FOLDER)


@pytest.fixture(scope="session")
def shared(shared_root: Path) -> Shared:
    """`shared(NAME, make)` is a folder that `make(folder)` has filled, once for all processes of the session.

    Where another process is about that, `meanwhile()` makes something else that tests need, instead of waiting.
    Source: https://pytest-xdist.readthedocs.io/en/stable/how-to.html#making-session-scoped-fixtures-execute-only-once
    """

    def once(name: str, make: Callable[[Path], object], meanwhile: Callable[[], object] | None = None) -> Path:
        root = shared_root
        folder, done, lock = root / name, root / f"{name}.done", FileLock(root / f"{name}.lock")
        if meanwhile and not done.exists():
            try:
                lock.acquire(blocking=False)
            except Timeout:
                meanwhile()
            else:
                lock.release()
        with lock:
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def flux_tiny() -> Path:
    """The trained checkpoint in the repository."""
    return MODELS / "flux-tiny"


@pytest.fixture(scope="session")
def sd35_tiny() -> Path:
    """The one like Stable Diffusion 3.5 medium."""
    return MODELS / "sd35-tiny"


@pytest.fixture(scope="session")
def random_schnell(shared: Shared) -> Path:
    """A randomly initialised checkpoint that shares no size with flux-tiny, and embeds no guidance."""
    import random_flux  # not above: the process that only hands out tests does without PyTorch

    return shared("checkpoint", random_flux.save_schnell) / "random-schnell"


@dataclass(frozen=True)
class Stages:
    """A checkpoint, and the folders that the stages make of it."""

    checkpoint: Path
    onnx: Path
    engines: Path
    repository: Path


def run_stages(
    checkpoint: Path,
    name: str,
    shared: Shared,
    meanwhile: Callable[[], object] | None = None,
    text_encoders: str = "all",
) -> Stages:
    """Export in fp32, build for the CPU, write the repository; into the shared folder NAME."""
    from ditforge.engines.build import build
    from ditforge.export.onnx_export import ExportOptions, export_checkpoint
    from ditforge.triton_repo.repository import write_repository

    def make(out: Path) -> None:
        export_checkpoint(
            CheckpointSource(checkpoint, text_encoders=text_encoders), out / "onnx", ExportOptions("fp32")
        )
        build(out / "onnx", out / "engines")
        write_repository(out / "engines", out / "repo")

    out = shared(name, make, meanwhile)
    return Stages(checkpoint, out / "onnx", out / "engines", out / "repo")


@pytest.fixture(scope="session")
def schnell(random_schnell: Path, shared: Shared, request: pytest.FixtureRequest) -> Stages:
    """The random checkpoint through every stage."""
    return run_stages(random_schnell, "schnell", shared, lambda: request.getfixturevalue("tiny"))


@pytest.fixture(scope="session")
def tiny(flux_tiny: Path, shared: Shared) -> Stages:
    """flux-tiny through every stage."""
    return run_stages(flux_tiny, "tiny", shared)


def make_ranges(checkpoint: Path, name: str, shared: Shared) -> Path:
    """A calibration of a checkpoint over two prompts, in the shared folder NAME."""
    from ditforge.export.quantisation.calibration import calibrate

    prompts = ["a red circle", "two blue squares"]
    return (
        shared(name, lambda out: calibrate(CheckpointSource(checkpoint), out / "ranges.json", prompts)) / "ranges.json"
    )


def make_dits(checkpoint: Path, ranges: Path, name: str, shared: Shared) -> Exports:
    """A checkpoint's DiT alone in a precision, e.g. ("fp8", "bf16"): fp8 with bf16 around it."""
    from exports import export_dits

    def make(base: str, meanwhile: Callable[[], object] | None = None) -> Path:
        return shared(f"{name}-{base}", lambda out: export_dits(checkpoint, ranges, base, out), meanwhile)

    return lambda precision, base: make(base, lambda: make(OTHER[base])) / precision


@pytest.fixture(scope="session")
def ranges(random_schnell: Path, shared: Shared) -> Path:
    """A calibration of the random checkpoint."""
    return make_ranges(random_schnell, "calibration", shared)


@pytest.fixture(scope="session")
def dits(random_schnell: Path, ranges: Path, shared: Shared) -> Exports:
    """`dits("fp8", "bf16")`: a folder with the random checkpoint's DiT alone, in fp8 with bf16 around it."""
    return make_dits(random_schnell, ranges, "dits", shared)


def make_exports(stages: Stages, dits: Exports, name: str, shared: Shared, without: tuple[str, ...] = ()) -> Exports:
    """A checkpoint in a precision, e.g. ("fp8", "bf16"): its DiT, of `dits`, in fp8, and all else in bf16."""
    from exports import export_around, replace_dit

    def whole(base: str, meanwhile: Callable[[], object] | None = None) -> Path:
        def make(out: Path) -> None:
            export_around(stages.checkpoint, stages.onnx, dits(base, base), base, out, without)

        return shared(f"{name}-export-{base}", make, meanwhile)

    def export(precision: str, base: str) -> Path:
        def make(out: Path) -> None:
            shutil.copytree(around, out, dirs_exist_ok=True)
            replace_dit(dits(precision, base), out)

        if base == "fp32":
            return stages.onnx
        around = whole(base, lambda: whole(OTHER[base]))
        return around if precision == base else shared(f"{name}-export-{precision}-{base}", make)

    return export


@pytest.fixture(scope="session")
def exports(schnell: Stages, dits: Exports, shared: Shared) -> Exports:
    """`exports("fp8", "bf16")`: the random checkpoint with its DiT in fp8, and everything else in bf16."""
    return make_exports(schnell, dits, "schnell", shared)


@pytest.fixture(scope="session")
def sd3_exports(sd3: Stages, shared: Shared) -> Exports:
    """The same of sd35-tiny, but for T5 and the autoencoder: these are the same graphs in both families."""
    ranges = make_ranges(sd3.checkpoint, "sd3-calibration", shared)
    dits = make_dits(sd3.checkpoint, ranges, "sd3-dits", shared)
    return make_exports(sd3, dits, "sd3", shared, ("t5", "vae_decoder", "vae_encoder"))


@pytest.fixture(scope="session")
def schnell_server(schnell: Stages) -> Iterator[Server]:
    """A server of the random checkpoint."""
    with start(schnell.repository, port=0) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_server(tiny: Stages) -> Iterator[Server]:
    """A server of flux-tiny."""
    with start(tiny.repository, port=0) as server:
        yield server


@pytest.fixture(scope="session")
def sd3(sd35_tiny: Path, shared: Shared, request: pytest.FixtureRequest) -> Stages:
    """sd35-tiny, trained and built like Stable Diffusion 3.5 medium, through every stage."""
    return run_stages(sd35_tiny, "sd3", shared, lambda: request.getfixturevalue("sd3_turbo"))


@pytest.fixture(scope="session")
def sd3_turbo(shared: Shared) -> Stages:
    """A random checkpoint that shares no size with sd35-tiny, built like large-turbo, through every stage."""
    import random_sd3

    folder = shared("sd3-turbo-checkpoint", lambda out: random_sd3.save_large_turbo(out, with_t5=True))
    return run_stages(folder / "random-sd3-turbo", "sd3-turbo", shared)


@pytest.fixture(scope="session")
def sd3_clip(sd3_turbo: Stages, shared: Shared) -> Stages:
    """The same without T5, whose files are not there, through every stage."""

    def copy(out: Path) -> None:
        shutil.copytree(sd3_turbo.checkpoint, out / "random-sd3-turbo", ignore=shutil.ignore_patterns("*_3"))

    folder = shared("sd3-clip-checkpoint", copy)
    return run_stages(folder / "random-sd3-turbo", "sd3-clip", shared, text_encoders="clip")


@pytest.fixture(scope="session")
def sd3_server(sd3: Stages) -> Iterator[Server]:
    """A server of sd35-tiny."""
    with start(sd3.repository, port=0) as server:
        yield server


@pytest.fixture(scope="session")
def sd3_turbo_server(sd3_turbo: Stages) -> Iterator[Server]:
    """A server of the random checkpoint like large-turbo."""
    with start(sd3_turbo.repository, port=0) as server:
        yield server


@pytest.fixture(scope="session")
def sd3_clip_server(sd3_clip: Stages) -> Iterator[Server]:
    """A server of the random checkpoint without T5."""
    with start(sd3_clip.repository, port=0) as server:
        yield server
