"""How much memory TensorRT-RTX says that an engine takes, which it knows without a GPU."""

from __future__ import annotations

from pathlib import Path

import tensorrt_rtx as trt

from ditforge.engines.compilers.tensorrt_common import allow_unfused_attention
from ditforge.export.network import BATCH, Dim, Network
from ditforge.model import Model

Shapes = dict[str, tuple[int, ...]]


def sample_shapes(network: Network, side: int, model: Model) -> Shapes:
    """The network's inputs for one picture of side x side pixels."""
    latent = side // model.vae_factor

    def size(dim: int | Dim) -> int:
        if isinstance(dim, int):
            return dim
        return 1 if dim == BATCH else latent if dim.name.startswith("latent_") else side

    return {name: tuple(map(size, port.shape)) for name, port in network.inputs.items()}


def compiled_sizes(graph: Path, shapes: Shapes, capability: str = "SM89") -> tuple[int, int]:
    """Bytes of weights and of activations of an engine for inputs of these shapes, from the compiler's log."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.said: dict[str, int] = {}

        def log(self, severity: object, message: str) -> None:
            if message.startswith("Total ") and message.endswith(" bytes"):
                what, _, size = message.removesuffix(" bytes").rpartition(": ")
                self.said[what] = int(size)

    class Nowhere(trt.IStreamWriter):
        def __init__(self) -> None:
            super().__init__()

        def write(self, data: bytes) -> int:
            return len(data)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, log).parse_from_file(str(graph))
    allow_unfused_attention(trt, network)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for name, shape in shapes.items():
        profile.set_shape(name, shape, shape, shape)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    assert builder.build_serialized_network_to_stream(network, config, Nowhere())
    return log.said["Total Weights Memory"], log.said["Total Activation Memory"]
