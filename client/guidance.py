"""Guidance: combines the DiT's velocities with the prompt, with the negative prompt and with fewer blocks into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ditforge.client.request import Request
from ditforge.client.samplers import Array, Denoise
from ditforge.model import Model, SkipLayers

Arrays = Mapping[str, npt.NDArray[Any]]
Evaluate = Callable[[Arrays], Array]  # calls the DiT: its inputs, batch first → velocity [B, C, h, w]


def guided(
    evaluate: Evaluate,
    model: Model,
    request: Request,
    sigmas: npt.NDArray[np.float32],
    text: Arrays,
    negative: Arrays | None,
) -> Denoise:
    """Return the function that samplers call for the velocity of a request's N pictures. It calls the DiT once.

    `text` and `negative` are the embeddings of the prompts and of the negative prompts, both [N, …].

    If `negative` is given, classifier-free guidance is used: v = v_negative + scale (v_text - v_negative), computed in
    a batch of 2 N (Ho and Salimans 2022, arXiv:2207.12598). Skip-layer guidance, in some of the steps, adds its scale
    times (v_text - v_skipped), computed in a batch of 3 N (Stability-AI/sd3.5, and diffusers'
    StableDiffusion3Pipeline).
    """
    scale, skip, count = request.cfg_scale(model), model.skip_layers, len(request.prompts)
    parts = [text] if negative is None else [negative, text]
    inputs = joined(parts, model, request, skipped=False)
    inputs_in_window = joined([*parts, text], model, request, skipped=True) if request.skip_layer_guidance else {}

    def denoise(latents: Array, sigma: float) -> Array:
        in_window = bool(skip and inputs_in_window and is_in_window(sigma, sigmas, skip))
        used = inputs_in_window if in_window else inputs
        batch = len(used["prompt_embeds"])
        timestep = np.full(batch, sigma, np.float32)
        if negative is None:
            return evaluate({"latents": latents, "timestep": timestep, **used})
        velocity = evaluate({"latents": np.concatenate([latents] * (batch // count)), "timestep": timestep, **used})
        without, with_prompt, *fewer = np.split(velocity, batch // count)
        velocity = without + scale * (with_prompt - without)
        return velocity + request.skip_layer_guidance * (with_prompt - fewer[0]) if fewer else velocity

    return denoise


def joined(parts: list[Arrays], model: Model, request: Request, skipped: bool) -> dict[str, npt.NDArray[Any]]:
    """The DiT's inputs that are the same in all steps, for the embeddings in `parts`, one after the other in the batch.

    If `skipped` is true, the DiT leaves out some blocks for the last part.
    """
    inputs = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    batch = len(inputs["prompt_embeds"])
    if model.guidance == "embedded":
        inputs["guidance"] = np.full(batch, request.guidance, np.float32)
    if model.skip_layers:
        mask = np.zeros((batch, model.skip_layers.blocks), np.float32)
        if skipped:
            mask[-len(request.prompts) :, list(model.skip_layers.layers)] = 1
        inputs["skip_layers"] = mask
    return inputs


def is_in_window(sigma: float, sigmas: npt.NDArray[np.float32], skip: SkipLayers) -> bool:
    """Whether skip-layer guidance is used at noise level `sigma`.

    It is if start * N < i < stop * N, where i is the number of the N + 1 levels in `sigmas` that are above `sigma`.
    """
    step, steps = int((sigmas > sigma).sum()), len(sigmas) - 1
    return skip.start * steps < step < skip.stop * steps
