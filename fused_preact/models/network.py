"""The network both families share: stem, stages of units, BN-ReLU-pool head, classifier."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..calls import observed, runs_batch_norm
from ..functional import BatchNorm, bn_relu_avg_pool2d, to_native_format
from ..modules import PreActBasicBlock, PreActBottleneck, PreActSequential, activated, call_with_statistics

__all__ = ["PreActResNet"]


class PreActResNet(nn.Module):
    """A pre-activation residual network (He et al. 2016): [N,in_channels,H,W] -> [N,num_classes].

    ``stem`` is a convolution, on ImageNet followed by max-pooling, without BN: the first unit's BN-ReLU is the
    activation right after it, shared by both of that unit's paths. The stages' units follow, then
    BN -> ReLU -> global average pool (``bn``) and the classifier (``fc``).

    Initialisation: convolutions N(0, 2 / (R S K)) (fan-out, as the paper's code), BN 1 and 0, classifier as
    ``nn.Linear`` with zero bias.
    """

    def __init__(
        self,
        stem: nn.Sequential,
        stages: list[PreActSequential],
        num_features: int,
        num_classes: int,
        fused: bool,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: got {num_classes}, allowed are 1 or more")
        self.stem = stem
        self.stages = PreActSequential(*stages)
        self.bn = nn.BatchNorm2d(num_features)
        self.fc = nn.Linear(num_features, num_classes)
        self.fused = fused
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and not observed(x):
            x = to_native_format(x)
        x, statistics = call_with_statistics(self.stages, self.stem(x), None, self.training)
        if self.fused and not observed(x) and runs_batch_norm(self.bn):
            features = bn_relu_avg_pool2d(x, BatchNorm.of(self.bn), statistics)
        else:
            features = activated(self.bn, x).mean((2, 3))
        return self.fc(features)


def make_stage(
    unit: type[PreActBasicBlock] | type[PreActBottleneck],
    in_channels: int,
    out_channels: int,
    units: int,
    stride: int,
    first_shortcut: str | None,
    **kwargs: Any,
) -> PreActSequential:
    """A stage: the first unit changes the shape, the others keep it and have identity shortcuts."""
    first = unit(in_channels, out_channels, stride, shortcut=first_shortcut, **kwargs)
    rest = [unit(out_channels, out_channels, **kwargs) for _ in range(units - 1)]
    return PreActSequential(first, *rest)
