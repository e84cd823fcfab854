"""What no network reads of a checkpoint: tensors, fields of configurations, components and files.

All of it is reported. It is an error where leaving it out changes the picture.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ditforge.errors import UserError
from ditforge.export.checkpoint.diffusers_folder import CONFIG, INDEX, SCHEDULER, Checkpoint
from ditforge.export.checkpoint.load_report import LoadReport, shown
from ditforge.export.checkpoint.weights import Weights
from ditforge.export.network import Network

LIBRARIES = ("diffusers", "transformers")
TWIN = "they are other names of tensors that are read"
# Fields that libraries write into configurations, and that change nothing in a network that is executed: who wrote the
# file, and what is for training or for other uses of such a network.
WITHOUT_EFFECT = {
    *("architectures", "torch_dtype", "dtype", "transformers_version", "model_type", "gradient_checkpointing"),
    *("dropout", "output_past", "n_positions", "task_specific_params", "finetuning_task", "pruned_heads"),
    *("torchscript", "use_bfloat16", "tf_legacy_loss", "tokenizer_class", "prefix", "add_cross_attention"),
    *("cross_attention_hidden_size", "tie_encoder_decoder", "tie_word_embeddings", "is_decoder", "sep_token_id"),
}
QUANTISED = "quantization_config"  # tells how the weights are stored, and is read with them
OF_PIPELINES = frozenset({"requires_safety_checker"})  # fields of a model_index.json that are no components
# Components of pipelines that make no picture from text.
SPARE = {
    "image_encoder": "it is for pictures as prompts",
    "feature_extractor": "it is for pictures as prompts",
    "safety_checker": "it looks at finished pictures, and is no part of the model",
}
NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")


def report_tensors(
    networks: Collection[Network], weights: Weights, read: Collection[str], twins: Collection[str], report: LoadReport
) -> None:
    """Report the tensors of a component that none of its networks reads.

    `read` has the keys that are read, and `twins` other keys of the same tensors. Raises UserError for a tensor that
    must be a part of the network: any one of a DiT or an autoencoder, and in a text encoder one beside those that are
    read, such as a layer more than the configuration says.
    """
    left: dict[str, list[str]] = {}
    for key in weights.shards:
        if key not in read:
            left.setdefault(reason_of(networks, key) or (TWIN if key in twins else ""), []).append(key)
    unknown = left.pop("", [])
    component = next(network.weights for network in networks)
    known = {start for key in read for start in starts(key)}
    parts = [key for key in unknown if not component.startswith("text_encoder") or known & set(starts(key))]
    if parts:
        problem = f"{weights.folder} holds {shown(parts)}, which the network that {CONFIG} describes does not have"
        raise UserError(problem, f"{CONFIG} is not the one of these weights: copy it again from where they came from")
    for reason, keys in left.items():
        report.add(f"{shown(keys)} in {weights.folder}", reason, expected=True)
    if unknown:
        report.add(f"{shown(unknown)} in {weights.folder}", "the network has no such tensors, so they are ignored")


def reason_of(networks: Iterable[Network], key: str) -> str:
    """Return why none of the networks needs the tensor `key`; "" if that is not known."""
    for network in networks:
        names = [key, *(key.removeprefix(prefix) for prefix in network.key_prefixes)]
        for pattern, reason in network.unread.items():
            if any(pattern.fullmatch(name) for name in names):
                return reason
    return ""


def starts(key: str) -> list[str]:
    """Return the module of a tensor, and the lists of layers that it is in, with * for the numbers of layers."""
    name = NUMBERS.sub("*", key)
    return [name.rpartition(".")[0], *(name[: match.end()] for match in re.finditer(r"\*", name))]


def report_fields(checkpoint: Checkpoint, component: str, report: LoadReport) -> None:
    """Report the fields of a component's configuration that its class does not know.

    Nothing is known of a class that is in none of the LIBRARIES, so nothing is reported.
    """
    entry = checkpoint.config("", INDEX).get(component)
    cls = class_named(entry) if isinstance(entry, list) else None
    if cls is None:
        return
    config, where = checkpoint.config(component), f"{checkpoint.folder / component / CONFIG}"
    add_fields(config, fields_of(cls), where, report)
    if moved := [name for name in ("latents_mean", "latents_std") if config.get(name) is not None]:
        report.add(f"{shown(moved)} in {where}", "the pipelines of this family scale latents by other fields")


def report_scheduler(checkpoint: Checkpoint, report: LoadReport) -> None:
    """Report the fields of the scheduler's configuration that its class does not know."""
    entry = checkpoint.config("", INDEX).get(SCHEDULER[0])
    if isinstance(entry, list) and (cls := class_named(entry)) is not None:
        add_fields(checkpoint.config(*SCHEDULER), fields_of(cls), str(checkpoint.folder.joinpath(*SCHEDULER)), report)


def add_fields(config: Mapping[str, Any], known: Collection[str], where: str, report: LoadReport) -> None:
    """Report the fields of a configuration that are not among the known ones."""
    from transformers import GenerationConfig

    generation = GenerationConfig().to_dict()  # type: ignore[no-untyped-call]
    harmless = WITHOUT_EFFECT | generation.keys()  # no text is generated
    left = [name for name in config if name not in known and name != QUANTISED]
    spare = [name for name in left if name.startswith("_") or name in harmless]
    other = [name for name in left if name not in spare]
    if spare:
        report.add(f"{shown(spare)} in {where}", "such fields change nothing in the network", expected=True)
    if other:
        report.add(f"{shown(other)} in {where}", "the class of this component has no such fields, so they are ignored")


def class_named(entry: list[Any]) -> Any:
    """Return the class that an entry of model_index.json names; None if it is in none of the LIBRARIES."""
    library, name = (*entry, None, None)[:2]
    return getattr(importlib.import_module(library), str(name), None) if library in LIBRARIES else None


def fields_of(cls: Any) -> set[str]:
    """Return the names of the fields that the configuration of a class of diffusers or transformers has."""
    config_class = getattr(cls, "config_class", None)
    if config_class is None:
        return set(inspect.signature(cls.__init__).parameters)
    return {*config_class().to_dict(), *config_class.attribute_map}


def report_index(checkpoint: Checkpoint, networks: Iterable[Network], report: LoadReport) -> None:
    """Report what model_index.json names and no network is made of."""
    used = {network.weights for network in networks}
    for name, value in checkpoint.config("", INDEX).items():
        where = f"{name} in {checkpoint.folder / INDEX}"
        if name.startswith(("_", "tokenizer", "scheduler")) or name in used or value in (None, [None, None]):
            continue
        if not isinstance(value, list):
            if name not in OF_PIPELINES:
                report.add(where, "such a field of the pipeline is not known, so it is ignored")
            continue
        known = SPARE.get(name)
        report.add(where, known or "a picture is made without this component, so it is ignored", expected=bool(known))
