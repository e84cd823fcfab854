"""Trains sd35-tiny: Stable Diffusion 3.5 medium's architecture at nine million parameters, on captioned flat shapes.

    python models/train_sd35_tiny.py --out models/sd35-tiny

Two stages, each kept under --work so that a second run goes on where the first stopped: the text encoders learn to
read captions; text encoders and transformer together by flow matching with prompt dropout, for classifier-free
guidance. The autoencoder is flux-tiny's. The result is a folder that `diffusers.StableDiffusion3Pipeline` loads.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from reading import train_reading
from sd35_tiny import CLIP_TOKENS, SHIFT, Models, build_models, save_pipeline
from training import Budget, command_line, compiled_twin, optimise, prepare_gpu, run_stage, working_type, write_report
from vocabulary import T5_LENGTH
from watching import Velocity, judge_samples

from examples import USUAL, Ids, Kind, Noised, draw_batch, draw_kind, encode_all, padded_ids

BUDGETS = {
    "reading": Budget(steps=6000, batch=256, pictures=196_608),
    "flow": Budget(steps=33_000, batch=256, pictures=196_608),
}
NO_T5 = 0.15  # share of the prompts whose T5 states are zeros, as the pipeline has it without T5


@dataclass(frozen=True)
class Prompts:
    """What the text encoders make of a batch: pooled [B, 160] and states [B, 24 + length, 160]."""

    pooled: torch.Tensor
    states: torch.Tensor


def encode_prompts(models: Models, ids: Ids, t5_kept: torch.Tensor | None = None) -> Prompts:
    """The three encoders joined as StableDiffusion3Pipeline joins them; `t5_kept` [B] 0 or 1."""
    outputs = [
        encoder(part, output_hidden_states=True)
        for encoder, part in zip((models.text_encoder, models.text_encoder_2), ids, strict=False)
    ]
    clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    t5 = models.text_encoder_3(ids[2])[0]
    if t5_kept is not None:
        t5 = t5 * t5_kept[:, None, None].to(t5.dtype)
    return Prompts(torch.cat([output.text_embeds for output in outputs], dim=-1), torch.cat([clip, t5], dim=1))


def predict(
    transformer: SD3Transformer2DModel, noisy: torch.Tensor, timestep: torch.Tensor, prompts: Prompts
) -> torch.Tensor:
    """Velocity of `noisy` [B, 16, h, w], float32, at `timestep` = sigma in 0..1 [B]."""
    return transformer(
        hidden_states=noisy.to(prompts.states.dtype),
        timestep=timestep * 1000,
        encoder_hidden_states=prompts.states,
        pooled_projections=prompts.pooled,
        return_dict=False,
    )[0].float()


def flow_loss(models: Models, transformer: SD3Transformer2DModel, batch: Noised) -> torch.Tensor:
    """Mean squared error of the velocity (Lipman et al. 2023, arXiv:2210.02747)."""
    kept = (torch.rand_like(batch.timestep) >= NO_T5).float()
    velocity = predict(transformer, batch.noisy, batch.timestep, encode_prompts(models, batch.ids, kept))
    return F.mse_loss(velocity, batch.velocity)


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """A trained one; its configuration does not say where it was read from, which diffusers would have it say."""
    trained = AutoencoderKL.from_pretrained(folder)
    config = {key: value for key, value in trained.config.items() if not key.startswith("_")}
    autoencoder = AutoencoderKL.from_config(config)
    autoencoder.load_state_dict(trained.state_dict())
    return autoencoder


def train(out: Path, work: Path, scale: float, seed: int, device: torch.device, autoencoder: Path) -> None:
    """Both stages at `scale` times their budgets, then the folder `out` with training.json beside the models."""
    prepare_gpu()
    models = build_models(seed, load_autoencoder(autoencoder))
    budgets = {name: budget.scaled(scale) for name, budget in BUDGETS.items()}
    readers = {
        "text_encoder": models.text_encoder,
        "text_encoder_2": models.text_encoder_2,
        "text_encoder_3": models.text_encoder_3,
    }
    for part in (models.vae, models.transformer, *readers.values()):
        part.to(device, working_type(device))

    def tokenize(captions: Sequence[str]) -> Ids:
        ids = (
            padded_ids(models.tokenizer, captions, CLIP_TOKENS),
            padded_ids(models.tokenizer_2, captions, CLIP_TOKENS),
            padded_ids(models.tokenizer_3, captions, T5_LENGTH),
        )
        return tuple(part.to(device) for part in ids)

    empty = tokenize([""])

    def reading() -> None:
        def encode(ids: Ids) -> list[torch.Tensor]:
            prompts = encode_prompts(models, ids)
            widths = [models.text_encoder.config.projection_dim, models.text_encoder_2.config.projection_dim]
            return [*prompts.pooled[:, None].split(widths, dim=-1), prompts.states[:, CLIP_TOKENS:]]

        share = train_reading(list(readers.values()), tokenize, encode, budgets["reading"], seed, device)
        print(f"reading: all encoders are right on {share:.4f} of fresh captions", flush=True)

    def flow() -> None:
        torch.manual_seed(seed + 1)
        budget, rng = budgets["flow"], random.Random(seed + 1)
        examples = encode_all(models.vae, tokenize, budget, seed, device)
        fast = compiled_twin(models.transformer)
        rates = [(models.transformer, 1e-3), *((reader, 2e-4) for reader in readers.values())]

        def loss(kind: Kind) -> torch.Tensor:
            transformer = fast if kind == USUAL else models.transformer
            return flow_loss(models, transformer, draw_batch(examples, kind, budget.batch, empty, lambda tokens: SHIFT))

        optimise(rates, loss, budget.steps, "flow", lambda: draw_kind(rng), lambda: check(3.5))

    def check(scale: float) -> str:
        def prepare(captions: Sequence[str]) -> Velocity:
            prompts, nothing = encode_prompts(models, tokenize(captions)), encode_prompts(models, empty)
            both = Prompts(
                torch.cat([prompts.pooled, nothing.pooled.expand_as(prompts.pooled)]),
                torch.cat([prompts.states, nothing.states.expand_as(prompts.states)]),
            )

            def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
                guided, free = predict(models.transformer, latents.repeat(2, 1, 1, 1), sigma.repeat(2), both).chunk(2)
                return free + scale * (guided - free)

            return velocity

        count = budgets["flow"].batch // 2
        return f"guidance {scale}: {judge_samples(prepare, models.vae, lambda tokens: SHIFT, count, device)}"

    seconds = {"reading": run_stage("reading", readers, work, reading)}
    seconds["flow"] = run_stage("flow", {"transformer": models.transformer, **readers}, work, flow)
    save_pipeline(models, out)
    write_report(out, device, seed, scale, budgets, seconds)


def main() -> None:
    """The command line."""
    parser = command_line(__doc__, Path("build/sd35-tiny"))
    parser.add_argument(
        "--autoencoder",
        type=Path,
        default=Path(__file__).parent / "flux-tiny" / "vae",
        help="a trained one of 16 channels (default: flux-tiny's)",
    )
    args = parser.parse_args()
    train(args.out, args.work, args.scale, args.seed, torch.device(args.device), args.autoencoder)


if __name__ == "__main__":
    main()
