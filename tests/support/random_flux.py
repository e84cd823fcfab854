"""A FLUX checkpoint of other sizes, with random weights: wiring that is fixed to one model breaks on it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = [
    "a",
    "an",
    "the",
    "red",
    "green",
    "blue",
    "small",
    "large",
    "circle",
    "square",
    "on",
    "above",
    "below",
    "left",
    "right",
    "of",
    "background",
]


TEXT_LENGTH = 40


def schnell(seed: int = 0) -> FluxPipeline:
    """A pipeline shaped like FLUX.1-schnell (no guidance embedding, fixed shift), unlike flux-tiny in every size."""
    torch.manual_seed(seed)
    clip_tokenizer, t5_tokenizer = character_clip_tokenizer(), word_t5_tokenizer(max_tokens=TEXT_LENGTH)
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=clip_tokenizer.model_max_length,
        eos_token_id=clip_tokenizer.eos_token_id,
        bos_token_id=clip_tokenizer.bos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=56,
        d_kv=12,
        d_ff=96,
        num_layers=2,
        num_heads=5,
        feed_forward_proj="gated-gelu",
    )
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=24,
        num_attention_heads=3,
        joint_attention_dim=56,
        pooled_projection_dim=48,
        guidance_embeds=False,
        axes_dims_rope=(4, 8, 12),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 24),
        latent_channels=16,
        norm_num_groups=4,
        sample_size=96,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for name, parameter in transformer.named_parameters():  # so that modulation and output are not near zero
        if name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.8 / parameter.shape[1] ** 0.5)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae.eval(),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=clip_tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=t5_tokenizer,
        transformer=transformer.eval(),
    )


def save_schnell(folder: Path, seed: int = 0) -> Path:
    """Save such a checkpoint to `folder`/random-schnell."""
    path = folder / "random-schnell"
    schnell(seed).save_pretrained(path, safe_serialization=True)
    save_settings(path)
    return path


def save_settings(path: Path) -> None:
    """Say in a folder's ditforge.json what save_schnell() says: T5's input is shorter than schnell's."""
    (path / "ditforge.json").write_text(json.dumps({"variant": "schnell", "text_length": TEXT_LENGTH}))


def save_wide(folder: Path) -> Path:
    """Save a checkpoint to `folder`/random-wide whose DiT is so wide that its engine is little else than weights."""
    pipeline = schnell()
    torch.manual_seed(0)
    pipeline.transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=8,
        joint_attention_dim=56,
        pooled_projection_dim=48,
        guidance_embeds=False,
        axes_dims_rope=(16, 56, 56),
    ).to(torch.bfloat16)
    path = folder / "random-wide"
    pipeline.save_pretrained(path, safe_serialization=True)
    save_settings(path)
    return path


def character_clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with no merges: a token a character."""
    characters = [chr(c) for c in range(33, 127)]
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=33)


def word_t5_tokenizer(max_tokens: int) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer over a few words and all letters, with T5's special tokens."""
    letters = [chr(c) for c in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -4.0) for word in WORDS] + [(letter, -8.0) for letter in letters]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_tokens,
    )
