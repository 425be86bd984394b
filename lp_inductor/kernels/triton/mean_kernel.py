"""Adding the mean of the values to the result of somebody else's attention, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "group"])
def add_means(
    x_ptr, mean_ptr, out_ptr, tokens, group,
    WIDTH: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out = x + mean, added in float32; grid (tokens / TILE, WIDTH / LANES, batch).

    ``x`` and ``out`` (batch, tokens, heads, D), contiguous, may be the same; WIDTH is heads * D.
    ``mean`` (batch, heads / group, D), float32.
    """
    lanes = tl.program_id(1) * LANES + tl.arange(0, LANES)
    exist = lanes < WIDTH
    batch = tl.program_id(2).to(tl.int64)
    means = mean_ptr + batch * (WIDTH // group)
    mean = tl.load(means + lanes // D // group * D + lanes % D, mask=exist, other=0.0)
    mine = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    offsets = (batch * tokens + mine)[:, None] * WIDTH + lanes[None, :]
    mask = (mine < tokens)[:, None] & exist[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, (x + mean[None, :]).to(out_ptr.dtype.element_ty), mask=mask)
