"""The names that the two sides of the wire agree on: models, tensors, parameters, and the metadata of requests.

docs/design.md has the tensors of each component. Nobody may change a name here without a server of yesterday, or a
client of yesterday, noticing.
"""

from __future__ import annotations

# Triton's models.
TOKENIZER, DIT, VAE_DECODER, VAE_ENCODER = "tokenizer", "dit", "vae_decoder", "vae_encoder"
TEXT_ENCODERS, TEXT_ENCODERS_CLIP = "text_encoders", "text_encoders_clip"  # ensembles; the latter without T5

# Parameters in the configuration of the model `dit`.
MODEL_PARAMETER = "ditforge_model"  # what ditforge.served_model writes and reads
ENGINES_PARAMETER = "ditforge_engines"  # a digest of all engines, the same where pictures are the same

# Metadata of a request for a picture: which picture, and the digest of the engines that it was begun with.
PICTURE_KEY, ENGINES_KEY = "ditforge-picture", "ditforge-engines"

# What a text ensemble gives.
PROMPT_EMBEDS, POOLED_EMBEDS, PROMPT_TOKENS = "prompt_embeds", "pooled_embeds", "prompt_tokens"
TEXT_OUTPUTS = (PROMPT_EMBEDS, POOLED_EMBEDS, PROMPT_TOKENS)
