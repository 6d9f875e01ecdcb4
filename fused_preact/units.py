"""Every residual unit of the paper: activation order (Fig. 4) x shortcut (Fig. 2) x body.

:func:`make_unit` gives the unit of a description: full pre-activation with an identity, zero-padding or projection
shortcut is a ``PreActBasicBlock`` and its like, one fused call; everything else is a :class:`ResidualUnit`, whose
definition is plain PyTorch and whose BN -> ReLU -> convolution sites run fused.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calls import observed, runs_batch_norm, runs_convolution
from .functional import BatchNorm, Convolution, Statistics, conv2d_with_statistics, preact_chain
from .modules import (
    IdentityProjection,
    PreActBasicBlock,
    PreActBottleneck,
    PreActSingleBlock,
    Unit,
    activated,
)

__all__ = ["BODIES", "ORDERS", "Order", "ResidualUnit", "Shortcut", "ShortcutDropout", "make_unit"]


class Order(NamedTuple):
    """A column of Fig. 4: the operations of one weight layer, and how many of the unit's last follow the addition."""

    layer: tuple[str, str, str]
    after: int

    @property
    def preactivates(self) -> bool:
        """Whether a unit begins with an activation: projections and first units then share it (appendix)."""
        return self.layer[0] != "conv"


ORDERS = {
    "original": Order(("conv", "bn", "relu"), after=1),  # (a)
    "bn_after_addition": Order(("conv", "bn", "relu"), after=2),  # (b)
    "relu_before_addition": Order(("conv", "bn", "relu"), after=0),  # (c)
    "relu_only_preact": Order(("relu", "conv", "bn"), after=0),  # (d)
    "preact": Order(("bn", "relu", "conv"), after=0),  # (e)
}
BODIES = {"single": (3,), "basic": (3, 3), "bottleneck": (1, 3, 1)}
"""The kernels of a unit's convolutions."""

_PREACT = {"single": PreActSingleBlock, "basic": PreActBasicBlock, "bottleneck": PreActBottleneck}

# Of each kind the numbers that may follow it, by name and default.
_KINDS: dict[str, dict[str, float]] = {
    "A": {},
    "B": {},
    "scaling": {"on_shortcut": 0.5, "on_branch": 1.0},
    "exclusive_gating": {"gate_bias": -6.0},
    "shortcut_gating": {"gate_bias": -6.0},
    "conv": {},
    "dropout": {"p": 0.5},
}


class Shortcut(NamedTuple):
    """What the shortcuts of a network do (Fig. 2), written as ``kind`` or ``kind:number[:number]``.

    - ``A``, ``B``: identity; where the size changes zero padding (A) or a 1x1 projection (B);
    - ``scaling[:on_shortcut[:on_branch]]``: y = on_shortcut x + on_branch F(x); 0.5 and 1 where not given;
    - ``exclusive_gating[:gate_bias]``: y = (1 - g) x + g F(x), g = sigmoid(W_g x + b_g), W_g a 1x1 convolution with
      as many output channels as F and the initial bias b_g (-6 where not given);
    - ``shortcut_gating[:gate_bias]``: y = (1 - g) x + F(x);
    - ``conv``: a 1x1 convolution in every unit (option C);
    - ``dropout[:p]``: :class:`ShortcutDropout` of x (p = 0.5 where not given).
    """

    kind: str
    option: str
    """ "A" or "B": what scaling, gating and dropout are applied to where the size changes."""
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str, option: str) -> Shortcut:
        """The shortcut that ``text`` names; ``option`` is that of kinds without one. ValueError for anything else."""
        kind, *given = text.split(":")
        problem = f"shortcut: got {text!r}, allowed are {cls.allowed()}"
        if kind not in _KINDS or len(given) > len(_KINDS[kind]):
            raise ValueError(problem)
        values = list(_KINDS[kind].values())
        try:
            values[: len(given)] = map(float, given)
        except ValueError:
            raise ValueError(problem) from None
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{problem}; the numbers finite")
        if kind == "dropout" and not 0 <= values[0] < 1:
            raise ValueError(f"{problem}; p at least 0 and below 1")
        return cls(kind, kind if kind in ("A", "B") else option, tuple(values))

    @staticmethod
    def allowed() -> str:
        """The kinds with their numbers, as :meth:`parse` takes them."""
        return ", ".join(
            f"'{kind}{''.join(f'[:{name}' for name in names)}{']' * len(names)}'"
            for kind, names in _KINDS.items()
        )

    @property
    def gated(self) -> bool:
        """Whether it has a gate."""
        return self.kind.endswith("_gating")


class ShortcutDropout(nn.Module):
    """Dropout as the paper means it, not inverted: x mask in training, (1 - p) x in evaluation.

    So the expected scale of the shortcut is 1 - p in both; ``nn.Dropout`` would keep it at 1. As there, the mask that
    a seed gives depends on the memory format: a fused network (channels_last) may draw another than a plain one.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training) * (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Projection(nn.Sequential):
    """A 1x1 convolution and the BN right after it."""

    def forward(self, input: Tensor) -> Tensor:
        conv, norm = self
        return activated(norm, conv(input), relu=False)


def check(name: str, value: Any, allowed: dict[str, Any]) -> None:
    """ValueError unless ``value`` is a key of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, allowed are {', '.join(allowed)}")


def default_option(body: str) -> str:
    """The paper's on CIFAR: zero padding for units of 3x3 convolutions, projections for bottlenecks."""
    return "B" if body == "bottleneck" else "A"


Part = str | tuple[tuple[str, str], ...]
"""One operation of a unit, or a row of (bn, conv) sites."""


class ResidualUnit(Unit):
    """A residual unit of any order, shortcut and body: f(h(x) + F(x)). [N,in,H,W] -> [N,out,H/stride,W/stride].

    Children: ``conv1``, ``bn1``, ... in every order; ``shortcut`` where the size changes (a projection with a BN
    behind it, but for full pre-activation); ``gate``, ``dropout``. Where the order begins with an activation a
    projection or padding reads it, not raw ``x``, and so does every shortcut with ``first=True``: the first unit of a
    network activates before it splits (He et al. 2016, appendix). The gate reads what the shortcut reads.

    ``shortcut`` is a :class:`Shortcut` or its text. The stride of a bottleneck is on its 3x3, or with
    ``stride_on_1x1`` on the first 1x1. BN -> ReLU -> convolution runs fused wherever it stands in the unit, the
    addition too if a convolution comes right before it. Raises ValueError for unknown words and sizes.
    """

    before: tuple[str, ...]
    """The operations whose result both the shortcut and F read."""
    parts: tuple[Part, ...]
    """The operations of F, those of its sites taken together."""
    after: tuple[str, ...]
    """Those after the addition: f."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        order: str = "original",
        shortcut: str | Shortcut = "A",
        body: str = "basic",
        first: bool = False,
        stride_on_1x1: bool = False,
        fused: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check("order", order, ORDERS)
        check("body", body, BODIES)
        if isinstance(shortcut, str):
            shortcut = Shortcut.parse(shortcut, default_option(body))
        if body == "bottleneck" and out_channels % 4:
            raise ValueError(
                f"out_channels: got {out_channels}, allowed are multiples of 4 with a bottleneck"
            )
        factory = {"device": device, "dtype": dtype}
        self.order, self.kind, self.body, self.fused = order, shortcut, body, fused
        layer, after = ORDERS[order]
        kernels = BODIES[body]
        width = out_channels // 4 if body == "bottleneck" else out_channels
        strided = 1 if body == "bottleneck" and not stride_on_1x1 else 0
        channels = in_channels
        for i, kernel in enumerate(kernels):
            out = out_channels if i + 1 == len(kernels) else width
            conv = nn.Conv2d(
                channels, out, kernel, stride if i == strided else 1, kernel // 2, bias=False, **factory
            )
            norm = nn.BatchNorm2d(channels if layer[0] == "bn" else out, **factory)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", norm)
            channels = out

        self.shortcut = self._projection(in_channels, out_channels, stride, factory)
        self.gate: nn.Conv2d | None = None
        self.dropout: ShortcutDropout | None = None
        if shortcut.gated:
            self.gate = nn.Conv2d(in_channels, out_channels, 1, stride, **factory)
            nn.init.constant_(self.gate.bias, shortcut.values[0])  # type: ignore[arg-type]
        elif shortcut.kind == "dropout":
            self.dropout = ShortcutDropout(shortcut.values[0])

        steps = [op if op == "relu" else f"{op}{i + 1}" for i in range(len(kernels)) for op in layer]
        self.after = tuple(steps[len(steps) - after :])
        steps = steps[: len(steps) - after]
        shares = ORDERS[order].preactivates and (self.shortcut is not None or first)
        begin = steps.index("conv1") if shares else 0
        self.before = tuple(steps[:begin])
        self.parts = _sites_in_rows(steps[begin:])

    def _projection(
        self, in_channels: int, out_channels: int, stride: int, factory: dict[str, Any]
    ) -> nn.Module | None:
        option = "B" if self.kind.kind == "conv" else self.kind.option
        if stride == 1 and in_channels == out_channels and self.kind.kind != "conv":
            return None
        if option == "A":
            return IdentityProjection(in_channels, out_channels, stride, **factory)
        conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False, **factory)
        return conv if self.order == "preact" else Projection(conv, nn.BatchNorm2d(out_channels, **factory))

    @property
    def adds_in_epilogue(self) -> bool:
        """Whether the addition comes right behind a convolution whose output nothing else changes."""
        scaled = self.kind.kind == "exclusive_gating" or self.on_branch != 1
        return not isinstance(self.parts[-1], str) and not scaled

    @property
    def on_branch(self) -> float:
        """The constant that F is multiplied with."""
        return self.kind.values[1] if self.kind.kind == "scaling" else 1.0

    def forward_with_statistics(
        self, input: Tensor, statistics: Statistics | None, return_statistics: bool = True
    ) -> tuple[Tensor, Statistics | None]:
        """As in :class:`Unit`: taken and handed on where the unit begins and ends with a fused site."""
        fused = self.fused and not observed(input)
        x = self.run(self.before, input)
        h, g = self.shortcut_of(x)
        f, made, added = x, None, False
        handed = None if self.before else statistics  # of f
        for i, part in enumerate(self.parts):
            if isinstance(part, str):
                conv = getattr(self, part) if self._makes_statistics(i) else None
                if fused and conv is not None and runs_convolution(conv):
                    f, handed = conv2d_with_statistics(f, Convolution.of(conv))
                else:
                    f, handed = self.run((part,), f), None
                continue
            sites = [(getattr(self, bn), getattr(self, conv)) for bn, conv in part]
            if not fused or not all(runs_batch_norm(bn) and runs_convolution(conv) for bn, conv in sites):
                for bn, conv in sites:
                    f = conv(activated(bn, f))
                handed = None
                continue
            added = i + 1 == len(self.parts) and self.adds_in_epilogue
            f, made = preact_chain(
                f,
                [(BatchNorm.of(bn), Convolution.of(conv)) for bn, conv in sites],
                h if added else None,
                statistics=handed,
                return_statistics=added and return_statistics and not self.after,
            )
            handed = None
        if not added:
            if g is not None and self.kind.kind == "exclusive_gating":
                f = g * f
            elif self.on_branch != 1:
                f = self.on_branch * f
            f = h + f
        return self.run(self.after, f), made

    def _makes_statistics(self, i: int) -> bool:
        """Whether part ``i`` is a convolution whose epilogue has the statistics that the site behind it asks for."""
        following = self.parts[i + 1] if i + 1 < len(self.parts) else ""
        if isinstance(following, str) or not str(self.parts[i]).startswith("conv"):
            return False
        norm = getattr(self, following[0][0])
        return runs_batch_norm(norm) and BatchNorm.of(norm).batch_stats

    def shortcut_of(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """h(x), and the gate where there is one."""
        h = x if self.shortcut is None else self.shortcut(x)
        if self.gate is not None:
            g = torch.sigmoid(self.gate(x))
            return (1 - g) * h, g
        if self.dropout is not None:
            h = self.dropout(h)
        elif self.kind.kind == "scaling":
            h = self.kind.values[0] * h
        return h, None

    def run(self, steps: tuple[str, ...], x: Tensor) -> Tensor:
        """Operations by name, one by one. The ReLU is never in place: the shortcut may need what it reads."""
        for step in steps:
            if step == "relu":
                x = F.relu(x)
            elif step.startswith("bn"):
                x = activated(getattr(self, step), x, relu=False)
            else:
                x = getattr(self, step)(x)
        return x

    def extra_repr(self) -> str:
        values = "".join(f":{v:g}" for v in self.kind.values)
        return f"order={self.order}, shortcut={self.kind.kind}{values}, body={self.body}"


def _sites_in_rows(steps: list[str]) -> tuple[Part, ...]:
    """``steps`` with each bn, relu, conv made a site, and sites behind one another one part."""
    parts: list[Part] = []
    while steps:
        bn, *others = steps[:3]
        if bn.startswith("bn") and len(others) == 2 and others[1].startswith("conv"):
            row = parts.pop() if parts and not isinstance(parts[-1], str) else ()
            assert not isinstance(row, str)
            parts.append((*row, (bn, others[1])))
            steps = steps[3:]
        else:
            parts.append(bn)
            steps = steps[1:]
    return tuple(parts)


def make_unit(
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    *,
    order: str = "preact",
    shortcut: str | Shortcut = "A",
    body: str = "basic",
    first: bool = False,
    stride_on_1x1: bool = False,
    fused: bool = True,
    device: Any = None,
    dtype: Any = None,
) -> Unit:
    """The unit of a description; arguments and errors as in :class:`ResidualUnit`."""
    check("body", body, BODIES)
    if isinstance(shortcut, str):
        shortcut = Shortcut.parse(shortcut, default_option(body))
    common: dict[str, Any] = {"fused": fused, "device": device, "dtype": dtype}
    if body == "bottleneck":
        common["stride_on_1x1"] = stride_on_1x1
    if order == "preact" and shortcut.kind in ("A", "B", "conv"):
        kind: str | None = None
        if shortcut.kind == "conv":
            kind = "B"
        elif stride != 1 or in_channels != out_channels:
            kind = shortcut.option
        elif first:
            kind = "A"
        return _PREACT[body](in_channels, out_channels, stride, shortcut=kind, **common)
    return ResidualUnit(
        in_channels, out_channels, stride, order=order, shortcut=shortcut, body=body, first=first, **common
    )
