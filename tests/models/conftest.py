"""Makes the modules of models/, which is not an installed package, importable by name."""

import sys
from pathlib import Path

import pytest

MODELS = Path(__file__).parents[2] / "models"
sys.path.insert(0, str(MODELS))


@pytest.fixture(scope="session")
def models_folder() -> Path:
    """The folder models/ of this checkout."""
    return MODELS
