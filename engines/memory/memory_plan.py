"""Decides which network is where and when, on a GPU of a given memory: the first of a list of ways that fits.

This is arithmetic only; docs/memory.md explains the numbers. All engines of a GPU are in one process (see
engines/runtime/process.py), and each keeps its weights as long as it is loaded. Resident engines therefore count in
every phase of a picture, and engines that are loaded on demand count only in their own phase. Memory for activations is
either each engine's own, and counts as its weights do, or all engines use the same, one at a time. A picture from text
does not need the phase "image encoding", but the server tries every engine when it starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

from ditforge.contract import DIT, TOKENIZER, VAE_DECODER, VAE_ENCODER
from ditforge.engines.gpus import Target
from ditforge.footprint import Footprint
from ditforge.manifest import Component
from ditforge.model import LEAST_TILE, TILED, Model
from ditforge.placement import CPU, ON_DEMAND, RESIDENT, Placement

GIB = 2**30
USABLE = 15 / 16  # of a card's memory: error correction takes 1/16 of GDDR6, and elsewhere driver and screen do
CONTEXT = 716 * 2**20  # bytes that CUDA and TensorRT take for themselves in the process that has the engines
SPARE = 1.1  # activations are reckoned that much larger: the compiler was seen to want 3 % more than that
BUILD_RATIO = 2.06  # bytes of memory that TensorRT-RTX takes at its peak to compile a byte of weights
BUILD_SPARE = 10**9  # bytes beside: the libraries, the graph, and what else runs

TEXT, DENOISING, DECODING, ENCODING = "text encoding", "denoising", "decoding", "image encoding"
PHASES = (TEXT, DENOISING, DECODING, ENCODING)
TEXT_SEGMENTS = (2, 4, 8)  # of the largest text encoder, where it is loaded on demand
DIT_SEGMENTS = (4, 8, 16)  # of the DiT, where some of them are loaded on demand, and the others stay
SLOTS = 2  # of segments or blocks that are loaded in each step: one computes, and the next one is loaded meanwhile
SPARE_BLOCKS = 1  # of a streamed DiT, for whose room nothing is planned: the allocator's pieces do not always fit
MOST_SEGMENTS = 1000  # more than any network has blocks
TILES = (1, 3 / 4, 1 / 2)  # sides of tiles, as parts of the model's default size


@dataclass(frozen=True)
class Part:
    """A network of a model, with what it takes in each of its possible precisions, the best one first.

    `cpu` is the number of bytes of the machine's memory that it takes on the CPU, or None if the CPU cannot compute it.
    """

    name: str
    footprints: Mapping[str, Footprint]
    cpu: int | None = None

    @property
    def phase(self) -> str:
        """The phase of a picture in which the network works."""
        return {DIT: DENOISING, VAE_DECODER: DECODING, VAE_ENCODER: ENCODING}.get(self.name, TEXT)

    @property
    def weights(self) -> int:
        """The bytes of its weights in its best precision."""
        return next(iter(self.footprints.values())).weights


@dataclass(frozen=True)
class Traits:
    """What a plan has to know of the compiler's engines.

    streams: whether they can stream their weights, block by block; then nothing is cut.
    libraries: the bytes of the GPU's memory that their libraries take in the process, beside the CUDA context.
    shares_activations: whether all engines use the same memory for their activations, one at a time.
    records_graphs: whether resident engines record CUDA graphs, with memory for activations of their own. They share
        that too. Those of the autoencoder do not: its kernels are large, so a graph saves it nothing.
    """

    streams: bool = False
    libraries: int = 0
    shares_activations: bool = False
    records_graphs: bool = False


@dataclass(frozen=True)
class Plan:
    """Where each network is, and how many bytes of the GPU's memory are taken in each phase of a picture.

    `precisions` and `sizes` give the precision of each network, and the bytes that it takes on its device while it
    works. `usable` is the number of bytes that the GPU has for engines, or None if that is not known. `rank` is the
    place of this way in the list of ways; if none fits, it is the last one. `batch` is how many samples the networks
    take at a time.
    """

    strategy: str
    rank: int
    placements: Mapping[str, Placement]
    precisions: Mapping[str, str]
    sizes: Mapping[str, int]
    vae_tile: int | None
    peaks: Mapping[str, int]
    usable: int | None
    batch: int = 1
    reasons: Sequence[str] = ()

    @property
    def peak(self) -> int:
        """The largest number of bytes that are taken at a time."""
        return max(self.peaks.values())

    @property
    def fits(self) -> bool:
        """Whether the GPU has enough memory for the plan."""
        return self.usable is None or self.peak <= self.usable


@dataclass(frozen=True)
class Way:
    """One way to save memory: which networks are not resident, which have their second precision, and what is cut.

    `kept` is how many segments of an on-demand network stay resident nevertheless; by default, none. `slots` is how
    many of the DiT's others have room at a time. `streamed` are the networks whose blocks come from the machine's
    memory in each call, except those for which the GPU has room.
    """

    strategy: str
    places: Mapping[str, str] = field(default_factory=dict)
    eight_bit: frozenset[str] = frozenset()
    segments: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)
    tile: int | None = None
    slots: int = 1
    streamed: frozenset[str] = frozenset()


def make_plan(
    parts: Sequence[Part],
    model: Model,
    target: Target,
    side: int,
    batch: int = 1,
    build_memory: int | None = None,
    vae_tile: int | None = None,
    traits: Traits | None = None,
) -> Plan:
    """Plan the memory of `target` for the model's pictures of up to side x side pixels, `batch` at a time.

    `build_memory` is the number of bytes that compiling may take (None: any). It may require more segments than the GPU
    does. `vae_tile` fixes the side of the autoencoder's tiles in pixels. `traits` are those of the compiler's engines.
    """
    usable = usable_memory(target)
    tried: dict[str, int] = {}
    plan = None
    sizes = [vae_tile] if vae_tile else [None, *tiles(model, side)]
    traits = traits or Traits()
    possible = streaming_ways(parts, sizes) if traits.streams else ways(parts, sizes, build_memory)
    for rank, way in enumerate(possible):
        placed = reckon(parts, way, side, batch, build_memory, usable, traits)
        plan = Plan(way.strategy, rank, *placed.of_networks, way.tile, placed.peaks, usable, batch)
        if plan.fits:
            break
        tried[way.strategy] = min(plan.peak, tried.get(way.strategy, plan.peak))
    assert plan is not None, "there is always a way"
    return replace(plan, reasons=tuple(explain(plan, parts, tried, side)))


def parts_of(components: Mapping[str, Component]) -> list[Part] | None:
    """The networks of an export, each in its precision, or None if the export has no measurements.

    Only a network in fp32 can be left to the CPU, which has no bf16, and would widen 8-bit weights.
    """
    parts = []
    for name, component in components.items():
        if name == TOKENIZER:
            continue
        if component.footprint is None:
            return None
        cpu = component.footprint.weights if component.precision == "fp32" else None
        parts.append(Part(name, {component.precision: component.footprint}, cpu))
    return parts


def usable_memory(target: Target) -> int | None:
    """The bytes of the GPU's memory that engines can have, or None if only its compute capability is known."""
    return None if target.memory_gb is None else int(target.memory_gb * GIB * USABLE)


def build_segments(footprint: Footprint, memory: int | None) -> int:
    """The number of segments into which a network must be cut to be compiled in so many bytes of memory."""
    counts = range(1, most_segments(footprint) + 1)
    fitting = (k for k in counts if memory is None or build_peak(footprint.segment(k)) <= memory)
    return next(fitting, counts[-1])


def build_peak(weights: int) -> int:
    """The bytes of memory that compiling so many bytes of weights takes."""
    return math.ceil(BUILD_RATIO * weights) + BUILD_SPARE


def most_segments(footprint: Footprint) -> int:
    """The largest sensible number of segments: the number of blocks, if all were as large as the largest one."""
    return min(max(1, footprint.weights // max(footprint.largest_block, 1)), MOST_SEGMENTS)


def tiles(model: Model, side: int) -> list[int]:
    """The sides in pixels of the tiles that the autoencoder may use for pictures of that side, the largest first."""
    least = model.vae_factor * LEAST_TILE
    sizes = [round(model.default_size * part / model.vae_factor) * model.vae_factor for part in TILES]
    return sorted({max(size, least) for size in sizes if max(size, least) < side}, reverse=True)


def ways(parts: Sequence[Part], tiles: Sequence[int | None], memory: int | None) -> Iterator[Way]:
    """All ways, each slower or less exact than those before it. The DiT's segments can be compiled in `memory`.

    An engine that is freed after use has to be loaded again for each picture, and a segment of the DiT for each step.
    Such ways come last, and those that load the least come first among them: with room for the next segment while one
    computes, and then without.
    """
    texts = [part for part in parts if part.phase == TEXT and part.weights]
    largest = largest_text_encoder(parts)
    heavy = largest.name if largest else ""
    dit = next((next(iter(part.footprints.values())) for part in parts if part.name == DIT), None)
    least = build_segments(dit, memory) if dit else 1
    smaller = frozenset([heavy]) if largest and len(largest.footprints) > 1 else frozenset[str]()
    freed = {part.name: ON_DEMAND for part in texts}
    outside = {heavy: CPU} if largest and largest.cpu is not None else {}
    most = most_segments(next(iter(largest.footprints.values()))) if largest else 1
    text_segments = [count for count in TEXT_SEGMENTS if count <= most]

    decoded = partial(decoding_ways, tiles)

    def texts_moved(moved: Mapping[str, str], segments: int, strategy: str, kept: int = 0) -> Iterator[Way]:
        once, cut, stay = {**freed, VAE_DECODER: ON_DEMAND, **moved}, {DIT: segments}, {DIT: kept}
        yield from decoded(Way(strategy or f"{heavy} freed", once, segments=cut, kept=stay))
        for count in text_segments:
            more = {**cut, heavy: count}
            yield from decoded(Way(strategy or f"{heavy} offload {count}", once, segments=more, kept=stay))
        if smaller:
            yield from decoded(Way(strategy or f"{heavy} 8-bit, freed", once, smaller, cut, stay))
        if outside:
            yield from decoded(Way(strategy or f"{heavy} on CPU", {**outside, **moved}, segments=cut, kept=stay))

    yield from decoded(Way(RESIDENT, segments={DIT: least}))
    if smaller:
        yield from decoded(Way(f"{heavy} 8-bit", eight_bit=smaller, segments={DIT: least}))
    if texts:
        yield from texts_moved({}, least, "")
    if dit:
        for slots, (on_demand, count) in product((SLOTS, 1), offloads(least, most_segments(dit))):
            strategy = f"offload {on_demand} of {count}"
            for way in texts_moved({DIT: ON_DEMAND}, count, strategy, count - on_demand):
                yield replace(way, slots=slots)


def streaming_ways(parts: Sequence[Part], tiles: Sequence[int | None]) -> Iterator[Way]:
    """All ways for engines that stream their blocks, each slower or less exact than those before it.

    The largest text encoder is streamed first, once a prompt, and then the DiT too, in each step. What then stays of
    the DiT is what finds room.
    """
    largest, dit = largest_text_encoder(parts), {part.name for part in parts if part.name == DIT}
    heavy = {largest.name} if largest else set[str]()
    yield from decoding_ways(tiles, Way(RESIDENT))
    if largest and len(largest.footprints) > 1:
        yield from decoding_ways(tiles, Way(f"{largest.name} 8-bit", eight_bit=frozenset(heavy)))
    decoding = {VAE_DECODER: ON_DEMAND}
    if heavy:
        yield from decoding_ways(tiles, Way(f"{min(heavy)} streamed", decoding, streamed=frozenset(heavy)))
    freed = {part.name: ON_DEMAND for part in parts if part.phase == TEXT} | decoding
    both = Way(" and ".join([*sorted(heavy), DIT]) + " streamed", freed, streamed=frozenset(heavy | dit))
    yield from decoding_ways(tiles, both)


def decoding_ways(tiles: Sequence[int | None], way: Way) -> Iterator[Way]:
    """The way with less and less memory for the autoencoder: its encoder on demand, and then smaller tiles."""
    yield replace(way, tile=tiles[0])
    waiting = replace(way, places={**way.places, VAE_ENCODER: ON_DEMAND})
    yield from (replace(waiting, tile=tile) for tile in tiles)


def largest_text_encoder(parts: Sequence[Part]) -> Part | None:
    """The text encoder with the most weights, or None if there is none with weights."""
    texts = [part for part in parts if part.phase == TEXT and part.weights]
    return max(texts, key=lambda part: part.weights, default=None)


def offloads(least: int, most: int) -> list[tuple[int, int]]:
    """How many of how many segments of the DiT are loaded on demand, the smallest part of the DiT first.

    It is never one segment alone, which might as well stay where it finds room. Ways in which all segments are loaded
    on demand come last, with any number of segments.
    """
    some = {(n, count) for count in DIT_SEGMENTS if least <= count <= most for n in range(2, count)}
    fewest = {n / count: (n, count) for n, count in sorted(some, key=lambda pair: -pair[1])}  # 2 of 4, not 4 of 8
    return [fewest[part] for part in sorted(fewest)] + [(count, count) for count in range(least, most + 1)]


@dataclass
class Reckoned:
    """The placement, precision and size of each network, and the bytes of the GPU's memory taken in each phase."""

    placements: dict[str, Placement] = field(default_factory=dict)
    precisions: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    @property
    def of_networks(self) -> tuple[dict[str, Placement], dict[str, str], dict[str, int]]:
        """The placement, the precision and the size of each network, as `Plan` takes them."""
        return self.placements, self.precisions, self.sizes


def reckon(
    parts: Sequence[Part], way: Way, side: int, batch: int, memory: int | None, usable: int | None, traits: Traits
) -> Reckoned:
    """Compute where each network is, and how many bytes of the GPU's memory are taken in each phase.

    A network is cut as the way says, or into more segments if these need more than `memory` to be compiled. Of a DiT
    that is streamed, as many blocks stay as find room in the `usable` bytes, beside SPARE_BLOCKS of them.
    """
    found = Reckoned()
    always, loaded, working = CONTEXT + traits.libraries, dict.fromkeys(PHASES, 0), dict.fromkeys(PHASES, 0)
    graphs = 0
    for part in parts:
        precision = list(part.footprints)[1 if part.name in way.eight_bit else 0]
        footprint, place = part.footprints[precision], way.places.get(part.name, RESIDENT)
        found.precisions[part.name] = precision
        if place == CPU:
            found.placements[part.name], found.sizes[part.name] = Placement(device="cpu"), part.cpu or 0
            continue
        count = max(way.segments.get(part.name, 1), build_segments(footprint, memory))
        pixels = min(side, way.tile or side) if part.name in TILED else side
        works = round(SPARE * batch * footprint.activations_at(pixels))  # bytes, while it computes
        if part.name in way.streamed:
            works += SLOTS * footprint.largest_block
            found.placements[part.name] = Placement(weight_budget=0)
            kept, stays, comes = count, 0, 0
        else:
            kept = way.kept.get(part.name, 0) if place == ON_DEMAND else count
            on_demand = count - kept
            slots = way.slots if part.name == DIT and on_demand > 1 else 1  # in each step; a text is encoded once
            stays = footprint.first(kept, count) if kept else 0
            comes = slots * footprint.segment(count) if on_demand else 0
            found.placements[part.name] = Placement(segments=count, on_demand=on_demand, slots=slots)
            if traits.records_graphs and place == RESIDENT and part.name not in TILED:
                graphs = max(graphs, works)
        found.sizes[part.name] = stays + comes + works
        always += stays
        loaded[part.phase] += comes
        if traits.shares_activations:
            working[part.phase] = max(working[part.phase], works)
        elif kept:
            always += works
        else:
            loaded[part.phase] += works
    always += graphs
    for part in parts:
        if part.name == DIT and part.name in way.streamed and usable is not None:
            spare = SPARE_BLOCKS * next(iter(part.footprints.values())).largest_block
            taken = always + max(loaded[phase] + working[phase] for phase in PHASES) + spare
            room = max(0, min(part.weights, usable - taken))
            found.placements[part.name] = Placement(weight_budget=room)
            found.sizes[part.name] += room
            always += room
    found.peaks = {phase: always + loaded[phase] + working[phase] for phase in PHASES}
    return found


def explain(plan: Plan, parts: Sequence[Part], tried: Mapping[str, int], side: int) -> Iterator[str]:
    """Why the plan is as it is, in sentences."""
    if plan.usable is None:
        yield "how much memory the GPU has is not known: all of it stays there"
        return
    if not plan.fits:
        yield f"does not fit: needs {gibibytes(plan.peak)}, {gibibytes(plan.usable)} can be used"
    for strategy, peak in tried.items():
        if strategy != plan.strategy and not strategy.startswith("offload"):  # of offloads there are many
            yield f"{strategy} would take {gibibytes(peak)} of {gibibytes(plan.usable)}"
    for part in parts:
        placement, size = plan.placements[part.name], gibibytes(plan.sizes[part.name])
        footprint = part.footprints[plan.precisions[part.name]]
        if part.name == VAE_DECODER and plan.vae_tile:
            whole, tiled = (footprint.activations_at(size) for size in (side, plan.vae_tile))
            yield (
                f"{part.name} decodes tiles of {plan.vae_tile} x {plan.vae_tile} pixels, in {gibibytes(tiled)}: "
                f"{side} x {side} at once would take {gibibytes(whole)}"
            )
        if part.name == VAE_ENCODER and placement.residency == ON_DEMAND:
            yield f"{part.name}, {size}, is loaded when it is asked: pictures from text need none"
        if part.phase == TEXT and placement.residency == ON_DEMAND and placement.segments > 1:
            yield f"{part.name}'s segments are loaded on demand: {gibibytes(footprint.weights)} a prompt"
        if placement.weight_budget is not None:
            stay = placement.weight_budget
            each = "a step" if part.name == DIT else "a prompt"
            yield (
                f"{part.name}'s blocks come from the machine's memory: {gibibytes(footprint.weights - stay)} {each}"
                + (f"; {gibibytes(stay)} of them stay" if stay else "")
            )
        if placement.residency == CPU:
            yield f"{part.name} takes {size} of the machine's memory"
        if part.name == DIT and placement.residency == ON_DEMAND:
            moved = footprint.weights * placement.on_demand // placement.segments
            which = f"{placement.on_demand} of {part.name}'s {placement.segments} segments"
            yield f"{which} are copied to the GPU in each step: {gibibytes(moved)} a step"


def gibibytes(size: int) -> str:
    """A number of bytes as text, in GiB, in which GPUs are counted."""
    return f"{size / GIB:.1f} GiB"
