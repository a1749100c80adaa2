"""Which attention backend is chosen, and what is said about it. No kernel is compiled here without a GPU."""

from __future__ import annotations

import pytest
import torch

from lowvram_i2v import attention
from lowvram_i2v.attention import choice
from lowvram_i2v.errors import PlatformError, RequestError
from lowvram_i2v.kernels import attention_reference as reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("name", ["triton", "triton-int8", "sage", "flash"])
def test_without_a_gpu_sdpa_runs_and_says_why(name: str) -> None:
    chosen = choice.choose(name, CPU, 128)
    assert chosen.name == "sdpa"
    assert name in chosen.why
    assert "CUDA" in chosen.why


def test_auto_is_exact_unless_eight_bits_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "obstacle", lambda *_: None)
    assert choice.choose("auto", CUDA, 128).name == "sdpa"
    assert choice.choose("auto", CUDA, 128, eight_bit=True).name == "triton-int8"
    assert choice.choose("triton", CUDA, 128).name == "triton"
    with pytest.raises(RequestError, match="magic"):
        choice.choose("magic", CUDA, 128)


@pytest.mark.parametrize(
    ("refused", "name"), [(("triton-sparse",), "triton-int8"), (("triton-sparse", "triton-int8"), "sdpa")]
)
def test_instead_of_sparse_attention_dense_8_bits_are_tried(
    monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...], name: str
) -> None:
    monkeypatch.setattr(choice, "obstacle", lambda tried, *_: "no luck" if tried in refused else None)
    chosen = choice.choose("triton-sparse", CUDA, 128)
    assert chosen.name == name
    assert chosen.why == "; ".join(f"{tried} cannot run here: no luck" for tried in refused)


def half(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return reference.attention(q, k, v) / 2


def nothing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q * float("nan")


def broken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no image")


@pytest.mark.parametrize(("attend", "said"), [(half, "off by 50.0%"), (nothing, "off by nan%"), (broken, "no image")])
def test_a_backend_that_fails_its_self_test_is_not_used(
    monkeypatch: pytest.MonkeyPatch, attend: attention.AttentionBackend, said: str
) -> None:
    monkeypatch.setattr(choice, "missing", lambda *_: None)
    monkeypatch.setattr(choice, "get", lambda _: attend)
    chosen = choice.choose("triton-int8", CPU, 32)
    assert chosen.name == "sdpa"
    assert said in chosen.why


def test_sparse_attention_is_held_to_its_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram_i2v.attention import sparse_trial

    assert choice.obstacle("triton-sparse", CPU, 32) is None
    monkeypatch.setattr(sparse_trial, "attend", lambda q, k, v, **_: reference.attention(q, k, v))
    assert "(sparse) is off by" in str(choice.obstacle("triton-sparse", CPU, 32))
    monkeypatch.setattr(sparse_trial, "dense", half)
    assert str(choice.obstacle("triton-sparse", CPU, 32)).startswith("in dense steps its self-test (flat) is off by 50")


def test_a_backend_that_is_wrong_only_over_q_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.empty_like(q) if out is None else out
        return out.zero_().add_(reference.attention(q, k, v))

    monkeypatch.setattr(choice, "get", lambda _: careless)
    assert "(peaked) is off by" in str(choice.self_test("triton", CPU, 32))


@pytest.mark.parametrize("name", [name for name in attention.BACKENDS if name != "sdpa"])
def test_a_card_that_is_too_old_is_an_obstacle(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 2080")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choice.missing(name, CUDA, 128) == "RTX 2080 has compute capability 7.5, and attention needs 8.0 (RTX 30)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert choice.missing(name, CUDA, 128) is None


def test_other_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None if name == "sageattention" else object())
    assert "sageattention" in choice.choose("sage", CUDA, 128).why
    assert "48 channels" in choice.choose("triton", CUDA, 48).why


def test_a_missing_package_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda _: None)
    with pytest.raises(PlatformError, match="flash_attn"):
        attention.get("flash")


def test_the_self_test_passes_for_sdpa() -> None:
    assert choice.self_test("sdpa", CPU, 32) is None


def test_the_definition_is_torchs() -> None:
    q, k, v = torch.randn(3, 50, 2, 16).unbind()
    exact = attention.get("sdpa")(q, k, v)
    assert reference.relative_l2(reference.attention(q, k, v), exact) < 1e-6
    assert torch.equal(reference.attention(q, k, v, rows=slice(3, 9)), reference.attention(q, k, v)[3:9])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "triton-int8"])
def test_backends_on_this_card(name: str) -> None:
    """Self-test, odd lengths, views of a workspace, and the result written over q."""
    assert choice.obstacle(name, CUDA, 128) is None
    attend = attention.get(name)
    for tokens in (1, 63, 64, 65, 1111):
        q, k, v = torch.randn(3, tokens, 6, 128, device=CUDA, dtype=torch.bfloat16)[:, :, 2:5].unbind()
        exact, limit = reference.attention(q, k, v), 0.08 if name in choice.KINDS else 0.01
        assert reference.relative_l2(attend(q, k, v), exact) < limit
        assert attend(q, k, v, out=q) is q  # type: ignore[call-arg]
        assert reference.relative_l2(q, exact) < limit
