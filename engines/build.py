"""`ditforge build`: compile every ONNX graph of a folder into an engine, unless the same engine exists already."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING

from ditforge import manifest, regions, stage_folder
from ditforge.contract import DIT, TOKENIZER
from ditforge.engines.compilers import Compiler, Job, Progress, Ranges, compilers, find_compiler, streamed_segments
from ditforge.engines.compilers.child_process import compile_apart
from ditforge.engines.compilers.choice import check_component, choose, made_by
from ditforge.engines.gpus import Target, default_precision, find_target, limited
from ditforge.engines.memory.fitting import (
    cut_before,
    decide,
    memory_to_compile,
    place_engines,
    warn_of_compiling,
)
from ditforge.engines.memory.memory_plan import Plan
from ditforge.engines.profile import Profile, announced, make_profiles, tiled
from ditforge.errors import DitforgeWarning, UserError
from ditforge.manifest import Component, Engine, Manifest
from ditforge.model import Model
from ditforge.option import command, option
from ditforge.placement import Placement

if TYPE_CHECKING:
    from ditforge.engines.memory.segments import Segment

CUTTING = 1  # how segments.cut does it; another number where the same graph and count would give other segments
PLAN = ".plan"
NEW = "there was none before"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """What a build did: the manifest, and for each component that was compiled the reason why."""

    manifest: Manifest
    rebuilt: dict[str, str]


@dataclass(frozen=True)
class BuildOptions:
    """What engines are compiled for. A field that is None is chosen automatically.

    gpu: a product, sm_89, several of these with commas, local, or cpu (see ditforge.engines.gpus.find_target).
    compiler: the name of a compiler; by default, the one that suits the GPU.
    resolutions, static, batch: the sizes in pixels and the batches (see ditforge.engines.profile.make_profiles). The
        default depends on the compiler: all sizes of the model, or those around the model's default size.
    vae_tile: the autoencoder takes pictures in tiles of that many pixels. By default it takes them whole.
    segments: the number of engines into which the DiT is cut. They are compiled one after the other.
    residency: "resident"; or "on-demand", which loads every engine for each call and then frees it.
    gpu_memory: the GiB of the GPU's memory that the engines may take.
    force: whether engines of another model in the folder are replaced.

    Where neither `segments` nor `residency` is given, a plan for the memory of the GPU decides about them, and about
    the batch and the tiles (see ditforge.engines.memory.fitting.decide).
    """

    gpu: str = "cpu"
    compiler: str | None = None
    resolutions: str | None = None
    static: str | None = None
    batch: int | None = None
    vae_tile: int | None = None
    segments: int | None = None
    residency: str | None = None
    gpu_memory: float | None = None
    force: bool = False

    @property
    def placed_by_hand(self) -> bool:
        """Whether the user says where engines are."""
        return (self.segments, self.residency) != (None, None)

    @property
    def sized_by_hand(self) -> bool:
        """Whether the user says what sizes or batches engines take."""
        return (self.resolutions, self.static, self.batch) != (None, None, None)


@dataclass(frozen=True)
class Order:
    """What a build makes of an export: its networks, its model, and the model that the engines announce to clients.

    `profiles` are the sizes for which engines are made; without any, engines take all sizes. By the name of the
    network, `makers` has the compiler and the target, and `placements` has where the engine will be in memory.
    """

    networks: dict[str, Component]
    exported: Model
    model: Model
    profiles: list[Profile]
    makers: dict[str, tuple[Compiler, Target]]
    placements: dict[str, Placement]


@dataclass(frozen=True)
class Design:
    """How an order is carried out. All fields but the largest batch (None: any) are by the name of the network.

    They say where the engine is placed, the profiles of its sizes, the shapes of its inputs in these profiles, its
    cache key, and, if it has to be compiled, the reason.
    """

    order: Order
    max_batch: int | None
    placements: dict[str, Placement]
    profiles: dict[str, list[Profile]]
    shapes: dict[str, list[Ranges]]
    keys: dict[str, dict[str, str]]
    reasons: dict[str, str]


def build(
    onnx: Path,
    out: Path,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
    planned: Callable[[Plan], None] | None = None,
) -> Built:
    """Compile the graphs in the folder `onnx` into engines in the folder `out`.

    An engine whose cache key is unchanged is kept. If all are kept, nothing is written. If the user does not say how
    networks are cut, the memory of this machine decides. `progress` is called with (what is done, how many steps are
    done, how many there are), and `planned` with the plan for the GPU's memory, where there is one. Raises UserError if
    the target cannot execute a component, or has too little memory, if a graph is damaged, or has not that many
    segments; then `out` is as it was before.
    """
    options = options or BuildOptions()
    source, before = manifest.read(onnx, "onnx"), manifest.earlier(out, "engines")
    check_export(source, onnx)
    order, plan = make_order(source, options)
    if plan and planned and not options.placed_by_hand:
        planned(plan)
    as_before = [name for name in order.networks if plan and not (name == DIT and options.segments)]
    design = make_design(order, before, as_before, out)
    if before and not design.reasons and is_same(before, out, design):
        return Built(before, {})
    for name in order.networks:
        log.info("%s: %s", name, f"compiled ({reason})" if (reason := design.reasons.get(name)) else "kept")
    called = "" if options.force else stage_folder.called(source.model.name, source.origin)
    stage_folder.check_replaceable(out, "engines", kept_files(), called)
    return Built(write_engines(source, onnx, out, design, before, progress), design.reasons)


def check_export(source: Manifest, onnx: Path) -> None:
    """Raise UserError unless an export has a tokenizer, and networks with their graphs."""
    manifest.check_components(source, onnx, [TOKENIZER])
    networks = {name: component for name, component in source.components.items() if name != TOKENIZER}
    again = f"{manifest.NEXT_COMMAND['onnx']}   again"
    if not networks:
        raise UserError(f"{onnx / manifest.FILE_NAME} has no network: components holds the tokenizer alone", again)
    for name, component in networks.items():
        if f"{name}.onnx" not in component.files:
            problem = f"{onnx / manifest.FILE_NAME} is damaged: components.{name}.files has no {name}.onnx"
            raise UserError(problem, again)


def make_order(source: Manifest, options: BuildOptions) -> tuple[Order, Plan | None]:
    """The order for an export, and the plan for the GPU's memory. Raises UserError for an order that is impossible."""
    target = limited(find_target(options.gpu), options.gpu_memory)
    check_wished(source, target, options.gpu)
    if options.gpu_memory is not None and options.placed_by_hand:
        raise UserError(
            f"{option('gpu_memory')} is for a plan, which {option('segments')} and {option('residency')} replace",
            "leave one of them out",
        )
    name, why = choose(target) if options.compiler is None else (options.compiler, "")
    if why:
        warnings.warn(f"{name} compiles for {options.gpu}: {why}", DitforgeWarning, stacklevel=2)
    compiler = find_compiler(name)
    networks = {name: component for name, component in source.components.items() if name != TOKENIZER}
    model, profiles = tiled(source.model, options.vae_tile), []
    if compiler.shapes == "ranges" or options.sized_by_hand or target.capabilities:
        profiles = make_profiles(model, options.resolutions, options.static, options.batch)
    plan, memory = None, memory_to_compile() if compiler.holds_weights else None
    if profiles:
        limits = replace(target, memory_gb=None) if options.placed_by_hand else target
        plan = decide(networks, model, limits, profiles, options.batch, memory, compiler.traits)
    if plan:
        model = tiled(model, plan.vae_tile)
        profiles = [replace(profile, max_batch=plan.batch) for profile in profiles]
    model = announced(model, profiles) if profiles else model
    placements = place_engines(networks, plan, options.segments, options.residency)
    if plan:
        warn_of_compiling(networks, placements, memory)
    if compiler.reads == "programs" and options.segments not in (None, 1):
        problem = f"{compiler.name} compiles blocks, whose weights it streams, and so needs no {option('segments')}"
        raise UserError(problem, f"leave out {option('segments')}, or {option('compiler')} with another one")
    makers = {name: made_by(placements[name], compiler, target) for name in networks}
    return Order(networks, source.model, model, profiles, makers, placements), plan


def check_wished(source: Manifest, target: Target, gpu: str) -> None:
    """Raise UserError for a GPU's engine of an fp32 export that is fp32 only because nobody named a precision."""
    if not target.capabilities or source.origin.get(manifest.PRECISION_CHOICE) != manifest.BY_DEFAULT:
        return
    precision = default_precision(target)[0]
    raise UserError(
        f"this export of {source.model.name} is in fp32, which suits the CPU, and {gpu} is for {precision}",
        command("ditforge export CHECKPOINT --gpu {} --out DIR   (or --precision fp32, if that is what you want)", gpu),
    )


def make_design(order: Order, before: Manifest | None, as_before: Collection[str], out: Path) -> Design:
    """How the order is carried out in the folder `out`, which may hold an earlier build, `before`.

    Networks of `as_before` may keep the number of segments that they have there. Raises UserError for a network that
    its target cannot execute.
    """
    own = {name: [profile.of(name, order.model) for profile in order.profiles] for name in order.networks}
    placed, shapes, keys, reasons = {}, {}, {}, {}
    for name, component in order.networks.items():
        wanted, (compiler, target) = order.placements[name], order.makers[name]
        check_component(compiler, name, component, target)
        shapes[name] = ranges(component, own[name] if compiler.shapes == "ranges" else [], order.exported)
        for placement in (cut_before(before if name in as_before else None, name, wanted), wanted):
            placed[name] = placement
            keys[name] = cache_key(component, compiler, target, placement, shapes[name])
            reason = rebuild_reason(before, out, name, keys[name])
            if not reason:
                break
        else:
            reasons[name] = reason
    max_batch = order.profiles[0].max_batch if order.profiles else None
    return Design(order, max_batch, placed, own, shapes, keys, reasons)


def write_engines(
    source: Manifest,
    onnx: Path,
    out: Path,
    design: Design,
    before: Manifest | None,
    progress: Progress | None,
) -> Manifest:
    """Compile the engines that are out of date, take the others over from the build `before`, and write `out` anew."""
    networks, placements = {name: source.components[name] for name in design.keys}, design.placements
    begun = perf_counter()
    for name in design.reasons:  # all of them are looked at before the first one is compiled
        manifest.check_files(onnx, networks[name].files, fix="ditforge export CHECKPOINT --out DIR   again")
    log.info("the export's files are checked after %.1f s", perf_counter() - begun)
    parts = {
        name: cut_graph(
            onnx / f"{name}.onnx", networks[name], source.model, design.profiles[name], placements[name].segments
        )
        for name in design.reasons
    }
    report = progress or (lambda component, done, total: None)
    kept = {name: before.components[name] for name in networks if name not in design.reasons} if before else {}
    own = kept_files()
    with stage_folder.written_whole(out, "engines", own) as folder:
        for file in own:
            if before and (out / file).is_file():
                shutil.copyfile(out / file, folder / file)
        jobs = {}
        for name in design.reasons:
            _, target = design.order.makers[name]
            graph = onnx / f"{name}.onnx"
            jobs[name] = Job(name, networks[name], graph, folder / name, target, design.shapes[name], report)
        compiled = compile_networks(jobs, design, parts, report)
        log.info("%d networks are compiled after %.1f s", len(jobs), perf_counter() - begun)
        components = {TOKENIZER: copy_component(source.components[TOKENIZER], onnx, folder)}
        engines = {}
        for name in networks:
            compiler, target = design.order.makers[name]
            if name in kept and before:
                components[name], made = keep_component(kept[name], out, folder), before.engines[name].segment_files
            else:
                described = {file.name: manifest.describe(file) for part in compiled[name] for file in part}
                components[name] = networks[name].model_copy(update={"files": described})
                made = tuple(tuple(file.name for file in part) for part in compiled[name]) if parts[name] else ()
            engines[name] = Engine(
                compiler=compiler.name,
                compiler_version=compiler.version(),
                target=str(target),
                cache_key=design.keys[name],
                triton_backend=compiler.triton_backend,
                max_batch=design.max_batch,
                placement=placements[name],
                segment_files=made,
            )
        report("done", len(networks), len(networks))
        result = Manifest(
            kind="engines", model=design.order.model, components=components, engines=engines, origin=source.origin
        )
        manifest.write(result, folder)
        log.info("the engines are described after %.1f s", perf_counter() - begun)
    return result


def kept_files() -> list[str]:
    """The names of the files that compilers keep in a folder of engines, beside the engines."""
    return sorted({file for compiler in compilers() for file in compiler.keeps})


def ranges(component: Component, profiles: list[Profile], model: Model) -> list[Ranges]:
    """The shapes of the inputs that vary, for each profile. Profiles that are the same for a component count once."""
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
    """Cut a graph into `count` segments. Raises UserError if it cannot be cut into so many.

    Returns the segments, or none if the graph stays whole.
    """
    if count == 1:
        return []
    from ditforge.engines.memory.segments import cut

    step = model.size_multiple
    probe = Profile((step, 2 * step), (2 * step, 3 * step), (3 * step, 5 * step), max_batch=2)
    shapes = ranges(component, profiles or make_profiles(model, None, None, None), model)
    return cut(graph, component, count, ranges(component, [probe], model)[0], shapes)


def compile_networks(
    jobs: dict[str, Job], design: Design, parts: dict[str, list[Segment]], report: Progress
) -> dict[str, list[list[Path]]]:
    """Compile networks: side by side where their compiler does that, and the others one after the other.

    `parts` are the segments of each. Returns, by the name of the network, the files of each engine.
    """
    compiled: dict[str, list[list[Path]]] = {}
    beside: dict[str, list[Job]] = {}
    for name, job in jobs.items():
        compiler, _ = design.order.makers[name]
        if compiler.together and not parts[name]:
            beside.setdefault(compiler.name, []).append(job)
        else:
            report(name, len(compiled), len(jobs))
            streamed = streamed_segments(compiler, design.placements[name])
            compiled[name] = compile_parts(compiler, job, parts[name], streamed)
    for name, together in beside.items():
        compile_together = find_compiler(name).together
        assert compile_together
        files = compile_together(together, report)
        compiled |= {job.name: [one] for job, one in zip(together, files, strict=True)}
    return compiled


def compile_parts(compiler: Compiler, job: Job, segments: list[Segment], streamed: int) -> list[list[Path]]:
    """Compile a graph, or each of its segments, one after the other. Returns the files of each engine.

    The last `streamed` segments must be able to stream their weights.
    """
    if not segments:
        return [compile_one(compiler, job)]
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
                streams=number > len(segments) - streamed,
            )
            files.append(compile_one(compiler, part))
    return files


def compile_one(compiler: Compiler, job: Job) -> list[Path]:
    """Compile a graph, in a process of its own if the compiler asks for one. Returns the files that were written."""
    return compile_apart(compiler.name, job) if compiler.own_process else compiler.compile(job)


def cache_key(
    component: Component, compiler: Compiler, target: Target, placement: Placement, shapes: list[Ranges]
) -> dict[str, str]:
    """Everything that changes an engine. Two engines with the same key are the same engine."""
    unread = regions.SUFFIX if compiler.reads == "graph" else ".onnx"
    digests = {f"sha256 of {name}": file.sha256 for name, file in component.files.items() if not name.endswith(unread)}
    profile = {
        f"shapes of {name}": ", ".join(" ".join("x".join(map(str, shape)) for shape in part[name]) for part in shapes)
        for name in (shapes[0] if shapes else ())
    }
    segments, streamed = placement.segments, streamed_segments(compiler, placement)
    return {
        "compiler": compiler.name,
        "compiler_version": compiler.version(),
        "target": str(target),
        "precision": component.precision,
        "segments": "1" if segments == 1 else f"{segments} (cutting {CUTTING})",
        **({"segments that can stream": str(streamed)} if streamed else {}),
        **profile,
        **compiler.settings(),
        **digests,
    }


def is_same(before: Manifest, out: Path, design: Design) -> bool:
    """Whether the build in `out` is already what the order asks for."""
    engines, placements = before.engines, design.placements
    same = before.model == design.order.model and engines.keys() == placements.keys()
    same = same and all(engine.max_batch == design.max_batch for engine in engines.values())
    same = same and all(engine.placement == placements[name] for name, engine in engines.items())
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
    """Take a component's files over from an earlier build and check them. They are linked if the file system can."""
    manifest.check_files(before, component.files, fix="remove the folder, and build again")
    for name in component.files:
        try:
            os.link(before / name, folder / name)
        except OSError:
            shutil.copyfile(before / name, folder / name)
    return component
