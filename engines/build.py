"""`ditforge build`: every ONNX graph of a folder becomes an engine, unless the same engine is there already."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ditforge import manifest
from ditforge.engines.compiler import Compiler, find_compiler
from ditforge.errors import UserError
from ditforge.manifest import Component, Engine, Manifest

TOKENIZER = "tokenizer"
DEFAULT_COMPILER = "onnxruntime"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Built:
    """What a build did: the manifest, and for each component that was compiled the reason why."""

    manifest: Manifest
    rebuilt: dict[str, str]


def build(
    onnx: Path, out: Path, target: str, compiler_name: str = DEFAULT_COMPILER, progress: Progress | None = None
) -> Built:
    """Compile the graphs in the folder `onnx` for `target` into the folder `out`.

    An engine whose cache key is unchanged is kept; if all are, nothing is written. `progress` is called with
    (component, how many are done, how many there are). Raises UserError if the target cannot execute a component, or
    if a graph is damaged; then `out` is as it was before.
    """
    source = manifest.read(onnx, "onnx")
    compiler = find_compiler(compiler_name)
    networks = {name: component for name, component in source.components.items() if name != TOKENIZER}
    for name, component in networks.items():
        compiler.check(name, component, target)
    keys = {name: cache_key(component, compiler_name, compiler, target) for name, component in networks.items()}
    before = previous_build(out)
    reasons = {name: reason for name in networks if (reason := rebuild_reason(before, out, name, keys[name]))}
    if before and not reasons and before.model == source.model and manifest.is_whole(out, before.components):
        return Built(before, {})

    for name in reasons:  # all of them are looked at before the first one is compiled
        manifest.check_files(onnx, networks[name].files, fix="ditforge export CHECKPOINT --out DIR   again")
    report = progress or (lambda component, done, total: None)
    with manifest.written_whole(out, "engines") as folder:
        components = {TOKENIZER: copy_component(source.components[TOKENIZER], onnx, folder)}
        for done, name in enumerate(networks):
            report(name, done, len(networks))
            if name in reasons or before is None:
                components[name] = compile_component(compiler, name, networks[name], onnx, folder)
            else:
                components[name] = copy_component(before.components[name], out, folder)
        report("done", len(networks), len(networks))
        engines = {
            name: Engine(
                compiler=compiler_name, compiler_version=compiler.version(), target=target, cache_key=keys[name]
            )
            for name in networks
        }
        result = Manifest(kind="engines", model=source.model, components=components, engines=engines)
        manifest.write(result, folder)
    return Built(result, reasons)


def cache_key(component: Component, compiler_name: str, compiler: Compiler, target: str) -> dict[str, str]:
    """Everything that changes an engine: the same key, the same engine."""
    digests = {f"sha256 of {name}": file.sha256 for name, file in component.files.items()}
    return {
        "compiler": compiler_name,
        "compiler_version": compiler.version(),
        "target": target,
        "precision": component.precision,
        **compiler.options(),
        **digests,
    }


def previous_build(out: Path) -> Manifest | None:
    """The manifest of an earlier build in `out`, if there is one that this version reads."""
    try:
        return manifest.read(out, "engines")
    except UserError:
        return None


def rebuild_reason(before: Manifest | None, out: Path, name: str, key: dict[str, str]) -> str:
    """Why the component `name` has to be compiled; empty if the engine in `out` is the one that `key` describes."""
    if before is None or name not in before.engines:
        return "there is no engine yet"
    old = before.engines[name].cache_key
    for field in dict.fromkeys((*key, *old)):
        if old.get(field) != key.get(field):
            shown = "changed" if field.startswith("sha256") else f"was {old.get(field)}, is {key.get(field)}"
            return f"{field} {shown}"
    for file, expected in before.components[name].files.items():
        path = out / file
        if not path.is_file() or path.stat().st_size != expected.size:
            return f"{file} is missing or truncated"
    return ""


def compile_component(compiler: Compiler, name: str, component: Component, onnx: Path, folder: Path) -> Component:
    """Compile one graph into `folder`/NAME…, and describe the engine's files."""
    files = compiler.compile(onnx / f"{name}.onnx", folder / name)
    return component.model_copy(update={"files": {file.name: manifest.describe(file) for file in files}})


def copy_component(component: Component, source: Path, folder: Path) -> Component:
    """Copy a component's files from the folder `source`, checked on the way."""
    manifest.check_files(source, component.files, fix="make the folder again")
    for name in component.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return component
