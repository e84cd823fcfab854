"""FLUX.1-dev and Stable Diffusion 3.5 at their full size on this machine: what each command takes, by /usr/bin/time -v.

    python benchmarks/full_size.py --out docs/full-size.md

Weights are random, and so is the calibration: time and memory do not depend on their values. Exports and engines are
deleted when they have been measured, so 60 GB of disk do. A run takes hours; `--only` makes some of them, and the
report has the latest figures of each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from made_up import write_calibration

from ditforge import manifest
from ditforge.export.checkpoint.diffusers_folder import CONFIGS, open_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from command_line import HEED_INTERRUPTS

LIMITS = {"export": (15 * 60, 3e9), "build": (20 * 60, 14e9)}  # seconds, bytes of resident memory
FIELDS = ("Elapsed (wall clock) time", "Maximum resident set size (kbytes)", "User time", "System time", "Exit status")
ABOUT = """# Full-size models in little memory

`ditforge export` reads weights one tensor at a time, converts and quantises them, and writes them before it reads the
next one; `ditforge build` compiles engines one after the other, in as many segments as the machine's memory asks for.
Without the checkpoint, `--random-weights` exports the real architecture with random values:

```sh
ditforge export flux.1-dev --random-weights --precision fp8-weights --out out/onnx
```

Names: `flux.1-dev`, `flux.1-schnell`, `sd3.5-medium`, `sd3.5-large`; or a folder in diffusers' layout, whose weights
are not read. Its pictures are noise. Tokenizers that are missing are made: a token for each byte, in a vocabulary of
the real size, so every stage runs, but no prompt means anything. Values are the same each time; they are cut from one
block of 17 million normal numbers, so tensors are unlike each other but not independent.

An export that is interrupted keeps its large finished components (256 MB and more) in `.NAME.unfinished` beside
`--out`, and the same command again goes on from there. Free space on the disk is checked before anything is written.

## The log
"""


@dataclass(frozen=True)
class Run:
    """An export of `model` in `precision`, and the GPUs that engines of it are compiled for.

    `interrupted` tells at which component a first export gets Ctrl-C, before the same command is measured.
    """

    model: str
    precision: str
    gpus: tuple[str, ...] = ()
    interrupted: str | None = None

    @property
    def name(self) -> str:
        """What `--only` calls it."""
        return f"{self.model}-{self.precision}"


RUNS = (
    Run("flux.1-dev", "fp8-weights", ("rtx4090", "rtx5090")),
    Run("flux.1-dev", "fp8", ("rtx4090",)),
    Run("flux.1-dev", "int8-weights", ("rtx3060",), interrupted="dit"),
    Run("sd3.5-large", "fp8-weights"),
)


def measure(name: str, arguments: list[str], folder: Path) -> dict[str, object]:
    """Run a command of ditforge to its end: what was measured. Its log goes to `folder`/NAME.log."""
    log = folder / f"{name}.log"
    command = ["/usr/bin/time", "-v", sys.executable, "-m", "ditforge", *arguments]
    load = os.getloadavg()[0]
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    text = log.read_text(errors="replace")
    if code:
        sys.exit(f"{' '.join(arguments)} ended with {code}:\n{text[-3000:]}")
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith(FIELDS)]
    elapsed = next(line for line in lines if line.startswith(FIELDS[0])).rpartition(" ")[2]
    peak = next(line for line in lines if line.startswith(FIELDS[1])).rpartition(" ")[2]
    return {
        "command": "ditforge " + " ".join(arguments),
        "seconds": sum(float(part) * 60**i for i, part in enumerate(reversed(elapsed.split(":")))),
        "peak_bytes": int(peak) * 1024,
        "load_before": round(load, 2),
        "date": str(date.today()),
        "time -v": lines,
        "said": [line for line in text.splitlines() if re.match(r"dit|built dit|\w+: .*segment", line)],
    }


def interrupt(name: str, arguments: list[str], folder: Path, component: str) -> str:
    """Start the command and end it with SIGINT once it writes `component`; returns what it said at the end."""
    log = folder / f"{name}-interrupted.log"
    out = Path(arguments[arguments.index("--out") + 1])
    with log.open("w") as file:
        process = subprocess.Popen(
            [*HEED_INTERRUPTS, sys.executable, "-m", "ditforge", *arguments], stdout=file, stderr=subprocess.STDOUT
        )
        while process.poll() is None and not any(out.parent.glob(f".{out.name}.*/{component}.onnx.data")):
            time.sleep(1)
        time.sleep(10)
        process.send_signal(signal.SIGINT)
        if process.wait() == 0:
            sys.exit(f"{' '.join(arguments)} came to its end instead of being interrupted")
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("warning: ")]
    return re.sub(r"\S*/", "", " ".join(said))


def made_up_calibration(model: str, onnx: Path, file: Path) -> Path:
    """A calibration with the same range for every linear that the export in `onnx` quantised."""
    dit = manifest.read(onnx, "onnx").components["dit"]
    linears = [name for name, kind in dit.layers.items() if kind == dit.precision]
    write_calibration(model, open_checkpoint(CONFIGS / model), linears, file)
    return file


def size(folder: Path, pattern: str = "*") -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def make(run: Run, folder: Path, segments: str, note: Callable[[str, dict[str, object]], None]) -> None:
    """One export and the builds of it."""
    onnx = folder / f"{run.name}-onnx"
    arguments = ["export", run.model, "--random-weights", "--precision", run.precision, "--out", str(onnx)]
    ranges = folder / f"{run.model}.json"
    if run.precision == "fp8":
        if not ranges.is_file():
            sys.exit(f"the made-up calibration needs the names of the linears: run {run.model}-fp8-weights first")
        arguments += ["--calibration", str(ranges)]
    said = interrupt(run.name, arguments, folder, run.interrupted) if run.interrupted else ""
    found = measure(f"{run.name}-export", arguments, folder)
    note(f"{run.name}-export", found | {"kind": "export", "bytes": size(onnx), "interrupted": said})
    if run.precision == "fp8-weights":
        made_up_calibration(run.model, onnx, ranges)
    for gpu in run.gpus:
        engines = folder / f"{run.name}-{gpu}"
        arguments = ["build", str(onnx), "--gpu", gpu, "--segments", segments, "--out", str(engines)]
        found = measure(f"{run.name}-{gpu}", arguments, folder)
        parts = manifest.read(engines, "engines").engines["dit"].segment_files
        plans = {"bytes": size(engines), "dit_bytes": size(engines, "dit*.plan"), "segments": max(1, len(parts))}
        note(f"{run.name}-{gpu}", found | {"kind": "build", **plans})
        shutil.rmtree(engines)
    shutil.rmtree(onnx)


def row(found: dict[str, Any]) -> str:
    """A line of the report's table."""
    seconds, peak = LIMITS[found["kind"]]
    minutes = f"{found['seconds'] // 60:.0f} min {found['seconds'] % 60:.0f} s"
    met = "met" if found["seconds"] <= seconds and found["peak_bytes"] <= peak else "MISSED"
    target = f"{seconds // 60} min, {peak / 1e9:.0f} GB: {met}"
    written = f"{found['bytes'] / 1e9:.1f} GB"
    if found["kind"] == "build":
        written += f", of which the DiT {found['dit_bytes'] / 1e9:.1f} GB in {found['segments']} segments"
    command = re.sub(r"\S*/", "", found["command"])
    cells = (f"`{command}`", minutes, f"{found['peak_bytes'] / 1e9:.2f} GB", target, written, f"{found['load_before']}")
    return "| " + " | ".join((*cells, found["date"])) + " |"


def report(log: dict[str, dict[str, Any]]) -> str:
    """The table of all runs, and what /usr/bin/time said of each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [
        ABOUT,
        f"Written by `make full-size` (`benchmarks/full_size.py`) on {platform.machine()}, {os.cpu_count()} cores, "
        f"{memory:.0f} GiB, no GPU, with random weights. Peak memory is that of the largest process. The load is the "
        "machine's before the command: 0 means that it had both cores to itself.",
        "",
        "| command | time | peak resident memory | target | written | load before | date |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(row(found) for found in log.values()),
        "",
    ]
    for found in log.values():
        if found.get("interrupted"):
            command = re.sub(r"\S*/", "", found["command"])
            lines += [f"`{command}` had been interrupted before, and had said: {found['interrupted']}", ""]
    lines += ["```"]
    for found in log.values():
        lines += [re.sub(r"\S*/", "", found["command"]), *(f"    {line}" for line in found["time -v"])]
    return "\n".join([*lines, "```", ""])


def main() -> None:
    """Make the runs, and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("out/full-size"), help="where they and the log go")
    parser.add_argument("--only", choices=[run.name for run in RUNS], action="append")
    parser.add_argument("--segments", default="auto")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = options.folder / "log.json"
    log = json.loads(kept.read_text()) if kept.is_file() else {}

    def note(name: str, found: dict[str, object]) -> None:
        log[name] = found
        kept.write_text(json.dumps(log, indent=1))
        options.out.write_text(report(log))
        print(row(log[name]), flush=True)

    for run in RUNS:
        if not options.only or run.name in options.only:
            make(run, options.folder, options.segments, note)


if __name__ == "__main__":
    main()
