"""`ditforge verify`: tells whether the files of a folder are undamaged, and compares what its networks compute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditforge import terminal
from ditforge.reports import Json, show

if TYPE_CHECKING:
    from ditforge.engines.verdict import Verification
    from ditforge.engines.verify import Difference

HEADINGS = ("component", "precision", "output", "largest difference", "relative error", "cosine", "PSNR")
OWN_GRAPH = "the reference's own graph, again in ONNX Runtime"


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What build, export or repo wrote.")],
    against: Annotated[Path | None, typer.Option(metavar="ONNX_DIR", help="Compare with this fp32 export.")] = None,
    as_json: Json = False,
) -> None:
    """Check that a folder is undamaged, and what it computes. It holds engines, an export or a repository.

    The last line is the verdict. The exit code is 0 where all is well, 1 where files are damaged or numbers different,
    and 2 where the folders cannot be verified.

    Example: ditforge verify out/engines --against out/onnx
    """
    from ditforge.engines import verdict

    with terminal.progress("verify") as report:
        found = verdict.verify(folder, against, report)
    show(found, say, as_json)
    if not found.good:
        raise typer.Exit(1)


def say(found: Verification) -> None:
    """Print what was compared, what is wrong, and the verdict."""
    if found.differences:
        terminal.table(HEADINGS, map(row, found.differences))
    for problem in found.damaged:
        terminal.say(problem)
    if found.fix:
        terminal.say(f"fix:   {found.fix}")
    terminal.say(f"verdict: {found.verdict}: {found.reason}")


def row(difference: Difference) -> tuple[str, ...]:
    """The row of a table for a difference, in the columns of HEADINGS."""
    what = difference.component, difference.precision, difference.output
    if difference.same_graph:
        return *what, OWN_GRAPH, "", "", ""
    psnr = "equal" if difference.largest == 0 else f"{difference.psnr:.1f}"
    return *what, f"{difference.largest:.3g}", f"{difference.relative:.3g}", f"{difference.cosine:.7f}", psnr
