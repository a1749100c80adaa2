"""An interrupted training ends in the same bits as one that was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import training_micro as micro

from tools.train_demo import decoder, flow, text, vae
from tools.train_demo.loop import averaged


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    micro.train_all(folder)
    return folder


def test_every_stage_goes_on_where_it_stopped(whole: Path, tmp_path: Path) -> None:
    recipe = micro.MICRO
    for stop in (3, None):
        with micro.clips() as clips:
            vae.train(recipe, clips, micro.run(tmp_path, stop))
    for stop in (5, None):
        with micro.clips() as clips:
            text.prepare(recipe, micro.prompts(), tmp_path)
            text.train(recipe, micro.COUNTS, clips, micro.run(tmp_path, stop))
    for stop in (1, 3, None):
        with micro.clips() as clips:
            flow.train(recipe, clips, micro.run(tmp_path, stop))
    for stop in (2, None):
        with micro.clips() as clips:
            decoder.train(recipe, clips, micro.run(tmp_path, stop))
    for stage in ("vae", "text", "flow", "decoder"):
        once, pieces = averaged(whole, stage), averaged(tmp_path, stage)
        assert all(torch.equal(once[name], pieces[name]) for name in once), stage
    assert (whole / "vae.json").read_text() == (tmp_path / "vae.json").read_text()


def test_the_decoder_alone_changes_no_latent(whole: Path) -> None:
    before, after = averaged(whole, "vae"), vae.trained(whole)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)


def test_a_finished_stage_returns_at_once(whole: Path) -> None:
    before = (whole / "flow.jsonl").read_text()
    with micro.clips() as clips:
        flow.train(micro.MICRO, clips, micro.run(whole))
    assert (whole / "flow.jsonl").read_text() == before


def test_parts_alone_are_enough_to_go_on(whole: Path, tmp_path: Path) -> None:
    """What a link that carries little brings to another machine: moving averages, configs, tokenizers."""
    for path in [*whole.glob("*.part-*.pt"), whole / "vae.json"]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text.prepare(micro.MICRO, micro.prompts(), tmp_path)
    longer = micro.longer_flow(12)
    with micro.clips() as clips:
        flow.train(longer, clips, micro.run(tmp_path))
    line = json.loads((tmp_path / "flow.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 12
    assert line["loss"] > 0
