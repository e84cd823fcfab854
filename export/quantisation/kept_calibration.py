"""Keep calibrations, so that the same checkpoint is not run on the same prompts twice."""

from __future__ import annotations

import logging
import shutil
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError

from ditforge import __version__, small_files
from ditforge.cache import default_cache
from ditforge.errors import UserError
from ditforge.export.checkpoint.source import CheckpointSource, fingerprint
from ditforge.export.quantisation.calibration import FORMAT, Calibration, Progress, calibrate

log = logging.getLogger(__name__)


def calibrate_once(
    source: CheckpointSource,
    out: Path,
    prompts: list[str],
    steps: int | None = None,
    progress: Progress | None = None,
) -> tuple[Calibration, bool]:
    """Calibrate as calibrate() does, or copy the result of an earlier run to `out`.

    Returns the calibration, and whether it is from an earlier run. All parts of `source` must be on this machine.
    Calibrations are kept in the cache folder (ditforge.cache); if that cannot be written, nothing is kept.
    """
    small_files.check_writable(out, "ranges.json")
    file = kept_file(source, prompts, steps)
    if found := read_kept(file):
        with small_files.written_whole(out) as temporary:
            shutil.copyfile(file, temporary)
        return found, True
    ranges = calibrate(source, out, prompts, steps, progress)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with small_files.written_whole(file) as temporary:
            shutil.copyfile(out, temporary)
    except (OSError, UserError) as error:
        log.info("the calibration is not kept: %s", error)
    return ranges, False


def kept_file(source: CheckpointSource, prompts: list[str], steps: int | None) -> Path:
    """Return the path of a kept calibration. Its name is a digest of everything that changes the calibration."""
    libraries = [version(name) for name in ("torch", "diffusers", "transformers")]
    paths = [str(path.resolve()) for path in (source.path, source.base) if path]
    made_of = (fingerprint(source), paths, [lora.name for lora, _ in source.loras], source.text_encoders)
    key = (FORMAT, __version__, libraries, made_of, prompts, steps)
    return default_cache() / "calibrations" / f"{sha256(repr(key).encode()).hexdigest()}.json"


def read_kept(file: Path) -> Calibration | None:
    """Read the calibration of an earlier run; None if there is none, or if it cannot be read."""
    try:
        return Calibration.model_validate_json(small_files.read_bytes(file))
    except (OSError, ValidationError):
        return None
