"""A graph with its matches replaced by calls of :mod:`runtime`."""

from __future__ import annotations

from torch.fx import Graph, Node

from .match import Chain, Found, Head
from .roles import Convolve, Normalise, Pad, Same
from .runtime import ChainCall, ConvSource, HeadCall, NormSource, function_of

__all__ = ["rewrite"]

Given = Node | str | None
"""An argument of a fused call: a value of the graph, or the path of a module."""


def rewrite(graph: Graph, found: Found) -> None:
    """Replace every chain and head of ``found`` in ``graph``, in place."""
    replaced: dict[Node, Node] = {}
    readers: dict[Node, int] = {}
    for match in sorted(found.matches, key=lambda m: found.values.order[m.last]):
        given: list[Given] = []
        if isinstance(match, Head):
            pool = match.pool
            norm = _norm(match.norm, True, given)
            head = HeadCall(norm, pool.keepdim, pool.window, pool.stride)
            before: list[Given] = [match.x]
            function = function_of(head)
        else:
            norm_node = match.sites[0].norm.node
            readers[norm_node] = number = readers.get(norm_node, 0) + 1
            last = number == len(match.siblings) + 1
            sites = tuple(
                (_norm(site.norm, site.relu is not None, given), _conv(site.conv, given))
                for site in match.sites
            )
            projection = None if match.projection is None else _conv(match.projection.conv, given)
            call = ChainCall(
                sites,
                match.shortcut,
                projection,
                bool(match.siblings),
                number == 1,
                last,
                _hands_on(match, found),
            )
            before = [match.x, match.residual]
            function = function_of(call)
        with graph.inserting_before(match.last):
            arguments = [
                graph.get_attr(a) if isinstance(a, str) else None if a is None else replaced.get(a, a)
                for a in (*before, *given)
            ]
            new = graph.call_function(function, tuple(arguments))
        new.meta = dict(match.last.meta)
        for reader in found.values.readers[match.last]:
            for operand in found.values.operands(reader, match.last):
                reader.replace_input_with(operand, new)
        match.last.replace_all_uses_with(new)
        replaced[match.last] = new
    gone = {node for match in found.matches for node in match.nodes()}
    for node in reversed(list(graph.nodes)):
        # What only passed a tensor on goes with them; a value that is still wanted would be a fault of the match.
        if node in gone or (isinstance(found.values.roles.get(node), Same | Pad) and not node.users):
            graph.erase_node(node)


def _hands_on(chain: Chain, found: Found) -> bool:
    """Whether a BN may read what the chain makes: one in the graph, or whoever gets the graph's result."""
    roles = found.values.roles
    return any(
        isinstance(roles[reader], Normalise) or reader.op == "output"
        for reader in found.values.readers[chain.last]
    )


def _norm(norm: Normalise, relu: bool, given: list[Given]) -> NormSource:
    at = len(given)
    if norm.module is not None:
        given.append(str(norm.node.target))
        return NormSource(at, None, relu)
    given += norm.tensors
    return NormSource(at, norm.constants, relu)


def _conv(conv: Convolve, given: list[Given]) -> ConvSource:
    if conv.subsamples:
        return ConvSource(None, conv.constants, conv.pad)
    at = len(given)
    if conv.module is not None:
        given.append(str(conv.node.target))
        return ConvSource(at, None, conv.pad)
    given += conv.tensors
    return ConvSource(at, conv.constants, conv.pad)
