"""The pipeline: one ordered sequence of passes, one cache key.

``AttentionPass`` runs as Inductor's ``joint_custom_pre_pass``, the first hook after AOTAutograd.
For every captured site it matches, proves, decides, and then either rewrites the site or expands
it back to stock attention. Each later Inductor pass sees rewritten attention or exactly what it
would have seen without us.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from lp_inductor.passes.decomposed import find_decomposed
from lp_inductor.passes.expand import expand_site
from lp_inductor.passes.inline import Inliner
from lp_inductor.passes.mask import MaskForm
from lp_inductor.passes.match import SiteMatch, SiteMatcher
from lp_inductor.passes.raising import Candidate
from lp_inductor.passes.result import Miss
from lp_inductor.passes.rewrite import Rewriter
from lp_inductor.passes.site import AttentionCall, Sdpa, Site, module_of, shape_for_report, values

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """A kernel that is to serve a site."""

    kernel: str
    granularity: str


#: Decides on a matched call: module name and call in, a kernel or the reason for none out.
Decide = Callable[[str, AttentionCall], "Decision | Miss"]


@dataclass(frozen=True)
class PipelineOptions:
    """What of the configuration changes graphs."""

    smooth_k: bool = True
    smooth_v: bool = True
    fuse_rope: bool = True


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
    rewriter = Rewriter(graph, options.smooth_k, options.smooth_v)
    inliner = Inliner()
    sites = refused + [
        _run_site(node, raised.get(node), matcher, rewriter, inliner, decide) for node in nodes
    ]
    graph.lint()
    log.debug("rewrote %d of %d sites", sum(site.fused for site in sites), len(sites))
    return sites


def _run_site(
    node: Node,
    written: Candidate | None,
    matcher: SiteMatcher,
    rewriter: Rewriter,
    inliner: Inliner,
    decide: Decide,
) -> Site:
    sdpa, module = Sdpa.of(node), module_of(node)
    mask = matcher.match_mask(sdpa)
    match = matcher.match_site(sdpa, mask)
    decision = decide(module, match.attention_call()) if isinstance(match, SiteMatch) else match
    if isinstance(match, Miss) or isinstance(decision, Miss):
        miss = match if isinstance(match, Miss) else decision
        assert isinstance(miss, Miss)
        site = _record(sdpa, module, mask, match, None, miss)
        if written is not None:
            written.discard()
        else:
            expand_site(sdpa, inliner)
        return site
    site = _record(sdpa, module, mask, match, decision, None)
    if written is not None:
        written.accept(node)
    rewriter.rewrite_site(match, decision.kernel)
    return site


def _record(
    sdpa: Sdpa,
    module: str,
    mask: MaskForm | Miss,
    match: SiteMatch | Miss,
    decision: Decision | None,
    miss: Miss | None,
) -> Site:
    q, k, v = (shape_for_report(values(sdpa)[n]) for n in ("query", "key", "value"))
    rope = None
    if isinstance(match, SiteMatch):
        kv_heads = int(match.attention_call().kv_heads)
        k, v = (k[0], kv_heads, *k[2:]), (v[0], kv_heads, *v[2:])
        rope = match.rope.describe() if match.rope else None
    if miss is not None:
        # Evaluate the detail now: the graph it speaks of will not outlive the compile.
        miss = Miss(miss.code, miss.detail)
    if sdpa.mask is None and not sdpa.is_causal:
        form = "none"
    else:
        form = "data" if isinstance(mask, Miss) else mask.describe()
    return Site(
        module,
        decision is not None,
        rope if decision else None,
        form,
        decision.kernel if decision else None,
        decision.granularity if decision else None,
        miss,
        q,
        k,
        v,
    )
