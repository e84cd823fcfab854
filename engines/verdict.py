"""The verdict of `ditforge verify`: whole, the same numbers as the reference, damaged, or different."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ditforge import local_gpu, manifest
from ditforge.engines.verify import Difference, check_comparable, compare
from ditforge.errors import UserError
from ditforge.manifest import Kind, Manifest
from ditforge.option import command, option

# The largest relative error of an output that a precision explains. fp8 has that of `make gpu-check`; the others stand
# to it as in docs/accuracy.md and in the tests, where models of random weights err by up to half of these.
LIMITS = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.05, "int8-weights": 0.05, "fp8-weights": 0.1, "fp8": 0.15}
LARGEST_LIMIT = max(LIMITS.values())


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    verdict: "whole" if only files were checked, as there were no other outputs to compare; "same" if the outputs also
        equal those of `against` within their limits; "damaged" if files are damaged, which `damaged` describes;
        "different" if an output exceeds its limit.
    reason: why, in words. fix: what to do about damaged files or different outputs.
    """

    folder: str
    kind: Kind
    model: str
    files: int
    damaged: tuple[str, ...]
    against: str | None
    differences: tuple[Difference, ...]
    verdict: Literal["whole", "same", "damaged", "different"]
    reason: str
    fix: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return self.verdict in ("whole", "same")


def verify(
    folder: Path, against: Path | None = None, progress: Callable[[str, int, int], None] | None = None
) -> Verification:
    """Check the files of the engines, export or repository in `folder`, and what it computes `against` an fp32 export.

    Raises UserError where the folders cannot be verified, and DitforgeError where a network cannot be executed.
    """
    found = read(folder, manifest.NEXT_COMMAND["engines"])
    reference = read_reference(folder, found, against) if against else None
    if against and reference:
        check_comparable(folder, found, against, reference)
        check_executable(folder, found, against)
    files = {name: file for component in found.components.values() for name, file in component.files.items()}
    again = f"{manifest.NEXT_COMMAND[found.kind]}   again"
    damaged = tuple(problem for name in files if (problem := damage(folder, name, files[name], again)))

    def verification(
        verdict: Literal["whole", "same", "damaged", "different"],
        reason: str,
        fix: str = "",
        differences: tuple[Difference, ...] = (),
    ) -> Verification:
        compared = str(against) if against else None
        known = str(folder), found.kind, found.model.name, len(files), damaged, compared
        return Verification(*known, differences, verdict, reason, fix)

    if damaged:
        return verification("damaged", f"{len(damaged)} of {len(files)} files are not as the manifest says", again)
    if against is None or reference is None:
        return verification("whole", f"{len(files)} files, all as the manifest says; nothing was executed")
    differences = tuple(compare(folder, against, progress))
    worst = max(differences, key=excess)
    limit = limit_of(worst)
    if excess(worst) > 1:
        reason = (
            f"{worst.component}'s {worst.output} has a relative error of {worst.relative:.3g}, and {worst.precision} "
            f"explains no more than {limit:g}"
        )
        other = "" if found.model.name == reference.model.name else f", {reference.model.name}"
        fix = f"compare with an fp32 export of the same checkpoint as {found.model.name}'s (now: {against}{other}); or "
        return verification("different", reason, fix + again, differences)
    if worst.same_graph:
        reason = (
            f"{len(files)} files, all as the manifest says; the networks are the reference's own graphs, which the "
        )
        return verification(
            "whole", reason + "same ONNX Runtime executes: there was nothing to compare", "", differences
        )
    numbers = f"the numbers are the same within {worst.relative:.3g} ({worst.component}'s {worst.output}; "
    reason = f"{len(files)} files are whole, and {numbers}{worst.precision} explains up to {limit:g})"
    return verification("same", reason, differences=differences)


def limit_of(difference: Difference) -> float:
    """The largest relative error that the precision of the output explains."""
    return LIMITS.get(difference.precision, LARGEST_LIMIT)


def excess(difference: Difference) -> float:
    """The relative error divided by its limit: above 1, it is too large. NaN counts as infinitely large."""
    if difference.same_graph:
        return -1.0
    return difference.relative / limit_of(difference) if math.isfinite(difference.relative) else math.inf


def damage(folder: Path, name: str, file: manifest.File, fix: str) -> str:
    """What is wrong with a file; empty if nothing is."""
    try:
        manifest.check_files(folder, {name: file}, fix, anew=True)
    except UserError as error:
        return error.problem
    return ""


def check_executable(folder: Path, found: Manifest, against: Path) -> None:
    """Raise UserError, with what can be done instead, if engines in `folder` are for another machine's GPU."""
    targets = {engine.target for engine in found.engines.values()}
    if why := local_gpu.why_not_here(targets):
        capabilities = " or ".join(sorted(targets - {local_gpu.CPU}))
        graphs = "ditforge verify ONNX_DIR --against {}   executes the graphs that they were built from"
        fix = command(graphs, against)
        raise UserError(
            f"the engines in {folder} cannot be executed: {why}", f"{fix}; or on a machine with {capabilities}"
        )


def read(folder: Path, command: str) -> Manifest:
    """The manifest of a folder that a stage wrote. Otherwise raises UserError with the `command` that writes one."""
    if not (folder / manifest.FILE_NAME).is_file():
        state = f"has no {manifest.FILE_NAME}: no stage of ditforge wrote it" if folder.is_dir() else "is not a folder"
        raise UserError(f"{folder} {state}", f"give what this wrote: {command}")
    return manifest.parse(folder / manifest.FILE_NAME)


def read_reference(folder: Path, found: Manifest, against: Path) -> Manifest:
    """The manifest of the export to compare with. Raises UserError if it is something else, or is not whole."""
    reference = read(against, f"{manifest.NEXT_COMMAND['onnx']} --precision fp32")
    if reference.kind != "onnx":
        problem = f"{option('against')} takes an fp32 export, and {against} holds {reference.kind}"
        if found.kind == "onnx":
            swapped = command("ditforge verify {} --against {}", against, folder)
            raise UserError(f"{problem}: the folders are swapped", swapped)
        fix = command("ditforge verify {} --against ONNX_DIR   with what ditforge export wrote", folder)
        raise UserError(problem, fix)
    if not manifest.is_whole(against, reference.components):
        problem = f"{against}, the reference, is damaged: a file is missing or truncated"
        raise UserError(problem, command("ditforge verify {}   says which", against))
    return reference
