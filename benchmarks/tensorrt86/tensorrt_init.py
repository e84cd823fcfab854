"""TensorRT 8.6 under the names that TensorRT 10 and 11 use, as far as ditforge calls them: executing and compiling.

It takes the place of `tensorrt/__init__.py` in the wheel's folder, beside the extension module. The libraries are
loaded by path, so nothing depends on LD_LIBRARY_PATH. Sources: the C++ and Python API references of TensorRT 8.6 and
10, and "Working with Mixed Precision" in the developer guide of 8.6.
"""

import ctypes
from pathlib import Path

import numpy as np

_here = Path(__file__).parent
for _name in (
    "libcublas.so.12", "libcublasLt.so.12", "libcudnn.so.8", "libnvinfer.so.8", "libnvinfer_plugin.so.8",
    "libnvonnxparser.so.8", "libnvparsers.so.8",
):  # fmt: skip
    ctypes.CDLL(str(_here / _name), mode=ctypes.RTLD_GLOBAL)

from . import tensorrt as _native  # noqa: E402
from .tensorrt import *  # noqa: E402, F403

__version__ = "8.6.0"
DataType, LayerType, BuilderFlag, TacticSource = (
    _native.DataType, _native.LayerType, _native.BuilderFlag, _native.TacticSource
)  # fmt: skip
float32, float16, int8, int32, uint8 = DataType.FLOAT, DataType.HALF, DataType.INT8, DataType.INT32, DataType.UINT8
bfloat16, int64 = object(), object()  # 8.6 has neither
_NUMPY = {
    DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT8: np.int8, DataType.INT32: np.int32,
    DataType.UINT8: np.uint8, DataType.BOOL: np.bool_,
}  # fmt: skip
# The layers that compute, in which a graph with fp32 islands wants them to be fp32.
_COMPUTE = {
    LayerType.ELEMENTWISE, LayerType.UNARY, LayerType.REDUCE, LayerType.ACTIVATION, LayerType.SOFTMAX,
    LayerType.MATRIX_MULTIPLY, LayerType.CONVOLUTION, LayerType.NORMALIZATION,
}  # fmt: skip


def nptype(dtype):
    """The NumPy dtype of a tensor's dtype."""
    return _NUMPY[dtype]


class _Wrapped:
    """An object of 8.6 to which a subclass gives what is missing."""

    def __init__(self, native):
        object.__setattr__(self, "_native", native)

    def __getattr__(self, name):
        return getattr(self._native, name)


# Executing


class ExecutionContextAllocationStrategy:
    """What ditforge asks for, which 8.6 calls `create_execution_context_without_device_memory`."""

    USER_MANAGED = 2


class _RuntimeConfig:
    def set_execution_context_allocation_strategy(self, strategy):
        assert strategy == ExecutionContextAllocationStrategy.USER_MANAGED


class _Context(_Wrapped):
    def set_device_memory(self, pointer, size):
        self._native.device_memory = pointer


class _Engine(_Wrapped):
    def create_runtime_config(self):
        return _RuntimeConfig()

    def create_execution_context(self, config):
        context = self._native.create_execution_context_without_device_memory()
        return None if context is None else _Context(context)

    @property
    def device_memory_size_v2(self):
        return self._native.device_memory_size


class Runtime:
    """tensorrt.Runtime, which also takes plans that are compatible with other versions."""

    def __init__(self, log):
        self._native = _native.Runtime(log)
        self._native.engine_host_code_allowed = True

    def deserialize_cuda_engine(self, data):
        """The engine of a plan, or None."""
        engine = self._native.deserialize_cuda_engine(bytes(data))
        return None if engine is None else _Engine(engine)


# Compiling


class IStreamWriter:
    """Base class of what a plan is written to."""


class IProgressMonitor:
    """Base class of what is told about progress: 8.6 tells nothing."""


class _Config(_Wrapped):
    def __setattr__(self, name, value):
        if name != "progress_monitor":
            setattr(self._native, name, value)


class _Network(_Wrapped):
    """`ports` has the shapes of inputs and outputs as the graph says: 8.6 leaves some dimensions open that it fixes."""

    def __init__(self, native):
        super().__init__(native)
        object.__setattr__(self, "ports", {})

    def get_output(self, index):
        tensor = self._native.get_output(index)
        return _Output(tensor, self.ports.get(tensor.name, tuple(tensor.shape)))


class _Output(_Wrapped):
    """An output whose open dimensions are those that the graph fixes. Others are as 8.6 found them."""

    def __init__(self, native, said):
        super().__init__(native)
        found = tuple(native.shape)
        filled = (own if own >= 0 else other for own, other in zip(found, said, strict=False))
        object.__setattr__(self, "shape", tuple(filled) if len(found) == len(said) else found)


class _ParserError(_Wrapped):
    def node_name(self):
        return str(self._native.node())

    def node_operator(self):
        return str(self._native.code())


class OnnxParser:
    """tensorrt.OnnxParser."""

    def __init__(self, network, log):
        self._network = network
        self._native = _native.OnnxParser(network._native, log)
        self._native.set_flag(_native.OnnxParserFlag.NATIVE_INSTANCENORM)

    def parse(self, graph, path=""):
        """Read a graph. Returns whether that went well."""
        import onnx

        for port in onnx.load_model_from_string(graph).graph.output:
            dims = port.type.tensor_type.shape.dim
            self._network.ports[port.name] = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
        return self._native.parse(graph)

    @property
    def num_errors(self):
        return self._native.num_errors

    def get_error(self, index):
        """An error of `parse`."""
        return _ParserError(self._native.get_error(index))


class Builder:
    """tensorrt.Builder. Where a graph has fp16 tensors, layers may compute in fp16, and fp32 ones should in fp32."""

    def __init__(self, log):
        self._native = _native.Builder(log)

    def __getattr__(self, name):
        return getattr(self._native, name)

    def create_network(self, flags=0):
        """An empty network."""
        return _Network(self._native.create_network(1 << int(_native.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)))

    def create_builder_config(self):
        """A configuration that needs neither cuBLAS nor cuDNN, and in which fp32 is not TF32."""
        config = self._native.create_builder_config()
        config.clear_flag(BuilderFlag.TF32)
        config.set_flag(BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(BuilderFlag.EXCLUDE_LEAN_RUNTIME)
        sources = TacticSource.EDGE_MASK_CONVOLUTIONS, TacticSource.JIT_CONVOLUTIONS
        config.set_tactic_sources(sum(1 << int(source) for source in sources))
        config.set_memory_pool_limit(_native.MemoryPoolType.WORKSPACE, 8 << 30)
        return _Config(config)

    def build_serialized_network_to_stream(self, network, config, writer):
        """Compile. Returns whether that went well."""
        layers = [network._native.get_layer(i) for i in range(network.num_layers)]
        if any(layer.get_output(i).dtype == float16 for layer in layers for i in range(layer.num_outputs)):
            config.set_flag(BuilderFlag.FP16)
            config.set_flag(BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
            for layer in layers:
                self._keep_in_fp32(layer)
        plan = self._native.build_serialized_network(network._native, config._native)
        if plan is None:
            return False
        writer.write(bytes(plan))
        return True

    def _keep_in_fp32(self, layer):
        """Let a layer that computes in fp32 by the graph do so, unless it computes shapes, which have one dimension."""
        output = layer.get_output(0)
        if layer.type in _COMPUTE and output.dtype == float32 and len(output.shape) > 1:
            layer.precision = float32
            layer.set_output_type(0, float32)
