"""Makes the configurations of Triton's models, with the protobuf classes that come with Triton's client.

Source: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from __future__ import annotations

from itertools import product
from typing import Any

from pydantic import BaseModel
from tritonclient.grpc import model_config_pb2 as pb

from ditforge.contract import PROMPT_EMBEDS, TEXT_ENCODERS, TEXT_ENCODERS_CLIP, TEXT_OUTPUTS
from ditforge.manifest import Component, Engine, File, Tensor
from ditforge.model import Model
from ditforge.triton_repo.limits import Limits

ENGINE_PARAMETER = "ditforge_engine"  # of a network: the JSON of EngineSource
LIMITS_PARAMETER = "ditforge_limits"  # of a model: the JSON of ditforge.triton_repo.limits.Limits
ENGINES_VARIABLE = "DITFORGE_ENGINES"  # of the environment: the folder where models find the engine process
FORGONE_VARIABLE = "DITFORGE_FORGONE"  # of the environment: a folder of the names of requests nobody waits for
CPU_INSTANCE = pb.ModelInstanceGroup(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
GPU_INSTANCE = pb.ModelInstanceGroup(count=1, kind=pb.ModelInstanceGroup.KIND_GPU, gpus=[0])
MODEL_CODE = "from ditforge.triton_repo.models.{module} import TritonPythonModel  # noqa: F401\n"
ENGINE_MODULE, TOKENIZER_MODULE = "engine", "tokenizer"  # of triton_repo/models/
MEMBER_PARAMETER = "ditforge_member"  # a text encoder's: as a member of an ensemble, it must not answer with errors
MAX_QUEUE = 128  # the most requests that wait for a model; one more is refused at once
LONGEST_WAIT = 600  # the most seconds in that queue, unless the request has an earlier deadline


class EngineSource(BaseModel):
    """The files of the engine, which are beside model.py, and how it was made. It is a parameter of the model."""

    files: dict[str, File]
    made: Engine


def python_model(name: str, component: Component, max_batch: int, parameters: dict[str, str]) -> pb.ModelConfig:
    """Make the configuration of a model of the Python backend, which has one instance.

    Triton puts up to `max_batch` samples of waiting requests into one call of the model. The instance is one of the
    CPU, whatever its engine's device is: the engine process computes, and this one needs no CUDA context.
    """
    config = pb.ModelConfig(
        name=name,
        backend="python",
        max_batch_size=max_batch,
        input=[_input(tensor, component.inputs[tensor]) for tensor in component.inputs],
        output=[_output(tensor, component.outputs[tensor]) for tensor in component.outputs],
        instance_group=[CPU_INSTANCE],
        dynamic_batching=pb.ModelDynamicBatching() if MEMBER_PARAMETER in parameters else batching(),
    )
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config


def tensorrt_model(
    name: str, component: Component, max_batch: int, parameters: dict[str, str], plan: str, model: Model
) -> pb.ModelConfig:
    """Make the configuration of a model of Triton's own TensorRT backend, whose engine is the file `plan`.

    Triton executes the model once in each size of `model` before it calls it ready. If the sizes are fixed, Triton also
    records each size as a CUDA graph for one picture, and replays this graph later. Source:
    https://github.com/triton-inference-server/server/blob/main/docs/user_guide/optimization.md
    """
    config = pb.ModelConfig(
        name=name,
        platform="tensorrt_plan",
        default_model_filename=plan,
        max_batch_size=max_batch,
        input=[_input(tensor, component.inputs[tensor]) for tensor in component.inputs],
        output=[_output(tensor, component.outputs[tensor]) for tensor in component.outputs],
        instance_group=[GPU_INSTANCE],
        dynamic_batching=pb.ModelDynamicBatching() if MEMBER_PARAMETER in parameters else batching(),
    )
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    samples: list[dict[str, list[int]]] = []
    for height, width in model.sizes or [(model.default_size, model.default_size)]:
        piece = model.piece(name, height, width)
        sample = {key: _sample(tensor, *piece, model) for key, tensor in component.inputs.items()}
        if sample not in samples:  # a text encoder's do not depend on the size
            samples.append(sample)
    # With classifier-free guidance, a picture's step is a batch of two.
    in_pairs = model.guidance == "classifier-free" and "timestep" in component.inputs and max_batch > 1
    for number, (sample, batch) in enumerate(product(samples, (1, 2) if in_pairs else (1,))):
        warmup = config.model_warmup.add(name=f"{name} {number}", batch_size=batch)
        for tensor in config.input:
            zeros = warmup.inputs[tensor.name]
            zeros.data_type, zeros.zero_data = tensor.data_type, True
            zeros.dims.extend(sample[tensor.name] or [1])
        if model.sizes:
            graph = config.optimization.cuda.graph_spec.add(batch_size=batch)
            for key, dims in sample.items():
                graph.input[key].dim.extend(dims)
    config.optimization.cuda.graphs = bool(model.sizes)
    return config


def batching() -> pb.ModelDynamicBatching:
    """Make the settings by which Triton batches waiting requests. The queue has a limit.

    A request that has waited for longer than a client waits is refused. Triton uses a request's own timeout only if it
    is shorter than this one. Text encoders have no such queue, because they must not refuse what an ensemble asks of
    them, and what they are asked has passed the tokenizer's queue before.
    """
    policy = pb.ModelQueuePolicy(
        timeout_action=pb.ModelQueuePolicy.REJECT,
        default_timeout_microseconds=LONGEST_WAIT * 1_000_000,
        allow_timeout_override=True,
        max_queue_size=MAX_QUEUE,
    )
    return pb.ModelDynamicBatching(default_queue_policy=policy)


def ensemble(name: str, members: dict[str, Component], limits: Limits) -> pb.ModelConfig:
    """Make the configuration of an ensemble of the members, in which a tensor goes where an input has its name.

    `limits` are those of the first member. A tensor that no member produces is an input of the ensemble, and one that
    no member consumes is an output.
    """
    produced = {tensor: described for member in members.values() for tensor, described in member.outputs.items()}
    consumed = {tensor: described for member in members.values() for tensor, described in member.inputs.items()}
    config = pb.ModelConfig(
        name=name,
        platform="ensemble",
        max_batch_size=limits.max_batch,
        input=[_input(tensor, consumed[tensor]) for tensor in consumed if tensor not in produced],
        output=[_output(tensor, produced[tensor]) for tensor in produced if tensor not in consumed],
    )
    config.parameters[LIMITS_PARAMETER].string_value = limits.model_dump_json(exclude_none=True)
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


def text_ways(text: dict[str, Component]) -> dict[str, dict[str, Component]]:
    """Find the ways from a prompt to its embeddings. Returns the members of each, by the name of its ensemble.

    `text` has the tokenizer and the text encoders. A way ends with a member that makes `prompt_embeds`. If there are
    two, the one with more members is called `text_encoders`, and the other one `text_encoders_clip`. Outputs that
    neither the way itself nor its client uses are left out.
    """
    ends = [name for name, member in text.items() if PROMPT_EMBEDS in member.outputs]
    ways = []
    for end in ends:
        way = {name: member for name, member in text.items() if name == end or name not in ends}
        while True:
            needed = {*TEXT_OUTPUTS, *(tensor for member in way.values() for tensor in member.inputs)}
            useful = {name: _only(member, needed) for name, member in way.items() if needed & set(member.outputs)}
            if useful == way:
                break
            way = useful
        ways.append(way)
    return dict(zip((TEXT_ENCODERS, TEXT_ENCODERS_CLIP), sorted(ways, key=len, reverse=True), strict=False))


def _only(member: Component, needed: set[str]) -> Component:
    outputs = {name: tensor for name, tensor in member.outputs.items() if name in needed}
    return member.model_copy(update={"outputs": outputs})


def _input(name: str, tensor: Tensor) -> pb.ModelInput:
    return pb.ModelInput(name=name, data_type=_data_type(tensor), **_shape(tensor))


def _output(name: str, tensor: Tensor) -> pb.ModelOutput:
    return pb.ModelOutput(name=name, data_type=_data_type(tensor), **_shape(tensor))


def _data_type(tensor: Tensor) -> int:
    result: int = pb.DataType.Value("TYPE_STRING" if tensor.dtype == "BYTES" else f"TYPE_{tensor.dtype}")
    return result


def _shape(tensor: Tensor) -> dict[str, Any]:
    """The dimensions of a tensor without its batch. Triton needs at least one, so [B] is declared as [B, 1]."""
    dims = [dim if isinstance(dim, int) else -1 for dim in tensor.shape[1:]]
    return {"dims": dims} if dims else {"dims": [1], "reshape": pb.ModelTensorReshape(shape=[])}


def _sample(tensor: Tensor, height: int, width: int, model: Model) -> list[int]:
    """The dimensions of a tensor without its batch, for a picture of that height and width in pixels."""
    sizes = {"height": height, "width": width}
    sizes |= {"latent_height": height // model.vae_factor, "latent_width": width // model.vae_factor}
    return [dim if isinstance(dim, int) else sizes[dim] for dim in tensor.shape[1:]]
