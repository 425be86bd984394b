"""The pipeline: one ordered sequence of passes, one cache key.

``AttentionPass`` runs as Inductor's ``joint_custom_pre_pass``, the first hook after AOTAutograd.
For every captured site it matches, proves, decides, and then either rewrites the site or expands
it back to stock attention. Each later Inductor pass sees rewritten attention or exactly what it
would have seen without us.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from lp_inductor._compat import NewGuardError, no_new_guards
from lp_inductor.passes.decomposed import find_decomposed
from lp_inductor.passes.expand import expand_site
from lp_inductor.passes.inline import Inliner
from lp_inductor.passes.match import SiteMatch, SiteMatcher
from lp_inductor.passes.raising import Candidate
from lp_inductor.passes.result import Miss, MissCode
from lp_inductor.passes.rewrite import Rewriter
from lp_inductor.passes.site import (
    AttentionCall,
    Decision,
    Sdpa,
    Site,
    module_of,
    shape_for_report,
    values,
)
from lp_inductor.passes.site_mask import SiteMask

log = logging.getLogger(__name__)


#: Decides on a matched call: module name and call in, a kernel or the reason for none out.
Decide = Callable[[str, AttentionCall], "Decision | Miss"]


@dataclass(frozen=True)
class PipelineOptions:
    """What of the configuration changes graphs.

    ``keep_open``: code for this graph has no guards, as in a package. A site whose rewrite would
    need one is refused.
    """

    fuse_rope: bool = True
    keep_open: bool = False


def run_passes(graph: Graph, options: PipelineOptions, decide: Decide) -> list[Site]:
    """Rewrite or expand every ``lp_inductor::sdpa`` node of ``graph``; report on each.

    Attention that is written out is rewritten too, or left as it is.
    """
    found = find_decomposed(graph)
    raised = {c.raise_(): c for c in found if isinstance(c, Candidate)}
    nodes = graph.find_nodes(op="call_function", target=torch.ops.lp_inductor.sdpa.default)
    refused = [site for site in found if isinstance(site, Site)]
    if not nodes:
        return refused
    matcher = SiteMatcher(options.fuse_rope)
    rewriter = Rewriter(graph)
    inliner = Inliner()
    sites = refused
    for number, node in enumerate(nodes, start=len(refused)):
        written = raised.get(node)
        site = _run_site(
            number, node, written, matcher, rewriter, inliner, decide, options.keep_open
        )
        sites.append(site)
    graph.lint()
    log.debug("rewrote %d of %d sites", sum(site.fused for site in sites), len(sites))
    return sites


def _run_site(
    number: int,
    node: Node,
    written: Candidate | None,
    matcher: SiteMatcher,
    rewriter: Rewriter,
    inliner: Inliner,
    decide: Decide,
    keep_open: bool,
) -> Site:
    sdpa, module = Sdpa.of(node), module_of(node)
    guarded = _guarding(sdpa, keep_open)
    mask: SiteMask | Miss
    match: SiteMatch | Miss
    decision: Decision | Miss
    try:
        with guarded():
            mask = matcher.match_mask(sdpa)
            match = matcher.match_site(sdpa, mask)
            if isinstance(match, Miss):
                decision = match
            else:
                decision = _about_mask(decide(module, match.attention_call()), match.mask)
    except NewGuardError as error:
        if error.too_late:
            raise
        mask = match = decision = Miss(MissCode.DYNAMIC_DIM, str(error))
    if isinstance(match, SiteMatch) and isinstance(decision, Decision):
        site = _record(sdpa, module, mask, match, decision)
        if written is not None:
            written.accept(node)
        with guarded():
            rewriter.rewrite_site(match, decision, number)
        return site
    assert isinstance(decision, Miss)
    site = _record(sdpa, module, mask, match, decision)
    if written is not None:
        written.discard()
    else:
        expand_site(sdpa, inliner)
    return site


def _guarding(sdpa: Sdpa, keep_open: bool) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Around what must not add guards; what expands to stock attention may, as stock does."""
    if not keep_open:
        return contextlib.nullcontext
    shape_env = values(sdpa)["query"].fake_mode.shape_env
    return lambda: no_new_guards(shape_env)


def _about_mask(decision: Decision | Miss, mask: SiteMask) -> Decision | Miss:
    """Where a kernel takes no mask tensor, the reason is why the mask could not be proved."""
    is_mask = isinstance(decision, Miss) and decision.code is MissCode.MASK_IS_DATA
    return mask.unproved if is_mask and mask.unproved is not None else decision


def _record(
    sdpa: Sdpa,
    module: str,
    mask: SiteMask | Miss,
    match: SiteMatch | Miss,
    decision: Decision | Miss,
) -> Site:
    q, k, v = (shape_for_report(values(sdpa)[n]) for n in ("query", "key", "value"))
    fused = decision if isinstance(decision, Decision) else None
    rope, rope_miss = None, None
    if isinstance(match, SiteMatch):
        kv_heads = int(match.attention_call().kv_heads)
        k, v = (k[0], kv_heads, *k[2:]), (v[0], kv_heads, *v[2:])
        if fused is not None:
            rope, rope_miss = match.describe_rope(), match.rope_miss
    return Site(
        module,
        fused is not None,
        rope,
        "unknown" if isinstance(mask, Miss) else mask.describe(),
        fused.kernel if fused else None,
        fused.quantization.describe() if fused else None,
        None if isinstance(decision, Decision) else _frozen(decision),
        q,
        k,
        v,
        None if rope_miss is None else _frozen(rope_miss),
    )


def _frozen(miss: Miss) -> Miss:
    """With its detail evaluated now: the graph it speaks of will not outlive the compile."""
    return Miss(miss.code, miss.detail)
