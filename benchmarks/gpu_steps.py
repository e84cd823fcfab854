"""How long one step of a DiT takes on this machine's GPU: ditforge's engines beside diffusers, in one run.

    python benchmarks/gpu_steps.py flux.1-dev --sizes 1024,512 --out out/steps.json

The DiT has its full size and random weights. Each row of the table is one way to compute it: diffusers as it is,
diffusers compiled by blocks, the same with FP8 products, and engines of Inductor in several precisions. The limit is
the time that the matrix products and the attention alone would take at the rates measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ditforge import regions
from ditforge.contract import DIT
from ditforge.engines.compilers import Job, inductor
from ditforge.engines.compilers.side_by_side import Task
from ditforge.engines.gpus import Target
from ditforge.engines.runtime.inductor import load_engine
from ditforge.export.checkpoint.source import CheckpointSource, opened
from ditforge.export.families import read_networks
from ditforge.export.graph.tracing import PREFIX, Traced, default_dtype, trace
from ditforge.export.network import Network
from ditforge.export.onnx_export import describe
from ditforge.export.quantisation.precision import parse_precision
from ditforge.export.quantisation.qdq import SCHEMES, activation_scale, quantise_weight, weight_scale
from ditforge.manifest import Component

STD = 0.02  # of random weights
RUNS, WARM = 10, 3
DEVICE = "cuda"
RESULTS: dict[str, dict[str, Any]] = {}


def note(out: Path, name: str, **values: Any) -> None:
    """Print a result, and keep it in the file."""
    RESULTS.setdefault(name, {}).update(values)
    shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
    print("##", name, json.dumps(shown, default=str), flush=True)
    out.write_text(json.dumps(RESULTS, indent=1, default=str))


def attempted(out: Path, name: str, run: Callable[[], Any]) -> Any:
    """Run a measurement; if it fails, its error is its result."""
    try:
        return run()
    except Exception as error:
        traceback.print_exc()
        note(out, name, failed=" ".join(f"{type(error).__name__}: {error}".split())[:600])
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def measured(step: Callable[[], Any]) -> dict[str, float]:
    """The median, smallest and largest milliseconds of a step, and the peak of the GPU's memory in GiB."""
    for _ in range(WARM):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"ms": statistics.median(times), "least": min(times), "most": max(times), "peak_gib": peak}


def error(made: torch.Tensor, expected: torch.Tensor) -> float:
    """The L2 norm of the difference, relative to that of what is expected."""
    a, b = made.double().cpu(), expected.double().cpu()
    return float((a - b).norm() / b.norm())


def example(network: Network, side: int, batch: int) -> dict[str, torch.Tensor]:
    """Inputs of a step for a picture of side x side pixels."""
    generator = torch.Generator().manual_seed(7)
    sizes = {"batch": batch, "latent_height": side // 8, "latent_width": side // 8}
    made = {}
    for name, port in network.inputs.items():
        shape = [dim if isinstance(dim, int) else sizes[dim.name] for dim in port.shape]
        if name == "timestep":
            made[name] = torch.full(shape, 0.5)  # times 1000, it is a number of bf16, as the guidance is
        elif name == "guidance":
            made[name] = torch.full(shape, 4.0)
        elif name == "skip_layers":
            made[name] = torch.zeros(shape)
        else:
            made[name] = torch.randn(shape, generator=generator).to(port.dtype)
    return made


def random_state(network: Network) -> dict[str, torch.Tensor]:
    """Random weights of the network in its dtype, on the GPU; norms have ones."""
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
    """The traced module itself with these weights, in `dtype`."""
    with torch.device("meta"), default_dtype(dtype):
        module = network.build().eval()
    module.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=False, assign=True)
    return module.requires_grad_(False)


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a DiT."""
    for child in module.modules():
        if isinstance(child, nn.ModuleList) and any(len(list(block.parameters())) > 8 for block in child):
            yield from child


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
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = linear.weight.abs().max().float() / largest
        self.register_buffer(
            "numbers", (linear.weight.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn)
        )
        self.register_buffer("scale", scale.reshape(()))
        self.register_buffer("activation", torch.tensor(amax / largest, device=scale.device))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        eight = (x.float() / self.activation).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        y = torch._scaled_mm(
            eight.reshape(-1, x.shape[-1]), self.numbers.t(), scale_a=self.activation, scale_b=self.scale,
            bias=self.bias, out_dtype=x.dtype, use_fast_accum=True,
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], -1)


def as_fp8(module: nn.Module, network: Network, amax: dict[str, float]) -> None:
    """Replace the linears that may be quantised by FP8 ones."""
    for name, child in list(module.named_modules()):
        weight = f"{name.removeprefix(PREFIX)}.weight"
        if isinstance(child, nn.Linear) and weight in amax:
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, Fp8Linear(child, amax[weight]))


def rates() -> dict[str, float]:
    """The floating point operations a second of large products in bf16 and FP8, and of attention in bf16."""
    from torch.nn.functional import scaled_dot_product_attention as attention

    rows, inner, columns, heads, tokens, width = 8192, 4096, 8192, 24, 4608, 128
    a, b = (torch.randn(size, inner, device=DEVICE, dtype=torch.bfloat16) for size in (rows, columns))
    one = torch.ones((), device=DEVICE)
    narrow = [tensor.to(torch.float8_e4m3fn) for tensor in (a, b)]
    query = torch.randn(1, heads, tokens, width, device=DEVICE, dtype=torch.bfloat16)

    def eight_bit() -> torch.Tensor:
        return torch._scaled_mm(
            narrow[0], narrow[1].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def attend() -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            return attention(query, query, query)

    def rate(operations: int, run: Callable[[], Any]) -> float:
        """Repeated within one measurement, so that starting it does not count."""
        repeats = 20

        def many() -> None:
            for _ in range(repeats):
                run()

        return operations * repeats / (measured(many)["least"] / 1e3)

    product = 2 * rows * inner * columns
    return {
        "bf16": rate(product, lambda: a @ b.t()),
        "fp8": rate(product, eight_bit),
        "attention": rate(4 * heads * tokens**2 * width, attend),
    }


def limits(step: Callable[[], Any], speeds: dict[str, float]) -> dict[str, float]:
    """The operations of a step, and the milliseconds of its products, in bf16 or in FP8, and its attention."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for name, count in counts.items() if "attention" in name)
    products = sum(counts.values()) - attention
    return {
        "products TFLOP": products / 1e12,
        "attention TFLOP": attention / 1e12,
        "bf16_ms": 1e3 * (products / speeds["bf16"] + attention / speeds["attention"]),
        "fp8_ms": 1e3 * (products / speeds["fp8"] + attention / speeds["attention"]),
    }


def diffusers_step(module: Any, inputs: dict[str, torch.Tensor], model: str, dtype: torch.dtype) -> Callable[[], Any]:
    """A call of diffusers' own transformer in `dtype`, as its pipeline calls it. It returns a velocity like latents."""
    transformer, latents = module.module, inputs["latents"]
    if "flux" in model:
        batch, channels, height, width = latents.shape
        packed = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        packed = packed.reshape(batch, height * width // 4, channels * 4).to(dtype)
        ids = torch.zeros(height // 2, width // 2, 3, device=DEVICE)
        ids[..., 1] += torch.arange(height // 2, device=DEVICE)[:, None]
        ids[..., 2] += torch.arange(width // 2, device=DEVICE)[None]
        given = {
            "hidden_states": packed,
            "timestep": inputs["timestep"].to(dtype),
            "guidance": inputs.get("guidance"),
            "pooled_projections": inputs["pooled_embeds"].to(dtype),
            "encoder_hidden_states": inputs["prompt_embeds"].to(dtype),
            "txt_ids": torch.zeros(inputs["prompt_embeds"].shape[1], 3, device=DEVICE, dtype=dtype),
            "img_ids": ids.reshape(-1, 3).to(dtype),
            "return_dict": False,
        }
    else:
        given = {
            "hidden_states": latents.to(dtype),
            "timestep": inputs["timestep"] * 1000,
            "pooled_projections": inputs["pooled_embeds"].to(dtype),
            "encoder_hidden_states": inputs["prompt_embeds"].to(dtype),
            "return_dict": False,
        }

    def step() -> Any:
        with torch.no_grad():
            made = transformer(**given)[0]
        if "flux" not in model:
            return made
        batch, channels, height, width = latents.shape
        patches = made.view(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(latents.shape)

    return step


def stored_of(network: Network, traced: Traced, scheme: str, amax: dict[str, float]) -> dict[str, regions.Stored]:
    """How each weight is stored for `scheme`."""
    weights = {}
    for name in traced.aliases:
        weights[name] = regions.Stored(name=name)
        if scheme and network.may_be_8_bit(name):
            known = SCHEMES[scheme]
            weights[name] = regions.Stored(
                name=f"{name}_quantized",
                scheme=scheme,
                scale=f"{name}_scale",
                activation_scale=(
                    activation_scale(amax[name], known, network.dtype).item() if known.activations else None
                ),
            )
    return weights


def engine_rows(
    args: argparse.Namespace,
    network: Network,
    traced: Traced,
    state: dict[str, torch.Tensor],
    precision: str,
    amax: dict[str, float],
    expected: dict[int, torch.Tensor],
) -> None:
    """Compile, load and time Inductor's engine in one precision."""
    scheme = precision if precision in SCHEMES else ""
    found = regions.Regions(
        torch=torch.__version__,
        calls=traced.calls,
        outputs=tuple(network.outputs),
        weights=stored_of(network, traced, scheme, amax),
    )

    def weight(name: str) -> torch.Tensor:
        if name.endswith(("_quantized", "_scale")):
            base = name.removesuffix("_quantized").removesuffix("_scale")
            wide = state[PREFIX + base].T
            scale = weight_scale(wide, SCHEMES[scheme], network.dtype)
            return scale if name.endswith("_scale") else quantise_weight(wide, scale, SCHEMES[scheme]).T
        return state[PREFIX + name]

    component = Component(
        files={}, precision=precision, reason="",
        inputs={name: describe(port) for name, port in network.inputs.items()},
        outputs={name: describe(port) for name, port in network.outputs.items()},
    )  # fmt: skip
    gpu = "sm_{}{}".format(*torch.cuda.get_device_capability())
    shapes = []
    for side in args.sizes:
        given = {name: tuple(tensor.shape) for name, tensor in example(network, side, args.batch).items()}
        varying = {n: s for n, s in given.items() if any(not isinstance(d, int) for d in network.inputs[n].shape)}
        shapes.append({n: (s, s, s) for n, s in varying.items()})
    if args.range:
        low, high = (
            {n: tuple(t.shape) for n, t in example(network, side, batch).items()}
            for side, batch in ((min(args.sizes), 1), (max(args.sizes), max(2, args.batch)))
        )
        shapes = [{n: (low[n], high[n], high[n]) for n in low}]
    with TemporaryDirectory(dir="/dev/shm") as folder:
        job = Job(
            DIT,
            component,
            Path(folder) / "dit.onnx",
            Path(folder) / "dit",
            Target(gpu, (gpu,)),
            shapes,
            lambda *_: None,
        )
        start = time.perf_counter()
        tasks: list[Task] = []
        programs = traced.programs.__getitem__
        files = inductor.compile_programs(job, found, programs, weight, lambda added, _: tasks.extend(added))
        inductor.do_apart(tasks, DEVICE, job.progress)
        compiled = time.perf_counter() - start
        sizes = sum(file.stat().st_size for file in files if file.suffix == ".pt2") / 1e6
        start = time.perf_counter()
        engine = load_engine(files, gpu, inductor.version(), inductor.version())
        loaded = time.perf_counter() - start
        name = f"inductor {precision}{' range' if args.range else ''}{args.tag}"
        note(args.out, name, compile_s=compiled, load_s=loaded, packages_mb=sizes)
        for side in args.sizes:
            inputs = {key: value.to(DEVICE) for key, value in example(network, side, args.batch).items()}
            key = {key: tuple(value.shape) for key, value in inputs.items()}
            variant = engine.variant(key)

            def plain(variant: Any = variant, inputs: Any = inputs) -> Any:
                with torch.no_grad():
                    return engine.run_calls(variant, inputs)["velocity"]

            row = f"{name} {side}"
            made = plain()
            note(args.out, row, error=error(made, expected[side]) if side in expected else -1.0, **measured(plain))
            arrays = {key: value.cpu().numpy() for key, value in inputs.items()}

            def served(arrays: Any = arrays) -> Any:
                return torch.from_numpy(engine.run(arrays)["velocity"])

            for _ in range(3):
                served()
            note(args.out, f"{row} as served", same=error(served(), made), **measured(served))
            if args.profile and side == args.sizes[0]:
                profile(args, row, plain)
        engine.close()


def profile(args: argparse.Namespace, name: str, step: Callable[[], Any]) -> None:
    """Note the kernels that take the most time in one step."""
    from torch.profiler import ProfilerActivity, profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    kernels = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)
    note(
        args.out,
        f"{name} kernels",
        kernels=[(k.key[:110], k.count, round(k.self_device_time_total / 1e3, 2)) for k in kernels[:24]],
    )


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sizes", type=lambda text: [int(part) for part in text.split(",")], default=[1024])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precisions", type=lambda text: [p for p in text.split(",") if p], default=["bf16", "fp8"])
    parser.add_argument(
        "--diffusers", type=lambda text: [p for p in text.split(",") if p], default=["eager", "compiled", "fp8"]
    )
    parser.add_argument("--range", action="store_true", help="one set of packages for all sizes")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tag", default="")
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    inductor.SETTINGS.update(args.settings)
    note(
        args.out,
        "machine",
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        python=platform.python_version(),
        date=str(date.today()),
    )
    configs = Path(__file__).parent.parent / "export" / "configs" / args.model
    with opened(CheckpointSource(configs, random_weights=True)) as checkpoint:
        _, _, networks = read_networks(checkpoint, parse_precision("bf16"))
        network = next(network for network in networks if network.name == DIT)
    start = time.perf_counter()
    traced = trace(network)
    note(
        args.out, "trace", seconds=time.perf_counter() - start, programs={k: len(v) for k, v in traced.programs.items()}
    )
    state = random_state(network)
    expected: dict[int, torch.Tensor] = {}
    order = torch.nn.attention.SDPBackend
    backends = [order.CUDNN_ATTENTION, order.FLASH_ATTENTION, order.EFFICIENT_ATTENTION, order.MATH]
    inputs = {side: {k: v.to(DEVICE) for k, v in example(network, side, args.batch).items()} for side in args.sizes}
    amax: dict[str, float] = {}

    def exact() -> None:
        own = with_weights(network, state, network.dtype)
        steps = {side: diffusers_step(own, inputs[side], args.model, network.dtype) for side in args.sizes}
        amax.update(ranges_of(own, network, steps[args.sizes[0]]))
        rounded = {side: step().float().cpu() for side, step in steps.items()}
        for side, step in steps.items():
            note(args.out, f"limit {side}", **limits(step, speeds))
        del own, steps
        wide = with_weights(network, state, torch.float32)
        for side in args.sizes:
            expected[side] = diffusers_step(wide, inputs[side], args.model, torch.float32)().cpu()
            note(args.out, f"diffusers bf16 {side}", error=error(rounded[side], expected[side]))

    speeds = rates()
    note(args.out, "rates", **{f"{name} TFLOP/s": speed / 1e12 for name, speed in speeds.items()})
    attempted(args.out, "fp32 reference", exact)
    with torch.nn.attention.sdpa_kernel(backends, set_priority=True):
        for way in args.diffusers:
            for side in args.sizes:

                def step_of(way: str = way, side: int = side) -> None:
                    own = with_weights(network, state, network.dtype)
                    if way == "fp8":
                        as_fp8(own, network, amax)
                    if way != "eager":
                        own.module.compile_repeated_blocks(fullgraph=True)
                    step = diffusers_step(own, inputs[side], args.model, network.dtype)
                    far = error(step(), expected[side]) if side in expected else -1.0
                    note(args.out, f"diffusers {way} {side}", error=far, **measured(step))

                attempted(args.out, f"diffusers {way} {side}", step_of)
                torch._dynamo.reset()
    for precision in args.precisions:
        rows = partial(engine_rows, args, network, traced, state, precision, amax, expected)
        attempted(args.out, f"inductor {precision}", rows)


if __name__ == "__main__":
    main()
