"""``torch.compile(model, backend="fused_preact")``: the matcher on the graph of Dynamo, before autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from .match import match
from .rewrite import rewrite

__all__ = ["backend"]


def backend(
    graph: fx.GraphModule,
    example_inputs: list[Tensor],
    *,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Callable[..., Any]:
    """Compile ``graph`` with its sites, units and head fused; the backend of the same name for ``torch.compile``.

    The rest is compiled by Inductor; ``options={"then": NAME}`` names another backend ("eager", "aot_eager", ...),
    and what else ``options`` and ``mode`` say goes to it. It needs no :func:`fuse`, and works on functional code too.
    Raises ValueError, from ``torch.compile``'s first call, for a backend that PyTorch does not know.
    """
    options = dict(options or {})
    then = options.pop("then", "inductor")
    known = torch.compiler.list_backends(exclude_tags=None)
    if then not in known or then == "fused_preact":
        raise ValueError(
            f"options['then']: got {then!r}, allowed are {', '.join(n for n in known if n != 'fused_preact')}"
        )
    rewrite(graph.graph, match(graph.graph, graph.get_submodule))
    graph.recompile()
    if options:
        kwargs["options"] = options
    compiler = torch._dynamo.lookup_backend(then)
    return compiler(graph, example_inputs, **kwargs)
