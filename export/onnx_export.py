"""`ditforge export`: a checkpoint's networks, one after the other, into a folder of ONNX graphs with a manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

from ditforge import __version__, manifest
from ditforge.errors import DitforgeError, UserError
from ditforge.export import fit, graph
from ditforge.export.checkpoint import Checkpoint, open_checkpoint
from ditforge.export.families import family_of
from ditforge.export.network import Network, Port
from ditforge.export.precision import PRECISIONS, precision_name
from ditforge.export.tokenization import Tokenizer
from ditforge.export.trace import trace
from ditforge.manifest import Component, Manifest, Tensor

TRITON_DTYPES = {
    torch.float32: "FP32",
    torch.float16: "FP16",
    torch.int32: "INT32",
    torch.uint8: "UINT8",
}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Exported:
    """What an export did: the manifest, and whether it was there already (`fresh`), so that nothing was written."""

    manifest: Manifest
    fresh: bool


def export_checkpoint(
    checkpoint: Path, out: Path, precision: str = "fp32", progress: Progress | None = None
) -> Exported:
    """Export the checkpoint in the folder `checkpoint` to ONNX in the folder `out`.

    If `out` holds the same export of the same files, nothing is written. `progress` is called with (component, how
    many are done, how many there are) before each component and at the end.
    Raises UserError for a checkpoint that is incomplete or of no known family; then `out` is as it was before.
    """
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}", f"use one of: {', '.join(PRECISIONS)}")
    opened = open_checkpoint(checkpoint)
    source = {"precision": precision, "exporter": f"torch {torch.__version__}", "checkpoint": fingerprint(checkpoint)}
    before = previous_export(out)
    if before and before.source == source and before.ditforge == __version__:
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
    for network in networks:  # all of them are looked at before the first one is written
        fit.check_weights(network, opened.weights(network.weights))
    fit.check_ports(networks)
    report = progress or (lambda component, done, total: None)
    with manifest.written_whole(out, "onnx") as folder:
        components = {"tokenizer": export_tokenizers(tokenizers, folder)}
        for done, network in enumerate(networks):
            report(network.name, done, len(networks))
            components[network.name] = export_network(network, opened, folder)
        report("done", len(networks), len(networks))
        result = Manifest(kind="onnx", model=model, components=components, source=source)
        manifest.write(result, folder)
    return Exported(result, fresh=False)


def fingerprint(checkpoint: Path) -> str:
    """A digest of the checkpoint's files by name, size and time of change, which tells whether it is still the same."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    listed = [(str(path.relative_to(checkpoint)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return sha256(repr(listed).encode()).hexdigest()


def previous_export(out: Path) -> Manifest | None:
    """The manifest of an earlier, whole export in `out`, if there is one that this version reads."""
    try:
        before = manifest.read(out, "onnx")
    except UserError:
        return None
    return before if manifest.is_whole(out, before.components) else None


def export_network(network: Network, checkpoint: Checkpoint, folder: Path) -> Component:
    """Trace one network, give it its weights and write it to `folder`/NAME.onnx."""
    model, aliases = trace(network)
    transposed = graph.store_transposed(model)
    graph.attach_weights(model, aliases, transposed, checkpoint.weights(network.weights), network.key_prefixes)
    graph.simplify(model, network)
    graph.assert_no_float64(model)
    files = graph.save(model, folder / f"{network.name}.onnx")
    return Component(
        files={file.name: manifest.describe(file) for file in files},
        precision=precision_name(network.dtype),
        reason=network.reason,
        inputs={name: describe(port) for name, port in network.inputs.items()},
        outputs={name: describe(port) for name, port in network.outputs.items()},
    )


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
