"""What models take of a GPU's memory: reckoned beside what TensorRT-RTX wants, and the plans that follow.

    python benchmarks/memory.py --out docs/memory.md
    python benchmarks/memory.py --plans --out docs/memory.md    # the table of plans alone, which takes seconds

Needs no GPU: TensorRT-RTX says what its engines take when it compiles them. Networks have their real width, the DiT and
T5 a few of their blocks, and random weights. What stands before the heading "Measured" is kept as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

from ditforge.commands.plan import step, strategy
from ditforge.engines.compilers import find_compiler
from ditforge.engines.gpus import find_target
from ditforge.export.checkpoint.diffusers_folder import CONFIGS, Checkpoint
from ditforge.export.checkpoint.random_weights import random_checkpoint
from ditforge.export.checkpoint.source import CheckpointSource
from ditforge.export.families import read_networks
from ditforge.export.graph.measure_footprint import measure
from ditforge.export.onnx_export import export_network
from ditforge.export.quantisation.precision import parse_precision
from ditforge.plan_report import Fit, fit_of
from ditforge.plan_subject import Wanted, read_subject

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from compiled_sizes import compiled_sizes, sample_shapes

MODEL = "flux.1-dev"
HEADING = "## Measured"
PLANS = f"## {MODEL} on some cards"
COMPARED = (
    ("dit", "fp8-weights", "SM89"),
    ("dit", "int8-weights", "SM86"),
    ("dit", "bf16", "SM86"),
    ("t5", "bf16", "SM86"),
    ("vae_decoder", "bf16", "SM89"),
    ("vae_encoder", "bf16", "SM89"),
)
COMPILERS = "tensorrt-rtx", "tensorrt"  # a card is planned for the first one that has it
SIDES = (512, 1024, 2048)
CARDS = ("rtx2060", "rtx4060", "rtx3060", "rtx4070tisuper", "rtx4000ada", "rtx4090", "rtx5090", "l40s", "h100")
BLOCKS = {"transformer": {"num_layers": 2, "num_single_layers": 2}, "text_encoder_2": {"num_layers": 3}}


def cut_down(folder: Path) -> Path:
    """The model's configurations with a few of its blocks, in `folder`."""
    target = folder / MODEL
    shutil.copytree(CONFIGS / MODEL, target)
    for component, changed in BLOCKS.items():
        path = target / component / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return target


def compare(checkpoint: Checkpoint, name: str, precision: str, capability: str) -> Iterator[list[str]]:
    """For each size the weights and activations in MB, as reckoned and as compiled, and the ratio of the latter two."""
    asked = parse_precision(precision)
    model, _, networks = read_networks(checkpoint, asked)
    network = next(network for network in networks if network.name == name)
    scheme = asked.scheme if name == "dit" else None
    footprint = measure(network, model).footprint(scheme)
    with tempfile.TemporaryDirectory() as folder:
        export_network(network, checkpoint, Path(folder), scheme)
        for side in SIDES[:1] if name == "t5" else SIDES:
            shapes = sample_shapes(network, side, model)
            weights, activations = compiled_sizes(Path(folder) / f"{name}.onnx", shapes, capability)
            reckoned = footprint.activations_at(side)
            sizes = [f"{size / 1e6:.0f}" for size in (footprint.weights, weights, reckoned, activations)]
            yield [name, precision, capability.lower(), str(side), *sizes, f"{activations / reckoned:.2f}"]


def plans() -> Iterator[list[str]]:
    """A row for each card: its precision, and for each size the peak in GiB and the strategy."""
    subject = read_subject(Wanted(CheckpointSource(Path(MODEL), random_weights=True)))
    compilers = [find_compiler(name) for name in COMPILERS]
    for card in CARDS:
        target = find_target(card)
        traits = next(one.traits for one in compilers if all(c in one.executes for c in target.capabilities))
        precision, parts = subject.parts(target, None)
        made = [fit_of(target, subject.model, parts, precision, side, traits) for side in (512, 1024, 1536, 2048)]
        yield [card, f"{target.memory_gb} GiB", precision, *map(cell, made)]


def cell(fit: Fit) -> str:
    """The plan for a size in a few characters: the peak in GiB, the strategy, the tile, and the seconds of a step."""
    tiled = f", tile {fit.vae_tile}" if fit.vae_tile else ""
    return f"{fit.peak / 2**30:.1f} {strategy(fit)}{tiled}, {step(fit.estimate)}"


def markdown(headings: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """A table."""
    return [f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *rows)]


def main() -> None:
    """Write the tables below the headings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plans", action="store_true", help="make the table of plans alone anew")
    options = parser.parse_args()
    kept = options.out.read_text()
    before = kept.partition(PLANS)[0] if options.plans else "\n".join([kept.partition(HEADING)[0] + made(), "", ""])
    options.out.write_text(before + planned())


def made() -> str:
    """The table of what engines take: compile and reckon."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary, random_checkpoint(cut_down(Path(temporary))) as opened:
        for name, precision, capability in COMPARED:
            for row in compare(opened, name, precision, capability):
                print(*row, flush=True)
                rows.append(row)
    compiler = f"TensorRT-RTX {version('tensorrt-rtx-cu13')}"
    headings = (
        "network",
        "precision",
        "for",
        "pixels",
        "weights, MB",
        "compiled",
        "activations, MB",
        "compiled",
        "ratio",
    )
    text = [
        f"{HEADING}, on {date.today().isoformat()}",
        "",
        "`python benchmarks/memory.py --out docs/memory.md` measured this on a CPU, for one picture. The networks are",
        f"those of {MODEL} in real width, with random weights. The DiT has 2 + 2 of its 19 + 38 blocks and T5 has 3 of",
        f'its 24; the blocks are all alike. "compiled" is what {compiler} says its engine takes.',
        "",
        *markdown(headings, rows),
    ]
    return "\n".join(text)


def planned() -> str:
    """The table of plans for cards."""
    text = [
        PLANS,
        "",
        "Each cell has the peak in GiB and the plan, for pictures of up to that many pixels on each side. Engines are",
        f"those of `{COMPILERS[0]}`, and of `{COMPILERS[1]}` for cards that it alone has.",
        f"`ditforge plan {MODEL} --gpu GPU --compiler NAME` makes plans for engines of others.",
        '"offload N of M": the DiT is in M segments, of which N are loaded and freed, or stream, in each step.',
        '"t5 offload N" means that T5 is in N segments, all of which are loaded and freed for each prompt, and that',
        "the DiT stays. The seconds are those of a step, estimated as `ditforge plan` does.",
        "",
        *markdown(("card", "memory", "precision", "512", "1024", "1536", "2048"), list(plans())),
        "",
    ]
    return "\n".join(text)


if __name__ == "__main__":
    main()
