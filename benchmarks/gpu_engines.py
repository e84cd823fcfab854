"""Pictures of the small models by engines that are there, whoever built them, and what faults do to them.

    python benchmarks/gpu_chain.py reference models/flux-tiny models/sd35-tiny --out out/reference
    python benchmarks/gpu_engines.py out/engines --reference out/reference --out docs/benchmarks/tensorrt.json

Each folder in `out/engines` is what `ditforge build` wrote, of whatever compiler and placement. A repository is made of
it and served, and its pictures are compared with those of fp32 on a CPU, as gpu_chain.py does it; then the first build
of each compiler whose engines are resident meets the faults. A table in Markdown is written beside the results.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from gpu_chain import Served, break_all, machine, measure_case, run
from gpu_memory import Gpu, has_gpu
from gpu_run import Results, Row
from gpu_table import number, outcome, table

from ditforge import manifest
from ditforge.contract import DIT
from ditforge.manifest import Manifest

# The columns of the table, and the keys of the results that they show.
COLUMNS = {
    "pictures": "pictures",
    "largest difference of 255": "largest",
    "of numbers differ by more than 1, %": "differ_by_more_than_1_percent",
    "worst PSNR, dB": "psnr_worst",
    "right by the judge, %": "score",
    "on the CPU": "cpu_fp32_score",
    "3 in one call and alone differ by": "together_and_alone_differ_by",
    "a picture, ms": "picture_ms",
    "`dit`, ms": "dit_ms",
    "ready, s": "ready_s",
    "engine processes": "engine_processes",
    "GPU memory, MiB": "gpu_mib",
    "after the pictures": "gpu_mib_afterwards",
}


def measure_all(folder: Path, reference: Path, work: Path, results: Results) -> dict[str, Path]:
    """Measure each build in `folder`. What is served and logged goes to `work`.

    Returns the folders of the repositories that may meet the faults, by the compiler.
    """
    builds = {path.name: manifest.read(path, "engines") for path in sorted(folder.iterdir()) if path.is_dir()}
    engines = [engine for build in builds.values() for engine in build.engines.values()]
    on_cpu = all(engine.target == "cpu" for engine in engines)
    compilers = sorted({f"{engine.compiler} {engine.compiler_version}" for engine in engines})
    results.note("machine", **machine("cpu" if on_cpu else "local"), compilers=", ".join(compilers))
    gpu = None if on_cpu else Gpu()
    whole: dict[str, Path] = {}
    for name, build in builds.items():
        served = Served(build.model.name, build.components[DIT].precision, work / name, resident(build))

        def measure(name: str = name, served: Served = served) -> None:
            run(served.folder / "repo.log", "repo", folder / name, "--out", served.repository)
            results.note(name, **measure_case(served, reference, gpu))

        results.attempted(name, measure)
        if served.resident and "score" in results.rows[name]:
            whole.setdefault(build.engines[DIT].compiler, served.folder)
    return whole


def resident(build: Manifest) -> bool:
    """Whether all engines of a build stay where they are."""
    return not any(engine.placement.on_demand for engine in build.engines.values())


def report(rows: dict[str, Row]) -> str:
    """The results as a page in Markdown."""
    about = rows.get("machine", {})
    driver = f", driver {about['driver']}" if "driver" in about else ""
    measured = {name: row for name, row in rows.items() if name != "machine" and ":" not in name}
    faults = {name: row for name, row in rows.items() if ":" in name}
    lines = [
        (name, *(number(row.get(key)) for key in COLUMNS.values()), outcome(row)) for name, row in measured.items()
    ]
    broken = [
        (name, "as it should be" if row.get("good") else "**not as it should be**", told(row))
        for name, row in faults.items()
    ]
    return "\n".join(
        [
            "# Pictures by engines that were there", "",
            f"Written by `benchmarks/gpu_engines.py` on {about.get('date')}: {about.get('gpu')}{driver}, "
            f"Python {about.get('python')}, {about.get('compilers')}.", "",
            "Pictures are of 128 x 128 pixels and 20 steps, of held-out captions. They are compared with those of fp32 "
            "engines on a CPU with the same seeds.", "",
            *table(("build", *COLUMNS, ""), lines),
            *table(("fault", "", "what was seen"), broken),
        ]
    )  # fmt: skip


def told(row: Row) -> str:
    """What was seen of a fault, in words."""
    seen = "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in row.items() if key not in ("good", "failed"))
    return (seen.replace("|", "/") or outcome(row))[:600]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", type=Path, help="a folder of folders of engines")
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("out/gpu-engines"))
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which nothing is begun")
    parser.add_argument("--faults", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    results = Results((args.out,), time.monotonic() + args.budget)
    page = args.out.with_suffix(".md")
    results.changed = lambda rows: page.write_text(report(rows))
    whole = measure_all(args.engines, args.reference, args.folder, results)
    for compiler, folder in whole.items() if args.faults else ():
        break_all(results, compiler, folder, Gpu() if has_gpu() else None)


if __name__ == "__main__":
    main()
