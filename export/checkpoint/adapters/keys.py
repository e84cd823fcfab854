"""The keys in adapter files: which module a tensor belongs to, and which part of an adapter it is.

The spellings are those of PEFT, diffusers, Kohya's sd-scripts, LyCORIS, ComfyUI, OneTrainer and XLabs. Only names are
read here, so this module needs no PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import TypeVar

from ditforge.errors import UserError
from ditforge.option import option

T = TypeVar("T")
NAMED = r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?"  # PEFT can write the name of its adapter between the others
LORA_PARTS = {"lora_down", "lora_up", "lora_mid"}
LOHA_PARTS = {f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
LOKR_PARTS = {f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
SMALL = "|".join(sorted(LOHA_PARTS | LOKR_PARTS, key=len, reverse=True))
# Parts of a fused module that Kohya's scripts number behind its name: MODULE.oft_blocks.0, MODULE.lora_down.1.weight.
NUMBERED = re.compile(r"(?P<module>.+)\.(?P<part>oft_blocks|lora_down|lora_up)\.(?P<number>\d+)(\.weight)?")
# The end of a key, and the part that it means. A group `part` in the pattern is the part itself.
PARTS = tuple(
    (re.compile(rf"(?P<module>.+)(?:{end})"), part)
    for end, part in (
        (rf"\.lora_A{NAMED}(\.weight)?|\.lora_down\.weight|\.lora(_linear_layer)?\.down\.weight", "lora_down"),
        (rf"\.lora_B{NAMED}(\.weight)?|\.lora_up\.weight|\.lora(_linear_layer)?\.up\.weight", "lora_up"),
        (rf"\.lora_B{NAMED}\.bias|\.lora_up\.bias", "lora_up_bias"),
        (r"\.lora_mid\.weight", "lora_mid"),
        (r"(?:(?<=_lora)|(?<=_lora\d))\.down\.weight", "lora_down"),
        (r"(?:(?<=_lora)|(?<=_lora\d))\.up\.weight", "lora_up"),
        (rf"\.lora_magnitude_vector{NAMED}(\.weight)?", "lora_magnitude_vector"),
        (rf"\.(?P<part>{SMALL}){NAMED}", None),
        (rf"\.oft_R{NAMED}\.weight", "oft_R"),
        (r"\.(?P<part>alpha|dora_scale|oft_blocks|rescale|diff|diff_b|w_norm|b_norm|set_weight)", None),
        (r"\.(?P<part>weight|bias)", None),  # PEFT writes modules that it trained as a whole
        (r"(?<=_norm)\.scale", "weight"),  # Black Forest Labs' name of a norm's weight
    )
)
PEFT_WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save(\.[^.]+)?)$")
WHOLE = {"weight", "bias"}  # what an adapter file has beside an adapter, and a checkpoint has alone
LEFT_OUT = {  # keys of adapter files that are no adapter of a network
    r"bundle_emb\..*": "embeddings for words of the prompt, which an export does not read",
}
ANOTHER = "use a LoRA for this model in place of it"
MERGE = "merge it into a checkpoint with the tool that made it, and export that"
# Adapters that cannot be merged here: a pattern of their keys, their name, and what to do.
OTHER_KINDS = tuple(
    (re.compile(pattern), kind, fix)
    for pattern, kind, fix in (
        (r".*\.([ab][12]|bm)\.weight", "a GLoRA", MERGE),
        (r".*\.(on_input|ia3_l(\..*)?)", "an IA3 adapter", MERGE),
        (r".*\.(lambda_layer|[qp]_layer\.weight)", "a T-LoRA, whose rank changes with the timestep", ANOTHER),
        (r".*\.(vera_lambda_[bd]|vera_[AB])(\..*)?", "a VeRA adapter", MERGE),
        (r".*\.boft_[RsP](\..*)?", "a BOFT adapter of PEFT", MERGE),
        (r".*\.(oft_r(\..*)?|oft_diag)", "an OFT adapter of an old version of its tool", MERGE),
        (r".*\.(lora_E|ranknum)(\..*)?", "an AdaLoRA adapter", MERGE),
        (r".*\.lora_embedding_[AB](\..*)?", "a LoRA of an embedding", MERGE),
        (
            r".*\.(c3a_kernel|fourierft_spectrum|hra_u|miss_block|bone_\w+|shira_weight|randlora_\w+|delora_\w+"
            r"|gralora_\w+|road_\w+|vblora_\w+|waveft_\w+)(\..*)?",
            "an adapter of a kind of PEFT that is not a LoRA",
            MERGE,
        ),
        (
            r".*\.base_layer\.weight",
            "a whole network with an adapter of PEFT inside",
            "save the adapter alone, with PEFT's save_pretrained(), or merge it with merge_and_unload() and save that",
        ),
        (r".*\.lora_(down|up)", "a LoRA that was converted for Nunchaku", "use the LoRA that it was converted from"),
        (
            r"(ip_adapter|image_proj|ip_adapter_proj_model)\..*|.*(to_[kv]_ip|_ip_adapter|ip_adapter_double_stream).*",
            "an IP-Adapter, which reads a picture",
            "leave it out: an export has no input for pictures of that kind",
        ),
        (
            r"(.*\.)?(controlnet_\w+|input_hint_block|control_model|zero_convs)\..*",
            "a ControlNet, which is a network of its own",
            "leave it out: an export has no input for its picture",
        ),
        (r"(.*\.)?(redux_up|redux_down)\..*", "FLUX.1 Redux, which reads a picture", "leave it out"),
        (
            r"emb_params|string_to_param.*|<.+>|clip_[lg]|t5xxl",
            "a textual inversion: an embedding for words of the prompt",
            "leave it out: use a LoRA for this model",
        ),
        (
            r".*\.reshape_weight",
            "a control LoRA, which makes an input of the network wider",
            "leave it out: use a LoRA that changes no input, or none",
        ),
    )
)


@dataclass(frozen=True)
class Key:
    """A key of an adapter file: the name that the file gives to a module, a part, and PEFT's name of the adapter."""

    module: str
    part: str
    adapter: str | None = None


def parse(key: str) -> Key | None:
    """Return the module and the part that a key names; None if the key has no known form."""
    if match := NUMBERED.fullmatch(key):
        return Key(f"{match['module']}.{match['number']}", match["part"])
    for pattern, part in PARTS:
        if match := pattern.fullmatch(key):
            groups = match.groupdict()
            found = part or groups["part"]
            return Key(PEFT_WRAPPERS.sub("", match["module"]), found, groups.get("adapter"))
    return None


def is_adapter(names: Iterable[str]) -> bool:
    """Return whether a file with tensors of these names is an adapter, and no checkpoint."""
    parsed = [parse(name) for name in names]
    return any(key is not None and key.part not in WHOLE for key in parsed)


def grouped(file: Path, tensors: Mapping[str, T]) -> tuple[dict[str, dict[str, T]], list[str]]:
    """Return the tensors of an adapter file by module and part, and the keys that have no known form.

    Raises UserError if the file holds no tensors, an adapter that cannot be merged, a checkpoint in place of an
    adapter, several adapters of PEFT under different names, or one part of a module twice.
    """
    if not tensors:
        raise UserError(f"{file} holds no tensors, and so no LoRA", "copy the file again, or leave it out")
    check_kind(file, tensors)
    modules: dict[str, dict[str, T]] = {}
    strange, adapters = [], set()
    for name, tensor in tensors.items():
        key = parse(name)
        if key is None:
            strange.append(name)
            continue
        parts = modules.setdefault(key.module, {})
        if key.part in parts and key.adapter is None:
            problem = f"{file}: {key.module} has two tensors for {key.part}, and the last one is {name}"
            raise UserError(problem, "take one of them out of the file")
        parts[key.part] = tensor
        if key.adapter:
            adapters.add(key.adapter)
    if len(adapters) > 1:
        problem = f"{file} holds several adapters of PEFT: {', '.join(sorted(adapters))}"
        raise UserError(problem, "save each of them into a file of its own, and give the file once for each")
    if modules and all(parts.keys() <= WHOLE for parts in modules.values()):
        problem = f"{file} holds whole weights, such as {next(iter(tensors))}, and no adapter"
        fix = f"give a checkpoint itself to the export, and only LoRAs to {option('loras', '--lora')}"
        raise UserError(problem, fix)
    return with_alphas(modules), strange


def with_alphas(modules: dict[str, dict[str, T]]) -> dict[str, dict[str, T]]:
    """Return the modules with the alpha of a module that is numbered parts (NUMBERED) in each of these.

    A module with only one such part is not divided: the part is the module.
    """
    found = dict(modules)
    for name, parts in modules.items():
        if parts.keys() != {"alpha"} or f"{name}.0" not in modules:
            continue
        numbered = list(takewhile(modules.__contains__, (f"{name}.{number}" for number in count())))
        del found[name]
        for part in numbered:
            found[part] = {**parts, **modules[part]}
        if len(numbered) == 1:
            found[name] = found.pop(numbered[0])
    return found


def check_kind(file: Path, keys: Iterable[str]) -> None:
    """Raise UserError if the keys show that the file is an adapter of a kind that cannot be merged."""
    for key in keys:
        for pattern, kind, fix in OTHER_KINDS:
            if pattern.fullmatch(key):
                raise UserError(f"{file} is {kind}: it holds {key}, which cannot be merged into the weights", fix)


def left_out(key: str) -> str | None:
    """Return why a key that is no part of an adapter of a network may be left out; None if it may not."""
    return next((why for pattern, why in LEFT_OUT.items() if re.fullmatch(pattern, key)), None)


def kind_of(parts: Iterable[str]) -> str:
    """Return the name of the kind of adapter that has these parts, for people to read."""
    parts = set(parts)
    decomposed = " with DoRA" if parts & {"dora_scale", "lora_magnitude_vector"} else ""
    if parts & LOHA_PARTS:
        return "LoHa" + decomposed
    if parts & LOKR_PARTS:
        return "LoKr" + decomposed
    if parts & {"oft_blocks", "oft_R"}:
        return "OFT"
    if parts & LORA_PARTS:
        return "DoRA" if decomposed else "LoCon" if "lora_mid" in parts else "LoRA"
    if parts & {"w_norm", "b_norm"}:
        return "difference of norms"
    if parts & {"diff", "diff_b", "lora_up_bias"}:
        return "difference of whole weights"
    return "whole weights"
