"""Previews: the two decoders, TAEHV against its graph written out plainly, and a writer that never fails a run."""

import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowvram_i2v import preview
from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.events import Notice
from lowvram_i2v.preview import LONG_SIDE, PreviewWriter, heading, load_tiny_decoder, preview_path
from lowvram_i2v.sampling.schedule import flow_sigmas
from lowvram_i2v.vae.preview import LATENT_TO_RGB, RGB_BIAS, TinyDecoder, linear_rgb, tiny_decoder_bytes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoder():
    """A narrow one with random weights whose pictures are neither flat nor all black and white."""
    torch.manual_seed(1)
    made = TinyDecoder((12, 8, 6)).eval().requires_grad_(False)
    for name, weight in made.state_dict().items():
        if weight.dim() == 4:
            gain = 0.2 if name.endswith(("conv.4.weight", "22.weight")) else 1.2
            weight.normal_(0, gain / weight[0].numel() ** 0.5)
    made.decoder["22"].bias.fill_(0.5)
    return made


def random_latents(time=3, height=4, width=6, seed=0):
    return torch.randn(16, time, height, width, generator=torch.manual_seed(seed))


def test_the_matrix_maps_each_channel_to_its_row():
    assert len(LATENT_TO_RGB) == 16
    flat = linear_rgb(torch.zeros(16, 2, 3, 5))
    assert flat.shape == (2, 3, 3, 5)
    assert flat[1, :, 2, 4].tolist() == pytest.approx([bias / 2 + 0.5 for bias in RGB_BIAS])
    for channel, row in enumerate(LATENT_TO_RGB):
        latents = torch.zeros(16, 1, 1, 1)
        latents[channel] = 2.0
        expected = [row[colour] + RGB_BIAS[colour] / 2 + 0.5 for colour in range(3)]
        assert linear_rgb(latents).flatten().tolist() == pytest.approx(expected)
    wild = linear_rgb(1e4 * random_latents())
    assert wild.min() == 0
    assert wild.max() == 1


def plain_taehv(weights, latents, dropped=3):
    """TAEHV's decoder, all frames at once: [16, T, h, w] -> [4 T - dropped, 3, 8 h, 8 w]"""

    def conv(x, name):
        return F.conv2d(x, weights[f"decoder.{name}.weight"], weights.get(f"decoder.{name}.bias"), padding=1)

    def block(x, index):
        past = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        y = torch.cat([x, past], 1)
        for part in (0, 2, 4):
            y = conv(y, f"{index}.conv.{part}")
            y = y.relu() if part < 4 else y
        return (y + x).relu()

    x = torch.tanh(latents.transpose(0, 1) / 3) * 3
    x = conv(x, 1).relu()
    for first in (3, 9, 15):
        for index in range(first, first + 3):
            x = block(x, index)
        channels = x.shape[1]
        x = F.interpolate(x, scale_factor=2)
        x = F.conv2d(x, weights[f"decoder.{first + 4}.conv.weight"])
        x = x.reshape(-1, channels, *x.shape[-2:])
        x = conv(x, first + 5)
    return conv(x.relu(), 22).clamp(0, 1)[dropped:]


@settings(max_examples=12)
@given(time=st.integers(1, 4), height=st.integers(1, 5), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_taehv_frame_by_frame_is_taehv_at_once(decoder, time, height, width, seed):
    latents = random_latents(time, height, width, seed)
    expected = plain_taehv(decoder.state_dict(), latents)
    frames = list(decoder.decode(latents))
    assert len(frames) == 4 * time - 3
    torch.testing.assert_close(torch.stack(frames), expected, atol=2e-5, rtol=0)


def test_the_result_of_random_weights_is_no_flat_picture(decoder):
    frames = torch.stack(list(decoder.decode(random_latents())))
    assert frames.std() > 0.02
    assert ((frames > 0) & (frames < 1)).float().mean() > 0.9
    assert (frames[1:] - frames[:-1]).abs().mean() > 0.01


def test_one_frame_a_latent_takes_the_last_of_each_split(decoder):
    latents = random_latents(5)
    pictures = list(decoder.decode(latents, every_frame=False))
    assert pictures[0].shape == (3, 32, 48)
    weights = decoder.state_dict()
    for name in ("decoder.13.conv.weight", "decoder.19.conv.weight"):
        weights[name] = weights[name][-weights[name].shape[1] :]
    torch.testing.assert_close(torch.stack(pictures), plain_taehv(weights, latents, dropped=0), atol=2e-5, rtol=0)


def test_the_past_is_the_call_s_own(decoder):
    latents = random_latents()
    first = torch.stack(list(decoder.decode(latents)))
    next(decoder.decode(random_latents(seed=3)))
    assert torch.equal(torch.stack(list(decoder.decode(latents))), first)


class LiveBytes(TorchDispatchMode):
    """Bytes of all results of operations that are alive at once."""

    def __init__(self):
        super().__init__()
        self.seen, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return

        def gone(_):
            del self.seen[key]
            self.live -= size

        self.seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [(64, 64), (90, 160)])
def test_the_predicted_peak_is_right(size, dtype):
    with torch.device("meta"):
        decoder = TinyDecoder().to(dtype).requires_grad_(False)
        latents = torch.empty(16, 3, *size, dtype=dtype)
    with LiveBytes() as counted:
        for frame in decoder.decode(latents, every_frame=False):
            del frame
    assert tiny_decoder_bytes(*size, dtype.itemsize) == pytest.approx(counted.peak, rel=0.03)


def test_where_a_straight_run_is_heading_is_its_end():
    video, noise = random_latents(seed=1), random_latents(seed=2)
    sigmas = flow_sigmas(8, 7.0).tolist()
    states = [(1 - sigma) * video + sigma * noise for sigma in sigmas]
    for step in range(1, 9):
        found = heading(states[step - 1], states[step], sigmas[step - 1], sigmas[step])
        torch.testing.assert_close(found, video, atol=1e-4, rtol=0)


def run(writer, steps, shape=(16, 3, 4, 6)):
    for step in range(1, steps + 1):
        writer(step, torch.randn(shape, generator=torch.manual_seed(step)))


def shown(monkeypatch):
    """Which pictures are written, without writing them."""
    written = []
    monkeypatch.setattr(preview, "write_preview", lambda path, pictures, duration: written.append(pictures))
    return written


@pytest.mark.parametrize(("steps", "every", "count"), [(9, 3, 3), (10, 3, 4), (5, 1, 4), (1, 1, 1), (4, 50, 1)])
def test_every_few_steps_and_the_last(tmp_path, monkeypatch, steps, every, count):
    written = shown(monkeypatch)
    run(PreviewWriter(tmp_path / "p.webp", flow_sigmas(steps, 7.0).tolist(), every, 24, pytest.fail), steps)
    assert len(written) == count


def test_the_last_preview_is_the_latents_themselves(tmp_path, monkeypatch):
    written = shown(monkeypatch)
    latents = random_latents(3, 8, 8)
    PreviewWriter(tmp_path / "p.webp", [1.0, 0.0], 1, 24, pytest.fail)(1, latents)
    expected = linear_rgb(latents).permute(0, 2, 3, 1).mul(255).numpy()
    small = written[0][:, 24::48, 24::48]  # the middle of each latent's pixels
    assert written[0].shape == (3, LONG_SIDE, LONG_SIDE, 3)
    assert np.abs(small.astype(float) - expected).mean() < 1.5


def test_the_file_is_an_animation_with_the_video_s_pace(tmp_path):
    path = preview_path(tmp_path / "out.mp4")
    assert path.name == "out.mp4.preview.webp"
    writer = PreviewWriter(path, flow_sigmas(4, 7.0).tolist(), 2, 24, pytest.fail)
    run(writer, 2, (16, 5, 6, 10))
    first = path.read_bytes()
    run(writer, 4, (16, 5, 6, 10))
    assert path.read_bytes() != first
    with Image.open(path) as file:
        assert file.format == "WEBP"
        assert file.n_frames == 5
        assert file.size == (LONG_SIDE, 230)
        file.load()
        assert file.info["duration"] == 167
    assert list(tmp_path.iterdir()) == [path]


def test_with_taehv_the_preview_shows_its_frames(tmp_path, monkeypatch, decoder):
    written = shown(monkeypatch)
    latents = random_latents(2, 64, 20)
    PreviewWriter(tmp_path / "p.webp", [1.0, 0.0], 1, 24, pytest.fail, decoder)(1, latents)
    whole = torch.stack(list(decoder.decode(latents, every_frame=False)))
    assert written[0].shape == (2, LONG_SIDE, 120, 3)
    assert written[0].mean() == pytest.approx(whole.mean().item() * 255, abs=1.5)


@pytest.mark.parametrize("fails", ["to", "decode"])
def test_out_of_memory_falls_back_to_the_matrix_with_a_notice(tmp_path, monkeypatch, fails):
    class Greedy:
        def to(self, *_):
            return self.decode() if fails == "to" else self

        def decode(self, *_, **__):
            raise torch.OutOfMemoryError("no")

    written, said = shown(monkeypatch), []
    run(PreviewWriter(tmp_path / "p.webp", flow_sigmas(6, 7.0).tolist(), 2, 24, said.append, Greedy()), 6)
    assert len(written) == 3
    assert len(said) == 1
    assert isinstance(said[0], Notice)
    assert "--preview-vae" in said[0].text


def test_no_memory_even_for_the_matrix_stops_nothing(tmp_path, monkeypatch):
    def linear_rgb(latents):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(preview, "linear_rgb", linear_rgb)
    said = []
    run(PreviewWriter(tmp_path / "p.webp", flow_sigmas(6, 7.0).tolist(), 2, 24, said.append), 6)
    assert len(said) == 1
    assert "too little video memory" in said[0].text


def test_a_preview_that_cannot_be_written_stops_nothing(tmp_path):
    said = []
    run(PreviewWriter(tmp_path / "none" / "p.webp", flow_sigmas(6, 7.0).tolist(), 2, 24, said.append), 6)
    assert len(said) == 1
    assert "cannot be written" in said[0].text
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_no_numbers_are_drawn_black(tmp_path):
    path = tmp_path / "p.webp"
    PreviewWriter(path, [1.0, 0.0], 1, 24, pytest.fail)(1, torch.full((16, 2, 4, 4), torch.nan))
    with Image.open(path) as file:
        assert np.asarray(file.convert("RGB")).max() <= 2


def test_latents_are_only_read_and_only_a_due_step_s_neighbour_is_kept(tmp_path, monkeypatch):
    shown(monkeypatch)
    writer = PreviewWriter(tmp_path / "p.webp", flow_sigmas(9, 7.0).tolist(), 4, 24, pytest.fail)
    for step in range(1, 10):
        latents = random_latents(seed=step)
        copy = latents.clone()
        writer(step, latents)
        assert torch.equal(latents, copy)
        assert (writer._before is latents) == (step + 1 in (4, 8, 9))


@pytest.mark.parametrize("every", [0, -3])
def test_a_wrong_interval_is_refused(tmp_path, every):
    with pytest.raises(RequestError, match="--preview"):
        PreviewWriter(tmp_path / "p.webp", [1.0, 0.0], every, 24, pytest.fail)


def released(decoder):
    """What the released file holds: the decoder, and an encoder that is not read."""
    weights = {name: value.half().contiguous() for name, value in decoder.state_dict().items()}
    return weights | {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}


@pytest.mark.parametrize("name", ["taehv.safetensors", "taehv.pth"])
def test_the_released_file_is_read(tmp_path, name):
    decoder = TinyDecoder()
    assert sum(weight.numel() for weight in decoder.parameters()) == 9_844_611
    save = save_file if name.endswith("safetensors") else torch.save
    save(released(decoder), tmp_path / name)
    loaded = load_tiny_decoder(tmp_path / name, CPU, torch.float32)
    assert not loaded.training
    assert not any(weight.requires_grad or weight.is_meta for weight in loaded.parameters())
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, decoder.state_dict()[key].half().float())


def test_files_that_are_not_taehv_are_refused_with_what_is_wrong(tmp_path):
    weights = released(TinyDecoder())
    del weights["decoder.7.conv.weight"]
    weights["decoder.22.weight"] = torch.zeros(12, 64, 3, 3)
    weights["vgg.0.weight"] = torch.zeros(1)
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_tiny_decoder(tmp_path / "other.safetensors", CPU, torch.float32)
    for line in ("missing: decoder.7.conv.weight", "decoder.22.weight is [12, 64, 3, 3]", "unexpected: vgg.0.weight"):
        assert line in str(error.value)
    assert "taehv" in error.value.remedy


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_run_no_code_and_damage_is_refused(tmp_path, capsys):
    path = tmp_path / "taehv.pth"
    for content in (b"", b"no pickle", pickle.dumps(Evil()), pickle.dumps({"decoder": {"a": 1}})):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read") as error:
            load_tiny_decoder(path, CPU, torch.float32)
        assert "weights_only" not in str(error.value)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="other than tensors"):
        load_tiny_decoder(path, CPU, torch.float32)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tiny_decoder(tmp_path / "none.pth", CPU, torch.float32)
    assert "code ran" not in capsys.readouterr().out
