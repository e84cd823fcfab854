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

HEADINGS = ("component", "precision", "output", "largest", "relative", "cosine", "PSNR")


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
    own = dict.fromkeys(one.component for one in found.differences if one.same_graph)
    if compared := [one for one in found.differences if not one.same_graph]:
        terminal.say("differences from the reference:")
        terminal.table(HEADINGS, map(row, compared))
    if own:
        terminal.say(f"not compared, since these are the reference's own graphs: {', '.join(own)}")
    for problem in found.damaged:
        terminal.say(problem)
    if found.fix:
        terminal.say(f"fix:   {found.fix}")
    terminal.say(f"verdict: {found.verdict}: {found.reason}")


def row(difference: Difference) -> tuple[str, ...]:
    """The row of a table for a difference, in the columns of HEADINGS."""
    what = difference.component, difference.precision, difference.output
    psnr = "equal" if difference.largest == 0 else f"{difference.psnr:.1f}"
    return *what, f"{difference.largest:.3g}", f"{difference.relative:.3g}", f"{difference.cosine:.7f}", psnr
