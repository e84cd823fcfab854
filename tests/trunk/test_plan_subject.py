"""What `plan` plans for: a published model is measured beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ditforge.export.checkpoint.source import CheckpointSource, opened
from ditforge.export.families import family_of, published_models
from ditforge.plan_subject import SHIPPED, Wanted, configurations, measured, read_kept, read_shipped, read_subject


@pytest.mark.parametrize("name", sorted(published_models()))
def test_a_published_model_comes_with_what_a_client_must_know(name: str) -> None:
    with opened(CheckpointSource(Path(name), random_weights=True)) as checkpoint:
        made = family_of(checkpoint).model(checkpoint)
    shipped = read_kept(published_models()[name] / SHIPPED)
    assert shipped and shipped.model == made, "run scripts/measure_published.py"


@pytest.mark.parametrize("name", ["flux.1-dev", "sd3.5-medium"])
def test_it_comes_with_what_would_be_measured(name: str) -> None:
    wanted = Wanted(CheckpointSource(Path(name), random_weights=True))
    with opened(wanted.source) as checkpoint:
        made = measured(checkpoint, wanted)
    here = replace(wanted, source=configurations(wanted.source))
    assert read_shipped(here) == made, "run scripts/measure_published.py"


def test_only_what_was_measured_beforehand_is_taken(flux_tiny: Path) -> None:
    source = CheckpointSource(Path("flux.1-dev"), random_weights=True)
    published = configurations(source)
    assert read_shipped(Wanted(published))
    assert configurations(CheckpointSource(Path("black-forest-labs/FLUX.1-dev"))) == published
    assert configurations(CheckpointSource(flux_tiny)) == CheckpointSource(flux_tiny)
    assert read_shipped(Wanted(published, precision="fp32")) is None
    for changes in ({"text_encoders": "clip"}, {"text_length": 100}, {"variant": ("dev",)}):
        assert read_shipped(Wanted(replace(published, **changes))) is None
    assert read_shipped(Wanted(CheckpointSource(flux_tiny, random_weights=True))) is None
    assert read_shipped(Wanted(CheckpointSource(flux_tiny))) is None
    assert read_subject(Wanted(source, precision="fp8")).model.name == "flux.1-dev"
