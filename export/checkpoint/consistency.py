"""Check that a checkpoint's configurations and weights fit each other, before the first network is traced."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from ditforge.errors import DitforgeError, UserError
from ditforge.export.checkpoint.diffusers_folder import Checkpoint
from ditforge.export.checkpoint.unread import report_fields, report_index, report_scheduler, report_tensors
from ditforge.export.checkpoint.weights import Weights
from ditforge.export.graph.tracing import dry_run
from ditforge.export.network import Network, Port
from ditforge.option import setting

FIX = "its config.json is not the one of these weights, or a shard is missing: copy the folder again"


@dataclass
class Found:
    """The keys of a component's weights that its networks read, and other keys of the same tensors."""

    read: set[str] = field(default_factory=set)
    twins: set[str] = field(default_factory=set)


def check_checkpoint(
    checkpoint: Checkpoint, networks: Collection[Network], weights_of: Callable[[Network], Weights]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Check all networks of the checkpoint, and report what none of them reads. No tensor is read.

    `weights_of` opens a network's weights. Returns for each network the shapes of its parameters by name. Raises
    UserError as check_weights() and check_ports() do, and for unread tensors that must be a part of a network.
    """
    shapes, found, opened = {}, dict[str, Found](), dict[str, Weights]()
    for network in networks:
        weights = opened[network.weights] = weights_of(network)
        keys = found.setdefault(network.weights, Found())
        shapes[network.name] = check_weights(network, weights, keys)
    check_ports(networks)
    report = checkpoint.report
    for component, keys in found.items():
        report.read[component] = len(keys.read)
        if checkpoint.seed is None:
            those = [network for network in networks if network.weights == component]
            report_tensors(those, opened[component], keys.read, keys.twins, report)
        report_fields(checkpoint, component, report)
    for component, tensors in checkpoint.tensors.items():
        if component not in found:
            files = sorted({str(tensor.file) for tensor in tensors.values()})
            report.add(f"{component} in {', '.join(files)}", "the export is without it", expected=True)
    report_scheduler(checkpoint, report)
    report_index(checkpoint, networks, report)
    return shapes


def check_weights(network: Network, weights: Weights, found: Found | None = None) -> dict[str, tuple[int, ...]]:
    """Check that the network can be made and run, and that `weights` have its tensors in the right shapes.

    The keys that it reads are added to `found`. Returns the shapes of the network's parameters by name. Raises
    UserError if the configuration is unusable or a tensor is missing or of another shape, and DitforgeError if one of
    the network's factors fits none of its weights.
    """
    try:
        parameters = dry_run(network)
    except Exception as error:  # PyTorch's modules raise many kinds, and all of them mean the same to the user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"{weights.folder}/config.json describes no network that works: {reason}"
        raise UserError(problem, "copy config.json again from where the checkpoint came from") from error
    for names, shape in parameters:
        key = weights.find(names, network.key_prefixes)
        if key is None:
            raise UserError(f"{weights.folder} lacks the tensor {names[0]}", FIX)
        if weights.shapes[key] != shape:
            seen = f"{key} has shape {list(weights.shapes[key])}, config.json says {list(shape)}"
            raise UserError(f"{weights.shards[key]}: {seen}", FIX)
        if found is not None:
            found.read.add(key)
            found.twins.update(prefix + name for name in names for prefix in ("", *network.key_prefixes))
    for pattern in network.factors:
        if not any(pattern.fullmatch(name) for names, _ in parameters for name in names):
            problem = f"{network.name} has no weights like {pattern.pattern}, which would be scaled for it"
            raise DitforgeError(
                problem, f"{setting('precision', 'bf16')} scales nothing; report it with the config.json"
            )
    return {names[0]: shape for names, shape in parameters}


def check_ports(networks: Iterable[Network]) -> None:
    """Raise UserError if ports of the same name have different shapes in different networks."""
    seen: dict[str, tuple[str, Port]] = {}
    for network in networks:
        for name, port in {**network.inputs, **network.outputs}.items():
            first, known = seen.setdefault(name, (network.weights, port))
            if port.names() != known.names():
                sizes = f"{list(known.names())} in {first}, {list(port.names())} in {network.weights}"
                raise UserError(f"{name} is {sizes}, which do not fit", "take both folders from one checkpoint")
