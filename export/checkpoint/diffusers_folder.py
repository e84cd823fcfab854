"""A checkpoint as a diffusers folder: the components that it names, their configurations, and their weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditforge.errors import UserError
from ditforge.export.checkpoint.architectures import pipeline_of
from ditforge.export.checkpoint.component_files import file_sets, variants
from ditforge.export.checkpoint.folder_settings import FolderSettings, read_settings
from ditforge.export.checkpoint.load_report import LoadReport
from ditforge.export.checkpoint.weights import Weights, component_files, file_names
from ditforge.option import option, setting
from ditforge.small_files import read_json_object

if TYPE_CHECKING:
    from ditforge.export.checkpoint.lazy_tensors import Lazy
    from ditforge.export.checkpoint.variants import Variant

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER = "scheduler", "scheduler_config.json"
NETWORKS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
LORA_FILE = "pytorch_lora_weights.safetensors"
CONFIGS = Path(__file__).parents[1] / "configs"  # published models' folders, without weights and vocabularies


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder, and what replaces parts of it: a single file and LoRAs (see source.py).

    folder: the diffusers folder.
    pipeline: the class that its model_index.json names, for example FluxPipeline.
    seed: the seed of the random weights, where these are used; None for real weights.
    title: the model's name, where it is not the folder's name.
    tensors: tensors that replace those of the folder, by component and name.
    configs: configurations that replace those of the folder, by component and file name.
    loras: the LoRAs that were added, as FILE:STRENGTH, without the files' folders.
    variant: the variants that the user asked for; LoadReport.choose() says which of several choices is among them.
    text_length: the tokens of T5's input that the user asked for; None for the model's own length.
    settings: what the folder's ditforge.json says.
    chosen: the variant of the family, where it was found before; None if the folder's files tell it.
    repository: the repository on the Hub that the folder is from; empty if it is from elsewhere.
    repositories: which parts are from the Hugging Face Hub, and their commits; empty if none is.
    report: what was not read of the files, and what was chosen; those who read them add to it.
    """

    folder: Path
    pipeline: str
    seed: int | None = None
    title: str | None = None
    tensors: Mapping[str, Mapping[str, Lazy]] = field(default_factory=dict)
    configs: Mapping[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    loras: tuple[str, ...] = ()
    variant: tuple[str, ...] = ()
    text_length: int | None = None
    settings: FolderSettings = field(default_factory=FolderSettings)
    chosen: Variant | None = None
    repository: str = ""
    repositories: str = ""
    report: LoadReport = field(default_factory=LoadReport, compare=False)

    @property
    def name(self) -> str:
        """The model's name: that of its folder, file or repository."""
        return self.title or self.folder.resolve().name

    def config(self, component: str, file: str = "config.json") -> dict[str, Any]:
        """Return the configuration of a component (`transformer`, `vae`, …) as its file has it.

        Raises UserError if the file is missing or damaged.
        """
        given = self.configs.get((component, file))
        return read_json(self.folder / component / file) if given is None else given

    def weights(self, component: str) -> Weights:
        """Open the weights of a component and check that they are complete. No tensor is read.

        Raises UserError as read_component() does.
        """
        from ditforge.export.checkpoint.lazy_tensors import as_weights

        return as_weights(self.folder / component, self.read_component(component))

    def read_component(self, component: str) -> Mapping[str, Lazy]:
        """Return the tensors of a component by name, unread, with those in 8 bits or less dequantised.

        Raises UserError if a file is missing, truncated or damaged, or if the weights are in an unknown format.
        """
        if component in self.tensors:
            return self.tensors[component]
        from ditforge.export.checkpoint.dequantising import dequantised

        folder = self.folder / component
        self._check_variant(component)
        config = self.config(component) if (component, CONFIG) in self.configs or (folder / CONFIG).is_file() else {}
        return dequantised(self._stored(component), self.report, config.get("quantization_config"), folder)

    def read_otherwise(self, component: str) -> bool:
        """Whether diffusers or transformers would read other weights from the folder than read_component().

        They read no scales, need the name of a variant, and may take another of several files.
        """
        from ditforge.export.checkpoint.dequantising import is_plain

        sets = file_sets(file_names(self.folder / component))
        if (
            component in self.tensors
            or len(sets) != 1
            or sets[0].variant
            or bool(sets[0].single) == bool(sets[0].indices)
        ):
            return True
        return not all(is_plain(name, tensor) for name, tensor in self._stored(component).items())

    def _stored(self, component: str) -> dict[str, Lazy]:
        from ditforge.export.checkpoint.lazy_tensors import open_tensors

        files = component_files(self.folder / component, self.report)
        return {name: tensor for file in files for name, tensor in open_tensors(file).items()}

    def _check_variant(self, component: str) -> None:
        """Report it if other components have the files of a variant that the user asked for, and this one has not."""
        here = file_names(self.folder / component)
        there = {name for part in self.folder.iterdir() if part.is_dir() for name in variants(file_names(part))}
        for variant in self.variant:
            if variant in there and variant not in variants(here):
                why = "other components have them; of this one, the files without a variant are read"
                self.report.add(f"{component} has no files of the variant {variant}", why)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the diffusers folder. Raises UserError if it is not a folder in diffusers' layout."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", "give the folder of a checkpoint in diffusers' layout")
    if not (folder / INDEX).is_file():
        problem = f"{folder} has no {INDEX}, so it is not a checkpoint in diffusers' layout"
        raise UserError(problem, elsewhere(folder))
    pipeline = str(read_json(folder / INDEX).get("_class_name", ""))
    return Checkpoint(folder, pipeline, settings=read_settings(folder))


def elsewhere(folder: Path) -> str:
    """Return what to do about a folder without an INDEX: it may be a part of a checkpoint's folder, or around one."""
    if found := sorted(path.parent for path in folder.glob(f"*/{INDEX}")):
        return f"give one that has it: {', '.join(map(str, found[:3]))}"
    if (folder.resolve().parent / INDEX).is_file():
        return f"give the whole checkpoint: {folder.resolve().parent}"
    if components_in(folder):
        return f"{setting('base', 'FOLDER')}, a diffusers folder of the model it was made from, has the rest"
    if files := sorted(folder.glob("*.safetensors")):
        lora = option("loras", "--lora")
        return f"give the file itself, such as {files[0]}, or with {lora} if it is a LoRA"
    return "download the whole repository of the model, with its subfolders transformer, vae, text_encoder, …"


def components_in(folder: Path) -> dict[str, Path]:
    """Return the networks in a folder without an INDEX, as trainers save them: component → the folder that holds it.

    It has subfolders such as `transformer`, or it is the folder of a transformer itself.
    """
    if is_network(folder) and "Transformer" in str(read_json(folder / CONFIG).get("_class_name", "")):
        return {"transformer": folder}
    return {name: folder / name for name in NETWORKS if is_network(folder / name)}


def is_network(folder: Path) -> bool:
    """Return whether the folder has a configuration and weights."""
    return (folder / CONFIG).is_file() and any(folder.glob("*.safetensors"))


def named_components(index: dict[str, Any]) -> list[str]:
    """Return the names of an index's components. Those left out have null in place of a class and are not listed."""
    return [name for name, value in index.items() if isinstance(value, list) and value and value[-1]]


def t5_parts(index: dict[str, Any]) -> list[str]:
    """Return the names that a model_index.json gives to T5 and its tokenizer; an empty list if it has no T5.

    A tokenizer's class does not say which encoder it belongs to, so its name is derived from the encoder's name.
    """
    entries = {name: value[-1] for name, value in index.items() if isinstance(value, list) and value}
    encoders = [name for name, cls in entries.items() if str(cls).startswith("T5Encoder")]
    return [*encoders, *(name.replace("text_encoder", "tokenizer") for name in encoders)]


def report_files(folder: Path, report: LoadReport) -> None:
    """Report the weights beside model_index.json: the model again in one file, or a LoRA."""
    for file in sorted(folder.glob("*.safetensors")):
        if file.name == LORA_FILE:
            report.add(str(file), f"a LoRA is applied only with {option('loras', '--lora')}")
        else:
            report.add(str(file), "the weights are read from the subfolders", expected=True)


def unknown_pipeline(folder: Path, pipeline: str, known: Iterable[str]) -> UserError:
    """Return the error for a folder whose pipeline cannot be exported. `known` are those that can."""
    name, known = pipeline_of(pipeline), ", ".join(known)  # the pipelines for pictures as input have the same networks
    problem = f"{folder} is a {pipeline or 'model of no named class'}{f' ({name})' if name else ''}"
    fix = (
        f"use a checkpoint of one of: {known}; if only the pipeline is another and all its components are those of one "
    )
    fix += f"of these, write that as _class_name into {INDEX}"
    return UserError(f"{problem}, which cannot be exported", fix)


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a checkpoint's file. Raises UserError if the file is missing or holds something else."""
    return read_json_object(path, "checkpoint")


def with_defaults(cls: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Return `config`, with the defaults of the constructor of `cls` for missing keys. diffusers reads it like this."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not p.empty} | config
