"""The streamed decoder against the plain and the tiled one: every route, chunk and band makes the same frames."""

import contextlib
from dataclasses import replace
from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from lowvram_i2v.errors import RequestError, ResourceError
from lowvram_i2v.vae import engine as engine_module
from lowvram_i2v.vae import streamed as streamed_module
from lowvram_i2v.vae.attention import by_products, fused
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.vae.convolution import conv3d
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.engine import Engine, decode_frames
from lowvram_i2v.vae.frames import Memory
from lowvram_i2v.vae.layout import attention_layout, chunk_layout
from lowvram_i2v.vae.planning import follow, plan_route
from lowvram_i2v.vae.policy import POLICIES, DecodeChunking, policy_of
from lowvram_i2v.vae.route import Segment, Shape, bands, rows_through, stages
from lowvram_i2v.vae.streamed import Room, StreamedAttention
from lowvram_i2v.vae.tiles import Tiling, decode_tiled

CONFIG = VaeConfig(
    latent_channels=4,
    block_out_channels=(4, 8, 8, 8),
    layers_per_block=1,
    norm_num_groups=2,
    sample_size=32,
    sample_tsize=16,
)
SEAMLESS, REFERENCE = POLICIES["seamless"], POLICIES["reference"]
SMALL = DecodeChunking(device_bytes=2**20 + 2**18, host_bytes=2**22, frames=3)


def random_decoder(config):
    """Weights strong enough that every norm and convolution matters."""
    torch.manual_seed(0)
    decoder = VaeDecoder(config).requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        if "norm" in name:
            parameter.add_(torch.randn_like(parameter) * 0.3)
        elif parameter.ndim > 1:
            parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return decoder


@pytest.fixture(scope="module")
def decoder():
    return random_decoder(CONFIG)


@pytest.fixture(scope="module")
def exact():
    """In float64 there is no rounding to hide behind: a latent of one column, for example, makes a picture so even
    that float32 is off by 1e-4 in any order of summation."""
    return random_decoder(CONFIG).double()


def error(actual, expected):
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@st.composite
def routes(draw, config=CONFIG):
    """Any partition of the decoder into segments that begin before an upsampling and leave the attention alone; old
    tensors written over where that is possible."""
    part = stages(config)
    cuts = {0, len(part)}
    for index, stage in enumerate(part[1:], 1):
        forced = stage.kind in ("up", "attend") or part[index - 1].kind == "attend"
        if forced or draw(st.booleans()):
            cuts.add(index)
    ordered = sorted(cuts)
    route = []
    for first, last in pairwise(ordered):
        inside = part[first:last]
        must = any(stage.narrows or stage.kind in ("in", "up", "out") for stage in inside)
        trunk = "device" if must or draw(st.booleans()) else ""
        route.append(Segment(first, last, draw(st.integers(1, 5)), draw(st.integers(5, 30)), trunk, "device", spare=12))
    return route


@settings(max_examples=8)
@given(routes(), st.integers(1, 4), st.integers(1, 2), st.integers(1, 3))
def test_every_route_is_the_plain_decoder(exact, route, frames, height, width):
    latent = torch.randn(4, frames, height, width, dtype=torch.float64)
    assert error(decoded(Engine(exact), latent, route), plain(exact, latent)) < 1e-10


def decoded(engine, latent, route):
    """What an engine makes along a route of segments."""
    steps = follow(CONFIG, Shape(*latent.shape[1:]), SEAMLESS, route, latent.element_size())
    return engine.run(latent, steps).settled().permute(3, 0, 1, 2).clone()


def plain(decoder, latent):
    """`decode` without its cast to float32."""
    return decoder.decoder(decoder.post_quant_conv(latent))


@settings(max_examples=8)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.floats(19, 22), st.integers(1, 8))
def test_seamless_is_the_plain_decoder_in_any_memory(exact, frames, height, width, memory, most):
    """Also where the tail does not fit: with a pass for each of its norms."""
    latent = torch.randn(4, frames, height, width, dtype=torch.float64)
    policy, chunking = replace(SEAMLESS, measures=None), DecodeChunking(int(2**memory), int(2**memory), most)
    with contextlib.suppress(ResourceError):  # too little for the smallest chunk
        pieces = list(decode_frames(exact, latent, policy, chunking))
        assert error(torch.cat(pieces, 1), plain(exact, latent)) < 1e-6


@settings(max_examples=8)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.floats(19.5, 22), st.integers(1, 8))
def test_reference_is_the_tiled_decoder_in_any_memory(exact, frames, height, width, memory, most):
    latent = torch.randn(4, frames, height, width, dtype=torch.float64)
    chunking = DecodeChunking(int(2**memory), int(2**memory), most)
    with contextlib.suppress(ResourceError):
        pieces = list(decode_frames(exact, latent, REFERENCE, chunking))
        assert error(torch.cat(pieces, 1), decode_tiled(exact, latent, Tiling.from_config(CONFIG))) < 1e-6


@pytest.mark.parametrize("shape", [(9, 3, 5), (1, 2, 2), (4, 7, 3)])
@pytest.mark.parametrize("policy", [replace(SEAMLESS, measures=None), REFERENCE])
def test_in_float32(decoder, policy, shape):
    latent = torch.randn(4, *shape)
    expected = (
        decode_tiled(decoder, latent, Tiling.from_config(CONFIG)) if policy is REFERENCE else decoder.decode(latent)
    )
    assert error(torch.cat(list(decode_frames(decoder, latent, policy, SMALL)), 1), expected) < 1e-5


def tail_route(measures, ups=1, rows=24):
    """All stages one by one, and the last `ups` upsamplings with all that follows as a tail, in bands of `rows`."""
    part = stages(CONFIG)
    tail = [index for index, stage in enumerate(part) if stage.kind == "up"][-ups]
    head = [Segment(index, index + 1, 2, 9, "device", "device") for index in range(tail)]
    return [*head, Segment(tail, len(part), 2, rows, "device", measures=measures)]


def test_the_tail_comes_nearer_with_every_pass(exact):
    """Each pass makes at least one more norm exact, and the others better: after as many passes as norms all are."""
    latent, engine = torch.randn(4, 3, 3, 4, dtype=torch.float64), Engine(exact)
    expected = plain(exact, latent)
    errors = [error(decoded(engine, latent, tail_route(measures)), expected) for measures in (0, 4, 5, None)]
    assert errors[1] < errors[0] / 10
    assert max(errors[2:]) < 1e-10


@pytest.mark.parametrize("rows", [7, 3])
def test_a_tail_with_an_upsampling_in_its_middle(exact, rows):
    """Each stage measures rows of its own scale, each row once, wherever bands begin; 3 may be none of a stage."""
    latent, engine = torch.randn(4, 2, 3, 2, dtype=torch.float64), Engine(exact)
    route = tail_route(13, 3, rows)
    assert error(decoded(engine, latent, route), plain(exact, latent)) < 1e-10


@pytest.mark.parametrize("policy", [SEAMLESS, REFERENCE])
def test_out_of_memory_means_smaller_chunks_and_the_same_frames(decoder, policy, monkeypatch):
    """Whatever convolution fails, the video is the same; one that always fails ends with an error."""
    latent = torch.randn(4, 3, 5, 2)
    memory = DecodeChunking(2**21, 2**22, 8)
    expected = torch.cat(list(decode_frames(decoder, latent, policy, memory)), 1)
    made: list[int] = []

    def failing_at(number):
        def convolve(x, weight, out):
            made.append(1)
            if len(made) == number or number == 0:
                raise torch.OutOfMemoryError("injected")
            conv3d(x, weight, out)

        monkeypatch.setattr(engine_module, "trusted_convolution", lambda *_: convolve)
        made.clear()
        return torch.cat(list(decode_frames(decoder, latent, policy, memory)), 1)

    failing_at(-1)
    convolutions, near = len(made), 2e-3 if policy is SEAMLESS else 1e-5
    for number in (1, convolutions // 3, convolutions // 2, convolutions):
        assert error(failing_at(number), expected) < near
    with pytest.raises(ResourceError, match="does not fit"):
        failing_at(0)


@pytest.mark.parametrize("policy", [SEAMLESS, REFERENCE])
def test_after_running_out_the_old_memory_is_gone_before_new_is_asked_for(decoder, policy, monkeypatch):
    """Where both must fit, smaller chunks would fail as well."""
    pieces, made, fit = [], [], Memory.fit

    def watched(memory, *sizes):
        assert not made or all(piece.expired() for piece in pieces)
        fit(memory, *sizes)
        pieces.append(StorageWeakRef(memory._piece.untyped_storage()))

    def convolve(x, weight, out):
        made.append(1)
        if len(made) == 20:
            raise torch.OutOfMemoryError("injected")
        conv3d(x, weight, out)

    monkeypatch.setattr(Memory, "fit", watched)
    monkeypatch.setattr(engine_module, "trusted_convolution", lambda *_: convolve)
    list(decode_frames(decoder, torch.randn(4, 3, 4, 2), policy, DecodeChunking(2**21, 2**22, 8)))
    assert len(made) > 20
    assert len(pieces) == 2


@pytest.mark.parametrize("policy", [SEAMLESS, REFERENCE])
def test_out_of_memory_beside_the_convolutions(decoder, policy, monkeypatch):
    """In the attention, in a norm, and where the decoder's own memory is asked for: each fails once."""
    latent, memory = torch.randn(4, 3, 5, 2), DecodeChunking(2**21, 2**22, 8)
    expected = torch.cat(list(decode_frames(decoder, latent, policy, memory)), 1)
    for owner, name, number in (
        (StreamedAttention, "__call__", 2),
        (streamed_module, "normalize_into", 9),
        (streamed_module, "interleave", 3),
        (streamed_module, "measure", 2),
        (Memory, "fit", 1),
    ):
        calls: list[int] = []
        whole = getattr(owner, name)

        def failing(*given, calls=calls, whole=whole, number=number):
            calls.append(1)
            if len(calls) == number:
                raise torch.OutOfMemoryError("injected")
            return whole(*given)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            pieces = torch.cat(list(decode_frames(decoder, latent, policy, memory)), 1)
        assert len(calls) > number, name
        assert error(pieces, expected) < (2e-3 if policy is SEAMLESS else 1e-5), name


def test_products_and_softmax_steps_are_the_attention():
    """More keys than one product takes; the last ones the highest by far."""
    shape, channels = Shape(2, 30, 40), 8
    at = attention_layout(shape, channels, 4, on_host=False)
    room = Room(torch.empty(at.size, dtype=torch.uint8), torch.float32)
    q, k, v = (torch.randn(n, channels) for n in (1200, 2400, 2400))
    k[2300:] += 3 * q[:100]
    expected = torch.softmax(q.double() @ k.double().t() * channels**-0.5, 1) @ v.double()
    assert error(by_products(q, k, v, room, at), expected) < 1e-5
    assert error(fused(q, k, v, room, at), expected) < 1e-5


@settings(max_examples=30)
@given(st.data())
def test_a_layout_holds_the_chunks_of_all_bands(data):
    part = stages(CONFIG)
    first = data.draw(st.integers(0, len(part) - 1))
    last = data.draw(st.integers(first + 1, len(part)))
    inside = part[first:last]
    if any(stage.kind == "attend" for stage in inside):
        return
    before = Shape(*(data.draw(st.integers(1, most)) for most in (6, 40, 5)))
    height = before.height * prod(stage.space for stage in inside)
    segment = Segment(first, last, data.draw(st.integers(1, 6)), data.draw(st.integers(1, height)))
    layout = chunk_layout(inside, before, segment, (False, False), (False, False), 2)
    for core in bands(height, segment.rows):
        rows = rows_through(inside, core, before)
        shape = before
        for stage, buffers, (top, bottom) in zip(inside, layout.stages, rows, strict=False):
            lines = bottom - top + (top == 0) + (bottom == shape.height)
            assert buffers.carry.size >= 2 * stage.past * lines * (shape.width + 2) * stage.inputs
            shape = stage.shape(shape)


def test_frames_come_in_order_and_are_float32(decoder):
    latent = torch.randn(4, 9, 2, 3)
    for policy in (SEAMLESS, REFERENCE):
        pieces = list(decode_frames(decoder, latent, policy, SMALL))
        assert {piece.dtype for piece in pieces} == {torch.float32}
        assert sum(piece.shape[1] for piece in pieces) == 33
        assert {piece.shape[2:] for piece in pieces} == {(16, 24)}


def test_half_precision_is_as_near_as_the_plain_decoder(decoder):
    latent = torch.randn(4, 3, 4, 4)
    half, expected = random_decoder(CONFIG).to(torch.bfloat16), decoder.decode(latent)
    pieces = torch.cat(list(decode_frames(half, latent, SEAMLESS)), 1)
    assert error(pieces, expected) < 1.5 * error(half.decode(latent), expected)


def test_the_weights_stay_what_they_were(decoder):
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    Engine(decoder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


def test_an_unknown_policy_is_refused():
    with pytest.raises(RequestError, match="reference, seamless"):
        policy_of("magic")


def test_the_tail_is_used_where_nothing_else_fits():
    config, latent = VaeConfig(), Shape(33, 90, 160)
    last = plan_route(config, latent, SEAMLESS, DecodeChunking(), 2)[-1].segment
    assert stages(config)[last.first].kind == "up"
    assert last.measures == SEAMLESS.measures
    tile = plan_route(config, Shape(17, 32, 32), REFERENCE, DecodeChunking(), 2)
    assert all(step.segment.measures is None for step in tile)
