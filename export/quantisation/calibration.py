"""Activation ranges for fp8: run a checkpoint's own pipeline over prompts, and record each linear's largest input.

The result is a small JSON file that can be shared. It says what it was made from. The same inputs give the same ranges,
except for rounding errors, because the order of sums depends on the CPU.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ditforge import small_files
from ditforge.errors import DitforgeWarning, UserError
from ditforge.export.checkpoint.consistency import check_checkpoint
from ditforge.export.checkpoint.diffusers_folder import Checkpoint
from ditforge.export.checkpoint.source import CheckpointSource, open_files
from ditforge.export.families import family_of, read_networks
from ditforge.export.quantisation.precision import FP32, Precision
from ditforge.export.quantisation.qdq import SCHEMES
from ditforge.model import MAX_STEPS
from ditforge.option import option, setting

FORMAT = 2
SEED = 0  # the seed of the first prompt; each further prompt has the next number

Progress = Callable[[str, int, int], None]


class Calibration(BaseModel):
    """Activation ranges, and what they were made from.

    amax: the largest absolute input of each linear over all prompts and steps, by the name of its weight.
    model, loras: the name of the model that was run, and its LoRAs as FILE:STRENGTH.
    config_sha256: the digest of the DiT's configuration. The ranges can be used for any model with this configuration.
    prompts_sha256, prompts: the digest of the prompts, and their number.
    steps, seed, guidance, height, width: how the pictures were made; `seed` is that of the first one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    model: str
    loras: tuple[str, ...] = ()
    config_sha256: str
    prompts_sha256: str
    prompts: int
    steps: int
    seed: int
    guidance: float
    height: int
    width: int
    amax: dict[str, float]


def config_digest(checkpoint: Checkpoint) -> str:
    """Return a digest of the DiT's configuration, which tells whether a calibration fits a model.

    It is the same whether the checkpoint is a single file or a folder.
    """
    config = family_of(checkpoint).read_config(checkpoint)
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return sha256(json.dumps(public, sort_keys=True).encode()).hexdigest()


def read_ranges(path: Path | None, checkpoint: Checkpoint, precision: Precision) -> Calibration | None:
    """Read the calibration in the file `path`. Returns None if `path` is None.

    Raises UserError if the precision needs a calibration and has none, or has one and takes none, or if the file is
    damaged or was made for a DiT of another configuration. Warns if it was made with other weights of the same
    configuration, for example with other LoRAs.
    """
    if path is None:
        if precision.scheme and SCHEMES[precision.scheme].activations:
            raise UserError(f"{precision.name} needs the activations' ranges, and no calibration was given", how())
        return None
    if precision.scheme is None:
        raise UserError(
            f"{precision.name} takes no calibration",
            f"leave out {option('calibration')}, or {setting('precision', 'fp8')}",
        )
    try:
        ranges = Calibration.model_validate_json(small_files.read_bytes(path))
    except OSError as error:
        raise UserError(f"cannot read the calibration {path}: {error.strerror}", how()) from error
    except ValidationError as error:
        raise UserError(f"{path} is no calibration: {error.errors()[0]['msg']}", how()) from error
    if ranges.format != FORMAT:
        raise UserError(f"{path} has format {ranges.format}, this version reads format {FORMAT}", how())
    if ranges.config_sha256 != config_digest(checkpoint):
        raise UserError(f"{path} was made for {ranges.model}, a DiT of another configuration", how())
    made, wanted = called(ranges.model, ranges.loras), called(checkpoint.name, checkpoint.loras)
    if made != wanted:
        remark = f"{path} was made for {made}, and this is {wanted}: if pictures get worse, calibrate this one"
        warnings.warn(remark, DitforgeWarning, stacklevel=2)
    return ranges


def how() -> str:
    """Return the fix in errors about calibrations: how to calibrate, and a precision that needs no calibration."""
    file, weights_only = setting("calibration", "FILE"), setting("precision", "fp8-weights")
    return f"ditforge calibrate CHECKPOINT --out FILE   writes one, for {file}; or {weights_only}"


def called(model: str, loras: Sequence[str]) -> str:
    """Return the model's name with its LoRAs, as text."""
    return f"{model} with {' and '.join(loras)}" if loras else model


def read_prompts(path: Path | None) -> list[str]:
    """Read the prompts in the file `path`, one per line; without a path, the 128 prompts that ship with ditforge.

    Empty lines are ignored, and so are comments, which begin with #.
    Raises UserError if the file cannot be read, is not UTF-8, or has no prompts.
    """
    if path is None:
        return files("ditforge.export.quantisation").joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()
    lines = small_files.read_lines(path, "prompts", f"{setting('prompts', 'FILE')}, one prompt a line")
    return [line.strip() for _, line in lines]


def check_steps(steps: int | None) -> None:
    """Raise UserError unless the sampler can take so many steps; None stands for the model's default."""
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise UserError(f"steps must be from 1 to {MAX_STEPS}, got {steps}", f"{setting('steps', 28)}, or leave it out")


def calibrate(
    source: CheckpointSource,
    out: Path,
    prompts: list[str],
    steps: int | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Run the checkpoint on `prompts` with all steps at its default size, and write the ranges to the file `out`.

    `steps` None means the model's default. `progress` is called with (prompt, prompts done, prompts in all). Raises
    UserError, before anything is run, if the checkpoint cannot be used or `out` cannot be written.
    """
    import torch

    if source.random_weights:
        raise UserError("the activations of random weights tell nothing", f"leave out {option('random_weights')}")
    check_steps(steps)
    small_files.check_writable(out, "ranges.json")
    checkpoint = open_files(source)
    model, _, networks = read_networks(checkpoint, FP32)
    check_checkpoint(checkpoint, networks, lambda network: checkpoint.weights(network.weights))
    checkpoint.report.conclude()
    family = family_of(checkpoint)
    report = progress or (lambda doing, done, total: None)
    steps = steps or model.default_steps
    pipeline = family.load_pipeline(checkpoint)
    amax: dict[str, float] = {}
    with torch.no_grad(), largest_inputs(pipeline.transformer, family.linears, amax):
        for done, prompt in enumerate(prompts):
            report(prompt[:30], done, len(prompts))
            family.run_pipeline(pipeline, model, prompt, steps, SEED + done)
    report("done", len(prompts), len(prompts))
    ranges = Calibration(
        model=model.name,
        loras=checkpoint.loras,
        config_sha256=config_digest(checkpoint),
        prompts_sha256=sha256("\n".join(prompts).encode()).hexdigest(),
        prompts=len(prompts),
        steps=steps,
        seed=SEED,
        guidance=model.default_guidance,
        height=model.default_size,
        width=model.default_size,
        amax=dict(sorted(amax.items())),
    )
    with small_files.written_whole(out) as temporary:
        temporary.write_text(ranges.model_dump_json(indent=1) + "\n")
    return ranges


def find_linears(module: Any, names: re.Pattern[str]) -> dict[str, Any]:
    """Return the linear layers of `module` whose weights' names match the pattern, by these names."""
    import torch

    layers = {f"{name}.weight": layer for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
    return {name: layer for name, layer in layers.items() if names.fullmatch(name)}


@contextmanager
def largest_inputs(module: Any, linears: re.Pattern[str], amax: dict[str, float]) -> Iterator[None]:
    """Within this context, record in `amax` the largest absolute input of each linear of `module` that matches."""
    import torch

    def note(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            amax[name] = max(amax.get(name, 0.0), inputs[0].abs().amax().item())

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in find_linears(module, linears).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
