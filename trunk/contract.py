"""The names that the two sides of the wire agree on: models, tensors, parameters, and the metadata of requests.

docs/design.md lists the tensors of each component. If a name here changes, older servers and older clients no longer
understand the new ones.
"""

from __future__ import annotations

# The models in Triton.
TOKENIZER, DIT, VAE_DECODER, VAE_ENCODER = "tokenizer", "dit", "vae_decoder", "vae_encoder"
TEXT_ENCODERS, TEXT_ENCODERS_CLIP = "text_encoders", "text_encoders_clip"  # ensembles; the second one is without T5

# Parameters in the configuration of the model `dit`.
MODEL_PARAMETER = "ditforge_model"  # the description of the model, which ditforge.served_model writes and reads
ENGINES_PARAMETER = "ditforge_engines"  # a digest of all engines; servers with the same digest make the same pictures

# Metadata of each request: an identifier of the picture, and the digest of the engines that it was begun with.
PICTURE_KEY, ENGINES_KEY = "ditforge-picture", "ditforge-engines"

# The front keeps some inputs of `dit` for the later steps of a picture. KEEPS_PARAMETER, which it adds to the model's
# configuration, has their names. A request with KEPT_KEY in its metadata has them, to be kept under that label; or it
# leaves them out, and gets those that are kept. If there are none any more, its status is ABORTED: send them again.
KEEPS_PARAMETER, KEPT_KEY = "ditforge_keeps", "ditforge-kept"

# The name of a folder in /dev/shm, in which a client on the same machine may place its tensors (shared_memory.py). The
# front adds this parameter to the configuration of `dit` too. If a client's file is gone, the status is NOT_FOUND.
SHARED_MEMORY_PARAMETER = "ditforge_shared_memory"

# The tensors of all models: their dtypes, and the names of the dimensions that vary; the batch is the first dimension.
DTYPES = ("FP32", "FP16", "INT32", "UINT8", "BYTES")
VARYING = ("batch", "height", "width", "latent_height", "latent_width")

# What a model's description says the width of: latents, the velocity that the DiT predicts for them, and token ids.
LATENTS, VELOCITY, IDS = "latents", "velocity", "_ids"

# The outputs of a text ensemble.
PROMPT_EMBEDS, POOLED_EMBEDS, PROMPT_TOKENS = "prompt_embeds", "pooled_embeds", "prompt_tokens"
TEXT_OUTPUTS = (PROMPT_EMBEDS, POOLED_EMBEDS, PROMPT_TOKENS)
