"""Plans: they keep their budget, use it, and say what fits when nothing else does."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Made
from tiny_models import model_once as model_once
from tiny_models import released_once as released_once

from lowvram_i2v.checkpoint import open_model
from lowvram_i2v.errors import ResourceError
from lowvram_i2v.plan import (
    GIB,
    Machine,
    Video,
    chunkings,
    fits,
    largest_size,
    limit_of,
    make_plan,
    most_frames,
    most_steps,
    plan_decode,
)
from lowvram_i2v.profile import VramProfile, load_profile, profile_names
from lowvram_i2v.sizes import ModelSizes, sizes_of
from lowvram_i2v.synth.headers import model_headers
from lowvram_i2v.variant import VARIANTS

NOWHERE = Machine(vram=None, ram=None)
COMPUTING = {"": ("w8a16", "sdpa"), "fast": ("w8a8", "triton-int8"), "sparse": ("w8a8", "triton-sparse")}
SIZED = [name for name in profile_names() if load_profile(name).vram_gib]


@cache
def released(scheme: str = "int8", variant: str = "token_replace") -> ModelSizes:
    return sizes_of(model_headers("full", VARIANTS[variant], scheme))


@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8", "nf4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_headers_without_a_model_are_those_of_the_converted_folder(variant: str, scheme: str, model_once: Made) -> None:
    real = sizes_of(open_model(model_once(variant, scheme)))
    imagined = sizes_of(model_headers("tiny", VARIANTS[variant], scheme))
    assert replace(imagined, text_encoder=real.text_encoder) == real


def test_the_released_model_in_8_bits_is_as_long_as_the_design_says() -> None:
    assert sum(released().slabs) / 1e9 == pytest.approx(9.06, rel=0.01)
    assert sum(released().modulation) / 1e9 == pytest.approx(3.40, rel=0.01)


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("size", [(512, 512), (960, 544), (1280, 720)])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_every_profile_plans_the_usual_sizes_within_its_budget(scheme: str, size: tuple[int, int], name: str) -> None:
    profile = load_profile(name)
    plan = make_plan(released(scheme), Video(*size, 129), profile, NOWHERE)
    assert plan.limit == int((profile.vram_gib - profile.reserve_gib) * GIB)
    assert all(phase.vram <= plan.limit for phase in plan.phases)


def test_more_memory_never_means_fewer_resident_blocks() -> None:
    video = Video(1280, 720, 129)
    plans = [make_plan(released(), video, load_profile(name), NOWHERE) for name in SIZED if "-" not in name]
    residents = [plan.resident for plan in plans]
    assert residents == sorted(residents)
    assert residents[0] < residents[-1] == plans[-1].blocks


sizes = st.tuples(st.integers(1, 120), st.integers(1, 120)).map(lambda cells: (16 * cells[0], 16 * cells[1]))
frames = st.integers(1, 100).map(lambda n: 4 * n + 1)
budgets = st.floats(2.0, 40.0)


def sized(gib: float) -> VramProfile:
    return replace(load_profile("6gb"), vram_gib=gib)


@settings(max_examples=25, deadline=None)
@given(size=sizes, frames=frames, gib=budgets, cfg=st.booleans())
def test_a_plan_fits_or_is_refused_with_something_that_fits(
    size: tuple[int, int], frames: int, gib: float, cfg: bool
) -> None:
    video, profile = Video(*size, frames, cfg=cfg), sized(gib)
    limit = limit_of(profile, NOWHERE)
    assert limit is not None
    if not fits(released(), video, profile=profile, machine=NOWHERE):
        with pytest.raises(ResourceError, match=f"{limit / GIB:.2f} GiB") as refused:
            make_plan(released(), video, profile, NOWHERE)
        assert "What fits: --" in refused.value.remedy or "Nothing fits" in refused.value.remedy
        return
    plan = make_plan(released(), video, profile, NOWHERE)
    assert all(phase.vram <= limit for phase in plan.phases)
    assert plan.chunking in chunkings(24)
    assert plan.slots in (0, profile.slots)


@settings(max_examples=8, deadline=None)
@given(size=sizes, frames=frames, gib=budgets)
def test_what_fits_at_most_fits_and_one_more_does_not(size: tuple[int, int], frames: int, gib: float) -> None:
    profile = sized(gib)
    limit = limit_of(profile, NOWHERE)
    assert limit is not None
    fitting = partial(fits, released(), profile=profile, machine=NOWHERE)
    video = Video(*size, frames)
    if most := most_frames(video, fitting):
        assert fitting(replace(video, frames=most))
        assert most == 1025 or not fitting(replace(video, frames=most + 4))
    if largest := largest_size(video, fitting):
        assert fitting(replace(video, width=largest[0], height=largest[1]))


def test_auto_takes_what_is_free_and_no_more() -> None:
    profile, video = load_profile("auto"), Video(960, 544, 129)
    for gib in (5, 9, 30):
        plan = make_plan(released(), video, profile, Machine(vram=gib * GIB, ram=None))
        assert plan.limit == gib * GIB
        assert max(phase.vram for phase in plan.phases) <= gib * GIB


def test_a_sized_profile_never_takes_more_than_is_free() -> None:
    assert limit_of(load_profile("24gb"), Machine(vram=5 * GIB, ram=None)) == 5 * GIB


def test_little_ram_moves_blocks_to_the_file_and_less_is_refused() -> None:
    profile, video = replace(load_profile("6gb"), resident_blocks=0), Video(960, 544, 129)
    assert make_plan(released(), video, profile, Machine(None, ram=32 * GIB)).host == "pinned"
    mapped = make_plan(released(), video, profile, Machine(None, ram=6 * GIB))
    assert mapped.host == "mapped"
    assert max(phase.ram for phase in mapped.phases) <= 8 * GIB
    with pytest.raises(ResourceError, match="GiB of RAM"):
        make_plan(released(), video, profile, Machine(None, ram=GIB // 2))
    with pytest.raises(ResourceError, match="GiB of RAM"):
        make_plan(released(), video, replace(profile, host="pinned"), Machine(None, ram=6 * GIB))


@pytest.mark.parametrize("gib", [2.5, 3.0, 3.5])
def test_latents_are_decoded_where_no_video_can_be_made(gib: float) -> None:
    video, profile, machine = Video(1280, 720, 129), load_profile("auto"), Machine(int(gib * GIB), 64 * GIB)
    with pytest.raises(ResourceError, match="denoise needs"):
        make_plan(released(), video, profile, machine)
    plan = plan_decode(released().vae, video, profile, machine)
    assert [phase.name for phase in plan.phases] == ["decode"]
    assert plan.vram("decode") <= machine.vram == plan.limit
    assert [line.split()[0] for line in plan.table().splitlines()] == ["phase", "decode", "budget"]


def test_decoding_asks_for_no_ram_of_blocks_and_is_planned_as_in_a_run() -> None:
    video, profile = Video(1280, 720, 129), replace(load_profile("6gb"), host="pinned")
    with pytest.raises(ResourceError, match=r"denoise needs .* of RAM"):
        make_plan(released(), video, profile, Machine(None, 4 * GIB))
    alone = plan_decode(released().vae, video, profile, Machine(None, 4 * GIB))
    whole = make_plan(released(), video, profile, NOWHERE)
    assert alone.phases == whole.phases[-1:]
    assert (alone.decoding, alone.limit, alone.reserve) == (whole.decoding, whole.limit, whole.reserve)


@pytest.mark.parametrize(
    ("decode", "vram_gib", "free", "ram", "needs", "remedy"),
    [
        ("seamless", 0.0, 1.5, 64, "of video memory", "--policy reference."),
        ("seamless", 0.0, 3.0, 4, "of RAM", "--policy reference."),
        ("reference", 1.2, 5.0, 64, "of video memory", "--profile auto, which takes all that is free."),
        ("reference", 0.0, 0.5, 64, "of video memory", "Close programs that use the card"),
        ("reference", 0.0, 5.0, 0.1, "of RAM", "Close other programs."),
    ],
)
def test_decoding_that_is_refused_is_offered_what_decodes_these_latents(
    decode: str, vram_gib: float, free: float, ram: float, needs: str, remedy: str
) -> None:
    profile = replace(load_profile("auto"), decode=decode, vram_gib=vram_gib)
    machine = Machine(int(free * GIB), int(ram * GIB))
    with pytest.raises(ResourceError, match=rf"decode needs \d+\.\d\d GiB {needs}") as refused:
        plan_decode(released().vae, Video(1280, 720, 129), profile, machine)
    assert remedy in refused.value.remedy
    assert "--frames" not in refused.value.remedy


def test_the_least_that_decoding_needs_is_said_and_is_enough() -> None:
    video, profile = Video(1280, 720, 129), load_profile("auto")
    with pytest.raises(ResourceError) as refused:
        plan_decode(released().vae, video, profile, Machine(GIB // 2, None))
    need = int(float(refused.value.what.partition("needs ")[2].split()[0]) * GIB)
    plan_decode(released().vae, video, profile, Machine(need + GIB // 50, None))
    with pytest.raises(ResourceError):
        plan_decode(released().vae, video, profile, Machine(need - GIB // 10, None))


@pytest.mark.parametrize("gib", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("changed", [{"decode": "seamless"}, {"host": "pinned"}, {"resident_blocks": 60}])
def test_what_fits_is_what_is_planned_in_ram_too(changed: dict[str, str | int], gib: int) -> None:
    profile, video = replace(load_profile("6gb"), **changed), Video(1280, 720, 129)  # type: ignore[arg-type]
    machine = Machine(None, gib * GIB)
    if fits(released(), video, profile=profile, machine=machine):
        make_plan(released(), video, profile, machine)
        return
    with pytest.raises(ResourceError) as refused:
        make_plan(released(), video, profile, machine)
    assert "What fits: " in refused.value.remedy or "the RAM is too little" in refused.value.remedy


def test_fewer_resident_blocks_than_asked_for_fit_too() -> None:
    profile, video = replace(load_profile("6gb"), resident_blocks=60), Video(1280, 720, 129)
    assert 0 < make_plan(released(), video, profile, NOWHERE).resident < 60
    assert fits(released(), video, profile=profile, machine=NOWHERE)


def test_too_many_steps_are_told_how_many_fit() -> None:
    profile, video = load_profile("6gb"), Video(512, 512, 33, steps=1000)
    with pytest.raises(ResourceError, match="conditioning needs") as refused:
        make_plan(released(), video, profile, NOWHERE)
    steps = most_steps(video, partial(fits, released(), profile=profile, machine=NOWHERE))
    assert steps is not None
    assert refused.value.remedy == f"What fits: --steps {steps}."
    make_plan(released(), replace(video, steps=steps), profile, NOWHERE)
    with pytest.raises(ResourceError):
        make_plan(released(), replace(video, steps=steps + 1), profile, NOWHERE)


def test_what_no_single_change_cures_is_not_blamed_on_the_weights() -> None:
    with pytest.raises(ResourceError, match="together they do"):
        make_plan(released(), Video(4096, 4096, 1025, steps=1000), load_profile("6gb"), NOWHERE)
    with pytest.raises(ResourceError, match="own weights do not"):
        make_plan(released(), Video(512, 512, 33), sized(1.0), NOWHERE)


def test_the_pinned_tier_holds_the_transformer_without_waste() -> None:
    plan = make_plan(released(), Video(1280, 720, 129), replace(load_profile("6gb"), resident_blocks=0), NOWHERE)
    assert plan.resident == 0
    assert plan.streamed <= 9.1 * GIB


def test_flavours_differ_in_how_they_compute_and_in_nothing_else() -> None:
    for name in SIZED:
        exact, _, flavour = name.partition("-")
        base, other = load_profile(exact), load_profile(name)
        same = {key: getattr(base, key) for key in ("name", "description", "compute", "attention")}
        assert replace(other, **same) == base
        assert (other.compute, other.attention) == COMPUTING[flavour]
