"""Model configurations, made with the protobuf classes that Triton's client ships.

Source: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from tritonclient.grpc import model_config_pb2 as pb

from ditforge.manifest import Component, File, Tensor

MODEL_PARAMETER = "ditforge_model"  # of `dit`: the JSON of ditforge.model.Model
ENGINE_PARAMETER = "ditforge_engine"  # of a network: the JSON of EngineSource


class EngineSource(BaseModel):
    """Which files beside model.py are the engine, and what made them; it travels in the model's parameters."""

    compiler: str
    target: str
    files: dict[str, File]


def python_model(name: str, component: Component, max_batch: int, parameters: dict[str, str]) -> pb.ModelConfig:
    """A model of the Python backend with one instance, whose requests Triton may batch."""
    config = pb.ModelConfig(
        name=name,
        backend="python",
        max_batch_size=max_batch,
        input=[_input(tensor, component.inputs[tensor]) for tensor in component.inputs],
        output=[_output(tensor, component.outputs[tensor]) for tensor in component.outputs],
        instance_group=[pb.ModelInstanceGroup(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)],
        dynamic_batching=pb.ModelDynamicBatching(),
    )
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config


def ensemble(name: str, members: dict[str, Component], max_batch: int) -> pb.ModelConfig:
    """The members in a row, wired by the names of their tensors.

    What no member produces is an input of the ensemble; what no member consumes is an output.
    """
    produced = {tensor: described for member in members.values() for tensor, described in member.outputs.items()}
    consumed = {tensor: described for member in members.values() for tensor, described in member.inputs.items()}
    config = pb.ModelConfig(
        name=name,
        platform="ensemble",
        max_batch_size=max_batch,
        input=[_input(tensor, consumed[tensor]) for tensor in consumed if tensor not in produced],
        output=[_output(tensor, produced[tensor]) for tensor in produced if tensor not in consumed],
    )
    for member_name, member in members.items():
        config.ensemble_scheduling.step.append(
            pb.ModelEnsembling.Step(
                model_name=member_name,
                model_version=-1,
                input_map={tensor: tensor for tensor in member.inputs},
                output_map={tensor: tensor for tensor in member.outputs},
            )
        )
    return config


def _input(name: str, tensor: Tensor) -> pb.ModelInput:
    return pb.ModelInput(name=name, data_type=_data_type(tensor), **_shape(tensor))


def _output(name: str, tensor: Tensor) -> pb.ModelOutput:
    return pb.ModelOutput(name=name, data_type=_data_type(tensor), **_shape(tensor))


def _data_type(tensor: Tensor) -> int:
    return pb.DataType.Value("TYPE_STRING" if tensor.dtype == "BYTES" else f"TYPE_{tensor.dtype}")


def _shape(tensor: Tensor) -> dict[str, Any]:
    """The dimensions after the batch. Triton wants at least one: a number a sample travels as [B, 1]."""
    dims = [dim if isinstance(dim, int) else -1 for dim in tensor.shape[1:]]
    return {"dims": dims} if dims else {"dims": [1], "reshape": pb.ModelTensorReshape(shape=[])}
