"""Activation ranges for fp8: a checkpoint's own pipeline is run over prompts, and the largest inputs are noted.

The file is small JSON that can be shared: it says what it was made from, and the same inputs give the same ranges,
but for the rounding of sums, whose order is the CPU's.
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
from ditforge.export.checkpoint.consistency import check_weights
from ditforge.export.checkpoint.diffusers_folder import Checkpoint
from ditforge.export.checkpoint.source import CheckpointSource, open_files
from ditforge.export.families import family_of, read_networks
from ditforge.export.quantisation.precision import FP32, Precision
from ditforge.export.quantisation.qdq import SCHEMES
from ditforge.model import MAX_STEPS
from ditforge.option import option, setting

FORMAT = 2
SEED = 0  # of the first prompt; the next ones count up

Progress = Callable[[str, int, int], None]


class Calibration(BaseModel):
    """amax: the largest absolute input of each linear, by its weight's name, over `prompts` prompts and all steps.

    `model` and `loras` (FILE:STRENGTH) tell what was run, `config_sha256` what the ranges fit: models of one
    configuration share them.
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
    """A digest of the DiT's configuration, by which a calibration knows its model: the same for a file and a folder."""
    config = family_of(checkpoint).read_config(checkpoint)
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return sha256(json.dumps(public, sort_keys=True).encode()).hexdigest()


def read_ranges(path: Path | None, checkpoint: Checkpoint, precision: Precision) -> Calibration | None:
    """The calibration in the file `path`. Raises UserError if fp8 lacks one, or if it is another model's or damaged.

    Warns if it was made with other weights of the same configuration: a fine-tune's, or other LoRAs.
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
    """How a checkpoint is calibrated, and what needs no calibration."""
    file, weights_only = setting("calibration", "FILE"), setting("precision", "fp8-weights")
    return f"ditforge calibrate CHECKPOINT --out FILE   writes one, for {file}; or {weights_only}"


def called(model: str, loras: Sequence[str]) -> str:
    """The model with its LoRAs, in words."""
    return f"{model} with {' and '.join(loras)}" if loras else model


def read_prompts(path: Path | None) -> list[str]:
    """The prompts in the file `path`, one a line; without one, the 128 that ship with ditforge. Raises UserError."""
    if path is None:
        text = files("ditforge.export.quantisation").joinpath("prompts.txt").read_text(encoding="utf-8")
    else:
        try:
            text = small_files.read_bytes(path).decode()
        except OSError as error:
            raise UserError(
                f"cannot read the prompts {path}: {error.strerror}", f"{setting('prompts', 'FILE')}, one prompt a line"
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 text: {error.reason}", f"{setting('prompts', 'FILE')}, one prompt a line"
            ) from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{path} has no prompts in it", f"{setting('prompts', 'FILE')}, one prompt a line")
    return prompts


def calibrate(
    source: CheckpointSource,
    out: Path,
    prompts: list[str],
    steps: int | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Run the checkpoint over `prompts` and all steps at its default size, and write the ranges to the file `out`.

    Raises UserError if the checkpoint cannot be used or `out` cannot be written, before anything is run.
    """
    import torch

    if source.random_weights:
        raise UserError("the activations of random weights tell nothing", f"leave out {option('random_weights')}")
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise UserError(f"steps must be from 1 to {MAX_STEPS}, got {steps}", f"{setting('steps', 28)}, or leave it out")
    small_files.check_writable(out, "ranges.json")
    checkpoint = open_files(source)
    model, _, networks = read_networks(checkpoint, FP32)
    for network in networks:
        check_weights(network, checkpoint.weights(network.weights))
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
    """The linear layers of `module` whose weights' names match, by those names."""
    import torch

    layers = {f"{name}.weight": layer for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
    return {name: layer for name, layer in layers.items() if names.fullmatch(name)}


@contextmanager
def largest_inputs(module: Any, linears: re.Pattern[str], amax: dict[str, float]) -> Iterator[None]:
    """While inside, `amax` keeps the largest absolute input of each linear of `module` that `linears` names."""
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
