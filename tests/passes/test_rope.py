"""RoPE in every spelling: what is matched is the operand, and what is not the form is refused."""

from __future__ import annotations

import pytest

from lp_inductor.passes.result import Miss, MissCode
from lp_inductor.passes.rope import RopeMatch
from lp_inductor.passes.sources import copies_made
from tests.rope_checks import find_rope
from tests.rotations import CASES, refused_cases


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
