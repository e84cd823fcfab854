"""Trains flux-tiny: FLUX.1-dev's architecture at nine million parameters, on captioned scenes of flat shapes.

    python models/train_flux_tiny.py --out models/flux-tiny

Four stages, each kept under --work so that a second run goes on where the first stopped: the autoencoder; the text
encoders learn to read captions; text encoders and transformer together by flow matching; guidance distillation of the
transformer. The result is a folder that `diffusers.FluxPipeline.from_pretrained` loads.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from flux_tiny import Models, build_models, save_pipeline
from reading import train_reading
from torch import nn
from training import (
    Budget,
    command_line,
    compiled_twin,
    optimise,
    prepare_gpu,
    run_stage,
    train_autoencoder,
    working_type,
    write_report,
)
from vocabulary import T5_LENGTH
from watching import Velocity, judge_reconstructions, judge_samples

from examples import (
    SIZES,
    USUAL,
    Ids,
    Kind,
    Noised,
    draw_batch,
    draw_kind,
    encode_all,
    pad_text,
    padded_ids,
)

BUDGETS = {
    "autoencoder": Budget(steps=4000, batch=64, pictures=65_536),
    "reading": Budget(steps=6000, batch=256, pictures=196_608),
    "flow": Budget(steps=33_000, batch=256, pictures=196_608),
    "guidance": Budget(steps=2500, batch=256, pictures=65_536),
}
# Captions have 20 at most. CLIP looks back only and is pooled at its end token: what pads to 77 changes nothing.
CLIP_TOKENS = 24
GUIDANCE = (1.0, 5.0)  # range of the distilled guidance; the teacher is always given the first


@dataclass(frozen=True)
class Prompts:
    """What the text encoders make of a batch: pooled [B, 128] float32, states [B, length, 128] in the working type."""

    pooled: torch.Tensor
    states: torch.Tensor


def schedule_shift(tokens: int) -> float:
    """The shift of FluxPipeline's schedule at this number of image tokens."""
    return math.exp(calculate_shift(tokens))


def encode_prompts(models: Models, ids: Ids) -> Prompts:
    """Both encoders without a mask, as FluxPipeline calls them."""
    pooled = models.text_encoder(ids[0]).pooler_output
    return Prompts(pooled.float(), models.text_encoder_2(ids[1])[0])


def predict(
    transformer: FluxTransformer2DModel,
    noisy: torch.Tensor,
    timestep: torch.Tensor,
    guidance: torch.Tensor,
    prompts: Prompts,
) -> torch.Tensor:
    """Velocity of `noisy` [B, 16, h, w], float32, at `timestep` = sigma in 0..1 [B], under `guidance` [B]."""
    batch, channels, height, width = noisy.shape
    velocity = transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, batch, channels, height, width),
        timestep=timestep,
        guidance=guidance,
        pooled_projections=prompts.pooled,
        encoder_hidden_states=prompts.states,
        txt_ids=noisy.new_zeros(prompts.states.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(velocity.float(), height * 8, width * 8, 8)


def flow_loss(models: Models, transformer: FluxTransformer2DModel, batch: Noised) -> torch.Tensor:
    """Mean squared error of the velocity (Lipman et al. 2023, arXiv:2210.02747), at the teacher's guidance."""
    guidance = torch.full_like(batch.timestep, GUIDANCE[0])
    velocity = predict(transformer, batch.noisy, batch.timestep, guidance, encode_prompts(models, batch.ids))
    return F.mse_loss(velocity, batch.velocity)


def guidance_loss(models: Models, teacher: FluxTransformer2DModel, empty: Ids, batch: Noised) -> torch.Tensor:
    """The model at a random guidance against the teacher's guided velocity (Meng et al. 2023, arXiv:2210.03142)."""
    least = torch.full_like(batch.timestep, GUIDANCE[0])
    with torch.no_grad():
        prompts = encode_prompts(models, batch.ids)
        nothing = encode_prompts(models, pad_text(empty, batch.ids[-1].shape[1]))
        unprompted = Prompts(
            nothing.pooled.expand_as(prompts.pooled), nothing.states.expand_as(prompts.states).contiguous()
        )
        with_prompt, without = (predict(teacher, batch.noisy, batch.timestep, least, p) for p in (prompts, unprompted))
    guidance = torch.empty_like(batch.timestep).uniform_(*GUIDANCE)
    target = without + guidance[:, None, None, None] * (with_prompt - without)
    return F.mse_loss(predict(models.transformer, batch.noisy, batch.timestep, guidance, prompts), target)


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


def train(out: Path, work: Path, scale: float, seed: int, device: torch.device) -> None:
    """All four stages at `scale` times their budgets, then the folder `out` with training.json beside the models."""
    prepare_gpu()
    models = build_models(seed)
    budgets = {name: budget.scaled(scale) for name, budget in BUDGETS.items()}
    kind = working_type(device)
    for part in (models.vae, models.text_encoder, models.text_encoder_2):
        part.to(device, kind)
    to_working_types(models.transformer, device)
    readers = {"text_encoder": models.text_encoder, "text_encoder_2": models.text_encoder_2}

    def tokenize(captions: Sequence[str]) -> Ids:
        clip = padded_ids(models.tokenizer, captions, CLIP_TOKENS)
        return clip.to(device), padded_ids(models.tokenizer_2, captions, T5_LENGTH).to(device)

    empty = tokenize([""])

    def autoencoder() -> None:
        train_autoencoder(models.vae, budgets["autoencoder"], SIZES[:4], seed, device)

    def reading() -> None:
        def encode(ids: Ids) -> list[torch.Tensor]:
            prompts = encode_prompts(models, ids)
            return [prompts.pooled[:, None], prompts.states]

        share = train_reading(list(readers.values()), tokenize, encode, budgets["reading"], seed, device)
        print(f"reading: both encoders are right on {share:.4f} of fresh captions", flush=True)

    def flow() -> None:
        torch.manual_seed(seed + 1)
        budget, rng = budgets["flow"], random.Random(seed + 1)
        examples = encode_all(models.vae, tokenize, budget, seed, device)
        fast = compiled_twin(models.transformer, lambda twin: hold_types(twin, kind))
        rates = [(models.transformer, 1e-3), *((reader, 2e-4) for reader in readers.values())]

        def loss(kind: Kind) -> torch.Tensor:
            transformer = fast if kind == USUAL else models.transformer
            return flow_loss(models, transformer, draw_batch(examples, kind, budget.batch, empty, schedule_shift))

        optimise(rates, loss, budget.steps, "flow", lambda: draw_kind(rng), lambda: check(GUIDANCE[0]))

    def guidance() -> None:
        torch.manual_seed(seed + 2)
        budget, rng = budgets["guidance"], random.Random(seed + 2)
        examples = encode_all(models.vae, tokenize, budget, seed + 50, device)
        teacher = FluxTransformer2DModel.from_config(models.transformer.config).requires_grad_(False)
        to_working_types(teacher, device)
        teacher.load_state_dict(models.transformer.state_dict())

        def loss(kind: Kind) -> torch.Tensor:
            batch = draw_batch(examples, kind, budget.batch, empty, schedule_shift)
            return guidance_loss(models, teacher, empty, batch)

        optimise(
            [(models.transformer, 3e-4)], loss, budget.steps, "guidance", lambda: draw_kind(rng), lambda: check(3.5)
        )

    def check(scale: float) -> str:
        def prepare(captions: Sequence[str]) -> Velocity:
            prompts = encode_prompts(models, tokenize(captions))
            return lambda latents, sigma: predict(
                models.transformer, latents, sigma, torch.full_like(sigma, scale), prompts
            )

        count = budgets["autoencoder"].batch * 2
        return f"guidance {scale}: {judge_samples(prepare, models.vae, schedule_shift, count, device)}"

    seconds = {"autoencoder": run_stage("autoencoder", {"vae": models.vae}, work, autoencoder)}
    crisp = judge_reconstructions(models.vae, budgets["autoencoder"].batch * 4, seed + 99, device)
    print(f"autoencoder: the judge passes {crisp:.4f} of the reconstructions", flush=True)
    seconds["reading"] = run_stage("reading", readers, work, reading)
    seconds["flow"] = run_stage("flow", {"transformer": models.transformer, **readers}, work, flow)
    seconds["guidance"] = run_stage("guidance", {"transformer": models.transformer}, work, guidance)
    save_pipeline(models, out)
    write_report(out, device, seed, scale, budgets, seconds, reconstructions_right=round(crisp, 4))


def main() -> None:
    """The command line."""
    parser = command_line(__doc__, Path("build/flux-tiny"))
    args = parser.parse_args()
    train(args.out, args.work, args.scale, args.seed, torch.device(args.device))


if __name__ == "__main__":
    main()
