"""flux-tiny's architecture: the classes of FLUX.1-dev at nine million parameters, and the folder that holds them."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from scenes import caption, training_scenes
from training import build_autoencoder, build_t5, fill_with_zeros, to_stored_type
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast
from vocabulary import CLIP_LENGTH, clip_tokenizer, save_settings, save_tokenizer, t5_tokenizer


@dataclass
class Models:
    """The parts of a FluxPipeline that have weights or a vocabulary."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    transformer: FluxTransformer2DModel
    tokenizer: CLIPTokenizer
    tokenizer_2: T5TokenizerFast


def build_models(seed: int) -> Models:
    """Untrained models and trained tokenizers."""
    rng = random.Random(seed)
    captions = [caption(scene, rng) for scene in training_scenes(20_000, seed)]
    tokenizer, tokenizer_2 = clip_tokenizer(captions), t5_tokenizer(captions)
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            # transformers pools at the first token with this id
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    text_encoder_2 = build_t5(tokenizer_2, 128)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    _start_as_identity(transformer)
    return Models(build_autoencoder(), text_encoder, text_encoder_2, transformer, tokenizer, tokenizer_2)


def _start_as_identity(transformer: FluxTransformer2DModel) -> None:
    """Zero modulation and output layers."""
    layers = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        layers += [block.norm1.linear, block.norm1_context.linear]
    layers += [block.norm.linear for block in transformer.single_transformer_blocks]
    fill_with_zeros(layers)


def save_pipeline(models: Models, folder: Path) -> None:
    """Writes a diffusers folder in bfloat16, the type FLUX.1 is stored in, with FLUX.1-dev's scheduler.

    The models themselves end in bfloat16.
    """
    parts = models.vae, models.text_encoder, models.text_encoder_2, models.transformer
    to_stored_type(parts)
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    pipeline = FluxPipeline(
        scheduler=scheduler,
        vae=models.vae,
        text_encoder=models.text_encoder,
        tokenizer=models.tokenizer,
        text_encoder_2=models.text_encoder_2,
        tokenizer_2=models.tokenizer_2,
        transformer=models.transformer,
    )
    pipeline.save_pretrained(folder)
    save_settings(folder)
    save_tokenizer(models.tokenizer, folder / "tokenizer")
