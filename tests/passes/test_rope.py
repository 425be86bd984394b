"""RoPE in every spelling: what is matched is the operand, and what is not the form is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from lp_inductor.passes.result import Miss, MissCode
from lp_inductor.passes.rope import RopeMatch
from lp_inductor.passes.sources import copies_made
from tests.rope_checks import find_rope
from tests.rotations import CASES, DIM, bhsd, halves, joint, joint_three, pair, refused_cases


@pytest.mark.parametrize("name", CASES)
def test_every_spelling_is_one_form(name: str) -> None:
    case = CASES[name]
    match = find_rope(case.function, *case.inputs)
    assert isinstance(match, RopeMatch), match
    assert match.describe() == case.rope
    assert match.permuted == case.permuted
    assert copies_made(match.source) == case.pieces
    assert match.cos.head_count == match.sin.head_count == case.table_heads


@pytest.mark.parametrize("name", refused_cases())
def test_what_has_not_the_form_is_refused(name: str) -> None:
    function, inputs = refused_cases()[name]
    found = find_rope(function, *inputs)
    assert isinstance(found, Miss) and found.code is MissCode.ROPE_FORM, found


def text_length_from_shape(x: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In place behind as many tokens as ``text`` has."""
    x = x.clone()
    x[:, :, text.shape[2] :] = halves(x[:, :, text.shape[2] :], cos, sin)
    return x


DYNAMIC: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int]] = {
    "joint": (joint, (bhsd(5), bhsd(7), *pair(1, 1, 7, DIM)), 2),
    "text_length": (text_length_from_shape, (bhsd(11), bhsd(5), *pair(1, 1, 6, DIM)), 2),
    "three": (
        joint_three,
        (bhsd(3), bhsd(5), bhsd(7), *pair(1, 1, 3, DIM), *pair(1, 1, 7, DIM)),
        2,
    ),
    "ltx": (CASES["ltx"].function, CASES["ltx"].inputs, 1),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_numbers_of_tokens_may_be_symbolic(name: str) -> None:
    function, inputs, dim = DYNAMIC[name]
    match = find_rope(function, *inputs, dynamic=dim)
    assert isinstance(match, RopeMatch), match


def test_a_run_that_may_be_empty_is_not_cut() -> None:
    """Nothing says that the text is shorter than what it is cut from."""

    def cut_blindly(x: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n = text.shape[2]
        return text_length_from_shape(x, text, cos[:, :, n:], sin[:, :, n:])

    inputs = (bhsd(11), bhsd(5), *pair(1, 1, 11, DIM))
    assert not isinstance(find_rope(cut_blindly, *inputs, dynamic=2), RopeMatch)
