"""The measure itself: what is wrong with a rewritten graph is seen, and said of the right part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from tests.zoo.building import noise
from tests.zoo.checks import SITE_FLOOR
from tests.zoo.measure import Built, Measurement, measure

QUANTIZED = torch.ops.aten._scaled_dot_product_flash_attention.quantized


class TwoSites(nn.Module):
    """A call of attention, then attention that is written out, with a sine behind."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        x = F.silu(F.scaled_dot_product_attention(query, key, value))
        scores = (x @ key.transpose(-1, -2)) * 0.5
        return torch.sin(scores.softmax(-1) @ value)


class Spoil(CustomGraphPass):
    """A pass behind ours that does something to the graph."""

    def __init__(self, change: Callable[[Graph], Any]) -> None:
        self._change = change

    def __call__(self, graph: Graph) -> None:
        self._change(graph)

    def uuid(self) -> None:
        return


def build() -> Built:
    operands = tuple(noise(1, 2, 16, 32, seed=seed) for seed in range(3))
    return TwoSites(), operands, {}


def spoiled(change: Callable[[Graph], Any]) -> Measurement:
    return measure(build, inductor={"joint_custom_pre_pass": Spoil(change)})


def calls(graph: Graph, target: Any) -> list[Any]:
    return graph.find_nodes(op="call_function", target=target)


def test_what_is_right() -> None:
    measured = measure(build)
    assert [site.fused for site in measured.sites] == [True, True]
    assert len(measured.decibels) == 2
    assert min(measured.decibels) > SITE_FLOOR
    assert all(record.same_elsewhere for record in measured.records)
    assert SITE_FLOOR / 2 < measured.output_db < float("inf")


def test_a_wrong_site_is_seen_at_that_site_alone() -> None:
    def wrong_scale(graph: Graph) -> None:
        first = calls(graph, QUANTIZED)[0]
        first.kwargs = {"scale": 2.0}

    measured = spoiled(wrong_scale)
    first, second = measured.decibels
    assert first < SITE_FLOOR < second
    assert all(record.same_elsewhere for record in measured.records)


def test_a_wrong_written_out_site_is_seen_too() -> None:
    def wrong_scale(graph: Graph) -> None:
        second = calls(graph, QUANTIZED)[1]
        second.kwargs = {"scale": 4.0}

    first, second = spoiled(wrong_scale).decibels
    assert second < SITE_FLOOR < first


def test_a_change_elsewhere_is_seen() -> None:
    def cosine(graph: Graph) -> None:
        (node,) = calls(graph, torch.ops.aten.sin.default)
        node.target = torch.ops.aten.cos.default

    measured = spoiled(cosine)
    assert min(measured.decibels) > SITE_FLOOR
    assert not any(record.same_elsewhere for record in measured.records)
