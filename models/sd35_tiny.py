"""sd35-tiny's architecture: the classes of Stable Diffusion 3.5 medium at nine million parameters, and their folder."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from scenes import caption, training_scenes
from training import build_t5, fill_with_zeros, to_stored_type
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)
from vocabulary import clip_tokenizer, save_settings, save_tokenizer, t5_tokenizer

SHIFT = 3.0  # of the schedule, at every size
CLIP_TOKENS = 24  # captions have 20 at most, and each of CLIP's tokens is one of the transformer's
CLIP_WIDTHS = (64, 96)  # of CLIP-L and CLIP-G
WIDTH = sum(CLIP_WIDTHS)  # of T5 and of what the transformer is told


@dataclass
class Models:
    """The parts of a StableDiffusion3Pipeline that have weights or a vocabulary."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection
    text_encoder_3: T5EncoderModel
    transformer: SD3Transformer2DModel
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    tokenizer_3: T5TokenizerFast


def build_models(seed: int, autoencoder: AutoencoderKL) -> Models:
    """Untrained models around a trained autoencoder, and trained tokenizers."""
    rng = random.Random(seed)
    captions = [caption(scene, rng) for scene in training_scenes(20_000, seed)]
    clips = []
    for _ in CLIP_WIDTHS:
        tokenizer = clip_tokenizer(captions)
        tokenizer.model_max_length = CLIP_TOKENS
        clips.append(tokenizer)
    clips[1].pad_token = "!"  # CLIP-G's, the first piece of the vocabulary
    tokenizer_3 = t5_tokenizer(captions)
    torch.manual_seed(seed)
    encoders = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                projection_dim=width,
                num_hidden_layers=3,
                num_attention_heads=width // 32,
                max_position_embeddings=CLIP_TOKENS,
                hidden_act=activation,
                bos_token_id=tokenizer.bos_token_id,
                # transformers pools at the first token with this id
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        for tokenizer, width, activation in zip(clips, CLIP_WIDTHS, ("quick_gelu", "gelu"), strict=True)
    ]
    text_encoder_3 = build_t5(tokenizer_3, WIDTH)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=WIDTH,
        caption_projection_dim=160,
        pooled_projection_dim=WIDTH,
        out_channels=16,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    _start_as_identity(transformer)
    return Models(autoencoder, *encoders, text_encoder_3, transformer, *clips, tokenizer_3)


def _start_as_identity(transformer: SD3Transformer2DModel) -> None:
    """Zero modulation and output layers."""
    layers = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        layers += [block.norm1.linear, block.norm1_context.linear]
    fill_with_zeros(layers)


def save_pipeline(models: Models, folder: Path) -> None:
    """Writes a diffusers folder in bfloat16 with Stable Diffusion 3.5's scheduler. The models end in bfloat16."""
    parts = models.vae, models.text_encoder, models.text_encoder_2, models.text_encoder_3, models.transformer
    to_stored_type(parts)
    pipeline = StableDiffusion3Pipeline(
        transformer=models.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT),
        vae=models.vae,
        text_encoder=models.text_encoder,
        tokenizer=models.tokenizer,
        text_encoder_2=models.text_encoder_2,
        tokenizer_2=models.tokenizer_2,
        text_encoder_3=models.text_encoder_3,
        tokenizer_3=models.tokenizer_3,
    )
    pipeline.save_pretrained(folder)
    save_settings(folder)
    save_tokenizer(models.tokenizer, folder / "tokenizer")
    save_tokenizer(models.tokenizer_2, folder / "tokenizer_2")
