"""Expand a site that is not rewritten back to stock attention.

Before: ``out = lp_inductor.sdpa(q, k, v, mask, is_causal, scale, enable_gqa)``. After: the nodes
that AOTAutograd would have put there, whichever backend the dispatcher picks for these operands::

    out = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, ...)[0]
"""

from __future__ import annotations

from lp_inductor.ops import stock_sdpa
from lp_inductor.passes.emit import Emitter
from lp_inductor.passes.inline import Inliner
from lp_inductor.passes.site import Sdpa


def expand_site(sdpa: Sdpa, inliner: Inliner) -> None:
    """Replace the site by what PyTorch's own attention traces to."""
    emitter = Emitter(sdpa.node.graph, sdpa.node)
    (result,) = inliner.inline(emitter, stock_sdpa, sdpa.node.args)
    assert result is not None
    emitter.replace_site(result)
