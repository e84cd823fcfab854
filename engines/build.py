"""`ditforge build`: every ONNX graph of a folder becomes an engine, unless the same engine is there already."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ditforge import manifest
from ditforge.contract import DIT, TOKENIZER
from ditforge.engines.compilers import Job, Progress, Ranges, find_compiler
from ditforge.engines.compilers.child_process import compile_apart
from ditforge.engines.gpus import default_compiler, find_target, limited
from ditforge.engines.memory.fitting import (
    Placement,
    cut_before,
    decide,
    memory_to_compile,
    place_engines,
    warn_of_compiling,
)
from ditforge.engines.memory.placement import Plan
from ditforge.engines.profile import Profile, announced, make_profiles, tiled
from ditforge.errors import UserError
from ditforge.manifest import Component, Engine, Manifest
from ditforge.model import Model

if TYPE_CHECKING:
    from ditforge.engines.memory.segments import Segment

CUTTING = 1  # how segments.cut does it; another number where the same graph and count would give other segments
TIMING_CACHE = "timing.cache"  # of TensorRT, beside the engines: what it measured on the GPU the last time
PLAN = ".plan"
NEW = "there was none before"


@dataclass(frozen=True)
class Built:
    """What a build did: the manifest, and for each component that was compiled the reason why."""

    manifest: Manifest
    rebuilt: dict[str, str]


@dataclass(frozen=True)
class Design:
    """What is to be made: the model that the engines announce, their largest batch (None: any), and more by network.

    That is where its engine goes, the profiles of its sizes, the shapes of its inputs in these, its cache key, and, if
    it has to be compiled, the reason why.
    """

    model: Model
    max_batch: int | None
    placements: dict[str, Placement]
    profiles: dict[str, list[Profile]]
    shapes: dict[str, list[Ranges]]
    keys: dict[str, dict[str, str]]
    reasons: dict[str, str]


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
    vae_tile: int | None = None,
    segments: int | None = None,
    residency: str | None = None,
    gpu_memory: float | None = None,
    planned: Callable[[Plan], None] | None = None,
) -> Built:
    """Compile the graphs in the folder `onnx` for `gpu` (see gpus.find_target) into the folder `out`.

    The compiler is by default that of the GPU. The sizes and batches (see profile.make_profiles) are by default the
    compiler's: all of the model's, or around the model's default size. The autoencoder takes pictures in tiles of
    `vae_tile` pixels, or, by default, whole. An engine whose cache key is unchanged is kept; if all are, nothing is
    written. The DiT is compiled in that many `segments`, one after the other (see segments.cut); with the `residency`
    "on-demand", all engines are loaded for each call (see manifest.Engine). Where neither is given, a plan for the
    memory of the GPU (or `gpu_memory` GB) decides about them, the batch and the tiles (see auto.decide); `planned` is
    called with it. Networks that nobody cut are cut as the memory of this machine asks for. `progress` is called with
    (what is done, how many steps are done, how many there are). Raises UserError if the target cannot execute a
    component, or has too little memory, if a graph is damaged, or has not that many segments; then `out` is as it was
    before.
    """
    source, target = manifest.read(onnx, "onnx"), limited(find_target(gpu), gpu_memory)
    by_hand = (segments, residency) != (None, None)
    if gpu_memory is not None and by_hand:
        raise UserError("--gpu-memory is for a plan, which --segments and --residency replace", "leave one of them out")
    compiler_name = compiler_name or default_compiler(target)
    networks = {name: component for name, component in source.components.items() if name != TOKENIZER}
    model, profiles = tiled(source.model, vae_tile), []
    if find_compiler(compiler_name).PROFILES or (resolutions, static, batch) != (None, None, None):
        profiles = make_profiles(model, resolutions, static, batch)
    plan, memory = None, memory_to_compile()
    if profiles:
        limits = replace(target, memory_gb=None) if by_hand else target
        plan = decide(networks, model, limits, profiles, batch, memory)
    if plan:
        model = tiled(model, plan.vae_tile)
        profiles = [replace(profile, max_batch=plan.batch) for profile in profiles]
        if planned and not by_hand:
            planned(plan)
    model = announced(model, profiles) if profiles else model
    placements = place_engines(networks, compiler_name, target, plan, segments, residency)
    if plan:
        warn_of_compiling(networks, placements, memory)
    before = manifest.earlier(out, "engines")
    as_before = [name for name in networks if plan and not (name == DIT and segments)]
    design = make_design(networks, source.model, model, profiles, placements, before, as_before, out)
    if before and not design.reasons and is_same(before, out, design):
        return Built(before, {})
    return Built(write_engines(source, onnx, out, design, before, progress), design.reasons)


def make_design(
    networks: dict[str, Component],
    given: Model,
    model: Model,
    profiles: list[Profile],
    placements: dict[str, Placement],
    before: Manifest | None,
    as_before: Collection[str],
    out: Path,
) -> Design:
    """Where each network of a model that was `given` goes, and in what shapes, so that it is the `model`.

    Those of `as_before` that are in `out` from a build `before` may stay in as many segments. Raises UserError for a
    network that its target cannot execute.
    """
    own = {name: [profile.of(name, model) for profile in profiles] for name in networks}
    placed, shapes, keys, reasons = {}, {}, {}, {}
    for name, component in networks.items():
        wanted = placements[name]
        compiler = find_compiler(wanted.compiler)
        compiler.check(name, component, wanted.target)
        shapes[name] = ranges(component, own[name] if compiler.PROFILES else [], given)
        for placement in (cut_before(before if name in as_before else None, name, wanted), wanted):
            placed[name], keys[name] = placement, cache_key(component, placement, shapes[name])
            reason = rebuild_reason(before, out, name, keys[name])
            if not reason:
                break
        else:
            reasons[name] = reason
    return Design(model, profiles[0].max_batch if profiles else None, placed, own, shapes, keys, reasons)


def write_engines(
    source: Manifest,
    onnx: Path,
    out: Path,
    design: Design,
    before: Manifest | None,
    progress: Progress | None,
) -> Manifest:
    """Compile what has to be, take the others over from the build `before` in `out`, and write it anew."""
    networks, placements = {name: source.components[name] for name in design.keys}, design.placements
    for name in design.reasons:  # all of them are looked at before the first one is compiled
        manifest.check_files(onnx, networks[name].files, fix="ditforge export CHECKPOINT --out DIR   again")
    parts = {
        name: cut_graph(
            onnx / f"{name}.onnx", networks[name], source.model, design.profiles[name], placements[name].segments
        )
        for name in design.reasons
    }
    report = progress or (lambda component, done, total: None)
    kept = {name: before.components[name] for name in networks if name not in design.reasons} if before else {}
    with manifest.written_whole(out, "engines", own=[TIMING_CACHE]) as folder:
        if before and (out / TIMING_CACHE).is_file():
            shutil.copyfile(out / TIMING_CACHE, folder / TIMING_CACHE)
        components = {TOKENIZER: copy_component(source.components[TOKENIZER], onnx, folder)}
        engines = {}
        for done, name in enumerate(networks):
            report(name, done, len(networks))
            place = placements[name]
            if name in kept and before:
                components[name], made = keep_component(kept[name], out, folder), before.engines[name].segments
            else:
                graph = onnx / f"{name}.onnx"
                job = Job(name, networks[name], graph, folder / name, place.target, design.shapes[name], report)
                compiled = compile_parts(place.compiler, job, parts[name])
                described = {file.name: manifest.describe(file) for part in compiled for file in part}
                components[name] = networks[name].model_copy(update={"files": described})
                made = tuple(tuple(file.name for file in part) for part in compiled) if parts[name] else ()
            engines[name] = Engine(
                compiler=place.compiler,
                compiler_version=find_compiler(place.compiler).version(),
                target=str(place.target),
                cache_key=design.keys[name],
                max_batch=design.max_batch,
                segments=made,
                on_demand=place.on_demand,
            )
        report("done", len(networks), len(networks))
        result = Manifest(
            kind="engines", model=design.model, components=components, engines=engines, origin=source.origin
        )
        manifest.write(result, folder)
    return result


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


def cut_graph(graph: Path, component: Component, model: Model, profiles: list[Profile], count: int) -> list[Segment]:
    """Cut a graph into `count` segments, or none if it stays whole. Raises UserError if it has not that many."""
    if count == 1:
        return []
    from ditforge.engines.memory.segments import cut

    step = model.size_multiple
    probe = Profile((step, 2 * step), (2 * step, 3 * step), (3 * step, 5 * step), max_batch=2)
    shapes = ranges(component, profiles or make_profiles(model, None, None, None), model)
    return cut(graph, component, count, ranges(component, [probe], model)[0], shapes)


def compile_parts(compiler_name: str, job: Job, segments: list[Segment]) -> list[list[Path]]:
    """Compile a graph, or its segments instead, one after the other; returns the files of each."""
    if not segments:
        return [compile_one(compiler_name, job)]
    files = []
    with TemporaryDirectory(dir=job.engine.parent) as folder:
        for number, segment in enumerate(segments, 1):
            part = replace(
                job,
                name=f"{job.name} {number} of {len(segments)}",
                component=segment.component,
                graph=segment.save(Path(folder) / f"{job.name}-{number}.onnx"),
                engine=job.engine.with_name(f"{job.engine.name}-{number}"),
                shapes=segment.shapes,
                weights=job.graph.parent,
            )
            files.append(compile_one(compiler_name, part))
    return files


def compile_one(compiler_name: str, job: Job) -> list[Path]:
    """Compile a graph, in a process of its own if the compiler wants that; returns the files written."""
    compiler = find_compiler(compiler_name)
    return compile_apart(compiler_name, job) if compiler.APART else compiler.compile(job)


def cache_key(component: Component, placement: Placement, shapes: list[Ranges]) -> dict[str, str]:
    """Everything that changes an engine: the same key, the same engine."""
    compiler, segments = find_compiler(placement.compiler), placement.segments
    digests = {f"sha256 of {name}": file.sha256 for name, file in component.files.items()}
    profile = {
        f"shapes of {name}": ", ".join(" ".join("x".join(map(str, shape)) for shape in part[name]) for part in shapes)
        for name in (shapes[0] if shapes else ())
    }
    return {
        "compiler": placement.compiler,
        "compiler_version": compiler.version(),
        "target": str(placement.target),
        "precision": component.precision,
        "segments": "1" if segments == 1 else f"{segments} (cutting {CUTTING})",
        **profile,
        **compiler.options(),
        **digests,
    }


def is_same(before: Manifest, out: Path, design: Design) -> bool:
    """Whether the build in `out` is all that is wanted."""
    engines, placements = before.engines, design.placements
    same = before.model == design.model and engines.keys() == placements.keys()
    same = same and all(engine.max_batch == design.max_batch for engine in engines.values())
    same = same and all(engine.on_demand == placements[name].on_demand for name, engine in engines.items())
    return same and manifest.is_whole(out, before.components)


def rebuild_reason(before: Manifest | None, out: Path, name: str, key: dict[str, str]) -> str:
    """Why the component `name` has to be compiled; empty if the engine in `out` is the one that `key` describes."""
    if before is None or name not in before.engines:
        return NEW
    if changed := manifest.first_difference(before.engines[name].cache_key, key):
        return changed
    for file, expected in before.components[name].files.items():
        path = out / file
        if not path.is_file() or path.stat().st_size != expected.size:
            return f"{file} is missing or truncated"
    return ""


def copy_component(component: Component, source: Path, folder: Path) -> Component:
    """Copy a component's files from the folder `source`, checked on the way."""
    manifest.check_files(source, component.files, fix="make the folder again")
    for name in component.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return component


def keep_component(component: Component, before: Path, folder: Path) -> Component:
    """Take a component's files over from an earlier build, checked; where the file system can, none is copied."""
    manifest.check_files(before, component.files, fix="remove the folder, and build again")
    for name in component.files:
        try:
            os.link(before / name, folder / name)
        except OSError:
            shutil.copyfile(before / name, folder / name)
    return component
