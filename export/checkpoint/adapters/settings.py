"""How strong an adapter is: alpha and rank, from its tensors, from the file's metadata, and from adapter_config.json.

The rules of precedence are those of the tools that write the files. PEFT's configuration is in a file beside the
adapter, or in the metadata that diffusers writes; the first pattern that matches a module overrides its alpha or rank.
A tensor `alpha` is that of Kohya's scripts and LyCORIS.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isclose, isfinite, prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditforge.errors import UserError
from ditforge.export.checkpoint.weights import safetensors_file
from ditforge.small_files import read_json_object

if TYPE_CHECKING:
    from ditforge.export.checkpoint.lazy_tensors import Lazy

METADATA_KEY = "lora_adapter_metadata"  # diffusers writes PEFT's configuration under this key of a file's metadata
CONFIG = "adapter_config.json"
ALPHAS = ("lora_alpha", "alpha")  # PEFT's names of alpha: that of LoRA, and that of LoHa and LoKr
KINDS = ("LORA", "LOHA", "LOKR", "OFT")  # PEFT's kinds that are merged


@dataclass(frozen=True)
class Settings:
    """The settings that a file has beside its tensors.

    file: the adapter's file. configs: PEFT's configuration of each component, and where it was read; that under "" is
    of all components. metadata: the file's metadata.
    """

    file: Path
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    origin: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def config(self, component: str) -> Mapping[str, Any]:
        """Return PEFT's configuration of the component; {} if there is none."""
        return self.configs.get(component, self.configs.get("", {}))

    def scale(self, component: str, module: str, rank: int | None, alpha: Lazy | None) -> float:
        """Return the factor of the module's product: alpha / rank, or alpha / sqrt(rank) with `use_rslora`.

        module: its name without prefixes, which PEFT's patterns are matched with. rank: None where the tensors tell
        none, as those of a LoKr of two whole matrices; LyCORIS then ignores alpha. alpha: the file's tensor.
        The factor is 1 if there is neither a tensor nor a configuration, as in all these tools. Raises UserError for
        values that are no finite numbers, and if the tensors and the configuration say different things.
        """
        config = self.config(component)
        by_tensor = None
        if alpha is not None:
            by_tensor = 1.0 if rank is None else self._scaling_alpha(alpha, module) / rank
            if config.get("use_rslora"):
                problem = f"{self.file}: {module} has an alpha, and {self.origin} has use_rslora"
                fix = "keep one of them in the file"
                raise UserError(f"{problem}: which of the two scales is meant is not known", fix)
        by_config = self._by_config(config, module, rank)
        if by_tensor is not None and by_config is not None and not isclose(by_tensor, by_config, rel_tol=1e-3):
            problem = f"{self.file}: {module} is scaled by {by_tensor:g} with its tensor alpha"
            problem += f", and by {by_config:g} with {self.origin}"
            raise UserError(problem, f"take the alphas out of the file, or keep {CONFIG} in another folder")
        return next((scale for scale in (by_tensor, by_config) if scale is not None), 1.0)

    def alpha(self, alpha: Lazy, module: str) -> float:
        """Return the number in a tensor `alpha`. Raises UserError if it is not one finite number."""
        if prod(alpha.shape) != 1:
            raise UserError(f"{self.file}: {module} has not one alpha, but {prod(alpha.shape)}", "copy the file again")
        value = float(alpha.read().float().reshape(-1)[0])
        if not isfinite(value):
            raise UserError(f"{self.file}: the alpha of {module} is {value}", "use a file with finite numbers")
        return value

    def _scaling_alpha(self, alpha: Lazy, module: str) -> float:
        value = self.alpha(alpha, module)
        if value == 0:
            problem = (
                f"{self.file}: the alpha of {module} is 0, which Kohya's scripts read as the rank, and ComfyUI as 0"
            )
            raise UserError(problem, "set it in the file: to the rank, or take the module out")
        return value

    def _by_config(self, config: Mapping[str, Any], module: str, rank: int | None) -> float | None:
        """Return PEFT's factor; None if its configuration says none."""
        named = self._number(config, "rank_pattern", "r", module)
        if named is not None and (named < 1 or named != int(named)):
            raise UserError(f"{self.origin}: the rank of {module} is {named:g}", "use a file with ranks from 1")
        if None not in (named, rank) and named != rank:
            problem = f"{self.file}: {module} has rank {rank}, and {self.origin} says {named:g}"
            raise UserError(problem, "use the configuration that belongs to this file")
        ranks = rank if rank is not None else named
        name = next((name for name in ALPHAS if name in config), ALPHAS[0])
        alpha = self._number(config, "alpha_pattern", name, module)
        if alpha is None or not ranks:
            return None
        return alpha / (sqrt(ranks) if config.get("use_rslora") else ranks)

    def _number(self, config: Mapping[str, Any], patterns: str, name: str, module: str) -> float | None:
        """Return the number of the first pattern that matches the module, or that of all modules; None if it has none.

        Raises UserError for a pattern that is no regular expression, and for a value that is no finite number.
        """
        found = config.get(patterns) or {}
        value = config.get(name)
        try:
            for pattern, number in found.items():
                if re.match(rf"(.*\.)?({pattern})$", module):  # as peft.utils.other.get_pattern_key matches them
                    name, value = f"{patterns} of {pattern}", number
                    break
        except (AttributeError, re.error) as error:
            problem = f"{self.origin}: {patterns} is damaged: {error}"
            raise UserError(problem, "copy the file again") from error
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise UserError(f"{self.origin}: {name} is {value!r}, and no finite number", "copy the file again")
        return float(value)


def read_settings(file: Path) -> Settings:
    """Read PEFT's configuration from the file's metadata and from adapter_config.json beside the file.

    Raises UserError if one is damaged, if both are there and differ, and for a kind of PEFT that cannot be merged.
    """
    with safetensors_file(file, "np") as opened:
        metadata = opened.metadata() or {}
    configs: dict[str, Mapping[str, Any]] = dict(_from_metadata(file, metadata))
    origin = f"{METADATA_KEY} in its header"
    beside = file.parent / CONFIG
    if beside.is_file():
        config = read_json_object(beside, "adapter")
        if any(_strength(known) != _strength(config) for known in configs.values()):
            problem = f"{file} has other settings in {METADATA_KEY} in its header than {beside}"
            raise UserError(problem, f"keep {CONFIG} in another folder")
        configs.setdefault("", config)
        origin = str(beside)
    for known in configs.values():
        kind = known.get("peft_type")
        if kind is not None and kind not in KINDS:
            raise UserError(
                f"{file} is an adapter of PEFT's kind {kind}, says {origin}: it cannot be merged into the weights",
                f"use one of the kinds {', '.join(KINDS)}, or merge it into a checkpoint with PEFT",
            )
    return Settings(file, configs, origin, metadata)


def _strength(config: Mapping[str, Any]) -> list[Any]:
    names = ("r", *ALPHAS, "rank_pattern", "alpha_pattern", "use_rslora")
    return [config.get(name) or None for name in names]


def _from_metadata(file: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return PEFT's configuration of each component, from keys such as `transformer.lora_alpha`.

    Without a component, as diffusers' save_lora_adapter() writes them, they are found under "".
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        for key, value in json.loads(metadata.get(METADATA_KEY) or "{}").items():
            component, _, option = key.rpartition(".")
            found.setdefault(component, {})[option] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: {METADATA_KEY} in its header is damaged: {error}", "copy the file again") from error
    return found
