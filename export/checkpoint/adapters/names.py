"""The names of modules in adapter files, mapped to the weights of a checkpoint.

Names are compared with underscores in place of dots, and without the prefixes of wrappers, so one rule serves all
tools. Diffusers' names and those of the family's authors are known. A module that the authors fuse (`qkv`, `linear1`)
has several weights here, and each of them is cut from its rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fractions import Fraction

from ditforge.export.checkpoint.conversion import Piece, Recipe, Tensors
from ditforge.export.checkpoint.layout import Layout
from ditforge.export.checkpoint.layouts import recipes_for

DIT = "transformer"
# Prefixes that say nothing: of wrappers of the network, and of tools. Any number of them can stand before a name.
WRAPPERS = (
    "base_model_model_",
    "base_model_",
    "model_",
    "module_",
    "_orig_mod_",
    "diffusion_model_",
    "transformer_",
    "unet_",
    "dit_",
    "net_",
    "pipe_",
    "oft_",
    "lora_",
    "lycoris_",
    "text_encoders_",
    "text_model_",
)
PARAMETERS = {".weight": "weight", ".bias": "bias"}


@dataclass(frozen=True)
class Target:
    """A weight of the checkpoint that a module has. `recipe` cuts its rows from the module's weight."""

    component: str
    name: str
    recipe: Recipe


Targets = dict[str, list[Target]]  # the targets of a module's weight and of its bias


@dataclass(frozen=True)
class Module:
    """A module that a name means: its component, its name in the file without prefixes, and its weight and bias."""

    component: str
    name: str
    targets: Targets


@dataclass
class Index:
    """All names that modules of a checkpoint can have in adapter files, by component, without dots and prefixes.

    spelled: each name as its layout writes it. prefixes: what the names of an encoder's modules start with, without
    wrappers, and the encoder. optional: patterns of modules that only some models of the family have, and why.
    """

    modules: dict[str, dict[str, Targets]] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    prefixes: dict[str, str] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)

    def add(self, component: str, module: str, parameter: str, target: Target) -> None:
        """Add a target to a module, unless it has it already under that name."""
        flat = bare(module)
        self.spelled.setdefault(flat, module)
        known = self.modules.setdefault(component, {}).setdefault(flat, {}).setdefault(parameter, [])
        if target.name not in {other.name for other in known}:
            known.append(target)

    def find(self, name: str) -> Module | None:
        """Return the module that an adapter file calls `name`; None if the checkpoint has no such module."""
        flat = flattened(name)
        for component, start in self._readings(flat):
            if targets := self.modules.get(component, {}).get(flat[start:]):
                return Module(component, name[start:], targets)
        encoders = [part for part in self.modules if part != DIT]
        found = [(part, start) for start in unwrapped(flat) for part in encoders if flat[start:] in self.modules[part]]
        if len({part for part, _ in found}) != 1:  # a name without a component, which several encoders have
            return None
        component, start = found[0]
        return Module(component, name[start:], self.modules[component][flat[start:]])

    def lacking(self, name: str) -> str | None:
        """Return why the checkpoint can do without the module `name`; None if there is no known reason.

        It is a module of a text encoder that is left out, or one that only some models of the family have.
        """
        flat = flattened(name)
        for component, start in self._readings(flat):
            if component != DIT and component not in self.modules:
                return f"{component} is left out of this export"
            for pattern, why in self.optional.items():
                if re.fullmatch(pattern, f"{component}.{flat[start:]}"):
                    return why
        return None

    def nearest(self, name: str) -> str | None:
        """Return the module of the checkpoint whose name is most like `name`; None if none is like it."""
        flat = flattened(name)
        component, start = max(self._readings(flat), key=lambda reading: reading[1])
        known = (name for name in self.modules.get(component, {}) if not self.spelled[name].endswith(tuple(PARAMETERS)))
        near = get_close_matches(flat[start:], list(known), n=1)
        return self.spelled[near[0]] if near else None

    def _readings(self, flat: str) -> Iterator[tuple[str, int]]:
        """Return the component that each way of leaving out prefixes means, and where the module's name starts."""
        longest = sorted(self.prefixes, key=len, reverse=True)
        for start in unwrapped(flat):
            prefix = next((prefix for prefix in longest if flat.startswith(prefix, start)), None)
            if prefix is None:
                yield DIT, start
            else:
                behind = start + len(prefix)
                yield from ((self.prefixes[prefix], behind + more) for more in unwrapped(flat[behind:]))


def unwrapped(flat: str) -> list[int]:
    """Return all places at which a name can start, if prefixes of WRAPPERS are left out, the first ones first."""
    starts = [0]
    for start in starts:
        starts += [start + len(prefix) for prefix in WRAPPERS if flat.startswith(prefix, start)]
    return sorted(set(starts))


def flattened(name: str) -> str:
    """Return the name of a module in an adapter's file without dots, and without the underscores that may end it."""
    return name.replace(".", "_").rstrip("_")


def bare(module: str) -> str:
    """Return the name of a module without dots, and without transformers 4's prefix of CLIP's modules."""
    return module.removeprefix("text_model.").replace(".", "_")


def index(components: Mapping[str, Tensors], layout: Layout | None) -> Index:
    """Return all names of the modules of the components. `layout` None means that only diffusers' names are known."""
    found = Index(prefixes=encoder_prefixes(components, layout), optional=layout.lora_optional if layout else {})
    for component, tensors in components.items():
        found.modules[component] = {}
        for name in tensors:
            target = Target(component, name, Recipe((Piece(name),)))
            for module, parameter in readings(name):
                found.add(component, module, parameter, target)
    if layout and DIT in components:
        add_authors_names(found, components[DIT], layout)
        add_joint_names(found, components[DIT], layout)
    return found


def readings(name: str) -> Iterable[tuple[str, str]]:
    """Return the modules, each with its parameter, that the tensor `name` can be meant by.

    ComfyUI also takes the tensor's own name for that of a module.
    """
    module, dot, parameter = name.rpartition(".")
    yield name, "weight"
    if dot:
        yield module, PARAMETERS.get(f".{parameter}", "weight")


def add_authors_names(found: Index, tensors: Tensors, layout: Layout) -> None:
    """Add the names of the authors' modules. The parts of a fused one can also have numbers (`qkv.0`, OneTrainer's)."""
    fused: dict[tuple[str, str], list[Target]] = {}
    for name, recipe in recipes_for(layout, tensors).items():
        target = Target(DIT, name, recipe)
        for module, parameter in readings(recipe.pieces[0].name):
            found.add(DIT, module, parameter, target)
            fused.setdefault((module, parameter), []).append(target)
    for (module, parameter), targets in fused.items():
        if len(targets) > 1:
            ordered = sorted(targets, key=lambda target: target.recipe.pieces[0].start)
            for number, target in enumerate(ordered):
                alone = Target(DIT, target.name, Recipe((Piece(target.name),)))
                found.add(DIT, f"{module}.{number}", parameter, alone)


def add_joint_names(found: Index, tensors: Tensors, layout: Layout) -> None:
    """Add the modules that adapters have for several of diffusers' modules at once."""
    blocks = {name.split(".")[1] for name in tensors if name.split(".")[1:2] and name.split(".")[1].isdecimal()}
    for module, parts in layout.lora_joint.items():
        for block in sorted(blocks):
            for ending, parameter in PARAMETERS.items():
                names = [part.format(block) + ending for part in parts]
                if not all(name in tensors for name in names):
                    continue
                joint = module.format(block)
                total, first = sum(tensors[name].length for name in names), 0
                for name in names:
                    stop = first + tensors[name].length
                    piece = Piece(joint, Fraction(first, total), Fraction(stop, total))
                    found.add(DIT, joint, parameter, Target(DIT, name, Recipe((piece,))))
                    first = stop


def encoder_prefixes(components: Iterable[str], layout: Layout | None) -> dict[str, str]:
    """Return what the names of the text encoders' modules start with, without WRAPPERS, and the encoder of each."""
    folders = {part for part in components if part != DIT} | (set(layout.encoders.values()) if layout else set())
    found = {f"{folder}_": folder for folder in folders}
    if "text_encoder" in folders:
        found["text_encoder_1_"] = "text_encoder"
    if layout:
        for name, folder in layout.encoders.items():
            found |= {f"{name}_": folder, f"{name.removesuffix('xxl')}_": folder}
        found |= {prefix.removeprefix("lora_"): folder for prefix, folder in layout.lora_encoders.items()}
    return found
