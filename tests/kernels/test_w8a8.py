"""8-bit products: exactly the product of the codes, each token by itself, and how large the error of 8 bits is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from goldens import relative_l2
from lowvram_i2v.errors import PlatformError
from lowvram_i2v.kernels import chunks, compute, w8a8
from lowvram_i2v.kernels.compute import FEWEST_ROWS, PRODUCTS, product_rows
from lowvram_i2v.kernels.scheme import SCHEMES

BOTH = pytest.mark.parametrize("scheme", PRODUCTS)
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": 448.0}
CPU = torch.device("cpu")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def multiply(scheme: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x times a weight [out, in] quantized in the scheme, in x's dtype."""
    parts = SCHEMES[scheme].quantize(weight)
    return w8a8.linear(x, w8a8.prepared(scheme, parts, bias, slice(None)), x.dtype)


def expected(scheme: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition in float64, from scales and codes in float32."""
    values = x.float()
    scale = (values.abs().amax(1, keepdim=True) / torch.tensor(LARGEST[scheme])).clamp_min(2.0**-126)
    codes = values / scale
    codes = codes.round() if scheme == "int8" else codes.clamp(-448, 448).to(DTYPES[scheme])
    parts = SCHEMES[scheme].quantize(weight)
    stored = parts["weight_scale"].view(1, -1) if scheme == "int8" else parts["scale_weight"]
    return (codes.double() @ parts["weight"].double().t()) * scale.double() * stored.double() + bias.double()


@given(
    st.sampled_from(list(PRODUCTS)),
    st.integers(1, 70),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 3000),
    st.integers(100, 5000),
    st.integers(0, 2**32),
)
def test_the_product_of_the_codes_is_rounded_once(
    scheme: str, tokens: int, out: int, into: int, dtype: torch.dtype, elements: int, product: int, seed: int
) -> None:
    """For any number of tokens, in any number of pieces."""
    x = gaussian(tokens, 16 * into, seed=seed).to(dtype)
    weight, bias = gaussian(16 * out, 16 * into, seed=seed + 1), gaussian(16 * out, seed=seed + 2).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "ELEMENTS", elements)
        patch.setattr(compute, "PRODUCT", product)
        y = multiply(scheme, x, weight, bias)
    exact = expected(scheme, x, weight, bias)
    assert y.dtype == dtype
    assert relative_l2(y, exact) < {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]


@given(st.integers(1, 10**5), st.sampled_from([64, 3072, 9216, 21504]))
def test_rows_of_a_product_are_few_and_alike(tokens: int, out: int) -> None:
    rows = product_rows(tokens, out)
    parts = -(-tokens // rows)
    assert rows * out <= compute.PRODUCT + out * parts
    last = tokens - (parts - 1) * rows
    assert tokens < 100 or last >= rows - parts, "no part is left over that would be padded"


@pytest.mark.parametrize("exact", [True, False])
def test_integer_products_are_exact_at_their_largest(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a CPU whose 8-bit product is not: it is then made in float64."""
    if not exact or not w8a8.cpu_product_is_exact():
        monkeypatch.setattr(w8a8, "cpu_product_is_exact", lambda: False)
    into = 15360
    codes = torch.full((FEWEST_ROWS, into), 127, dtype=torch.int8)
    codes[1], codes[2, ::2] = -127, -127
    weight = codes[:16].clone()
    product = torch.empty(FEWEST_ROWS, 16, dtype=torch.int32)
    w8a8.int_mm(codes, weight, product)
    assert torch.equal(product, (codes.double() @ weight.double().t()).int())
    assert product.max() == 127 * 127 * into


@BOTH
def test_codes_reach_the_ends_and_no_further(scheme: str) -> None:
    x = gaussian(50, 64)
    scale = w8a8.token_scales(x, DTYPES[scheme])
    codes = torch.empty(x.shape, dtype=DTYPES[scheme])
    w8a8.quantize_tokens(x, scale, codes)
    assert torch.equal(codes.float().abs().amax(1), torch.full((50,), LARGEST[scheme]))
    assert torch.equal(codes.float().sign(), torch.where(codes.float() == 0, 0, x.sign()))


@BOTH
def test_a_token_does_not_see_the_others(scheme: str) -> None:
    """One with huge, infinite or no numbers, or zeros, changes no other; and what it has lost, its result has too."""
    weight, bias, x = gaussian(48, 64, seed=1), gaussian(48, seed=2), gaussian(40, 64)
    plain = multiply(scheme, x, weight, bias)
    x[3] *= 1e30
    x[5, 7], x[6, 8], x[7] = float("inf"), float("nan"), 0
    y = multiply(scheme, x, weight, bias)
    others = [i for i in range(40) if i not in (3, 5, 6, 7)]
    assert torch.equal(y[others], plain[others])
    assert not y[5].isfinite().any()
    assert not y[6].isfinite().any()
    assert torch.equal(y[7], bias)
    torch.testing.assert_close(y[3] / 1e30, plain[3] - bias, rtol=1e-4, atol=1e-4)


def test_no_tokens_no_result() -> None:
    for scheme in PRODUCTS:
        assert multiply(scheme, gaussian(0, 64), gaussian(48, 64)).shape == (0, 48)


@pytest.mark.parametrize(("scheme", "error"), [("int8", 0.0125), ("fp8", 0.0374)])
def test_error_on_gaussian_numbers(scheme: str, error: float) -> None:
    """Weights' and activations' errors add as squares: int8 0.88 % each, e4m3 2.65 % each."""
    x, weight = gaussian(256, 3072), gaussian(256, 3072, seed=1)
    assert relative_l2(multiply(scheme, x, weight), F.linear(x, weight)) == pytest.approx(error, rel=0.05)


def test_error_with_a_channel_that_stands_out() -> None:
    """What int8 is bad at: a channel 50 times the others takes their bits; e4m3 does not mind."""
    x, weight = gaussian(256, 3072), gaussian(256, 3072, seed=1)
    x[:, 17] *= 50
    weight[:, 17] /= 50
    errors = {scheme: relative_l2(multiply(scheme, x, weight), F.linear(x, weight)) for scheme in PRODUCTS}
    assert errors["fp8"] < 0.04 < 0.05 < errors["int8"] < 0.15


def test_a_new_way_goes_before_the_old_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(x: w8a8.Codes, weight: w8a8.OpenWeight, dtype: torch.dtype) -> Tensor:
        return torch.full((len(x.codes), len(weight.codes)), 7, dtype=dtype)

    new = w8a8.Way("new", constant, lambda codes, device: codes == torch.int8)
    monkeypatch.setattr(w8a8, "WAYS", [new, *w8a8.WAYS])
    assert (multiply("int8", gaussian(4, 64), gaussian(48, 64)) == 7).all()
    assert (multiply("fp8", gaussian(4, 64), gaussian(48, 64)) != 7).any()
    with pytest.raises(PlatformError, match="w8a16"):
        w8a8.way(torch.float8_e4m3fn, torch.device("meta"))


@BOTH
@pytest.mark.gpu
def test_a_gpu_computes_the_same(scheme: str) -> None:
    """The bits of codes and scales; of the results all but the rounding to bfloat16, which alone is 0.0017, and, of
    e4m3 on Hopper, the few bits of its sums."""
    x, bias = gaussian(700, 3072).to(torch.bfloat16), gaussian(1024, seed=2).to(torch.bfloat16)
    parts = SCHEMES[scheme].quantize(gaussian(1024, 3072, seed=1))
    here = w8a8.linear(x, w8a8.prepared(scheme, parts, bias, slice(0, 768)), torch.float32)
    cuda = {suffix: part.cuda() for suffix, part in parts.items()}
    weight = w8a8.prepared(scheme, cuda, bias.cuda(), slice(0, 768))
    for one in w8a8.WAYS:
        there = one.linear(w8a8.quantized(x.cuda(), DTYPES[scheme]), weight, torch.bfloat16)
        assert relative_l2(there.cpu(), here) < {"int8": 1.8e-3, "fp8": 2.5e-3}[scheme], one.name
    scale = w8a8.token_scales(x, DTYPES[scheme])
    assert torch.equal(w8a8.token_scales(x.cuda(), DTYPES[scheme]).cpu(), scale)
    codes, codes_there = (torch.empty(x.shape, dtype=DTYPES[scheme], device=device) for device in ("cpu", "cuda"))
    w8a8.quantize_tokens(x, scale, codes)
    w8a8.quantize_tokens(x.cuda(), scale.cuda(), codes_there)
    assert torch.equal(codes_there.cpu().view(torch.uint8), codes.view(torch.uint8))
