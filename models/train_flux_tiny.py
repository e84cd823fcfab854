"""Trains flux-tiny: FLUX.1-dev's architecture at nine million parameters, on captioned scenes of flat shapes.

    python models/train_flux_tiny.py --out models/flux-tiny

Four stages, each kept under --work so that a second run goes on where the first stopped: the autoencoder; the text
encoders, which then stay as they are; the transformer by flow matching; guidance distillation. The result is a folder
that `diffusers.FluxPipeline.from_pretrained` loads.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from flux_tiny import Models, build_models, save_pipeline
from judge import judge
from reading import train_reading
from torch import nn
from training import (
    Budget,
    draw_pool,
    optimise,
    reconstruct,
    run_stage,
    train_autoencoder,
    working_type,
)
from vocabulary import T5_LENGTH

from examples import SIZES, Noised, draw_batch, encode_all, token_ids

BUDGETS = {
    "autoencoder": Budget(steps=4000, batch=64, pictures=65_536),
    "reading": Budget(steps=4000, batch=512, pictures=196_608),
    "flow": Budget(steps=9000, batch=512, pictures=196_608),
    "guidance": Budget(steps=1500, batch=512, pictures=65_536),
}
GUIDANCE = (1.0, 5.0)  # range of the distilled guidance; the teacher is always given the first


@dataclass(frozen=True)
class Prompts:
    """What the text encoders make of a batch: pooled [B, 128] float32, states [B, length, 128] in the working type."""

    pooled: torch.Tensor
    states: torch.Tensor


@torch.no_grad()
def encode_prompts(models: Models, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> Prompts:
    """Both encoders, frozen, without a mask, as FluxPipeline calls them."""
    pooled = models.text_encoder(clip_ids).pooler_output
    return Prompts(pooled.float(), models.text_encoder_2(t5_ids)[0])


def predict(
    transformer: FluxTransformer2DModel,
    noisy: torch.Tensor,
    timestep: torch.Tensor,
    guidance: torch.Tensor,
    prompts: Prompts,
    image_ids: torch.Tensor,
) -> torch.Tensor:
    """Velocity [B, tokens, 64] float32 at `timestep` = sigma in 0..1 [B], under `guidance` [B]."""
    text_ids = image_ids.new_zeros(prompts.states.shape[1], 3)
    velocity = transformer(
        hidden_states=noisy,
        timestep=timestep,
        guidance=guidance,
        pooled_projections=prompts.pooled,
        encoder_hidden_states=prompts.states,
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]
    return velocity.float()


def flow_loss(models: Models, student: FluxTransformer2DModel, batch: Noised) -> torch.Tensor:
    """Mean squared error of the velocity (Lipman et al. 2023, arXiv:2210.02747), at the teacher's guidance."""
    prompts = encode_prompts(models, batch.clip_ids, batch.t5_ids)
    guidance = torch.full_like(batch.timestep, GUIDANCE[0])
    velocity = predict(student, batch.noisy, batch.timestep, guidance, prompts, batch.image_ids)
    return F.mse_loss(velocity, batch.velocity)


def guidance_loss(
    models: Models,
    teacher: FluxTransformer2DModel,
    student: FluxTransformer2DModel,
    empty: tuple[torch.Tensor, torch.Tensor],
    batch: Noised,
) -> torch.Tensor:
    """The student at a random guidance against the teacher's guided velocity (Meng et al. 2023, arXiv:2210.03142)."""
    prompts = encode_prompts(models, batch.clip_ids, batch.t5_ids)
    nothing = encode_prompts(models, empty[0], F.pad(empty[1], (0, batch.t5_ids.shape[1] - T5_LENGTH)))
    unprompted = Prompts(
        nothing.pooled.expand_as(prompts.pooled), nothing.states.expand_as(prompts.states).contiguous()
    )
    least = torch.full_like(batch.timestep, GUIDANCE[0])
    with torch.no_grad():
        with_prompt, without = (
            predict(teacher, batch.noisy, batch.timestep, least, p, batch.image_ids) for p in (prompts, unprompted)
        )
    guidance = torch.empty_like(batch.timestep).uniform_(*GUIDANCE)
    target = without + guidance[:, None, None] * (with_prompt - without)
    velocity = predict(student, batch.noisy, batch.timestep, guidance, prompts, batch.image_ids)
    return F.mse_loss(velocity, target)


def to_working_types(transformer: FluxTransformer2DModel, device: torch.device) -> None:
    """bfloat16 on a GPU, but for the embeddings of latents, timestep, guidance and pooled prompt.

    The transformer rounds timestep and guidance to the type that the latents' embedding has, and eight bits of a
    timestep would be all that training sees.
    """
    kind = working_type(device)
    transformer.to(device, kind)
    transformer.x_embedder.float()
    transformer.time_text_embed.float()
    hold_types(transformer, kind)


def hold_types(transformer: FluxTransformer2DModel, kind: torch.dtype) -> None:
    """Casts what the float32 embeddings put out to the blocks' type."""

    def narrow(module: nn.Module, args: tuple[()], kwargs: dict[str, torch.Tensor]) -> tuple[tuple[()], dict]:
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].to(kind)}

    transformer.time_text_embed.register_forward_hook(lambda module, args, output: output.to(kind))
    transformer.transformer_blocks[0].register_forward_pre_hook(narrow, with_kwargs=True)


def compiled_twin(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """On a GPU a second model over the same weights with compiled blocks, meant for batches of one shape alone.

    Each further shape would cost a compilation of half a minute, and inductor's dynamic shapes fail (torch 2.11).
    """
    if not next(transformer.parameters()).is_cuda:
        return transformer
    with torch.device("meta"):
        twin = FluxTransformer2DModel.from_config(transformer.config)
    twin.load_state_dict(transformer.state_dict(keep_vars=True), assign=True)
    hold_types(twin, transformer.proj_out.weight.dtype)
    twin.compile_repeated_blocks()
    return twin


def judge_reconstructions(models: Models, count: int, seed: int, device: torch.device) -> float:
    """Share of `count` fresh pictures that the judge still accepts after the autoencoder."""
    pool = draw_pool(count, SIZES[0], seed, device)
    pictures = reconstruct(models.vae, pool.pixels).permute(0, 2, 3, 1).cpu().numpy()
    return sum(judge(picture, scene).correct for picture, scene in zip(pictures, pool.scenes, strict=True)) / count


def train(out: Path, work: Path, scale: float, seed: int, device: torch.device) -> None:
    """All four stages at `scale` times their budgets, then the folder `out` with training.json beside the models."""
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention fails at 256 and more tokens of head size 32 ("mha_graph.execute", torch 2.11 on an H100).
    torch.backends.cuda.enable_cudnn_sdp(False)
    models = build_models(seed)
    budgets = {name: budget.scaled(scale) for name, budget in BUDGETS.items()}
    seconds, kind = {}, working_type(device)
    for part in (models.vae, models.text_encoder, models.text_encoder_2):
        part.to(device, kind)
    to_working_types(models.transformer, device)
    readers = {"text_encoder": models.text_encoder, "text_encoder_2": models.text_encoder_2}
    empty = token_ids(models, [""], device)

    def autoencoder() -> None:
        train_autoencoder(models.vae, budgets["autoencoder"], SIZES[:4], seed, device)

    def reading() -> None:
        def encode(ids: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return [models.text_encoder(ids[0]).pooler_output[:, None], models.text_encoder_2(ids[1])[0]]

        def tokenize(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
            return token_ids(models, captions, device)

        share = train_reading(list(readers.values()), tokenize, encode, budgets["reading"], seed, device)
        print(f"reading: both encoders are right on {share:.4f} of fresh captions", flush=True)

    def flow() -> None:
        torch.manual_seed(seed + 1)
        budget, rng = budgets["flow"], random.Random(seed + 1)
        examples = encode_all(models, budget, seed, device)
        fast = compiled_twin(models.transformer)

        def loss(step: int) -> torch.Tensor:
            batch = draw_batch(examples, budget.batch, empty, rng)
            return flow_loss(models, fast if batch.is_usual else models.transformer, batch)

        optimise([models.transformer], loss, budget.steps, 1e-3, "flow")

    def guidance() -> None:
        torch.manual_seed(seed + 2)
        budget, rng = budgets["guidance"], random.Random(seed + 2)
        examples = encode_all(models, budget, seed + 50, device)
        teacher = FluxTransformer2DModel.from_config(models.transformer.config).requires_grad_(False)
        to_working_types(teacher, device)
        teacher.load_state_dict(models.transformer.state_dict())

        def loss(step: int) -> torch.Tensor:
            batch = draw_batch(examples, budget.batch, empty, rng)
            return guidance_loss(models, teacher, models.transformer, empty, batch)

        optimise([models.transformer], loss, budget.steps, 3e-4, "guidance")

    seconds["autoencoder"] = run_stage("autoencoder", {"vae": models.vae}, work, autoencoder)
    crisp = judge_reconstructions(models, budgets["autoencoder"].batch * 4, seed + 99, device)
    print(f"autoencoder: the judge passes {crisp:.4f} of the reconstructions", flush=True)
    seconds["reading"] = run_stage("reading", readers, work, reading)
    seconds["flow"] = run_stage("flow", {"transformer": models.transformer}, work, flow)
    seconds["guidance"] = run_stage("guidance", {"transformer": models.transformer}, work, guidance)
    save_pipeline(models, out)
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "seed": seed,
        "scale": scale,
        "steps": {name: budget.steps for name, budget in budgets.items()},
        "reconstructions_right": round(crisp, 4),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report), flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished pipeline")
    parser.add_argument(
        "--work", type=Path, default=Path("build/flux-tiny"), help="finished stages (default: %(default)s)"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args()
    train(args.out, args.work, args.scale, args.seed, torch.device(args.device))


if __name__ == "__main__":
    main()
