"""On an NVIDIA GPU: the Triton kernels with their real tiles, over the matrix of tests/kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lp_inductor.visibility import Visibility
from tests.helpers import sqnr
from tests.kernels.cases import (
    INTERPRETED,
    MIN_DB,
    ROTATIONS,
    Case,
    Rotation,
    attention_cases,
    expected,
    operands,
)
from tests.kernels.one_operand import quantize_triton, quantize_value_triton
from tests.kernels.quantize_checks import (
    LAYERS,
    Layer,
    check_dither,
    check_key_blocks,
    check_layer,
    check_per_head,
    check_rows,
    check_settled,
    check_value,
    check_value_blocks,
    longer,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs an NVIDIA GPU"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("case", attention_cases(256), ids=lambda c: c.name)
def test_attention_matches_the_reference(case: Case) -> None:
    """Every mask, length, head size and output type, twice with the same bits."""
    from lp_inductor.kernels.triton.kernel import TritonKernel

    o, visible = operands(case, CUDA), case.visible(CUDA)
    want = expected(case, o, visible)
    first, second = (
        TritonKernel().run(
            o.query, o.key, o.value, o.q_descale, o.k_descale, o.v_descale,
            v_mean=o.v_mean, visible=visible, scale=case.scale, out_dtype=case.dtype,
        )
        for _ in range(2)
    )  # fmt: skip
    assert first.dtype == case.dtype
    assert torch.equal(first, second)
    blind = (want == 0).all(-1)
    assert (first[blind] == 0).all()
    if not blind.all():
        assert sqnr(first, want) > MIN_DB


@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: r.name)
@pytest.mark.parametrize("tokens", [300, 4096])
def test_per_head_scales(rotation: Rotation, tokens: int) -> None:
    """FP8 bytes as the definition has them, but for ties."""
    check_per_head(rotation, tokens, CUDA)


@pytest.mark.parametrize("tokens", [399, 5000, 131000])
def test_guesses_that_do_not_hold(tokens: int) -> None:
    """What the sample did not show is found, and the head rounded again."""
    check_settled(tokens, CUDA)


@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: r.name)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_scales_of_rows_and_blocks(rotation: Rotation, dtype: torch.dtype) -> None:
    """A row, or 128 tokens."""
    check_rows(rotation, 1000, CUDA, dtype)
    check_key_blocks(rotation, 1000, CUDA)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("shape", [(2, 4, 300, 40), (1, 3, 4096, 128), (1, 2, 1000, 256)])
def test_value(shape: tuple[int, ...], transpose: bool) -> None:
    """Centred, by channel or by token, with its mean; and with one scale for 128 tokens."""
    check_value(shape, CUDA, transpose)
    check_value_blocks(shape, CUDA, center=transpose)


def test_dither() -> None:
    """Values in bfloat16, which a mean would turn all in one direction."""
    check_dither(65536, CUDA)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda c: c.name)
def test_layer(layer: Layer) -> None:
    """Whole layers, four times as long; twice with the same bits."""
    torch.manual_seed(0)
    first = check_layer(longer(layer, 4), CUDA)
    torch.manual_seed(0)
    second = check_layer(longer(layer, 4), CUDA)
    assert torch.equal(first, second)


def test_logsumexp() -> None:
    """Natural logarithms, -inf for rows that see no key."""
    from lp_inductor.kernels.triton.attention import attention_triton, transpose_value

    case = Case("lse", 300, 300, batch=2, lower=-50, upper=-2)
    o = operands(case, CUDA)
    _, lse = attention_triton(
        o.query, o.key, transpose_value(o.value), o.q_descale, o.k_descale, o.v_descale,
        visible=case.visible(CUDA), return_lse=True,
    )  # fmt: skip
    query, key = (
        t.double() * d[..., None, None] for t, d in ((o.query, o.q_descale), (o.key, o.k_descale))
    )
    hidden = ~case.visible(CUDA).band(300, 300, CUDA)
    scores = (query @ key.mT * case.head_dim**-0.5).masked_fill(hidden, -torch.inf)
    assert lse is not None
    assert (lse[..., :2] == -torch.inf).all()
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-3, atol=1e-3)


def test_nan_stays_in_its_row() -> None:
    """A NaN in a query is a NaN in its row, and in no other."""
    from lp_inductor.kernels.triton.attention import attention_triton, transpose_value

    case = Case("nan", 200, 200)
    o = operands(case, CUDA)
    o.query.view(torch.uint8)[0, 1, 5, 3] = 0x7F
    got, _ = attention_triton(
        o.query, o.key, transpose_value(o.value), o.q_descale, o.k_descale, o.v_descale
    )
    assert got[0, 1, 5].isnan().all()
    assert got.isnan().sum() == case.value_head_dim


@pytest.mark.parametrize("tokens", [4096, 65536])
def test_accuracy_does_not_depend_on_length(tokens: int) -> None:
    """Values of mean one: sums of many terms of one sign do not lose their bits."""
    from lp_inductor.kernels.triton.attention import attention_triton

    query, key, value = (torch.randn(1, 1, tokens, 128, device=CUDA) for _ in range(3))
    value += 1
    query = query[:, :, :256]
    q, q_descale = quantize_triton(query)
    k, k_descale = quantize_triton(key, center=True)
    v, v_descale, v_mean = quantize_value_triton(value)
    storage = v.as_strided((1, 1, 128, tokens), (128 * tokens, 128 * tokens, tokens, 1))
    got, _ = attention_triton(
        q, k, storage, q_descale, k_descale, v_descale, v_mean=v_mean, out_dtype=torch.float32
    )
    want = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert sqnr(got, want) > 45


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hadamard_qk": True},
        {"granularity": "per_block"},
        {"qk_dtype": torch.int8},
    ],
    ids=["head", "hadamard", "block", "int8"],
)
def test_inside_a_triton_op(dynamic: bool, options: dict[str, Any]) -> None:
    """Traced into a graph by torch.compile, a layer computes the same."""
    from lp_inductor.kernels.triton.layer import attention_layer

    # A name of its own: what is compiled is kept by the name and source of the operator.
    name = f"lp_inductor_test::attention_{'_'.join(options) or 'default'}"

    @torch.library.triton_op(name, mutates_args={})
    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention_layer(query, key, value, visible=Visibility(upper=0), **options)

    compiled = torch.compile(lambda *t: attention(*t) * 1, fullgraph=True)
    for tokens in (512, 400) if dynamic else (512,):
        args = [torch.randn(1, 4, tokens, 64, device=CUDA, dtype=torch.bfloat16) for _ in range(3)]
        for arg in args if dynamic else ():
            torch._dynamo.mark_dynamic(arg, 2)
        eager = attention(*args)
        assert torch.equal(eager, compiled(*args))
        want = F.scaled_dot_product_attention(*(t.double() for t in args), is_causal=True)
        assert sqnr(eager, want) > 24


def test_strides_are_not_the_only_one_compiled_for() -> None:
    """One call after another with other lengths and layouts: no result of the last shows."""
    for layer in (LAYERS[0], LAYERS[1], LAYERS[2]):
        for tokens in (130, 257, 1024, 33):
            for inside in (True, False):
                check_layer(replace(layer, tokens=tokens, heads_inside=inside), CUDA)
