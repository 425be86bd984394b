"""Value numbers: two nodes with one number compute the same values, whatever their names.

AOTAutograd does not remove common subexpressions from inference graphs, and models compute a
table twice as readily as once. The number of a node is the structure of its computation:
operator and arguments, down to graph inputs and to anything that is not a pure function.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Node

from lp_inductor.passes.movement import value_of


class ValueNumbers:
    """Numbers the nodes of one graph on demand; linear in the nodes asked for."""

    def __init__(self) -> None:
        self._of_node: dict[Node, int] = {}
        self._of_key: dict[Hashable, int] = {}

    def __call__(self, node: Node) -> int:
        """The number of ``node``."""
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [n for n in current.all_input_nodes if n not in self._of_node]
            if current in self._of_node or not missing or not _is_pure(current):
                pending.pop()
                self._of_node.setdefault(current, self._number(current))
            else:
                pending.extend(missing)
        return self._of_node[node]

    def _number(self, node: Node) -> int:
        key: Hashable = ("node", node)
        if _is_pure(node):
            structure = (node.target, self._freeze(node.args), self._freeze(node.kwargs))
            if _is_hashable(structure):
                key = structure
        return self._of_key.setdefault(key, len(self._of_key))

    def _freeze(self, value: Any) -> Hashable:
        if isinstance(value, Node):
            return ("node", self._of_node[value])
        if isinstance(value, list | tuple):
            return tuple(self._freeze(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, self._freeze(v)) for k, v in sorted(value.items()))
        if isinstance(value, bool | int | float):
            return (type(value).__name__, value)  # 1, 1.0 and True are equal, but not the same
        return value if _is_hashable(value) else id(value)


def _is_pure(node: Node) -> bool:
    if node.op != "call_function":
        return False
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return not isinstance(value_of(node), torch.Tensor) or target.__module__ == "_operator"
    random = torch.Tag.nondeterministic_seeded in target.tags
    # An uninitialised tensor has no value to share.
    uninitialised = "empty" in target._schema.name
    return not (random or uninitialised or target._schema.is_mutable)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
