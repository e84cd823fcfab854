"""The Stable Diffusion 3.5 family (medium, large, large-turbo and their fine-tunes), and Stable Diffusion 3 medium.

The DiT is in sd3_dit.py. The outputs of CLIP and T5 are concatenated by a graph of its own. Source: Esser et al. 2024
(arXiv:2403.03206), Stability-AI/sd3.5, and diffusers' StableDiffusion3Pipeline.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from ditforge.contract import DIT
from ditforge.errors import UserError
from ditforge.export import vae
from ditforge.export.checkpoint.diffusers_folder import CONFIGS, INDEX, Checkpoint, t5_parts, with_defaults
from ditforge.export.checkpoint.schedule import flow_schedule
from ditforge.export.checkpoint.variants import Variant, variant_of
from ditforge.export.families import Family
from ditforge.export.families.sd3_dit import StableDiffusion3Velocity
from ditforge.export.families.sd3_layout import LAYOUT, PUBLISHED, T5_TOKENS, VARIANTS
from ditforge.export.network import BATCH, Dim, Network, Port
from ditforge.export.quantisation import reference_pipeline
from ditforge.export.quantisation.precision import Precision, network_dtype, text_dtype
from ditforge.export.text_encoders import clip, t5
from ditforge.export.text_encoders.tokenizers import Tokenizer, read_tokenizer
from ditforge.model import Model, SkipLayers
from ditforge.option import setting

# The largest side of a picture, relative to the side that the model was trained for. The table of positions may limit
# it further.
MAX_SIZE_RATIO = 4
# The linears of the blocks, without those of the modulation (norm…), whose errors reach every token.
LINEARS = re.compile(r"transformer_blocks\.\d+\.(?!.*norm).*\.weight")
# Skip-layer guidance as the authors recommend it for medium, which has 24 blocks (its model card; diffusers' defaults).
SKIPPED, OF_BLOCKS = (7, 8, 9), 24
SKIP_SCALE, SKIP_START, SKIP_STOP = 2.8, 0.01, 0.2


class JoinedText(nn.Module):
    """Concatenate the outputs of the text encoders: → prompt_embeds [B, tokens, width], pooled_embeds [B, P].

    The hidden states of the two CLIPs are concatenated along the channels and padded with zeros to `width`; T5's tokens
    follow. The pooled outputs of the two CLIPs are concatenated.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(
        self,
        clip_l_states: Tensor,
        clip_l_pooled: Tensor,
        clip_g_states: Tensor,
        clip_g_pooled: Tensor,
        t5_states: Tensor,
    ) -> tuple[Tensor, Tensor]:
        states = torch.cat((clip_l_states, clip_g_states), dim=2)
        states = nn.functional.pad(states, (0, self.width - states.shape[2]))
        return torch.cat((states, t5_states), dim=1), torch.cat((clip_l_pooled, clip_g_pooled), dim=1)


class JoinedClip(nn.Module):
    """Do the same as JoinedText with `tokens` zeros in T5's place.

    The model was trained to work without T5: its output was at times replaced by zeros (Esser et al. 2024, section
    5.3.3).
    """

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.join = JoinedText(width)
        self.shape = tokens, width

    def forward(
        self, clip_l_states: Tensor, clip_l_pooled: Tensor, clip_g_states: Tensor, clip_g_pooled: Tensor
    ) -> tuple[Tensor, Tensor]:
        zeros = clip_l_states.new_zeros(clip_l_states.shape[0], *self.shape)
        result: tuple[Tensor, Tensor] = self.join(clip_l_states, clip_l_pooled, clip_g_states, clip_g_pooled, zeros)
        return result


def joined(clips: list[Network], states: Network | None, tokens: int, width: int, precision: Precision) -> Network:
    """Describe the network that joins CLIP's outputs and T5's `states` to the contract's embeddings.

    If `states` is None, `tokens` zeros take the place of T5's output.
    """
    out = text_dtype(precision)
    inputs = {name: port for network in clips for name, port in network.outputs.items()}
    pooled = sum(fixed(port.shape[1]) for name, port in inputs.items() if name.endswith("_pooled"))
    length = tokens + fixed(inputs["clip_l_states"].shape[1])
    return Network(
        name="join" if states else "join_clip",
        build=lambda: JoinedText(width) if states else JoinedClip(width, tokens),
        inputs={**inputs, **(states.outputs if states else {})},
        outputs={"prompt_embeds": Port(out, (BATCH, length, width)), "pooled_embeds": Port(out, (BATCH, pooled))},
        weights=clips[0].weights,  # any folder will do, because this network has no weights
        dtype=out,
        reason="as its inputs",
    )


def fixed(size: int | Dim) -> int:
    """Return the size of a dimension that does not vary."""
    assert isinstance(size, int), f"{size} varies"
    return size


def dit(config: dict[str, Any], tokens: int, precision: Precision) -> Network:
    """Describe the DiT that has diffusers' configuration `config`. `tokens` counts the text tokens of CLIP and T5."""
    patch = config["patch_size"]
    size = Dim("latent_height", patch), Dim("latent_width", patch)
    text = text_dtype(precision)
    inputs = {
        "latents": Port(torch.float32, (BATCH, config["in_channels"], *size)),
        "timestep": Port(torch.float32, (BATCH,)),
        "prompt_embeds": Port(text, (BATCH, tokens, config["joint_attention_dim"])),
        "pooled_embeds": Port(text, (BATCH, config["pooled_projection_dim"])),
    }
    if skip_layers(config):
        inputs["skip_layers"] = Port(torch.float32, (BATCH, config["num_layers"]))
    return Network(
        name=DIT,
        build=lambda: StableDiffusion3Velocity(SD3Transformer2DModel.from_config(config)),
        inputs=inputs,
        outputs={"velocity": Port(torch.float32, (BATCH, config["out_channels"] or config["in_channels"], *size))},
        weights="transformer",
        dtype=network_dtype(precision),
        linears=LINEARS,
    )


def skip_layers(config: dict[str, Any]) -> SkipLayers | None:
    """Return the settings of skip-layer guidance for a model built like medium (MMDiT-X); None for all others.

    A model of another depth skips the blocks at the same relative depth.
    """
    if not config["dual_attention_layers"]:
        return None
    blocks = config["num_layers"]
    layers = sorted({layer * blocks // OF_BLOCKS for layer in SKIPPED})
    return SkipLayers(blocks=blocks, layers=tuple(layers), scale=SKIP_SCALE, start=SKIP_START, stop=SKIP_STOP)


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the DiT's configuration, with diffusers' defaults for keys that the file leaves out."""
    return with_defaults(SD3Transformer2DModel, checkpoint.config("transformer"))


def variant(checkpoint: Checkpoint) -> Variant:
    """Return the variant that the checkpoint is. Raises UserError if its files leave it open."""
    return variant_of(checkpoint, VARIANTS, read_config(checkpoint))


def has_t5(checkpoint: Checkpoint) -> bool:
    """Return whether the checkpoint comes with T5. Its index names a class for T5, or null if it was left out."""
    return bool(t5_parts(checkpoint.config("", INDEX)))


def check_t5(checkpoint: Checkpoint) -> None:
    """Raise UserError if the index names T5 but T5's files are missing. The error says how to leave T5 out."""
    parts = t5_parts(checkpoint.config("", INDEX))
    missing = [name for name in parts if name not in checkpoint.tensors and not (checkpoint.folder / name).is_dir()]
    if missing:
        problem = f"{checkpoint.folder} lacks {' and '.join(missing)}, which is T5 and which its {INDEX} names"
        raise UserError(
            problem, f"copy it from where the checkpoint came from, or leave T5 out: {setting('text_encoders', 'clip')}"
        )


def networks(checkpoint: Checkpoint, precision: Precision) -> list[Network]:
    """Describe all networks of the checkpoint, in the order in which data flows.

    A checkpoint with T5 has two networks that join the text encoders' outputs, because a prompt may do without T5.
    """
    config = read_config(checkpoint)
    length = {tokenizer.name: tokenizer.max_tokens for tokenizer in read_tokenizers(checkpoint)}
    folders = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
    text = [
        clip.clip_penultimate(name, checkpoint.config(folder), folder, length[name], precision)
        for name, folder in folders.items()
    ]
    width, tokens = config["joint_attention_dim"], length.get("t5", T5_TOKENS)
    joins = [joined(text, None, tokens, width, precision)]
    if has_t5(checkpoint):
        states = t5.t5_hidden_states(checkpoint.config("text_encoder_3"), "text_encoder_3", tokens, precision)
        states = replace(states, outputs={"t5_states": states.outputs["prompt_embeds"]})
        joins += [states, joined(text, states, tokens, width, precision)]
    tokens += length["clip_l"]
    return [*text, *joins, dit(config, tokens, precision), *vae.vae(vae.read_config(checkpoint), precision)]


def read_tokenizers(checkpoint: Checkpoint) -> list[Tokenizer]:
    """Return CLIP's two tokenizers, and T5's if the checkpoint has T5."""
    check_t5(checkpoint)
    positions = min(clip.positions_of(checkpoint.config(name)) for name in ("text_encoder", "text_encoder_2"))
    clip_l = read_tokenizer(checkpoint, "tokenizer", "clip_l", limit=positions)
    # StableDiffusion3Pipeline cuts the prompts of both CLIPs at the first one's length.
    tokenizers = [clip_l, read_tokenizer(checkpoint, "tokenizer_2", "clip_g", length=clip_l.max_tokens)]
    if has_t5(checkpoint):
        tokenizers.append(read_tokenizer(checkpoint, "tokenizer_3", "t5", length=variant(checkpoint).text_length))
    return tokenizers


def model(checkpoint: Checkpoint) -> Model:
    """Return what a client must know. Steps and guidance are those of the checkpoint's variant."""
    transformer, autoencoder = read_config(checkpoint), vae.read_config(checkpoint)
    scheduler = checkpoint.config("scheduler", "scheduler_config.json")
    pixels, patch = vae.factor(autoencoder), transformer["patch_size"]
    known = variant(checkpoint)
    size = transformer["sample_size"] * pixels
    return Model(
        name=checkpoint.name,
        latent_channels=autoencoder["latent_channels"],
        vae_factor=pixels,
        size_multiple=pixels * patch,
        default_size=size,
        max_size=min(size * MAX_SIZE_RATIO, transformer["pos_embed_max_size"] * patch * pixels),
        default_steps=known.steps,
        guidance=known.guidance,
        default_guidance=known.scale,
        skip_layers=skip_layers(transformer),
        schedule=flow_schedule(scheduler, scheduler.get("_class_name", ""), patch, pipeline_spaces=False),
        max_tokens={tokenizer.name: tokenizer.max_tokens for tokenizer in read_tokenizers(checkpoint)},
        t5="optional" if has_t5(checkpoint) else "absent",
    )


def load_pipeline(checkpoint: Checkpoint) -> StableDiffusion3Pipeline:
    """Load diffusers' own pipeline, for calibration."""
    without = {} if has_t5(checkpoint) else {"text_encoder_3": None, "tokenizer_3": None}
    return reference_pipeline.load(
        StableDiffusion3Pipeline, checkpoint, networks(checkpoint, Precision("fp32")), **without
    )


def run_pipeline(loaded: StableDiffusion3Pipeline, model: Model, prompt: str, steps: int, seed: int) -> None:
    """Run all steps of a picture, without decoding it."""
    reference_pipeline.run(loaded, model, prompt, steps, seed, model.max_tokens.get("t5", T5_TOKENS))


FAMILY = Family(
    name="sd3",
    title="Stable Diffusion 3.5",
    pipeline=LAYOUT.pipeline,
    model=model,
    read_tokenizers=read_tokenizers,
    networks=networks,
    read_config=read_config,
    linears=LINEARS,
    load_pipeline=load_pipeline,
    run_pipeline=run_pipeline,
    layout=LAYOUT,
    published={name: CONFIGS / name for name in PUBLISHED},
    variants=VARIANTS,
)
