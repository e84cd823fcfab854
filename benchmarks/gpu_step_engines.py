"""The ways to compute a step of a DiT that gpu_steps.py compares: diffusers' own, compiled, and ditforge's engines.

Each is a context manager that takes a Subject and gives a function, which makes the step for a shape ready.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_diffusers import compile_blocks
from gpu_run import Results
from gpu_step_limits import DEVICE
from torch import nn
from torch.nn.attention import sdpa_kernel

from ditforge import regions
from ditforge.contract import DIT
from ditforge.engines.compilers import Job, inductor
from ditforge.engines.compilers.region_packages import ATTENTION
from ditforge.engines.compilers.side_by_side import Task
from ditforge.engines.gpus import CPU, Target
from ditforge.engines.runtime.inductor import Execution, load_engine
from ditforge.errors import DitforgeError
from ditforge.export.checkpoint.source import CheckpointSource, opened
from ditforge.export.checkpoint.weights import Weights
from ditforge.export.families import read_networks
from ditforge.export.graph import writing
from ditforge.export.graph.tracing import PREFIX, default_dtype, trace
from ditforge.export.network import Network
from ditforge.export.onnx_export import describe
from ditforge.export.quantisation.precision import parse_precision
from ditforge.export.quantisation.qdq import SCHEMES, activation_scale, quantise_weight, weight_scale
from ditforge.manifest import Component
from ditforge.regions import Call

STD = 0.02  # of random weights
LARGEST = torch.finfo(torch.float8_e4m3fn).max
FP16 = "fp16"  # what onnxruntime's engine computes in


@dataclass(frozen=True, order=True)
class Shape:
    """Pictures of side x side pixels, `batch` samples at a time."""

    side: int
    batch: int

    def __str__(self) -> str:
        return f"{self.side} x{self.batch}"


@dataclass(frozen=True)
class Ready:
    """A step that can be called.

    run: computes the velocity. foreign: bytes in the GPU's memory that are not the step's own.
    served: the same from arrays of NumPy to arrays of NumPy, as it is served, if that is another way.
    """

    run: Callable[[], torch.Tensor]
    foreign: int = 0
    served: Callable[[], torch.Tensor] | None = None


StepOf = Callable[[Shape, bool], Ready]  # of a shape; and whether what was compiled for all shapes is to be taken


@dataclass(frozen=True)
class Programs:
    """What an engine of Inductor is compiled of: the calls, the names of the weights, and the programs by kind."""

    calls: tuple[Call, ...]
    weights: tuple[str, ...]
    programs: dict[str, bytes]


@dataclass
class Subject:
    """A DiT with random weights, which all ways share.

    state: the weights by the names of the module's parameters. amax: the range of each linear that may be in 8 bits.
    statics: the shapes that are compiled each for itself; smallest, largest: the range that is compiled for all.
    programs: the traced programs, which another process makes meanwhile.
    """

    model: str
    network: Network
    state: dict[str, torch.Tensor]
    statics: list[Shape]
    smallest: Shape
    largest: Shape | None
    folder: Path
    results: Results
    programs: Future[Programs]
    amax: dict[str, float] = field(default_factory=dict)

    def inputs(self, shape: Shape) -> dict[str, torch.Tensor]:
        """The inputs of a step on the device."""
        return {name: tensor.to(DEVICE) for name, tensor in example(self.network, shape).items()}

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs of a step."""
        sizes = sizes_of(shape)
        return {n: tuple(d if isinstance(d, int) else sizes[d.name] for d in p.shape) for n, p in ports(self.network)}


def ports(network: Network) -> list[tuple[str, Any]]:
    """The inputs of a network."""
    return list(network.inputs.items())


def read_dit(model: str, precision: str) -> Network:
    """The DiT of a published model, or of one in a folder, in a precision."""
    with opened(CheckpointSource(Path(model), random_weights=True)) as checkpoint:
        _, _, networks = read_networks(checkpoint, parse_precision(precision))
        return next(network for network in networks if network.name == DIT)


def trace_programs(model: str, precision: str) -> Programs:
    """Trace the DiT's programs. It is called in a process of its own."""
    traced = trace(read_dit(model, precision))
    return Programs(traced.calls, tuple(traced.aliases), traced.programs)


def sizes_of(shape: Shape) -> dict[str, int]:
    """What the varying dimensions of the inputs are."""
    return {"batch": shape.batch, "latent_height": shape.side // 8, "latent_width": shape.side // 8}


def example(network: Network, shape: Shape) -> dict[str, torch.Tensor]:
    """Inputs of a step."""
    generator = torch.Generator().manual_seed(7)
    sizes = sizes_of(shape)
    made = {}
    for name, port in network.inputs.items():
        dims = [dim if isinstance(dim, int) else sizes[dim.name] for dim in port.shape]
        if name == "timestep":
            made[name] = torch.full(dims, 0.5)  # times 1000, it is a number of bf16, as the guidance is
        elif name == "guidance":
            made[name] = torch.full(dims, 4.0)
        elif name == "skip_layers":
            made[name] = torch.zeros(dims)
        else:
            made[name] = torch.randn(dims, generator=generator).to(port.dtype)
    return made


def random_state(network: Network) -> dict[str, torch.Tensor]:
    """Random weights of the network in its dtype, on the device; norms have ones."""
    torch.manual_seed(0)
    with torch.device("meta"), default_dtype(network.dtype):
        module = network.build()
    state = {}
    for name, parameter in module.named_parameters():
        if "norm" in name and parameter.dim() == 1 and name.endswith("weight"):
            state[name] = torch.ones(parameter.shape, dtype=network.dtype, device=DEVICE)
        else:
            state[name] = torch.randn(parameter.shape, dtype=network.dtype, device=DEVICE) * STD
    return state


def with_weights(network: Network, state: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """The traced module itself with these weights, in `dtype`; weights of that dtype are not copied."""
    with torch.device("meta"), default_dtype(dtype):
        module = network.build().eval()
    module.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=False, assign=True)
    return module.requires_grad_(False)


def ranges_of(module: nn.Module, network: Network, step: Callable[[], Any]) -> dict[str, float]:
    """The largest absolute input of each linear that may be quantised, for one step."""
    amax: dict[str, float] = {}
    hooks = []

    def watch(name: str) -> Callable[..., None]:
        def note_input(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            amax[name] = max(amax.get(name, 0.0), float(args[0].abs().max()))

        return note_input

    for name, child in module.named_modules():
        weight = f"{name.removeprefix(PREFIX)}.weight"
        if isinstance(child, nn.Linear) and network.may_be_8_bit(weight):
            hooks.append(child.register_forward_pre_hook(watch(weight)))
    step()
    for hook in hooks:
        hook.remove()
    return amax


class Fp8Linear(nn.Module):
    """A linear with static FP8 scales, one for each tensor: what PyTorch users compile today."""

    numbers: torch.Tensor
    scale: torch.Tensor
    activation: torch.Tensor

    def __init__(self, linear: nn.Linear, amax: float) -> None:
        super().__init__()
        scale = linear.weight.abs().max().float() / LARGEST
        numbers = (linear.weight.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", scale.reshape(()))
        self.register_buffer("activation", torch.tensor(amax / LARGEST, device=scale.device))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        eight = (x.float() / self.activation).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        y = torch._scaled_mm(
            eight.reshape(-1, x.shape[-1]), self.numbers.t(), scale_a=self.activation, scale_b=self.scale,
            bias=self.bias, out_dtype=x.dtype, use_fast_accum=True,
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], -1)


def as_fp8(module: nn.Module, amax: dict[str, float]) -> int:
    """Replace the linears that may be quantised by FP8 ones. Returns the bytes of the weights that they replace."""
    replaced = 0
    for name, child in list(module.named_modules()):
        weight = f"{name.removeprefix(PREFIX)}.weight"
        if isinstance(child, nn.Linear) and weight in amax:
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, Fp8Linear(child, amax[weight]))
            replaced += child.weight.nbytes
    return replaced


def diffusers_step(module: Any, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> Callable[[], Any]:
    """A call of diffusers' own transformer in `dtype`, as its pipeline calls it. It returns a velocity like latents."""
    transformer, latents = module.module, inputs["latents"]
    given = {
        "pooled_projections": inputs["pooled_embeds"].to(dtype),
        "encoder_hidden_states": inputs["prompt_embeds"].to(dtype),
        "return_dict": False,
    }
    packed = "guidance_embeds" in transformer.config  # whether it takes tokens and their positions, and not latents
    if packed:
        batch, channels, height, width = latents.shape
        tokens = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        ids = torch.zeros(height // 2, width // 2, 3, device=DEVICE)
        ids[..., 1] += torch.arange(height // 2, device=DEVICE)[:, None]
        ids[..., 2] += torch.arange(width // 2, device=DEVICE)[None]
        given |= {
            "hidden_states": tokens.reshape(batch, height * width // 4, channels * 4).to(dtype),
            "timestep": inputs["timestep"].to(dtype),
            "guidance": inputs.get("guidance"),
            "txt_ids": torch.zeros(inputs["prompt_embeds"].shape[1], 3, device=DEVICE, dtype=dtype),
            "img_ids": ids.reshape(-1, 3).to(dtype),
        }
    else:
        given |= {"hidden_states": latents.to(dtype), "timestep": inputs["timestep"] * 1000}

    def step() -> Any:
        with torch.no_grad():
            made = transformer(**given)[0]
        if not packed:
            return made
        batch, channels, height, width = latents.shape
        patches = made.view(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(latents.shape)

    return step


@contextmanager
def diffusers(way: str, subject: Subject) -> Iterator[StepOf]:
    """Diffusers' transformer: eager, compiled by blocks in bf16, or so with FP8 products. Attention is cuDNN's.

    What is compiled for one shape is compiled anew for each; what is for all shapes, once for one sample and once for
    several.
    """
    network = subject.network
    made: dict[object, tuple[Any, int]] = {}

    def module_for(key: object, dynamic: bool) -> tuple[Any, int]:
        if key not in made:
            made.clear()
            torch._dynamo.reset()
            module = with_weights(network, subject.state, network.dtype)
            foreign = as_fp8(module, subject.amax) if way == "fp8" else 0
            if way != "eager":
                compile_blocks(module.module, dynamic)
            made[key] = module, foreign
        return made[key]

    def step_of(shape: Shape, dynamic: bool) -> Ready:
        module, foreign = module_for("all" if dynamic or way == "eager" else shape, dynamic)
        return Ready(diffusers_step(module, subject.inputs(shape), network.dtype), foreign)

    try:
        with sdpa_kernel(ATTENTION, set_priority=True):
            yield step_of
    finally:
        made.clear()
        torch._dynamo.reset()
        freed()


def freed() -> None:
    """Give memory back that nobody needs any more."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def regions_of(subject: Subject, scheme: str) -> regions.Regions:
    """The DiT's regions, and how each weight is stored for `scheme`; in 16 bits if that is empty."""
    programs = subject.programs.result()
    weights = {}
    for name in programs.weights:
        weights[name] = regions.Stored(name=name)
        if scheme and subject.network.may_be_8_bit(name):
            known = SCHEMES[scheme]
            scale = activation_scale(subject.amax[name], known, subject.network.dtype) if known.activations else None
            weights[name] = regions.Stored(
                name=f"{name}_quantized",
                scheme=scheme,
                scale=f"{name}_scale",
                activation_scale=None if scale is None else scale.item(),
            )
    return regions.Regions(
        torch=torch.__version__, calls=programs.calls, outputs=tuple(subject.network.outputs), weights=weights
    )


def compile_engine(subject: Subject, precision: str, folder: Path, target: Target, ranges: bool) -> list[Path]:
    """Compile Inductor's engine into a folder: for each static shape, and with `ranges` for all shapes too."""
    network, scheme = subject.network, precision if precision in SCHEMES else ""

    def weight(name: str) -> torch.Tensor:
        if name.endswith(("_quantized", "_scale")):
            base = name.removesuffix("_quantized").removesuffix("_scale")
            wide = subject.state[PREFIX + base].T
            scale = weight_scale(wide, SCHEMES[scheme], network.dtype)
            return scale if name.endswith("_scale") else quantise_weight(wide, scale, SCHEMES[scheme]).T
        return subject.state[PREFIX + name]

    def varying(shape: Shape) -> dict[str, tuple[int, ...]]:
        known = dict(ports(network))
        return {n: s for n, s in subject.shapes(shape).items() if any(not isinstance(d, int) for d in known[n].shape)}

    wanted = [(shape, shape, shape) for shape in subject.statics]
    if ranges and subject.largest is not None:
        best = wanted.pop(0)[1] if wanted else subject.largest
        wanted.append((subject.smallest, best, subject.largest))
    shapes = [{n: (low[n], best[n], high[n]) for n in low} for low, best, high in (map(varying, w) for w in wanted)]
    component = Component(
        files={}, precision=precision, reason="",
        inputs={name: describe(port) for name, port in network.inputs.items()},
        outputs={name: describe(port) for name, port in network.outputs.items()},
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(DIT, component, folder / "dit.onnx", folder / DIT, target, shapes, lambda *_: None)
    programs = subject.programs.result().programs
    tasks: list[Task] = []
    found = regions_of(subject, scheme)
    files = inductor.compile_programs(job, found, programs.__getitem__, weight, lambda added, _: tasks.extend(added))
    inductor.do_apart(tasks, DEVICE, job.progress)
    return files


@contextmanager
def inductor_engine(precision: str, subject: Subject) -> Iterator[StepOf]:
    """Ditforge's engine of Inductor. What was compiled stays in the subject's folder for the next time."""
    name, folder = f"{subject.model} inductor {precision}", subject.folder / f"inductor-{precision}"
    gpu = "sm_{}{}".format(*torch.cuda.get_device_capability()) if DEVICE == "cuda" else CPU
    target = Target(gpu, (gpu,) if DEVICE == "cuda" else ())
    files = sorted(folder.glob("*"))
    if not files:
        subject.programs.result()  # is waited for, which does not count as compiling
        start = time.perf_counter()
        try:
            files = compile_engine(subject, precision, folder, target, ranges=True)
        except DitforgeError as error:
            if subject.largest is None or not subject.statics:
                raise
            subject.results.note(name, all_shapes_failed=str(error)[:600])
            files = compile_engine(subject, precision, folder, target, ranges=False)
        sizes = sum(file.stat().st_size for file in files if file.suffix == ".pt2") / 1e6
        subject.results.note(name, compile_s=time.perf_counter() - start, packages_mb=sizes)
    start = time.perf_counter()
    engine = load_engine(files, gpu, inductor.version(), inductor.version())
    if DEVICE == "cuda":
        torch.cuda.synchronize()  # the weights arrive in another stream
    subject.results.note(name, load_s=time.perf_counter() - start)
    beside = sum(tensor.nbytes for tensor in subject.state.values())

    def step_of(shape: Shape, dynamic: bool) -> Ready:
        engine.forget_graphs()  # which keep the memory of their activations
        freed()
        inputs, shapes = subject.inputs(shape), subject.shapes(shape)
        fitting = [v for v in engine.description.variants if (v.smallest != v.largest) == dynamic]
        variant = next(v for v in fitting if dynamic or v.smallest == shapes)
        arrays = {key: value.cpu().numpy() for key, value in inputs.items()}
        served = None if dynamic else partial(from_arrays, engine, arrays)
        return Ready(partial(on_device, engine, variant, inputs), beside, served)

    try:
        yield step_of
    finally:
        engine.close()
        freed()


def on_device(engine: Execution, variant: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """A step with inputs and outputs in the device's memory."""
    with torch.no_grad(), engine.stream():
        return engine.run_calls(variant, inputs)["velocity"]


def from_arrays(engine: Execution, arrays: dict[str, Any]) -> torch.Tensor:
    """A step as it is served: from NumPy to NumPy, by a CUDA graph from the third time on, if that is faster."""
    return torch.from_numpy(engine.run(arrays)["velocity"])


@contextmanager
def onnxruntime_engine(precision: str, subject: Subject) -> Iterator[StepOf]:
    """Ditforge's graph for ONNX Runtime, after its passes, with inputs and outputs in the GPU's memory."""
    from onnxruntime_passes import Result, load, write_variant

    name, folder = f"{subject.model} onnxruntime {precision}", subject.folder / f"onnxruntime-{precision}"
    network = read_dit(subject.model, precision)
    graph, result = folder / "dit.onnx", Result("all", DEVICE)
    start = time.perf_counter()
    if not graph.is_file():
        folder.mkdir(parents=True)
        traced = trace(network)
        transposed = writing.store_transposed(traced.model)
        weights = Weights(folder, {}, {}, {})
        for key, tensor in subject.state.items():
            own = key.removeprefix(PREFIX)
            weights.shards[own], weights.shapes[own] = folder, tuple(tensor.shape)
            weights.reads[own] = tensor.cpu
        writing.attach_weights(traced.model, traced.aliases, transposed, weights, network)
        writing.save(traced.model, graph)
        subject.results.note(name, export_s=time.perf_counter() - start)
    path = write_variant(graph, "all", result, {"three terms"} if DEVICE == "cpu" else set())
    start = time.perf_counter()
    engine = load(path, "all", DEVICE)
    subject.results.note(name, load_s=time.perf_counter() - start)

    def step_of(shape: Shape, dynamic: bool) -> Ready:
        arrays: dict[str, Any] = {key: value.numpy() for key, value in example(network, shape).items()}
        if DEVICE == "cuda":
            import cupy

            arrays = {key: cupy.asarray(value) for key, value in arrays.items()}
            cupy.cuda.get_current_stream().synchronize()

        def run() -> torch.Tensor:
            made = engine.run_batch([arrays])["velocity"]
            return torch.from_numpy(made) if isinstance(made, np.ndarray) else torch.from_dlpack(made)

        return Ready(run)

    try:
        yield step_of
    finally:
        engine.close()
        freed()


ENGINES: dict[str, Callable[[Subject], Any]] = {
    "diffusers eager": partial(diffusers, "eager"),
    "diffusers compiled": partial(diffusers, "compiled"),
    "diffusers fp8": partial(diffusers, "fp8"),
    "inductor bf16": partial(inductor_engine, "bf16"),
    "inductor fp8": partial(inductor_engine, "fp8"),
    "onnxruntime fp16": partial(onnxruntime_engine, FP16),
}
