"""`ditforge export`: a checkpoint's networks, one after the other, into a folder of ONNX graphs with a manifest."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import onnx_ir as ir
import torch

from ditforge import __version__, manifest
from ditforge.errors import DitforgeError, UserError
from ditforge.export import fit, graph
from ditforge.export.calibration import Calibration, find_linears, read_prompts, read_ranges
from ditforge.export.checkpoint import Checkpoint, open_checkpoint
from ditforge.export.families import family_of
from ditforge.export.network import Network, Port
from ditforge.export.precision import Precision, dtype_name
from ditforge.export.quantise import SCHEMES, quantise_linears
from ditforge.export.sensitivity import SAMPLES, Call, Choice, choose_linears, recorded_calls
from ditforge.export.tokenization import Tokenizer
from ditforge.export.trace import trace
from ditforge.manifest import Component, Manifest, Tensor
from ditforge.model import Model

TRITON_DTYPES = {
    torch.float32: "FP32",
    torch.float16: "FP16",
    torch.int32: "INT32",
    torch.uint8: "UINT8",
}

FP32 = Precision("fp32")
TEXT_ENCODERS = ("all", "clip")
T5 = "t5"  # the name of its network and of its tokenizer
MEASURED_PROMPTS = 4  # of those that ship with ditforge, to measure what each linear loses to 8 bits

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Exported:
    """What an export did: the manifest, and whether it was there already (`fresh`), so that nothing was written.

    `choice` tells which linears were kept from 8 bits and why, where that was measured.
    """

    manifest: Manifest
    fresh: bool
    choice: Choice | None = None


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    precision: Precision = FP32,
    calibration: Path | None = None,
    max_error: float | None = None,
    progress: Progress | None = None,
    text_encoders: str = "all",
) -> Exported:
    """Export the checkpoint in the folder `checkpoint` to ONNX in the folder `out`.

    `calibration` is a file that `ditforge calibrate` wrote for this checkpoint; fp8 needs one. With `max_error`, the
    linears with the largest 8-bit errors stay 16-bit until the velocity's relative error is no larger. `text_encoders`
    "clip" leaves T5 out. If `out` holds the same export of the same files, nothing is written. `progress` is called
    with (component, how many are done, how many there are) before each component and at the end.
    Raises UserError for a checkpoint that is incomplete or of no known family; then `out` is as it was before.
    """
    if text_encoders not in TEXT_ENCODERS:
        raise UserError(f"unknown text encoders {text_encoders!r}", f"--text-encoders {' or '.join(TEXT_ENCODERS)}")
    opened = open_checkpoint(checkpoint)
    ranges = read_ranges(calibration, opened, precision)
    source = {
        "precision": precision.name,
        "base": precision.base,
        "calibration": manifest.describe(calibration).sha256 if calibration else "none",
        "max_error": str(max_error),
        "text_encoders": text_encoders,
        "exporter": f"torch {torch.__version__}",
        "checkpoint": fingerprint(checkpoint),
    }
    before = manifest.earlier(out, "onnx")
    if (
        before
        and (before.source, before.ditforge) == (source, __version__)
        and manifest.is_whole(out, before.components)
    ):
        return Exported(before, fresh=True)
    family = family_of(opened)
    try:
        model, tokenizers, networks = (
            family.model(opened),
            family.read_tokenizers(opened),
            family.networks(opened, precision),
        )
    except DitforgeError:
        raise
    except Exception as error:  # the libraries' configuration classes raise many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        problem = f"a configuration in {checkpoint} cannot be used: {reason}"
        raise UserError(problem, "copy the checkpoint's folder again") from error
    if text_encoders == "clip":
        model, tokenizers, networks = without_t5(model, tokenizers, networks)
    for network in networks:  # all of them are looked at before the first one is written
        fit.check_weights(network, opened.weights(network.weights))
    fit.check_ports(networks)
    report = progress or (lambda component, done, total: None)
    choice = measure_linears(opened, precision, ranges, max_error, report)
    with manifest.written_whole(out, "onnx") as folder:
        components = {"tokenizer": export_tokenizers(tokenizers, folder)}
        for done, network in enumerate(networks):
            report(network.name, done, len(networks))
            components[network.name] = export_network(
                network, opened, folder, precision.scheme, ranges, choice.keep if choice else ()
            )
        report("done", len(networks), len(networks))
        result = Manifest(kind="onnx", model=model, components=components, source=source)
        manifest.write(result, folder)
    return Exported(result, fresh=False, choice=choice)


def without_t5(
    model: Model, tokenizers: list[Tokenizer], networks: list[Network]
) -> tuple[Model, list[Tokenizer], list[Network]]:
    """The same without T5, and without what needs it. Raises UserError for a model that cannot do without."""
    if model.t5 == "required":
        raise UserError(f"{model.name} cannot do without T5", "--text-encoders all")
    lost = {port for network in networks if network.name == T5 for port in network.outputs}
    left = {name: tokens for name, tokens in model.max_tokens.items() if name != T5}
    return (
        model.model_copy(update={"t5": "absent", "max_tokens": left}),
        [tokenizer for tokenizer in tokenizers if tokenizer.name != T5],
        [network for network in networks if network.name != T5 and not lost.intersection(network.inputs)],
    )


def measure_linears(
    checkpoint: Checkpoint,
    precision: Precision,
    ranges: Calibration | None,
    max_error: float | None,
    report: Progress,
) -> Choice | None:
    """Run the checkpoint on a few prompts and choose the linears to keep; None where no `max_error` is asked for."""
    if max_error is None:
        return None
    if precision.scheme is None:
        raise UserError(f"{precision.name} quantises nothing", "leave out --max-error, or --precision fp8-weights")
    family = family_of(checkpoint)
    model, pipeline = family.model(checkpoint), family.load_pipeline(checkpoint)
    calls: list[Call] = []
    for seed, prompt in enumerate(read_prompts(None)[:MEASURED_PROMPTS]):
        report(prompt[:30], seed, MEASURED_PROMPTS)
        seen: list[Call] = []
        with recorded_calls(pipeline.transformer, seen):
            family.run_pipeline(pipeline, model, prompt, model.default_steps, seed)
        calls += seen[:: max(1, len(seen) // SAMPLES)][:SAMPLES]
    linears = find_linears(pipeline.transformer, family.LINEARS)
    scheme, amax = SCHEMES[precision.scheme], ranges.amax if ranges else {}
    return choose_linears(pipeline.transformer, linears, calls, scheme, amax, max_error, report)


def fingerprint(checkpoint: Path) -> str:
    """A digest of the checkpoint's files by name, size and time of change, which tells whether it is still the same."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    listed = [(str(path.relative_to(checkpoint)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return sha256(repr(listed).encode()).hexdigest()


def export_network(
    network: Network,
    checkpoint: Checkpoint,
    folder: Path,
    scheme: str | None = None,
    ranges: Calibration | None = None,
    keep: Collection[str] = (),
) -> Component:
    """Trace one network, give it its weights, quantise what bears it but `keep`, and write it to `folder`/NAME.onnx."""
    model, aliases = trace(network)
    transposed = graph.store_transposed(model)
    graph.attach_weights(model, aliases, transposed, checkpoint.weights(network.weights), network)
    graph.simplify(model, network)
    graph.assert_no_float64(model)
    base, layers = dtype_name(network.dtype), {}
    if scheme and network.linears:
        layers = quantise(model, network, scheme, ranges, keep)
    files = graph.save(model, folder / f"{network.name}.onnx")
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


def quantise(
    model: ir.Model, network: Network, scheme: str, ranges: Calibration | None, keep: Collection[str]
) -> dict[str, str]:
    """Quantise the network's linears but `keep`; returns the precision of each, in the graph's order."""
    linears = [name for name in model.graph.initializers if network.may_be_8_bit(name)]
    chosen = {name for name in linears if name not in keep}
    done = quantise_linears(model, chosen, SCHEMES[scheme], ranges.amax if ranges else {})
    assert set(done) == chosen, f"not quantised: {sorted(chosen - set(done))[:3]}"
    return {name: scheme if name in chosen else dtype_name(network.dtype) for name in linears}


def export_tokenizers(tokenizers: list[Tokenizer], folder: Path) -> Component:
    """Write every tokenizer to `folder`/tokenizer/NAME.json."""
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
    """The port as the manifest writes it."""
    return Tensor(dtype=TRITON_DTYPES[port.dtype], shape=port.names())
