"""Exports of one checkpoint in several precisions, of which each writes only what another has not."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from ditforge import manifest
from ditforge.export.checkpoint.diffusers_folder import open_checkpoint
from ditforge.export.families import family_of
from ditforge.export.onnx_export import export_network
from ditforge.export.quantisation import calibration
from ditforge.export.quantisation.precision import EIGHT_BIT, parse_precision


def export_dits(
    checkpoint: Path, ranges: Path | None, base: str, out: Path, precisions: Sequence[str] = EIGHT_BIT
) -> None:
    """The DiT in `base` and, with `base` around them, in 8-bit precisions: each a folder `out`/PRECISION."""
    opened = open_checkpoint(checkpoint)
    family = family_of(opened)
    for name in (base, *precisions):
        precision = parse_precision(name, base)
        network = next(n for n in family.networks(opened, precision) if n.name == "dit")
        read = calibration.read_ranges(ranges if name == "fp8" else None, opened, precision)
        (out / name).mkdir()
        component = export_network(network, opened, out / name, precision.scheme, read)
        whole = manifest.Manifest(kind="onnx", model=family.model(opened), components={"dit": component})
        manifest.write(whole, out / name)


def export_around(checkpoint: Path, fp32: Path, dit: Path, base: str, out: Path, without: Collection[str] = ()) -> None:
    """An export in `base`, with the DiT of the folder `dit`, and what is in fp32 anyway from the export `fp32`.

    It has all networks but those `without` which it is made.
    """
    opened = open_checkpoint(checkpoint)
    networks = family_of(opened).networks
    whole = manifest.read(fp32, "onnx")
    components = {name: component for name, component in whole.components.items() if name not in without}
    for file in (file for component in components.values() for file in component.files):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fp32 / file, out / file)
    same = {n.name: (n.dtype, n.inputs, n.outputs) for n in networks(opened, parse_precision("fp32"))}
    for network in networks(opened, parse_precision(base)):
        if (
            network.name in components
            and network.name != "dit"
            and (network.dtype, network.inputs, network.outputs) != same[network.name]
        ):
            components[network.name] = export_network(network, opened, out)
    manifest.write(whole.model_copy(update={"components": components, "source": {}}), out)
    replace_dit(dit, out)


def replace_dit(dit: Path, export: Path) -> None:
    """Put the DiT of the folder `dit` into the folder `export`."""
    whole, component = manifest.read(export, "onnx"), manifest.read(dit, "onnx").components["dit"]
    for name in component.files:
        shutil.copyfile(dit / name, export / name)
    manifest.write(whole.model_copy(update={"components": {**whole.components, "dit": component}}), export)


def alone(export: Path, out: Path, *networks: str) -> Path:
    """A copy of an export, in which these are the only networks, by default the DiT."""
    found = manifest.read(export, "onnx")
    components = {name: found.components[name] for name in ("tokenizer", *(networks or ("dit",)))}
    for file in (file for component in components.values() for file in component.files):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(export / file, out / file)
    manifest.write(found.model_copy(update={"components": components}), out)
    return out
