"""Load and run diffusers' own pipelines, for calibration and for measuring linears."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_log
from transformers.utils import logging as transformers_log

from ditforge.errors import UserError
from ditforge.export.checkpoint.diffusers_folder import INDEX, SCHEDULER, Checkpoint
from ditforge.export.graph.tracing import dry_run
from ditforge.export.network import Network
from ditforge.model import Model

LOGS = (diffusers_log, transformers_log)
LIBRARIES = ("diffusers", "transformers")  # a model_index.json may name classes of these libraries only


def load(
    cls: type[DiffusionPipeline], checkpoint: Checkpoint, networks: Iterable[Network], **components: Any
) -> DiffusionPipeline:
    """Load the checkpoint's pipeline of the class `cls`, in bf16 onto a GPU, or in fp32 if there is none.

    `networks` are all networks of the checkpoint. `components` replace those of the checkpoint; None leaves one out.
    Tensors that are not from the checkpoint's folder (Checkpoint.tensors), or that diffusers would read otherwise, are
    read one at a time, directly to the device. Raises UserError if the folder's index names a class of another library.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    index, networks = checkpoint.config("", INDEX), list(networks)
    made = {
        name: filled(checkpoint, name, [n for n in networks if n.weights == name], device, dtype)
        for name in dict.fromkeys((*checkpoint.tensors, *(network.weights for network in networks)))
        if name not in components and (index.get(name) or [None])[-1] and checkpoint.read_otherwise(name)
    }
    if SCHEDULER in checkpoint.configs:
        made[SCHEDULER[0]] = class_of(checkpoint, SCHEDULER[0]).from_config(checkpoint.config(*SCHEDULER))
    with silent():
        pipeline = cls.from_pretrained(checkpoint.folder, dtype=dtype, **made, **components).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def filled(
    checkpoint: Checkpoint, component: str, networks: Iterable[Network], device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """Make the component's module with the checkpoint's tensors, which must have been checked against `networks`."""
    module = unfilled(checkpoint, component)
    weights, state = checkpoint.weights(component), {}
    for network in networks:
        for names, _ in dry_run(network):
            key = weights.find(names, network.key_prefixes)
            assert key is not None, f"{weights.folder} lacks {names[0]}"
            if names[0] not in state:  # the two networks of an autoencoder may share weights
                state.update(dict.fromkeys(names, weights.read(key).to(device, dtype)))
    module.load_state_dict(state, strict=False, assign=True)
    left = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    assert not left, f"{component} has weights that no network has: {left[:3]}"
    result: torch.nn.Module = module.eval()
    return result


def unfilled(checkpoint: Checkpoint, component: str) -> torch.nn.Module:
    """Make the component's module as its configuration says, with parameters that have no memory."""
    cls, config = class_of(checkpoint, component), checkpoint.config(component)
    with init_empty_weights():
        if hasattr(cls, "from_config"):
            module: torch.nn.Module = cls.from_config(config)
        else:  # transformers has only a private method for this
            module = cls._from_config(cls.config_class.from_dict(config))
    return module


def class_of(checkpoint: Checkpoint, component: str) -> Any:
    """Return the class that the checkpoint's index names. Raises UserError if it is in none of the LIBRARIES."""
    library, name = checkpoint.config("", INDEX)[component]
    found = getattr(importlib.import_module(library), name, None) if library in LIBRARIES else None
    if found is None:
        problem = f"{checkpoint.folder / INDEX} says that {component} is a {name} of {library}"
        raise UserError(problem, f"copy it again; the libraries are {' and '.join(LIBRARIES)}, as installed")
    return found


def run(
    pipeline: DiffusionPipeline, model: Model, prompt: str, steps: int, seed: int, t5_tokens: int, **options: Any
) -> None:
    """Run all steps of a picture with the model's default size and guidance, without decoding it.

    `options` are the pipeline's own.
    """
    with silent():
        pipeline(
            prompt,
            height=model.default_size,
            width=model.default_size,
            num_inference_steps=steps,
            guidance_scale=model.default_guidance,
            max_sequence_length=t5_tokens,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
            **options,
        )


@contextmanager
def silent() -> Iterator[None]:
    """Within this context, the libraries show no progress bars, and no warnings about prompts that are cut off.

    Their bars would disturb ditforge's own. The warnings are not needed: calibration takes prompts as they are, and
    what CLIP cuts off is read by T5.
    """
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in LOGS]
    try:
        for log in LOGS:
            log.set_verbosity_error()
            log.disable_progress_bar()
        yield
    finally:
        for log, level, bars in before:
            log.set_verbosity(level)
            if bars:
                log.enable_progress_bar()
