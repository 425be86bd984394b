"""Random rotations, half of them with a mistake: whatever is matched is the operand.

LP_INDUCTOR_FUZZ sets the number of cases.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lp_inductor.passes.rope import RopeMatch
from tests.rope_checks import find_rope
from tests.rotations import polar

CASES = int(os.environ.get("LP_INDUCTOR_FUZZ", "40"))
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
BATCH, HEADS, DIM = 2, 3, 8


@dataclass(frozen=True)
class Run:
    """A run of tokens: how many, whether they turn, and whether they have a tensor of their own."""

    tokens: int
    turns: bool
    own: bool


@dataclass(frozen=True)
class Spelling:
    """One random rotation."""

    runs: tuple[Run, ...]
    interleaved: bool
    start: int
    width: int
    form: str
    table: str
    join: str
    cast: bool
    moved: bool
    heads_last: bool
    dynamic: bool
    mistake: str


SPELLINGS = st.builds(
    Spelling,
    runs=st.lists(st.builds(Run, st.integers(1, 3), st.booleans(), st.booleans()), min_size=1, max_size=3).map(tuple),
    interleaved=st.booleans(),
    start=st.sampled_from([0, 2, 4]),
    width=st.sampled_from([2, 4, 8]),
    form=st.sampled_from(["parts", "signed", "addcmul", "complex", "matrix", "index"]),
    table=st.sampled_from(["tokens", "batch", "heads", "full", "alone", "negated"]),
    join=st.sampled_from(["cat", "scatter"]),
    cast=st.booleans(),
    moved=st.booleans(),
    heads_last=st.booleans(),
    dynamic=st.booleans(),
    mistake=st.sampled_from(
        ["no"] * 4 + ["partner", "sign", "lane", "token", "order", "unwritten", "head"]
    ),
)  # fmt: skip


class Model:
    """The operand as drawn, of (batch, heads, tokens, dim), from pieces and angles."""

    def __init__(self, spelling: Spelling) -> None:
        self.s = spelling
        self.width = min(spelling.width, DIM - spelling.start)

    def inputs(self) -> list[Tensor]:
        """A tensor for each run that has its own, one for the others, and angles for each run."""
        shared = sum(run.tokens for run in self.s.runs if not run.own)
        counts = [shared] + [run.tokens for run in self.s.runs if run.own]
        shapes = [
            (BATCH, n, HEADS, DIM) if self.s.heads_last else (BATCH, HEADS, n, DIM) for n in counts
        ]
        angles = [torch.rand(self.angle_shape(run)) * 6 for run in self.s.runs]
        return [*(torch.randn(shape) for shape in shapes), *angles]

    def angle_shape(self, run: Run) -> tuple[int, ...]:
        """Angles vary as the table does; a full table has an angle for each lane."""
        table, pairs = self.s.table, self.width // 2
        batch = BATCH if table == "batch" else 1
        heads = HEADS if table == "heads" else 1
        tokens = 1 if table == "alone" else run.tokens
        return (batch, heads, tokens, self.width if table == "full" else pairs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The operand."""
        own = sum(run.own for run in self.s.runs)
        tensors, angles = list(inputs[: own + 1]), inputs[own + 1 :]
        if self.s.heads_last:
            tensors = [t.transpose(1, 2) for t in tensors]
        shared, rest, at = tensors[0], iter(tensors[1:]), 0
        pieces: list[Tensor] = []
        for run, angle in zip(self.s.runs, angles, strict=True):
            if run.own:
                piece = next(rest)
            else:
                piece = shared[:, :, at : at + run.tokens]
                at += run.tokens
            pieces.append(self.turn(piece, angle) if run.turns else piece)
        return self.spoil(self.joined(pieces))

    def joined(self, pieces: list[Tensor]) -> Tensor:
        """The runs behind one another."""
        if self.s.mistake == "order" and len(pieces) > 1:
            pieces = [pieces[-1], *pieces[:-1]]
        if self.s.join == "cat":
            return torch.cat(pieces, dim=2)
        tokens = sum(piece.shape[2] for piece in pieces)
        out = pieces[0].new_empty(BATCH, HEADS, tokens, DIM)
        at = 0
        for piece in pieces:
            out[:, :, at : at + piece.shape[2]] = piece
            at += piece.shape[2]
        return out

    def spoil(self, x: Tensor) -> Tensor:
        """A mistake behind the rotation."""
        if self.s.mistake == "lane":
            x = x.clone()
            x[..., self.s.start] = x[..., self.s.start + 1]
        if self.s.mistake == "token":
            x = x.clone()
            x[:, :, -1] = x[:, :, 0] * 2
        if self.s.mistake == "unwritten":
            out = torch.zeros_like(x)
            out[:, :, :-1] = x[:, :, :-1]
            x = out
        if self.s.mistake == "head":
            x = x.flip(1)
        return x

    def turn(self, x: Tensor, angle: Tensor) -> Tensor:
        """Rotate the window of one run."""
        s, stop = self.s, self.s.start + self.width
        dtype = x.dtype
        window = x[..., s.start : stop]
        if s.cast:
            window = window.float()
        turned = self.window(window, angle).to(dtype)
        if s.start == 0 and self.width == DIM:
            return turned
        return torch.cat([x[..., : s.start], turned, x[..., stop:]], dim=-1)

    def window(self, x: Tensor, angle: Tensor) -> Tensor:
        s = self.s
        if s.form == "complex" and s.interleaved and s.table not in ("full", "negated"):
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * polar(angle)).flatten(-2)
        cos, sin = angle.cos(), angle.sin()
        if s.table == "full":
            (cos_a, cos_b), (sin_a, sin_b) = (self.pairs(t) for t in (cos, sin))
        else:
            (cos_a, cos_b), (sin_a, sin_b) = (cos, cos), (sin, sin)
        if s.table == "negated":
            sin_a = sin_b = (-sin).bfloat16().float()
        a, b = self.pairs(x)
        if s.mistake == "partner":
            b = b.roll(1, -1)
        sign = -1.0 if s.mistake == "sign" else 1.0
        if s.form == "addcmul":
            first = torch.addcmul(a * cos_a, b, sin_a, value=-1)
            second = torch.addcmul(b * cos_b, a, sin_b * sign)
        elif s.form == "matrix":
            matrix = torch.stack([cos_a, -sin_a, sin_b * sign, cos_b], -1).unflatten(-1, (2, 2))
            turned = (matrix * torch.stack([a, b], -1).unsqueeze(-2)).sum(-1)
            first, second = turned.unbind(-1)
        elif s.form in ("signed", "index"):
            other = self.unpaired(-b, a)
            if s.form == "index":
                half = self.width // 2
                swap = [
                    n ^ 1 if s.interleaved else (n + half) % self.width for n in range(self.width)
                ]
                other = x[..., swap] if s.mistake != "partner" else other
                first, second = self.pairs(other)
                other = self.unpaired(-first, second)
            whole = x * self.unpaired(cos_a, cos_b) + other * self.unpaired(sin_a, sin_b * sign)
            return self.order(*self.pairs(whole))
        else:
            first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b * sign
        return self.order(first, second)

    def order(self, first: Tensor, second: Tensor) -> Tensor:
        """Write the lanes back: in place, or moved."""
        if self.s.moved:
            joined = torch.cat([first, second], -1), torch.stack([first, second], -1).flatten(-2)
            return joined[0] if self.s.interleaved else joined[1]
        return self.unpaired(first, second)

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both lanes of every pair."""
        a, b = (x[..., 0::2], x[..., 1::2]) if self.s.interleaved else x.chunk(2, dim=-1)
        return a, b

    def unpaired(self, a: Tensor, b: Tensor) -> Tensor:
        """Pairs back in place."""
        if self.s.interleaved:
            return torch.stack([a, b], dim=-1).flatten(-2)
        return torch.cat([a, b], dim=-1)


def has_form(s: Spelling) -> bool:
    """Whether the drawn rotation is one that must be found."""
    turning = [run for run in s.runs if run.turns]
    # A table that is full and moved has no equally spaced lanes in source order; and lanes may
    # only be moved for all tokens alike.
    moved = s.moved and (s.table == "full" or len(turning) < len(s.runs))
    return s.mistake == "no" and bool(turning) and not moved


@settings(max_examples=CASES, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(SPELLINGS, st.integers(0, 2**16))
def test_what_is_matched_is_the_operand(spelling: Spelling, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model(spelling)
    dynamic = None
    if spelling.dynamic and all(run.own for run in spelling.runs):
        dynamic = 1 if spelling.heads_last else 2
    found = find_rope(model, *model.inputs(), dynamic=dynamic)
    if has_form(spelling) and dynamic is None:
        assert isinstance(found, RopeMatch), found
