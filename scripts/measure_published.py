"""Measures what the networks of the published models take of memory, and writes it beside their configurations.

    python scripts/measure_published.py

`ditforge plan` reads it there, and so measures nothing for a published model. Run this again after a change of a
family, of the configurations, or of export/graph/measure_footprint.py, which tests/trunk/test_plan_subject.py tells. It
takes about a minute.
"""

from __future__ import annotations

from pathlib import Path

from ditforge.export.checkpoint.source import CheckpointSource, opened
from ditforge.export.families import published_models
from ditforge.plan_subject import SHIPPED, Wanted, measured


def main() -> None:
    """Write the file of each model into this checkout's export/configs."""
    for name, folder in published_models().items():
        source = CheckpointSource(Path(name), random_weights=True)
        with opened(source) as checkpoint:
            found = measured(checkpoint, Wanted(source))
        file = folder / SHIPPED
        file.write_text(found.model_dump_json(indent=1) + "\n")
        print(f"{file}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
