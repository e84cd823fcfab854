"""What a client must know of FLUX.1-dev, for tests that are about its sizes."""

from ditforge.model import Model, Schedule

MODEL = Model(
    name="dev",
    latent_channels=16,
    vae_factor=8,
    size_multiple=16,
    default_size=1024,
    max_size=4096,
    default_steps=28,
    guidance="embedded",
    default_guidance=3.5,
    schedule=Schedule(kind="fixed"),
    max_tokens={"clip": 77, "t5": 512},
)
