"""`ditforge build`: every ONNX graph of a folder becomes an engine, unless the same engine is there already."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ditforge import manifest
from ditforge.engines.compiler import Compiler, Job, Progress, Ranges, find_compiler
from ditforge.engines.gpus import Target, default_compiler, find_target
from ditforge.engines.profile import Profile, announced, make_profiles
from ditforge.manifest import Component, Engine, Manifest
from ditforge.model import Model

TOKENIZER = "tokenizer"
TIMING_CACHE = "timing.cache"  # of TensorRT, beside the engines: what it measured on the GPU the last time
RUNTIME_CACHE = ".runtime-cache"  # of TensorRT-RTX, beside each engine: what it compiled for the GPU the last time


@dataclass(frozen=True)
class Built:
    """What a build did: the manifest, and for each component that was compiled the reason why."""

    manifest: Manifest
    rebuilt: dict[str, str]


def build(
    onnx: Path,
    out: Path,
    gpu: str,
    compiler_name: str | None = None,
    progress: Progress | None = None,
    *,
    resolutions: str | None = None,
    static: str | None = None,
    batch: int | None = None,
) -> Built:
    """Compile the graphs in the folder `onnx` for `gpu` (see gpus.find_target) into the folder `out`.

    The compiler is by default that of the GPU. The sizes and batches (see profile.make_profiles) are by default the
    compiler's: all of the model's, or around the model's default size. An engine whose cache key is unchanged is kept;
    if all are, nothing is written. `progress` is called with (what is done, how many steps are done, how many there
    are). Raises UserError if the target cannot execute a component, or if a graph is damaged; then `out` is as it was
    before.
    """
    source, target = manifest.read(onnx, "onnx"), find_target(gpu)
    compiler_name = compiler_name or default_compiler(target)
    compiler = find_compiler(compiler_name)
    networks = {name: component for name, component in source.components.items() if name != TOKENIZER}
    for name, component in networks.items():
        compiler.check(name, component, target)
    model, profiles = source.model, []
    if compiler.PROFILES or (resolutions, static, batch) != (None, None, None):
        profiles = make_profiles(model, resolutions, static, batch)
        model = announced(model, profiles)
    shapes = {
        name: ranges(component, profiles if compiler.PROFILES else [], source.model)
        for name, component in networks.items()
    }
    keys = {
        name: cache_key(component, compiler_name, compiler, target, shapes[name])
        for name, component in networks.items()
    }
    max_batch = profiles[0].max_batch if profiles else None
    before = manifest.earlier(out, "engines")
    reasons = {name: reason for name in networks if (reason := rebuild_reason(before, out, name, keys[name]))}
    if before and not reasons and is_same(before, out, model, max_batch, keys):
        return Built(before, {})

    for name in reasons:  # all of them are looked at before the first one is compiled
        manifest.check_files(onnx, networks[name].files, fix="ditforge export CHECKPOINT --out DIR   again")
    report = progress or (lambda component, done, total: None)
    caches = (TIMING_CACHE, *(name + RUNTIME_CACHE for name in networks))
    with manifest.written_whole(out, "engines", own=caches) as folder:
        copy_caches(before, out, folder, caches, reasons)
        components = {TOKENIZER: copy_component(source.components[TOKENIZER], onnx, folder)}
        for done, name in enumerate(networks):
            report(name, done, len(networks))
            if name in reasons or before is None:
                graph = onnx / f"{name}.onnx"
                job = Job(name, networks[name], graph, folder / name, target, shapes[name], report)
                components[name] = compile_component(compiler, job)
            else:
                components[name] = copy_component(before.components[name], out, folder)
        report("done", len(networks), len(networks))
        engines = {
            name: Engine(
                compiler=compiler_name,
                compiler_version=compiler.version(),
                target=str(target),
                cache_key=keys[name],
                max_batch=max_batch,
            )
            for name in networks
        }
        result = Manifest(kind="engines", model=model, components=components, engines=engines)
        manifest.write(result, folder)
    return Built(result, reasons)


def ranges(component: Component, profiles: list[Profile], model: Model) -> list[Ranges]:
    """For each profile the shapes of the inputs that vary; profiles that do not differ for a component count once."""
    found: list[Ranges] = []
    for profile in profiles:
        varying = {
            name: profile.shapes(tensor, model)
            for name, tensor in component.inputs.items()
            if any(isinstance(dim, str) for dim in tensor.shape)
        }
        if varying not in found:
            found.append(varying)
    return found


def cache_key(
    component: Component, compiler_name: str, compiler: Compiler, target: Target, shapes: list[Ranges]
) -> dict[str, str]:
    """Everything that changes an engine: the same key, the same engine."""
    digests = {f"sha256 of {name}": file.sha256 for name, file in component.files.items()}
    profile = {
        f"shapes of {name}": ", ".join(" ".join("x".join(map(str, shape)) for shape in part[name]) for part in shapes)
        for name in (shapes[0] if shapes else ())
    }
    return {
        "compiler": compiler_name,
        "compiler_version": compiler.version(),
        "target": str(target),
        "precision": component.precision,
        **profile,
        **compiler.options(),
        **digests,
    }


def is_same(before: Manifest, out: Path, model: Model, max_batch: int | None, keys: dict[str, dict[str, str]]) -> bool:
    """Whether the build in `out` is all that is wanted."""
    same = before.model == model and before.engines.keys() == keys.keys()
    same = same and all(engine.max_batch == max_batch for engine in before.engines.values())
    return same and manifest.is_whole(out, before.components)


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


def compile_component(compiler: Compiler, job: Job) -> Component:
    """Compile one graph, and describe the engine's files."""
    files = compiler.compile(job)
    return job.component.model_copy(update={"files": {file.name: manifest.describe(file) for file in files}})


def copy_caches(
    before: Manifest | None, out: Path, folder: Path, caches: tuple[str, ...], reasons: dict[str, str]
) -> None:
    """Keep the caches of an earlier build; those of engines that are compiled again are of no use."""
    useless = {name + RUNTIME_CACHE for name in reasons}
    for name in caches:
        if before is not None and name not in useless and (out / name).is_file():
            shutil.copyfile(out / name, folder / name)


def copy_component(component: Component, source: Path, folder: Path) -> Component:
    """Copy a component's files from the folder `source`, checked on the way."""
    manifest.check_files(source, component.files, fix="make the folder again")
    for name in component.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return component
