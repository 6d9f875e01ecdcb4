"""Pre-activation residual networks of timm, of the CIFAR repositories and of Torch7, tiny and complete.

Written from the facts that are known of each structure, not from its code; see ``definitions_base.Definition``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from definitions_base import BatchNormAct2d, chain, conv1x1, conv3x3, define, norm_relu
from torch import Tensor, nn

# --- timm: norm and activation are one module; S1; stem without a norm; 1x1 convolution as classifier -------------


class TimmShortcut(nn.Module):
    """Projection of the activated tensor; in the ``d`` networks the average pool takes the stride."""

    def __init__(self, channels: int, width: int, stride: int, pooled: bool) -> None:
        super().__init__()
        self.pool: nn.Module = nn.Identity()
        if pooled and stride > 1:
            self.pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
            stride = 1
        self.conv = conv1x1(channels, width, stride)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.pool(x)))


class TimmBottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, project: bool, pooled: bool = False) -> None:
        super().__init__()
        inner = width // 4
        self.downsample = TimmShortcut(channels, width, stride, pooled) if project else None
        self.norm1 = BatchNormAct2d(channels)
        self.conv1 = conv1x1(channels, inner)
        self.norm2 = BatchNormAct2d(inner)
        self.conv2 = conv3x3(inner, inner, stride)
        self.norm3 = BatchNormAct2d(inner)
        self.conv3 = conv1x1(inner, width)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        active = self.norm1(x)
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(active)
        x = self.conv1(active)
        x = self.conv2(self.norm2(x))
        x = self.conv3(self.norm3(x))
        x = self.drop_path(x)
        return x + shortcut


class TimmBasic(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, project: bool, pooled: bool = False) -> None:
        super().__init__()
        self.downsample = None
        if stride != 1 or channels != width:  # unlike the bottleneck: never for the sake of being first
            self.downsample = TimmShortcut(channels, width, stride, pooled)
        self.norm1 = BatchNormAct2d(channels)
        self.conv1 = conv3x3(channels, width, stride)
        self.norm2 = BatchNormAct2d(width)
        self.conv2 = conv3x3(width, width)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        active = self.norm1(x)
        shortcut = self.downsample(active) if self.downsample is not None else x
        x = self.conv1(active)
        x = self.conv2(self.norm2(x))
        x = self.drop_path(x)
        return x + shortcut


class TimmStage(nn.Module):
    def __init__(
        self, unit: type[nn.Module], channels: int, width: int, stride: int, pooled: bool, units: int
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential()
        self.blocks.add_module("0", unit(channels, width, stride, True, pooled))
        for number in range(1, units):
            self.blocks.add_module(str(number), unit(width, width, 1, False, pooled))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class TimmHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.0)
        self.fc = nn.Conv2d(width, 5, 1)
        self.flatten = nn.Flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.flatten(self.fc(self.drop(self.global_pool(x))))


class TimmNet(nn.Module):
    def __init__(
        self,
        unit: type[nn.Module],
        deep_stem: bool = False,
        pooled: bool = False,
        widths: tuple[int, int] = (16, 24),
        units: int = 2,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        if deep_stem:
            self.stem.add_module("conv1", conv3x3(3, 4))
            self.stem.add_module("norm1", BatchNormAct2d(4))
            self.stem.add_module("conv2", conv3x3(4, 4))
            self.stem.add_module("norm2", BatchNormAct2d(4))
            self.stem.add_module("conv3", conv3x3(4, 8))
        else:
            self.stem.add_module("conv", nn.Conv2d(3, 8, 7, 2, 3, bias=False))
        self.stem.add_module("pool", nn.MaxPool2d(3, 2, 1))
        first, second = widths
        self.stages = nn.Sequential(
            TimmStage(unit, 8, first, 1, pooled, units), TimmStage(unit, first, second, 2, pooled, units)
        )
        self.norm = BatchNormAct2d(second)
        self.head = TimmHead(second)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.stages(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


# 4 units of 3, and the projections of both first units
@define(sites=14, additions=4, heads=1, large=lambda: TimmNet(TimmBottleneck, widths=(32, 64), units=4))
def timm_resnetv2_50() -> nn.Module:
    return TimmNet(TimmBottleneck)


# 2 in the stem, 4 units of 2, one projection; that of the second stage reads a pool instead
@define(
    sites=11,
    additions=4,
    heads=1,
    breaks=("average pool before the projection",),
    large=lambda: TimmNet(TimmBasic, deep_stem=True, pooled=True, widths=(32, 64), units=4),
)
def timm_resnetv2_18d() -> nn.Module:
    return TimmNet(TimmBasic, deep_stem=True, pooled=True)


# --- kuangliu: the attribute ``shortcut`` exists in some units only; S1; no final norm -----------------------------


class KuangliuBasic(nn.Module):
    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv3x3(channels, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(conv1x1(channels, width, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class KuangliuBottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        inner = width // 4
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv1x1(channels, inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride)
        self.bn3 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, width)
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(conv1x1(channels, width, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(F.relu(self.bn3(out)))
        out += shortcut
        return out


class KuangliuNet(nn.Module):
    def __init__(self, unit: type[nn.Module], width: int = 8, units: int = 2) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 8)
        self.layer1 = nn.Sequential(*chain(unit, [(width, 1)] * units, 8))
        self.layer2 = nn.Sequential(*chain(unit, [(2 * width, 2), *[(2 * width, 1)] * (units - 1)], width))
        self.layer3 = nn.Sequential(*chain(unit, [(3 * width, 2)], 2 * width))
        self.linear = nn.Linear(3 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, 4)
        out = out.view(out.size(0), -1)
        return self.linear(out)


@define(sites=12, additions=5)  # 5 units of 2, 2 projections; the pool reads a sum: no head
def kuangliu_18() -> nn.Module:
    return KuangliuNet(KuangliuBasic)


@define(sites=18, additions=5)  # 5 units of 3, 3 projections
def kuangliu_50() -> nn.Module:
    return KuangliuNet(KuangliuBottleneck, 16)


# --- locuslab and robustness: kuangliu's names, but the basic unit projects the raw tensor (S2); a final norm ------


class LocuslabBasic(KuangliuBasic):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(x) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class LocuslabNet(KuangliuNet):
    def __init__(self, unit: type[nn.Module], width: int = 8) -> None:
        super().__init__(unit, width)
        self.bn = nn.BatchNorm2d(3 * width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        out = F.avg_pool2d(F.relu(self.bn(out)), 4)
        return self.linear(out.view(out.size(0), -1))


@define(sites=10, additions=5, heads=1)  # 5 units of 2; the 2 projections read a sum
def locuslab_18() -> nn.Module:
    return LocuslabNet(LocuslabBasic)


@define(sites=18, additions=5, heads=1)  # as kuangliu's
def locuslab_50() -> nn.Module:
    return LocuslabNet(KuangliuBottleneck, 16)


# --- Torch7: tables of branches; option A with zero channels; both branches behind one pre-activation --------------


class ConcatTable(nn.Module):
    """The outputs of several branches as a list."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [branch(x) for branch in self.branches]


class CAddTable(nn.Module):
    """The sum of a list, into its first member where that is allowed."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, table: list[Tensor]) -> Tensor:
        total = table[0]
        for other in table[1:]:
            total = total.add_(other) if self.inplace else torch.add(total, other)
        return total


class ZeroChannels(nn.Module):
    """The input, and as many channels of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x * 0), 1)


def unit_1k_layers(channels: int, width: int, stride: int) -> nn.Module:
    """Bottleneck with the stride on the first 1x1; where the width changes, both branches share BN and ReLU."""
    inner = width // 4
    body = [conv1x1(channels, inner, stride), *norm_relu(inner), conv3x3(inner, inner)]
    body += [*norm_relu(inner), conv1x1(inner, width)]
    if channels != width:
        branches = ConcatTable(nn.Sequential(*body), conv1x1(channels, width, stride))
        return nn.Sequential(*norm_relu(channels), branches, CAddTable(inplace=True))
    branches = ConcatTable(nn.Sequential(*norm_relu(channels), *body), nn.Identity())
    return nn.Sequential(branches, CAddTable(inplace=True))


@define(sites=14, additions=4, heads=1)  # 4 units of 3, 2 projections
def kaiminghe_1k_layers() -> nn.Module:
    return nn.Sequential(
        conv3x3(3, 8),
        nn.Sequential(*chain(unit_1k_layers, [(16, 1), (16, 1)], 8)),
        nn.Sequential(*chain(unit_1k_layers, [(32, 2), (32, 1)], 16)),
        *norm_relu(32),
        nn.AvgPool2d(8, 1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def fb_shortcut(channels: int, width: int, stride: int, option: str) -> nn.Module:
    if option == "B" and channels != width:
        return nn.Sequential(conv1x1(channels, width, stride))
    if channels != width:
        return nn.Sequential(nn.AvgPool2d(1, stride), ZeroChannels())
    return nn.Identity()


def fb_unit(channels: int, width: int, stride: int, kind: str, option: str) -> nn.Module:
    """``both_preact``: even an identity takes the activated tensor. ``no_preact``: what comes is already active."""
    body = [conv3x3(channels, width, stride), *norm_relu(width), conv3x3(width, width)]
    shortcut = fb_shortcut(channels, width, stride, option)
    before = norm_relu(channels)
    if kind == "preact":
        return nn.Sequential(ConcatTable(nn.Sequential(*before, *body), shortcut), CAddTable(True))
    branches = ConcatTable(nn.Sequential(*body), shortcut)
    return nn.Sequential(*(before if kind == "both_preact" else []), branches, CAddTable(True))


@define(sites=12, additions=6, heads=1)  # 6 units of 2; shortcuts are pools and zeros
def fb_resnet_cifar() -> nn.Module:
    net = nn.Sequential(conv3x3(3, 8))
    channels = 8
    for width, stride in ((8, 1), (16, 2), (32, 2)):
        net.append(fb_unit(channels, width, stride, "both_preact", "A"))
        net.append(fb_unit(width, width, 1, "preact", "A"))
        channels = width
    return net.extend([*norm_relu(32), nn.AvgPool2d(4, 1), nn.Flatten(), nn.Linear(32, 5)])


def fb_imagenet(units: int) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), *norm_relu(8), nn.MaxPool2d(3, 2, 1))
    first, second = fb_unit(8, 8, 1, "no_preact", "B"), fb_unit(8, 16, 2, "both_preact", "B")
    net.append(nn.Sequential(first, *(fb_unit(8, 8, 1, "preact", "B") for _ in range(1, units))))
    net.append(nn.Sequential(second, *(fb_unit(16, 16, 1, "preact", "B") for _ in range(1, units))))
    return net.extend([*norm_relu(16), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 5)])


# 4 units of 2 without the first convolution, which reads the stem's pool, and a projection
@define(sites=8, additions=4, heads=1, shape=(2, 3, 32, 32), large=lambda: fb_imagenet(16))
def fb_resnet_imagenet() -> nn.Module:
    return fb_imagenet(2)
