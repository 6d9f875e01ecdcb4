"""The network that all families share: stem, stages of units, head, classifier; and how one is put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..calls import observed, runs_batch_norm
from ..functional import BatchNorm, Statistics, bn_relu_avg_pool2d, to_native_format
from ..modules import PreActSequential, Stem, activated, call_with_statistics
from ..units import BODIES, ORDERS, Shortcut, check, default_option, make_unit

__all__ = ["PreActResNet", "ResNet", "Variant", "build"]


class ResNet(nn.Module):
    """A residual network: [N,in_channels,H,W] -> [N,num_classes].

    ``stem``, the stages' units, global average pooling, the classifier (``fc``). Before the pooling comes what the
    last unit's order asks for (He et al. 2016, appendix): with ``head`` "none" nothing, "relu" a ReLU, "bn_relu" BN
    (child ``bn``) and ReLU, which run in one operation with the pooling.

    Initialisation: convolutions N(0, 2 / (R S K)) (fan-out, as the paper's code), BN 1 and 0, classifier as
    ``nn.Linear`` with zero bias.
    """

    bn: nn.BatchNorm2d | None

    def __init__(
        self,
        stem: nn.Sequential,
        stages: Sequence[PreActSequential],
        num_features: int,
        num_classes: int,
        fused: bool,
        head: str = "none",
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: got {num_classes}, allowed are 1 or more")
        self.stem = stem
        self.stages = PreActSequential(*stages)
        self.bn = nn.BatchNorm2d(num_features) if head == "bn_relu" else None
        self.fc = nn.Linear(num_features, num_classes)
        self.head, self.fused = head, fused
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and not observed(x):
            x = to_native_format(x)
        wanted = self.training and self.bn is not None
        return self.classify(*call_with_statistics(self.stages, self.stem(x), None, wanted))

    def classify(self, x: Tensor, statistics: Statistics | None = None) -> Tensor:
        """The logits of the last unit's output, whose statistics may come with it."""
        if self.bn is None:
            features = (F.relu(x) if self.head == "relu" else x).mean((2, 3))
        elif self.fused and not observed(x) and runs_batch_norm(self.bn):
            features = bn_relu_avg_pool2d(x, BatchNorm.of(self.bn), statistics)
        else:
            features = activated(self.bn, x).mean((2, 3))
        return self.fc(features)


class PreActResNet(ResNet):
    """A full pre-activation network (He et al. 2016).

    ``stem`` is a convolution, on ImageNet followed by max-pooling, without BN: the first unit's BN-ReLU is the
    activation right after it, shared by both of that unit's paths. The head is BN -> ReLU -> global average pool.
    """

    bn: nn.BatchNorm2d

    def __init__(
        self,
        stem: nn.Sequential,
        stages: Sequence[PreActSequential],
        num_features: int,
        num_classes: int,
        fused: bool,
    ) -> None:
        super().__init__(stem, stages, num_features, num_classes, fused, "bn_relu")


class Variant(NamedTuple):
    """What the units of a network are: see :data:`units.ORDERS`, :class:`units.Shortcut` and :data:`units.BODIES`."""

    order: str
    shortcut: Shortcut
    body: str
    stride_on_1x1: bool

    @classmethod
    def of(
        cls, order: str, shortcut: str | None, body: str, stride_on_1x1: bool, option: str = ""
    ) -> Variant:
        """With the words checked; ``option`` is "A" or "B" where the family has one of its own."""
        check("order", order, ORDERS)
        check("body", body, BODIES)
        option = option or default_option(body)
        return cls(order, Shortcut.parse(shortcut or option, option), body, stride_on_1x1)


def build(
    stem: tuple[int, int, int, int],
    pool: bool,
    widths: Sequence[int],
    units: Sequence[int],
    variant: Variant,
    num_classes: int,
    fused: bool,
) -> ResNet:
    """A network of ``units[i]`` units of ``widths[i]`` channels (times 4 for bottlenecks) in stage i.

    All stages but the first halve the size. ``stem``: input and output channels, kernel and stride of its
    convolution; ``pool``: max-pooling 3x3 / 2 behind it. Without full pre-activation the stem has a BN and a ReLU,
    before the pooling. With "relu_only_preact" they are the activation "right after conv1 and before splitting".
    """
    stages = []
    in_channels, channels, kernel, stem_stride = stem
    for index, (width, count) in enumerate(zip(widths, units, strict=True)):
        out = width * 4 if variant.body == "bottleneck" else width
        stage = []
        for i in range(count):
            unit = make_unit(
                channels,
                out,
                2 if index and not i else 1,
                order=variant.order,
                shortcut=variant.shortcut,
                body=variant.body,
                first=not index and not i,
                stride_on_1x1=variant.stride_on_1x1,
                fused=fused,
            )
            stage.append(unit)
            channels = out
        stages.append(PreActSequential(*stage))
    begin: list[nn.Module] = [nn.Conv2d(in_channels, stem[1], kernel, stem_stride, kernel // 2, bias=False)]
    if variant.order != "preact":
        begin += [nn.BatchNorm2d(stem[1]), nn.ReLU()]
    if pool:
        begin.append(nn.MaxPool2d(3, stride=2, padding=1))
    if variant.order == "preact":
        return PreActResNet(Stem(*begin), stages, channels, num_classes, fused)
    head = "relu" if ORDERS[variant.order].preactivates else "none"
    return ResNet(Stem(*begin), stages, channels, num_classes, fused, head)
