"""`ditforge export`: write a checkpoint's networks, one by one, into a folder of ONNX graphs with a manifest."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
import torch

from ditforge import __version__, manifest, regions, small_files, stage_folder
from ditforge.contract import TOKENIZER
from ditforge.errors import DitforgeError, DitforgeWarning, UserError
from ditforge.export.checkpoint import consistency, random_weights
from ditforge.export.checkpoint.diffusers_folder import Checkpoint
from ditforge.export.checkpoint.load_report import LoadReport
from ditforge.export.checkpoint.source import CheckpointSource, fingerprint, localised, opened
from ditforge.export.checkpoint.weights import Weights
from ditforge.export.disk_space import check_space, size_of
from ditforge.export.families import family_of, read_networks
from ditforge.export.graph import writing
from ditforge.export.graph.measure_footprint import measure
from ditforge.export.graph.resuming import Unfinished
from ditforge.export.graph.tracing import Traced, trace
from ditforge.export.network import Network, Port
from ditforge.export.quantisation.calibration import Calibration, find_linears, read_prompts, read_ranges
from ditforge.export.quantisation.precision import Precision, dtype_name, parse_precision, with_t5
from ditforge.export.quantisation.qdq import (
    SCHEMES,
    Scheme,
    activation_scale,
    calibrated,
    quantise_linears,
    quantised_name,
    scale_name,
)
from ditforge.export.quantisation.sensitivity import (
    SAMPLES,
    Call,
    Choice,
    check_max_error,
    choose_linears,
    recorded_calls,
)
from ditforge.export.text_encoders.tokenizers import Tokenizer
from ditforge.manifest import ASKED, BY_DEFAULT, PRECISION_CHOICE, Component, Manifest, Tensor
from ditforge.option import option, setting

TRITON_DTYPES = {
    torch.float32: "FP32",
    torch.float16: "FP16",
    torch.int32: "INT32",
    torch.uint8: "UINT8",
}

T5 = "t5"  # the name of T5's network
MEASURED_PROMPTS = 4  # how many of the prompts that ship with ditforge are used to measure each linear's 8-bit error

Progress = Callable[[str, int, int], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    manifest: the manifest of the folder.
    fresh: True if the folder held this export already, so that no network was exported.
    choice: which linears were not quantised to 8 bits and why; None where that was not measured.
    report: what was read of the checkpoint, and what was not.
    """

    manifest: Manifest
    fresh: bool
    choice: Choice | None = None
    report: LoadReport = field(default_factory=LoadReport)


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is exported.

    precision: fp32, fp16 or bf16; for the DiT's linears also fp8, fp8-weights or int8-weights. None means fp32 by
        default; no engine for a GPU is built from an export whose precision was not asked for.
    activations: the precision of everything but the 8-bit weights: bf16 (also None), fp16 or fp32.
    calibration: a file that `ditforge calibrate` wrote for this checkpoint; fp8 needs one.
    max_error: the largest relative error of the velocity that is allowed. Linears are left unquantised, those with the
        largest 8-bit errors first, until the velocity's error is no larger.
    force: whether to replace the export of another model in the folder.
    """

    precision: str | None = None
    activations: str | None = None
    calibration: Path | None = None
    max_error: float | None = None
    force: bool = False

    def asked(self, source: CheckpointSource) -> Precision:
        """Return the precision that these options and `source` ask for.

        Raises UserError for an unknown name, and for options that the precision leaves without an effect.
        """
        name = "fp32" if self.precision is None else self.precision
        precision = parse_precision(name, "bf16" if self.activations is None else self.activations)
        if precision.scheme is None and (self.activations, self.max_error) != (None, None):
            ignored = option("max_error" if self.activations is None else "activations")
            problem = f"{name} has no 8-bit weights, which {ignored} is for"
            raise UserError(problem, f"leave out {ignored}, or {setting('precision', 'fp8-weights')}")
        check_max_error(self.max_error)
        return with_t5(precision, source.t5_precision)


def export_checkpoint(
    source: CheckpointSource,
    out: Path,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
    measuring: Progress | None = None,
) -> Exported:
    """Export a checkpoint to ONNX in the folder `out`.

    If `out` already holds the same export of the same files, no network is exported again.

    `progress` is called often with (network, bytes of weights written, bytes in all), where the network reads as in
    "dit (4 of 5)". It also reports downloads. `measuring` reports the search for the linears that stay unquantised.

    An interrupted export leaves `out` as it was. Its large finished components stay in the folder `.NAME.unfinished`
    beside `out`, and the next run of the same export uses them.

    Raises UserError, before anything is written, for a checkpoint that is incomplete or of no known family, and if the
    disk has too little space.
    """
    options = options or ExportOptions()
    options.asked(source)
    if source.random_weights and options.max_error is not None:
        raise UserError(
            "the errors of random weights tell nothing",
            f"leave out {option('max_error')}, or {option('random_weights')}",
        )
    if not source.random_weights:
        # A branch of a Hub repository can move, so it is resolved to files only once: the files that are opened are
        # then of the same commit as the digest in the manifest.
        source = localised(source, progress=progress)
    with opened(source) as checkpoint:
        return export_opened(checkpoint, source, out, options, progress, measuring)


def export_opened(
    checkpoint: Checkpoint,
    origin: CheckpointSource,
    out: Path,
    options: ExportOptions,
    progress: Progress | None,
    measuring: Progress | None,
) -> Exported:
    """Export a checkpoint that is already open; `origin` is what it was opened from. See export_checkpoint."""
    precision, calibration = options.asked(origin), options.calibration
    ranges = read_ranges(calibration, checkpoint, precision)
    source = {
        "precision": precision.name,
        "base": precision.base,
        "calibration": manifest.describe(calibration).sha256 if calibration else "none",
        "max_error": str(options.max_error),
        "text_encoders": origin.text_encoders,
        "t5_precision": precision.t5.name if precision.t5 else "as the rest",
        "exporter": f"torch {torch.__version__}",
        "checkpoint": random_weights.fingerprint(checkpoint) if origin.random_weights else fingerprint(origin),
    }
    if origin.variant:
        source["variant"] = ", ".join(sorted(origin.variant))
    if origin.text_length is not None:
        source["text_length"] = str(origin.text_length)
    if checkpoint.repositories:
        source["repositories"] = checkpoint.repositories
    before = manifest.earlier(out, "onnx")
    if before and (before.source, before.ditforge) != (source, __version__):
        before = None
    fresh = before is not None and manifest.is_whole(out, before.components)
    if before and fresh and not origin.strict:
        return Exported(wished(before, out, options), fresh=True, report=checkpoint.report)
    model, tokenizers, networks = read_networks(checkpoint, precision)
    if precision.t5 and T5 not in (network.name for network in networks):
        raise UserError(f"{model.name} is exported without T5", f"leave out {option('t5_precision')}")
    # All of them are checked before the first one is written.
    shapes = consistency.check_checkpoint(checkpoint, networks, lambda network: weights_of(network, checkpoint))
    sizes = {n.name: size_of(n, shapes[n.name], scheme_of(n, precision)) for n in networks}
    checkpoint.report.conclude()
    for line in checkpoint.report.lines():
        log.info("%s", line)
    if before and fresh:
        return Exported(wished(before, out, options), fresh=True, report=checkpoint.report)
    made_from = origin_of(checkpoint, source, options)
    stage_folder.check_replaceable(out, "onnx", (), "" if options.force else stage_folder.called(model.name, made_from))
    unfinished = Unfinished.beside(out, {**source, "ditforge": __version__})
    unfinished.drop_others()
    check_space(out, sum(size for name, size in sizes.items() if name not in unfinished.kept()))
    report = progress or (lambda component, done, total: None)
    choice = measure_linears(checkpoint, precision, ranges, options.max_error, measuring)
    done, total = 0, max(1, sum(sizes.values()))
    try:
        with stage_folder.written_whole(out, "onnx") as folder:
            components = {TOKENIZER: export_tokenizers(tokenizers, folder)}
            for number, network in enumerate(networks, 1):
                written = bytes_reported(report, f"{network.name} ({number} of {len(networks)})", done, total)
                written(0)
                component = unfinished.take(network.name, folder)
                log.info("%s: %s", network.name, "kept of an unfinished export" if component else "exported")
                if component is None:
                    keep = choice.keep if choice else ()
                    scheme = scheme_of(network, precision)
                    component = export_network(network, checkpoint, folder, scheme, ranges, keep, written)
                    footprint = measure(network, model).footprint(scheme)
                    component = component.model_copy(update={"footprint": footprint})
                    unfinished.keep(network.name, component, folder)
                components[network.name] = component
                done += sizes[network.name]
            report("done", total, total)
            result = Manifest(kind="onnx", model=model, components=components, source=source, origin=made_from)
            manifest.write(result, folder)
    except BaseException:
        if kept := unfinished.kept():
            remark = (
                f"{', '.join(kept)} of the unfinished export stay in {unfinished.folder}, for the same command again"
            )
            warnings.warn(remark, DitforgeWarning, stacklevel=1)
        raise
    unfinished.drop_all()
    return Exported(result, fresh=False, choice=choice, report=checkpoint.report)


def wished(before: Manifest, out: Path, options: ExportOptions) -> Manifest:
    """Return the manifest `before` of an export that is there already.

    If its precision was a default and the user asks for that precision now, the manifest is rewritten to say so.
    """
    if options.precision is None or before.origin.get(PRECISION_CHOICE) != BY_DEFAULT:
        return before
    result = before.model_copy(update={"origin": {**before.origin, PRECISION_CHOICE: ASKED}})
    with small_files.written_whole(out / manifest.FILE_NAME) as temporary:
        temporary.write_text(manifest.as_text(result))
    return result


def origin_of(checkpoint: Checkpoint, source: Mapping[str, str], options: ExportOptions) -> dict[str, str]:
    """Return the manifest's `origin`: what the export was made from, for people and for later stages."""
    weights = "random" if checkpoint.seed is not None else "the checkpoint's"
    loras = {"loras": ", ".join(checkpoint.loras)} if checkpoint.loras else {}
    told = {"precision", "calibration", "t5_precision", "exporter"}
    return {
        "checkpoint": checkpoint.name,
        "checkpoint_digest": source["checkpoint"],
        "weights": weights,
        **loras,
        **{key: value for key, value in source.items() if key in told},
        PRECISION_CHOICE: ASKED if options.precision else BY_DEFAULT,
    }


def bytes_reported(report: Progress, doing: str, before: int, total: int) -> Callable[[int], None]:
    """Return a function that takes how many bytes of one network are written, and reports the progress of all networks.

    `before` is the size in bytes of the networks that are finished, `total` that of all.
    """
    return lambda count: report(doing, min(before + count, total), total)


def scheme_of(network: Network, precision: Precision) -> str | None:
    """Return the 8-bit format that `precision` asks for in this network, or None. Only its `linears` get it."""
    if network.name == T5:
        return precision.t5.scheme if precision.t5 else None
    return precision.scheme


def weights_of(network: Network, checkpoint: Checkpoint) -> Weights:
    """Return the network's weights, from the checkpoint's files or random ones. None of them is read yet.

    Raises UserError if a file is missing or damaged.
    """
    if checkpoint.seed is not None:
        return random_weights.random_weights(network, checkpoint)
    return checkpoint.weights(network.weights)


def measure_linears(
    checkpoint: Checkpoint,
    precision: Precision,
    ranges: Calibration | None,
    max_error: float | None,
    progress: Progress | None,
) -> Choice | None:
    """Run the checkpoint on a few prompts and choose the linears that are not quantised.

    Returns None if no `max_error` is asked for.
    """
    if max_error is None or precision.scheme is None:
        return None
    report = progress or (lambda doing, done, total: None)
    family = family_of(checkpoint)
    model, pipeline = family.model(checkpoint), family.load_pipeline(checkpoint)
    calls: list[Call] = []
    for seed, prompt in enumerate(read_prompts(None)[:MEASURED_PROMPTS]):
        report(prompt[:30], seed, MEASURED_PROMPTS)
        seen: list[Call] = []
        with recorded_calls(pipeline.transformer, seen):
            family.run_pipeline(pipeline, model, prompt, model.default_steps, seed)
        calls += seen[:: max(1, len(seen) // SAMPLES)][:SAMPLES]
    linears = find_linears(pipeline.transformer, family.linears)
    scheme, amax = SCHEMES[precision.scheme], ranges.amax if ranges else {}
    return choose_linears(pipeline.transformer, linears, calls, scheme, amax, max_error, report)


def export_network(
    network: Network,
    checkpoint: Checkpoint,
    folder: Path,
    scheme: str | None = None,
    ranges: Calibration | None = None,
    keep: Collection[str] = (),
    progress: Callable[[int], None] | None = None,
) -> Component:
    """Trace one network, attach its weights, quantise its linears, and write it to `folder`/NAME.onnx.

    `scheme` is the 8-bit format (None: nothing is quantised), `ranges` has the activation ranges that fp8 needs, and
    `keep` names the linears that are not quantised. `progress` is called with the bytes written so far.
    """
    traced = trace(network)
    model = traced.model
    transposed = writing.store_transposed(model)
    writing.attach_weights(model, traced.aliases, transposed, weights_of(network, checkpoint), network)
    writing.assert_no_float64(model)
    base, layers = dtype_name(network.dtype), {}
    if scheme and network.linears:
        layers = quantise(model, network, scheme, ranges, keep)
    files = writing.save(model, folder / f"{network.name}.onnx", progress)
    quantised = {name: SCHEMES[scheme] for name in layers if layers[name] == scheme} if scheme else {}
    files.append(write_programs(folder, network, traced, transposed, quantised, ranges))
    count = list(layers.values()).count(scheme or "")
    return Component(
        files={file.name: manifest.describe(file) for file in files},
        precision=scheme if scheme and layers else base,
        dtype=base,
        reason=f"{count} of {len(layers)} linears are {scheme}, the rest {base}" if layers else network.reason,
        layers=layers,
        inputs={name: describe(port) for name, port in network.inputs.items()},
        outputs={name: describe(port) for name, port in network.outputs.items()},
    )


def write_programs(
    folder: Path,
    network: Network,
    traced: Traced,
    transposed: Collection[str],
    quantised: Mapping[str, Scheme],
    ranges: Calibration | None,
) -> Path:
    """Write the network's programs beside its graph, whose weights they share. Returns their file.

    `transposed` and `quantised` name the weights that are stored so for the graph.
    """
    weights = {}
    for name in traced.aliases:
        stored = regions.Stored(name=name, transposed=name in transposed)
        if scheme := quantised.get(name):
            amax = calibrated(ranges.amax, name) if scheme.activations and ranges else None
            stored = regions.Stored(
                name=quantised_name(name),
                transposed=name in transposed,
                scheme=scheme.name,
                scale=scale_name(name),
                activation_scale=None if amax is None else activation_scale(amax, scheme, network.dtype).item(),
            )
        weights[name] = stored
    path = folder / f"{network.name}{regions.SUFFIX}"
    found = regions.Regions(
        torch=torch.__version__, calls=traced.calls, outputs=tuple(network.outputs), weights=weights
    )
    regions.write(path, found, traced.programs)
    return path


def quantise(
    model: ir.Model, network: Network, scheme: str, ranges: Calibration | None, keep: Collection[str]
) -> dict[str, str]:
    """Quantise the network's linears except those in `keep`. Returns the precision of each, in the graph's order.

    Raises UserError if the calibration lacks a range, and DitforgeError if a linear is no matrix product in the graph.
    """
    linears = [name for name in model.graph.initializers if network.may_be_8_bit(name)]
    chosen = {name for name in linears if name not in keep}
    done = quantise_linears(model, chosen, SCHEMES[scheme], ranges.amax if ranges else {})
    if left := sorted(chosen - set(done)):
        problem = f"{network.name} has no matrix product of its own for {', '.join(left[:3])}, which are to be {scheme}"
        raise DitforgeError(problem, "a fault of the model's family: its `linears` names them")
    return {name: scheme if name in chosen else dtype_name(network.dtype) for name in linears}


def export_tokenizers(tokenizers: list[Tokenizer], folder: Path) -> Component:
    """Write every tokenizer to `folder`/tokenizer/NAME.json, and return the component that describes them."""
    (folder / "tokenizer").mkdir()
    paths = {tokenizer.name: folder / "tokenizer" / f"{tokenizer.name}.json" for tokenizer in tokenizers}
    for tokenizer in tokenizers:
        tokenizer.save(paths[tokenizer.name])
    outputs = {f"{t.name}_ids": Tensor(dtype="INT32", shape=("batch", t.max_tokens)) for t in tokenizers}
    return Component(
        files={f"tokenizer/{path.name}": manifest.describe(path) for path in paths.values()},
        precision="none",
        reason="text to token ids",
        inputs={"prompt": Tensor(dtype="BYTES", shape=("batch", 1))},
        outputs={**outputs, "prompt_tokens": Tensor(dtype="INT32", shape=("batch", len(tokenizers)))},
    )


def describe(port: Port) -> Tensor:
    """Return the port as the manifest describes it."""
    return Tensor(dtype=TRITON_DTYPES[port.dtype], shape=port.names())
