"""What training one of these models shares with training another: optimisation, pools of pictures, autoencoder.

Nothing here knows a transformer or a text encoder. Every random choice follows from the seeds given.
"""

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from numpy.typing import NDArray
from scenes import Scene, caption, draw, training_scenes
from torch import nn
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel

K = TypeVar("K", bound=Hashable)  # what tells kinds of steps apart
M = TypeVar("M", bound=ModelMixin)
Size = tuple[int, int]  # height, width in pixels
MAIN_SHARE = 0.85  # share of the autoencoder's batches that have the first size, the model's own


@dataclass(frozen=True)
class Budget:
    """How long one stage trains: optimiser steps, pictures a step, and how many different pictures it draws from."""

    steps: int
    batch: int
    pictures: int

    def scaled(self, scale: float) -> "Budget":
        """`scale` times the steps and pictures, and below 1 also fewer pictures a step (its square root)."""
        batch = max(4, round(self.batch * min(1.0, scale) ** 0.5))
        return replace(
            self, steps=max(2, round(self.steps * scale)), batch=batch, pictures=max(32, round(self.pictures * scale))
        )


@dataclass(frozen=True)
class Pool:
    """Pictures of one size with their captions: pixels [N, 3, H, W] uint8 on the training device."""

    scenes: list[Scene]
    captions: list[str]
    pixels: torch.Tensor


def draw_pool(count: int, size: Size, seed: int, device: torch.device) -> Pool:
    """`count` training scenes drawn and captioned; the same for the same seed and size."""
    scenes = training_scenes(count, seed)
    rng = random.Random(f"wording {seed}")
    pieces = []
    for start in range(0, count, 512):
        drawn = draw(scenes[start : start + 512], *size, seed=seed * 1_000_003 + start, device=device)
        pieces.append((drawn * 255).round().to(torch.uint8))
    return Pool(scenes, [caption(scene, rng) for scene in scenes], torch.cat(pieces))


def prepare_gpu() -> None:
    """Settings for the whole process; without a GPU they change nothing."""
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention fails at 256 and more tokens of head size 32 ("mha_graph.execute", torch 2.11 on an H100).
    torch.backends.cuda.enable_cudnn_sdp(False)


def working_type(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has units for it; float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear to 1 in `warmup` steps, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Steps(Generic[K]):
    """Optimiser steps on some modules, in place: AdamW at a learning rate for each of them.

    Weights may be bfloat16: the optimiser keeps its own in float32, and so is `average`, the moving one. On a GPU each
    kind of step is recorded as a CUDA graph when it comes for the third time: small models keep a GPU waiting for
    Python otherwise. `loss(kind)` returns a scalar; it draws from torch's default generator and may not wait for the
    GPU.
    """

    def __init__(
        self, rates: Sequence[tuple[nn.Module, float]], loss: Callable[[K], torch.Tensor], warm_uses: int = 2
    ) -> None:
        self.loss, self.warm_uses = loss, warm_uses
        owned = [[p for p in module.parameters() if p.requires_grad] for module, _ in rates]
        self.parameters = [p for group in owned for p in group]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.average = [p.clone() for p in self.masters]
        self.peaks = [peak for _, peak in rates]
        self.on_gpu = self.masters[0].is_cuda
        masters = iter(self.masters)
        groups = [
            # A graph reads the rate from memory, where each step finds its own.
            {"params": [next(masters) for _ in group], "lr": torch.tensor(peak).cuda() if self.on_gpu else peak}
            for group, peak in zip(owned, self.peaks, strict=True)
        ]
        self.optimiser = torch.optim.AdamW(
            groups, betas=(0.9, 0.99), weight_decay=0.01, fused=self.on_gpu, capturable=self.on_gpu
        )
        self.uses: Counter[K] = Counter()
        self.graphs: dict[K, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.stream = torch.cuda.Stream() if self.on_gpu else None

    def take(self, kind: K, share: float, decay: float) -> torch.Tensor:
        """One step at `share` of the peak learning rates; the loss before it."""
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            if self.on_gpu:
                group["lr"].fill_(peak * share)
            else:
                group["lr"] = peak * share
        value = self._replay(kind) if self.on_gpu else self._step(kind)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.masters, 1 - decay)
        return value

    def _replay(self, kind: K) -> torch.Tensor:
        if kind not in self.graphs:
            self.uses[kind] += 1
            if self.uses[kind] <= self.warm_uses:
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    value = self._step(kind)
                torch.cuda.current_stream().wait_stream(self.stream)
                return value
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
            with torch.cuda.graph(graph, pool=pool):
                value = self._step(kind)
            self.graphs[kind] = graph, value
        graph, value = self.graphs[kind]
        graph.replay()
        return value

    def _step(self, kind: K) -> torch.Tensor:
        value = self.loss(kind)
        value.backward()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)
        return value.detach()

    @torch.no_grad()
    def finish(self) -> None:
        """The modules get the moving average of their weights."""
        torch._foreach_copy_(self.parameters, self.average)


def optimise(
    rates: Sequence[tuple[nn.Module, float]],
    loss: Callable[[K], torch.Tensor],
    steps: int,
    name: str,
    kind: Callable[[], K],
    check: Callable[[], str] | None = None,
) -> None:
    """`steps` of `Steps`, each of the next `kind()`; the modules end with their moving average (decay 0.999).

    `rates`: modules with their peak learning rates. Prints the loss 25 times, and what `check` says four times.
    Raises FloatingPointError when the loss is not finite.
    """
    work = Steps(rates, loss)
    start, report = time.perf_counter(), max(1, steps // 25)
    for step in range(steps):
        value = work.take(kind(), cosine(step, steps, min(500, steps // 10)), min(0.999, (1 + step) / (10 + step)))
        if step % report == 0 or step == steps - 1:
            number = value.item()
            print(f"{name} {step:6d}/{steps}  loss {number:.5f}  {time.perf_counter() - start:.1f} s", flush=True)
            if not math.isfinite(number):
                raise FloatingPointError(f"{name}: the loss is {number} at step {step}; lower the learning rates")
        if check and (step + 1) % max(2, steps // 4) == 0:
            print(f"{name} {step + 1:6d}/{steps}  {check()}", flush=True)
    work.finish()


def compiled_twin(transformer: M, prepare: Callable[[M], None] = lambda twin: None) -> M:
    """On a GPU a second diffusers model over the same weights with compiled blocks, meant for one shape alone.

    Each further shape would cost a compilation of half a minute, and inductor's dynamic shapes fail (torch 2.11).
    `prepare` does to the twin, before it is compiled, what weights do not tell.
    """
    if not next(transformer.parameters()).is_cuda:
        return transformer
    with torch.device("meta"):
        twin = type(transformer).from_config(transformer.config)
    twin.load_state_dict(transformer.state_dict(keep_vars=True), assign=True)
    prepare(twin)
    compile_blocks(twin)
    return twin


def compile_blocks(transformer: ModelMixin, backend: str = "inductor") -> None:
    """Compile each block, those of one kind once; not all of diffusers' models say which they are."""
    for blocks in transformer.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.compile(backend=backend)


def build_t5(tokenizer: PreTrainedTokenizerBase, width: int) -> T5EncoderModel:
    """T5's encoder in its second version (gated), of three layers."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


def fill_with_zeros(layers: Iterable[nn.Linear]) -> None:
    """Weights and biases in place.

    With the modulation and the output at zero, every block starts as the identity (Peebles & Xie, arXiv:2212.09748).
    """
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def to_stored_type(parts: Iterable[nn.Module]) -> None:
    """bfloat16, the type that large checkpoints are stored in; in place."""
    for part in parts:
        part.to(torch.bfloat16).to(memory_format=torch.contiguous_format)


def build_autoencoder() -> AutoencoderKL:
    """FLUX.1's autoencoder at a small width: factor 8, 16 latent channels, no quantisation convolutions."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(32, 48, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=16,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def to_model_range(pixels: torch.Tensor, autoencoder: AutoencoderKL) -> torch.Tensor:
    """uint8 0..255 to -1..1 in the autoencoder's own type."""
    return (pixels.float() / 127.5 - 1).to(autoencoder.dtype)


def train_autoencoder(
    autoencoder: AutoencoderKL, budget: Budget, sizes: Sequence[Size], seed: int, device: torch.device
) -> None:
    """Trains it in place on pictures of every size, the first of them the most.

    Loss: L1 of the pixels, and a little KL. The decoder also sees latents with noise of up to a fifth of their spread,
    as a sampler's latents are never quite an encoder's. Ends with the latents' mean and spread in the configuration.
    """
    torch.manual_seed(seed)
    counts = [budget.pictures] + [max(4, budget.pictures // 16)] * (len(sizes) - 1)
    pools = [draw_pool(n, size, seed + i, device).pixels for i, (n, size) in enumerate(zip(counts, sizes, strict=True))]
    rng = random.Random(seed)

    def kind() -> int:
        return 0 if len(pools) == 1 or rng.random() < MAIN_SHARE else rng.randrange(1, len(pools))

    def loss(size: int) -> torch.Tensor:
        pool = pools[size]
        area = pool.shape[2] * pool.shape[3] / (pools[0].shape[2] * pools[0].shape[3])
        rows = torch.randint(len(pool), (max(1, round(budget.batch / area)),), device=device)
        pictures = to_model_range(pool[rows], autoencoder)
        posterior = autoencoder.encode(pictures).latent_dist
        latents = posterior.sample()
        strength = 0.2 * torch.rand(len(latents), 1, 1, 1, device=device) * latents.detach().float().std()
        noise = (strength * torch.randn(latents.shape, device=device)).to(latents.dtype)
        decoded = autoencoder.decode(latents + noise).sample
        spread = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float())
        return (decoded.float() - pictures.float()).abs().mean() + 1e-4 * spread.mean()

    optimise([(autoencoder, 1e-3)], loss, budget.steps, "autoencoder", kind)
    latents = encode_pool(autoencoder, pools[0][:2048]).float()
    autoencoder.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def encode_pool(autoencoder: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Latents [N, 16, H/8, W/8] float16 of pictures [N, 3, H, W] uint8: the posterior's mean, not shifted or scaled."""
    chunks = (autoencoder.encode(to_model_range(chunk, autoencoder)).latent_dist for chunk in pixels.split(256))
    return torch.cat([posterior.mode().half() for posterior in chunks])


def to_pictures(decoded: torch.Tensor) -> NDArray[np.uint8]:
    """uint8 [N, H, W, 3] of what an autoencoder decoded, [N, 3, H, W] in -1..1."""
    pixels = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, pixels: torch.Tensor) -> NDArray[np.uint8]:
    """Pictures [N, 3, H, W] uint8 through the autoencoder and back, [N, H, W, 3]."""
    pieces = []
    for chunk in pixels.split(64):
        latents = autoencoder.encode(to_model_range(chunk, autoencoder)).latent_dist.mode()
        pieces.append(to_pictures(autoencoder.decode(latents).sample))
    return np.concatenate(pieces)


def run_stage(name: str, modules: dict[str, nn.Module], work: Path, train: Callable[[], None]) -> float:
    """Loads the stage's weights from `work`, or trains and saves them. Returns the seconds it trained, or had."""
    path = work / f"{name}.pt"
    if path.exists():
        state = torch.load(path, map_location="cpu")
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
            if "latents" in state and isinstance(module, AutoencoderKL):
                module.register_to_config(**state["latents"])
        print(f"{name}: read from {path}", flush=True)
        return state["seconds"]
    start = time.perf_counter()
    train()
    seconds = time.perf_counter() - start
    state = {"modules": {key: module.state_dict() for key, module in modules.items()}, "seconds": seconds}
    for module in modules.values():
        if isinstance(module, AutoencoderKL):
            state["latents"] = {key: module.config[key] for key in ("shift_factor", "scaling_factor")}
    work.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return seconds


def write_report(
    out: Path,
    device: torch.device,
    seed: int,
    scale: float,
    budgets: dict[str, Budget],
    seconds: dict[str, float],
    **more: float,
) -> None:
    """training.json beside the finished models: when, where and how long each stage trained."""
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "seed": seed,
        "scale": scale,
        "steps": {name: budget.steps for name, budget in budgets.items()},
        **more,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report), flush=True)


def command_line(description: str | None, work: Path) -> argparse.ArgumentParser:
    """The options that every training script has; `work` is where finished stages are by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished pipeline")
    parser.add_argument("--work", type=Path, default=work, help="finished stages (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    return parser
