"""What is where on a GPU, and when: properties of all plans, and those for the published models' real sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st
from published import MODEL

from ditforge.engines.compilers import find_compiler
from ditforge.engines.compilers.choice import made_by
from ditforge.engines.gpus import GPUS, Target, find_target
from ditforge.engines.memory import fitting
from ditforge.engines.memory.memory_plan import (
    BUILD_RATIO,
    CONTEXT,
    PHASES,
    RESIDENT,
    SPARE,
    SPARE_BLOCKS,
    Part,
    Plan,
    Traits,
    make_plan,
    offloads,
    parts_of,
    usable_memory,
)
from ditforge.engines.profile import make_profiles
from ditforge.errors import DitforgeWarning, UserError
from ditforge.footprint import Footprint
from ditforge.manifest import Component, Engine, Manifest
from ditforge.placement import Placement

GB = 10**9
# FLUX.1-dev's, as `make memory` measures them: weights, the largest block, activations at 512, 1024 and 2048 pixels.
LARGE = {
    "clip": (0.246, 0.076, (0.002, 0.002, 0.002)),
    "t5": (9.525, 0.386, (0.126, 0.126, 0.126)),
    "dit": (15.2, 0.453, (0.251, 0.613, 2.06)),
    "vae_decoder": (0.099, 0.033, (0.403, 1.613, 17.66)),
    "vae_encoder": (0.069, 0.022, (0.338, 1.352, 17.69)),
}


def footprint(weights: float, block: float, activations: tuple[float, ...]) -> Footprint:
    """From gigabytes, at 512, 1024 and 2048 pixels."""
    sizes = {512 * 2**i: round(size * GB) for i, size in enumerate(activations)}
    return Footprint(weights=round(weights * GB), largest_block=round(block * GB), activations=sizes)


def parts() -> list[Part]:
    """FLUX.1-dev with 8-bit weights, as a checkpoint that can be exported with an 8-bit T5, or one for the CPU."""
    found = {name: footprint(*sizes) for name, sizes in LARGE.items()}
    half = footprint(4.9, 0.386, (0.21, 0.21, 0.21))
    return [
        Part(name, {"bf16": taken, "int8-weights": half}, cpu=19 * GB) if name == "t5" else Part(name, {"best": taken})
        for name, taken in found.items()
    ]


STREAMS = Traits(streams=True, shares_activations=True, records_graphs=True)
RTX = find_compiler("tensorrt-rtx").traits


def plan(gpu: str, side: int = 1024, traits: Traits = RTX) -> Plan:
    """That of FLUX.1-dev on a product."""
    return make_plan(parts(), MODEL, find_target(gpu), side, traits=traits)


@pytest.mark.parametrize(
    ("gpu", "side", "strategy", "tile"),
    [
        ("rtx2060", 2048, "offload 15 of 15", 1024),
        ("rtx4060", 1024, "offload 13 of 16", None),
        ("rtx3060", 1024, "offload 9 of 16", None),
        ("rtx3060", 2048, "offload 11 of 16", 1024),
        ("rtx4070tisuper", 1024, "offload 5 of 16", None),
        ("rtx4000ada", 2048, "t5 offload 4", 1024),
        ("rtx4000ada", 512, "t5 offload 4", None),
        ("rtx4000ada", 1536, "t5 offload 4", 1024),
        ("rtx4090", 512, "t5 8-bit", None),
        ("rtx4090", 1024, "t5 8-bit", None),
        ("rtx4090", 2048, "t5 8-bit", 1024),
        ("rtx5090", 1024, RESIDENT, None),
        ("rtx5090", 2048, RESIDENT, 1024),
        ("h100", 2048, RESIDENT, None),
    ],
)
def test_what_a_card_gets(gpu: str, side: int, strategy: str, tile: int | None) -> None:
    made = plan(gpu, side)
    assert made.fits
    assert (made.strategy, made.vae_tile) == (strategy, tile)


def test_engines_that_triton_may_execute_itself_do_not_count_on_shared_activations() -> None:
    """With activations of their own they take more: of pictures of 1024 pixels, 24 GB would hold tiles alone."""
    assert RTX.shares_activations and not RTX.streams
    tensorrt = find_compiler("tensorrt")
    assert tensorrt.triton_backend and not tensorrt.traits.shares_activations
    alone = plan("rtx4090", traits=tensorrt.traits)
    assert (alone.strategy, alone.vae_tile, plan("rtx4090").vae_tile) == ("t5 8-bit", 768, None)


def test_a_text_encoder_that_is_too_large_is_loaded_in_segments() -> None:
    for gpu, segments in (("rtx4000ada", 4), ("rtx3060", 4)):
        made = plan(gpu)
        assert made.precisions["t5"] == "bf16"
        assert made.placements["t5"] == Placement(segments=segments, on_demand=segments)
        assert any("8.9 GiB a prompt" in reason for reason in made.reasons)


def test_the_peak_is_the_sum_of_what_is_there() -> None:
    made = plan("h100", traits=Traits())
    total = sum(weights + SPARE * activations[1] for weights, _, activations in LARGE.values()) * GB + CONTEXT
    assert list(made.peaks.values()) == pytest.approx([total] * len(PHASES))
    made = plan("rtx3060")
    weights, block, activations = LARGE["dit"]  # 7 segments of 16 stay, and there is room for two of the others
    taken = weights * 9 / 16 + 3 * block + LARGE["vae_encoder"][0] + SPARE * activations[1]
    assert made.peaks["denoising"] == pytest.approx(taken * GB + CONTEXT)
    assert any("9 of dit's 16 segments are copied to the GPU in each step: 8.0 GiB" in line for line in made.reasons)


@pytest.mark.parametrize(
    ("gpu", "strategy", "tile"),
    [
        ("h100", RESIDENT, None),
        ("rtx4090", "t5 8-bit", None),
        ("rtx4000ada", "t5 streamed", None),
        ("rtx3060", "t5 and dit streamed", None),
    ],
)
def test_what_a_card_gets_of_engines_that_stream(gpu: str, strategy: str, tile: int | None) -> None:
    made = plan(gpu, traits=STREAMS)
    assert made.fits
    assert (made.strategy, made.vae_tile) == (strategy, tile)
    assert all(placement.segments == 1 for placement in made.placements.values())


def test_what_is_streamed_stays_as_far_as_there_is_room() -> None:
    made = plan("rtx3060", traits=STREAMS)
    assert made.usable is not None
    weights, block, activations = LARGE["dit"]
    assert made.usable - made.peak == pytest.approx(SPARE_BLOCKS * block * GB)
    stay = made.placements["dit"].weight_budget
    assert stay is not None
    assert made.sizes["dit"] == pytest.approx(stay + 2 * block * GB + SPARE * activations[1] * GB, rel=1e-6)
    assert made.placements["t5"] == Placement(weight_budget=0)
    assert made.placements["clip"].on_demand == 1
    assert made.placements["dit"].residency == "streamed"
    streamed = (weights * GB - stay) / 2**30
    assert any(f"machine's memory: {streamed:.1f} GiB a step" in reason for reason in made.reasons)
    larger = make_plan(parts(), MODEL, Target("card", ("sm_86",), 13), 1024, traits=STREAMS).placements["dit"]
    assert larger.weight_budget == pytest.approx(stay + 15 / 16 * 2**30, abs=2)


def test_engines_that_share_their_activations_need_the_largest_ones_alone() -> None:
    """The autoencoder's decoder works with the most. Graphs are recorded of the others, and keep the DiT's."""
    made = plan("h100", traits=STREAMS)
    weights = sum(weights for weights, _, _ in LARGE.values())
    largest = {"text encoding": "t5", "denoising": "dit", "decoding": "vae_decoder", "image encoding": "vae_encoder"}
    for phase, name in largest.items():
        working = SPARE * (LARGE[name][2][1] + LARGE["dit"][2][1])
        assert made.peaks[phase] == pytest.approx((weights + working) * GB + CONTEXT)
    without = plan("h100", traits=replace(STREAMS, records_graphs=False))
    assert made.peak - without.peak == pytest.approx(SPARE * LARGE["dit"][2][1] * GB)


def test_slots_of_streamed_weights_are_there_while_the_engine_computes() -> None:
    made = plan("rtx4000ada", traits=STREAMS)
    assert made.placements["t5"].weight_budget == 0
    _, block, activations = LARGE["t5"]
    always = made.peaks["denoising"] - SPARE * LARGE["dit"][2][1] * GB
    assert made.peaks["text encoding"] - always == pytest.approx((2 * block + SPARE * activations[1]) * GB)


def test_libraries_take_memory_in_every_phase() -> None:
    more = plan("h100", traits=replace(RTX, libraries=GB))
    assert {phase: more.peaks[phase] - peak for phase, peak in plan("h100").peaks.items()} == dict.fromkeys(PHASES, GB)


def test_a_streamed_dit_fits_the_smallest_cards() -> None:
    for gpu in GPUS:
        made = plan(gpu.name, traits=STREAMS)
        assert made.fits, gpu
        assert made.peak <= gpu.memory_gb * 2**30


def test_every_gpu_of_the_table_has_a_plan() -> None:
    for gpu in GPUS:
        made = plan(gpu.name)
        assert made.fits, gpu
        assert made.peak <= gpu.memory_gb * 2**30


def test_what_is_done_is_not_among_what_would_take_too_much() -> None:
    """A strategy has variants, such as smaller tiles; that one of them takes too much says nothing about the others."""
    for gpu in GPUS:
        for side in (512, 1024, 2048):
            made = plan(gpu.name, side)
            assert not any(reason.startswith(f"{made.strategy} would take") for reason in made.reasons)


def moved(made: Plan) -> float:
    """The part of the DiT that is loaded in each step."""
    return made.placements["dit"].on_demand / made.placements["dit"].segments


def test_as_little_of_the_dit_as_possible_is_loaded_in_each_step() -> None:
    pairs = offloads(1, 57)
    parts = [n / count for n, count in pairs]
    assert parts == sorted(parts)
    assert all(2 <= n < count for n, count in pairs if n / count < 1)
    assert len(set(parts)) == len([part for part in parts if part < 1]) + 1
    assert (2, 4) in pairs and (4, 8) not in pairs  # the same part in fewer segments
    assert pairs[-57:] == [(count, count) for count in range(1, 58)]
    assert offloads(12, 14) == [(12, 12), (13, 13), (14, 14)]
    assert min(count for _, count in offloads(5, 57)) == 5


memories = st.integers(min_value=1, max_value=200)
sides = st.sampled_from([256, 512, 1024, 1536, 2048, 4096])


@given(small=memories, large=memories, side=sides, batch=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_more_memory_is_never_worse(small: int, large: int, side: int, batch: int) -> None:
    low, high = (
        make_plan(parts(), MODEL, Target("card", ("sm_89",), memory), side, batch) for memory in sorted((small, large))
    )
    assert high.rank <= low.rank
    assert moved(high) <= moved(low)
    for made in (low, high):
        if made.fits:
            assert all(peak <= made.usable for peak in made.peaks.values() if made.usable)
        else:
            assert "does not fit" in made.reasons[0]


@given(memory=st.integers(min_value=6, max_value=100), gpu=memories)
@settings(max_examples=40, deadline=None)
def test_segments_are_small_enough_to_compile(memory: int, gpu: int) -> None:
    target = Target("card", ("sm_89",), gpu)
    made, without = (make_plan(parts(), MODEL, target, 1024, build_memory=m) for m in (memory * GB, None))
    count = made.placements["dit"].segments
    assert count >= without.placements["dit"].segments
    assert BUILD_RATIO * footprint(*LARGE["dit"]).segment(count) < memory * GB


def test_the_whole_memory_of_a_card_is_not_usable() -> None:
    assert usable_memory(find_target("rtx3060")) == 12 * 2**30 * 15 // 16
    assert usable_memory(find_target("sm_89")) is None
    made = make_plan(parts(), MODEL, find_target("sm_89"), 1024, build_memory=20 * GB)
    assert (made.fits, made.strategy, made.placements["dit"].segments) == (True, RESIDENT, 2)


def components(precision: str = "int8-weights", t5: str = "bf16") -> dict[str, Component]:
    """FLUX.1-dev as the manifest of an export describes it."""
    found = {
        name: Component(
            files={}, precision={"dit": precision, "t5": t5}.get(name, "bf16"), reason="", inputs={}, outputs={},
            footprint=footprint(*sizes),
        )
        for name, sizes in LARGE.items()
    }  # fmt: skip
    return {"tokenizer": Component(files={}, precision="none", reason="", inputs={}, outputs={}), **found}


def test_an_export_is_planned_as_it_is() -> None:
    made = parts_of(components())
    assert made is not None
    assert [part.name for part in made] == list(LARGE)
    assert all(len(part.footprints) == 1 and part.cpu is None for part in made)
    unknown = {name: part.model_copy(update={"footprint": None}) for name, part in components().items()}
    assert parts_of(unknown) is None
    (outside,) = [part for part in parts_of(components(t5="fp32")) or [] if part.name == "t5"]
    assert outside.cpu == outside.weights


def test_build_takes_a_smaller_batch_before_a_worse_plan() -> None:
    profiles = make_profiles(MODEL, "512-1024", None, None)
    for gpu, batch in (("h100", 4), ("rtx3060", 1)):
        made = fitting.decide(components(), MODEL, find_target(gpu), profiles, None)
        assert made is not None
        assert made.batch >= batch
        alone = fitting.decide(components(), MODEL, find_target(gpu), profiles, 1)
        assert alone is not None and made.rank == alone.rank
    asked = fitting.decide(components(), MODEL, find_target("rtx5090"), profiles, 3)
    assert asked is not None and asked.batch == 3


def test_build_says_what_does_not_fit() -> None:
    profiles = make_profiles(MODEL, "512-2048", None, None)
    with pytest.raises(UserError, match=r"does not fit rtx2060 for pictures of 2048 x 2048.*can be used"):
        fitting.decide(components(), MODEL, find_target("rtx2060"), profiles, 4)
    assert fitting.decide(components(), MODEL, find_target("cpu"), profiles, None) is None


def test_build_says_what_will_hardly_compile() -> None:
    profiles = make_profiles(MODEL, "512-1024", None, None)
    made = fitting.decide(components(), MODEL, find_target("h100"), profiles, 1, 14 * GB)
    assert made is not None
    assert {name: placed.segments for name, placed in made.placements.items() if placed.segments > 1} == {
        "t5": 2,
        "dit": 3,
    }
    target, memory = find_target("h100"), 2 * GB
    networks = {name: part for name, part in components().items() if name in LARGE}
    frugal = fitting.decide(networks, MODEL, target, profiles, 1, memory)
    with pytest.warns(DitforgeWarning, match=r"compiling dit takes up to 2.7 GiB, and 1.9 GiB are to be had"):
        fitting.warn_of_compiling(networks, fitting.place_engines(networks, frugal), memory)
    with pytest.warns(DitforgeWarning, match=r"compiling dit takes up to 30.1 GiB, and 1.9 GiB are to be had"):
        fitting.warn_of_compiling(networks, fitting.place_engines(networks, frugal, 1), memory)


def test_by_hand_only_the_dit_is_cut_otherwise() -> None:
    """Other networks are cut as the memory to compile in asks for."""
    target = find_target("sm_89")
    made = fitting.decide(components(), MODEL, target, make_profiles(MODEL, None, None, None), None, 14 * GB)
    for segments, residency, expected in (
        (None, None, {"t5": (2, 0), "dit": (3, 0), "clip": (1, 0)}),
        (5, None, {"t5": (2, 0), "dit": (5, 0), "clip": (1, 0)}),
        (None, "on-demand", {"t5": (2, 2), "dit": (3, 3), "clip": (1, 1)}),
        (1, "on-demand", {"t5": (2, 2), "dit": (1, 1), "clip": (1, 1)}),
    ):
        placed = fitting.place_engines(list(LARGE), made, segments, residency)
        assert {name: (placed[name].segments, placed[name].on_demand) for name in expected} == expected


def test_engines_are_placed_as_planned() -> None:
    target = find_target("rtx4000ada")
    made = fitting.decide(components(t5="fp32"), MODEL, target, make_profiles(MODEL, "512-2048", None, None), 1)
    placed = fitting.place_engines(list(LARGE), made)
    compiler = find_compiler("tensorrt-rtx")
    makers = {name: made_by(placed[name], compiler, target) for name in ("t5", "dit")}
    assert {name: (maker.name, str(device)) for name, (maker, device) in makers.items()} == {
        "t5": ("onnxruntime", "cpu"),
        "dit": ("tensorrt-rtx", "sm_89"),
    }
    assert placed["t5"].on_demand == 0
    with pytest.raises(UserError, match="unknown residency"):
        fitting.place_engines(list(LARGE), None, None, "sometimes")


@pytest.mark.parametrize(
    ("before", "wanted", "kept"),
    [
        ((1, 0), (3, 0), (1, 0)),  # the GPU holds it, however it is cut
        ((8, 0), (3, 0), (8, 0)),
        ((16, 9), (16, 9), (16, 9)),
        ((16, 9), (8, 5), (16, 10)),  # of the same size, three eighths stay
        ((8, 5), (16, 9), (16, 9)),  # its segments are too large
        ((7, 7), (4, 3), (7, 6)),
        ((4, 0), (4, 3), (4, 3)),
        ((4, 3), (4, 0), (4, 0)),
    ],
)
def test_a_cut_that_is_there_already(before: tuple[int, int], wanted: tuple[int, int], kept: tuple[int, int]) -> None:
    def placement(cut: tuple[int, int]) -> Placement:
        return Placement(segments=cut[0], on_demand=cut[1])

    names = [f"dit-{number}.plan" for number in range(before[0])]
    made = {"compiler": "tensorrt-rtx", "compiler_version": "", "target": "", "cache_key": {}}
    engine = Engine(**made, placement=placement(before), segment_files=[(name,) for name in names])
    files = {name: {"size": 1, "sha256": ""} for name in names}
    dit = Component(files=files, precision="fp32", reason="", inputs={}, outputs={})
    built = Manifest(kind="engines", model=MODEL, components={"dit": dit}, engines={"dit": engine})
    assert fitting.cut_before(built, "dit", placement(wanted)) == placement(kept)
    assert fitting.cut_before(None, "dit", placement(wanted)) == placement(wanted)


@pytest.mark.parametrize(("text", "count"), [("auto", None), ("1", 1), ("12", 12)])
def test_segments_as_an_option(text: str, count: int | None) -> None:
    assert fitting.parse_segments(text) == count


@pytest.mark.parametrize("text", ["0", "-1", "two", "", "1.5"])
def test_segments_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="auto or a number"):
        fitting.parse_segments(text)
