"""`ditforge verify`: are a folder's files undamaged, and what does it compute?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditforge import terminal


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What build or export wrote.")],
    against: Annotated[Path | None, typer.Option(metavar="ONNX_DIR", help="Compare with this fp32 export.")] = None,
) -> None:
    """Check that engines or an export are undamaged, and what they compute.

    Example: ditforge verify out/engines --against out/onnx
    """
    from ditforge.engines.verify import HEADINGS, compare, verify_files

    count = verify_files(folder)
    terminal.say(f"{folder}: {count} files, all as the manifest says")
    if against is not None:
        with terminal.progress("verify") as report:
            rows = compare(folder, against, report)
        terminal.table(HEADINGS, [row.row() for row in rows])
