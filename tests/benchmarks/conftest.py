"""Makes the scripts of benchmarks/, which is not an installed package, importable by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
