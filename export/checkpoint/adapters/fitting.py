"""Which published models an adapter fits, by the names and shapes of their modules: for `ditforge inspect`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ditforge.errors import UserError
from ditforge.export.checkpoint.adapters import keys
from ditforge.export.checkpoint.adapters.fusing import check_fit, gathered
from ditforge.export.checkpoint.adapters.names import DIT, Index, index
from ditforge.export.checkpoint.adapters.reading import Use, changes
from ditforge.export.checkpoint.adapters.settings import Settings, read_settings
from ditforge.export.checkpoint.conversion import Tensors
from ditforge.export.checkpoint.diffusers_folder import INDEX, read_json
from ditforge.export.checkpoint.lazy_tensors import Lazy, open_tensors
from ditforge.export.families import families


@dataclass(frozen=True)
class Fit:
    """How an adapter's file fits a published model.

    matched: how many of its modules fit. lacking: those that the model can do without. unmatched: those whose name fits
    no module. misfits: those whose shape is another. nearest: for unmatched modules, those of the model most like them.
    """

    model: str
    matched: int
    lacking: tuple[str, ...]
    unmatched: tuple[str, ...]
    misfits: tuple[str, ...]
    nearest: Mapping[str, str]

    @property
    def whole(self) -> bool:
        """Whether `export` takes the adapter for this model."""
        return self.matched > 0 and not self.unmatched and not self.misfits


def fits(file: Path) -> list[Fit]:
    """Return how the adapter fits each published model, the best fit first. No weight is read.

    Raises UserError for a file that is no adapter, or of a kind that cannot be merged.
    """
    modules, strange = keys.grouped(file, open_tensors(file))
    strange = [key for key in strange if not keys.left_out(key)]
    settings = read_settings(file)
    found = []
    for family in families():
        for model, folder in family.published.items():
            components = published_tensors(folder)
            names = index(components, family.layout)
            found.append(_fit(model, modules, strange, settings, (names, components)))
    return sorted(found, key=lambda fit: (-fit.matched, len(fit.unmatched) + len(fit.misfits)))


def _fit(
    model: str,
    modules: Mapping[str, dict[str, Lazy]],
    strange: list[str],
    settings: Settings,
    known: tuple[Index, Mapping[str, Tensors]],
) -> Fit:
    names, components = known
    matched, unmatched = 0, list(strange)
    lacking: list[str] = []
    misfits: list[str] = []
    for written, parts in modules.items():
        module = names.find(written)
        if module is None:
            (lacking if names.lacking(written) else unmatched).append(written)
            continue
        try:
            for parameter, change in changes(settings.file, written, module, dict(parts), settings).items():
                targets = module.targets[parameter]
                first = components[targets[0].component][targets[0].name]
                use = Use(written, module, parameter, change)
                check_fit(settings.file, use, gathered(targets, components), first, targets[0].name)
            matched += 1
        except (UserError, KeyError):  # KeyError: the module has no bias
            misfits.append(written)
    nearest = {name: near for name in unmatched[:3] if (near := names.nearest(name))}
    return Fit(model, matched, tuple(lacking), tuple(unmatched), tuple(misfits), nearest)


def published_tensors(folder: Path) -> dict[str, dict[str, Lazy]]:
    """Return the shapes of a published model's tensors, by component and name, as tensors that cannot be read."""
    found = {}
    for component, value in read_json(folder / INDEX).items():
        if component == DIT or component.startswith("text_encoder"):
            library, name = value
            config = folder / component
            with torch.device("meta"):
                state = _built(getattr(importlib.import_module(library), name), config).state_dict()
            found[component] = {
                key: Lazy(tuple(tensor.shape), tensor.dtype, config, _unread) for key, tensor in state.items()
            }
    return found


def _built(cls: Any, config: Path) -> Any:
    if hasattr(cls, "load_config"):  # a class of diffusers; those of transformers have classes for configurations
        return cls.from_config(cls.load_config(config))
    return cls(cls.config_class.from_pretrained(config))


def _unread(start: int, stop: int) -> torch.Tensor:
    raise AssertionError("a published model has shapes here, and no weights")
