"""More PyTorch code bases of pre-activation networks: pytorchcv, weiaicunzai, bearpaw, hysts and the WideResNets.

Written from the facts that are known of each structure, not from its code; see ``definitions_base.Definition``.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from definitions_base import chain, conv1x1, conv3x3, define, norm_relu
from torch import Tensor, nn

# --- pytorchcv: a unit's first layer returns the activated tensor too; double norm after the stem (S1) --------------


class PreConvBlock(nn.Module):
    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1, both: bool = False) -> None:
        super().__init__()
        self.return_preact = both
        self.bn = nn.BatchNorm2d(channels)
        self.activ = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.activ(self.bn(x))
        if self.return_preact:
            x_pre_activ = x
        x = self.conv(x)
        return (x, x_pre_activ) if self.return_preact else x


class PytorchcvBody(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, conv1_stride: bool) -> None:
        super().__init__()
        inner = width // 4
        self.conv1 = PreConvBlock(channels, inner, 1, stride if conv1_stride else 1, both=True)
        self.conv2 = PreConvBlock(inner, inner, 3, 1 if conv1_stride else stride)
        self.conv3 = PreConvBlock(inner, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, x_pre_activ = self.conv1(x)
        x = self.conv2(x)
        return self.conv3(x), x_pre_activ


class PytorchcvUnit(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, conv1_stride: bool = True) -> None:
        super().__init__()
        self.resize_identity = channels != width or stride != 1
        self.body = PytorchcvBody(channels, width, stride, conv1_stride)
        if self.resize_identity:
            self.identity_conv = conv1x1(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        x, x_pre_activ = self.body(x)
        if self.resize_identity:
            identity = self.identity_conv(x_pre_activ)
        x = x + identity
        return x


class PytorchcvNet(nn.Module):
    def __init__(self, width: int = 16, units: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential()
        stem = [nn.Conv2d(3, 8, 7, 2, 3, bias=False), *norm_relu(8), nn.MaxPool2d(3, 2, 1)]
        self.features.add_module("init_block", nn.Sequential(*stem))
        wide = 2 * width
        for number, (channels, out, stride) in enumerate(((8, width, 1), (width, wide, 2)), 1):
            stage = nn.Sequential()
            stage.add_module("unit1", PytorchcvUnit(channels, out, stride, conv1_stride=number == 1))
            for following in range(2, units + 1):
                stage.add_module(f"unit{following}", PytorchcvUnit(out, out, 1))
            self.features.add_module(f"stage{number}", stage)
        self.features.add_module(
            "post_activ", nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(wide), activ=nn.ReLU()))
        )
        self.features.add_module("final_pool", nn.AvgPool2d(2, 1))
        self.output = nn.Linear(wide, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x.view(x.size(0), -1)
        return self.output(x)


# 4 units of 3, 2 projections; the stem's norm stands before a pool
@define(sites=14, additions=4, heads=1, large=lambda: PytorchcvNet(32, 6))
def pytorchcv_preresnet50() -> nn.Module:
    return PytorchcvNet()


# --- weiaicunzai: everything in one Sequential, biases, an empty Sequential as identity (S2); no final norm ---------


class WeiaicunzaiBottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        inner = width // 4
        self.residual = nn.Sequential(
            *norm_relu(channels),
            nn.Conv2d(channels, inner, 1, stride),
            *norm_relu(inner),
            nn.Conv2d(inner, inner, 3, padding=1),
            *norm_relu(inner),
            nn.Conv2d(inner, width, 1),
        )
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut = nn.Conv2d(channels, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        res = self.residual(x)
        shortcut = self.shortcut(x)
        return res + shortcut


# 4 units of 3; the projection of the first reads the stem's BN-ReLU, which a second norm reads as well
@define(sites=13, additions=4)
def weiaicunzai_50() -> nn.Module:
    pre = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *norm_relu(8))
    stages = [
        nn.Sequential(*chain(WeiaicunzaiBottleneck, [(16, 1), (16, 1)], 8)),
        nn.Sequential(*chain(WeiaicunzaiBottleneck, [(32, 2), (32, 1)], 16)),
    ]
    return nn.Sequential(pre, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))


# --- bearpaw: one ReLU module for everything; ``downsample`` of the raw tensor (S2) --------------------------------


class BearpawBottleneck(nn.Module):
    def __init__(
        self, channels: int, inner: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv1x1(channels, inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride)
        self.bn3 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, inner * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        residual = x

        out = self.bn1(x)
        out = self.relu(out)
        out = self.conv1(out)

        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv2(out)

        out = self.bn3(out)
        out = self.relu(out)
        out = self.conv3(out)

        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return out


class BearpawNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 8)
        first = BearpawBottleneck(8, 4, 1, nn.Sequential(conv1x1(8, 16)))
        self.layer1 = nn.Sequential(first, BearpawBottleneck(16, 4))
        first = BearpawBottleneck(16, 8, 2, nn.Sequential(conv1x1(16, 32, 2)))
        self.layer2 = nn.Sequential(first, BearpawBottleneck(32, 8))
        self.bn = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(8)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.conv1(x)))
        x = self.avgpool(self.relu(self.bn(x)))
        x = x.view(x.size(0), -1)
        return self.fc(x)


@define(sites=12, additions=4, heads=1)  # 4 units of 3; projections read a convolution or a sum
def bearpaw_preresnet() -> nn.Module:
    return BearpawNet()


# --- hysts: flags for the first ReLU, for a norm at the end and, a stage at a time, for S3 against S2 ---------------


class HystsBasic(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, flags: tuple[bool, bool, bool]) -> None:
        super().__init__()
        self._remove_first_relu, self._add_last_bn, self._preact = flags
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv3x3(channels, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        if self._add_last_bn:
            self.bn3 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if channels != width:
            self.shortcut.add_module("conv", conv1x1(channels, width, stride))

    def forward(self, x: Tensor) -> Tensor:
        if self._preact:
            x = self.bn1(x)
            if not self._remove_first_relu:
                x = F.relu(x, inplace=True)
            y = self.conv1(x)
        else:
            y = self.bn1(x)
            if not self._remove_first_relu:
                y = F.relu(y, inplace=True)
            y = self.conv1(y)
        y = self.conv2(F.relu(self.bn2(y), inplace=True))
        if self._add_last_bn:
            y = self.bn3(y)
        y += self.shortcut(x)
        return y


class HystsNet(nn.Module):
    def __init__(
        self, remove_first_relu: bool, add_last_bn: bool, preact: tuple[bool, ...], units: int = 2
    ) -> None:
        super().__init__()
        self.conv = conv3x3(3, 8)
        channels = 8
        for number, (width, stride) in enumerate(((8, 1), (16, 2), (32, 2))):
            flags = (remove_first_relu, add_last_bn, preact[number])
            stage = nn.Sequential()
            stage.add_module("block1", HystsBasic(channels, width, stride, flags))
            for following in range(2, units + 1):
                stage.add_module(f"block{following}", HystsBasic(width, width, 1, (*flags[:2], False)))
            self.add_module(f"stage{number + 1}", stage)
            channels = width
        self.bn = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.conv(x))))
        x = F.relu(self.bn(x), inplace=True)
        x = F.adaptive_avg_pool2d(x, output_size=1)
        return self.fc(x.view(x.size(0), -1))


# 6 units of 2, and the projection of the second stage, which takes the activated tensor; the third's is raw
@define(sites=13, additions=6, heads=1)
def hysts_preact() -> nn.Module:
    return HystsNet(False, False, (True, True, False))


# The same 13, of which the first of each unit (and the projection) has no ReLU; a norm stands between the last
# convolution and the sum, so the only host is the projection
@define(
    sites=13,
    additions=1,
    heads=1,
    breaks=("norm before the addition",),
    large=lambda: HystsNet(True, True, (True, True, False), 6),
)
def hysts_flags() -> nn.Module:
    return HystsNet(True, True, (True, True, False))


# --- WideResNet: branches by ``equalInOut``; dropout before conv2 or, in older copies, before bn2 -------------------


class WideBasic(nn.Module):
    """HEAD: dropout between the second BN-ReLU and its convolution."""

    def __init__(self, channels: int, width: int, stride: int, dropRate: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv3x3(channels, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width)
        self.droprate = dropRate
        self.equalInOut = channels == width
        self.convShortcut = ((not self.equalInOut) and conv1x1(channels, width, stride)) or None

    def forward(self, x: Tensor) -> Tensor:
        if not self.equalInOut:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.equalInOut else x)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, training=self.training)
        out = self.conv2(out)
        return torch.add(x if self.equalInOut else self.convShortcut(x), out)


class WideOlder(WideBasic):
    """Older copies: dropout in front of the second norm, where no site minds."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.equalInOut:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.conv1(out if self.equalInOut else x)
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, training=self.training)
        out = self.conv2(self.relu2(self.bn2(out)))
        return torch.add(x if self.equalInOut else self.convShortcut(x), out)


class WideAndOr(WideBasic):
    """The oldest: ``and`` and ``or`` on tensors. Where ``equalInOut`` holds, a tensor is asked for its truth.

    PyTorch refuses that of more than one element, traced or not, so only units that change the width run at all (and
    the sum of the oldest copies, which asks for the truth of a projection, runs nowhere: it is turned round here).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.equalInOut:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.conv1((self.equalInOut and out) or x)
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, training=self.training)
        out = self.conv2(self.relu2(self.bn2(out)))
        return torch.add((self.equalInOut and x) or self.convShortcut(x), out)


class WideNetworkBlock(nn.Module):
    def __init__(
        self, unit: type[WideBasic], count: int, channels: int, width: int, stride: int, p: float
    ) -> None:
        super().__init__()
        units = [unit(channels if i == 0 else width, width, stride if i == 0 else 1, p) for i in range(count)]
        self.layer = nn.Sequential(*units)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(self, unit: type[WideBasic], count: int = 2, dropRate: float = 0.0) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 8)
        self.block1 = WideNetworkBlock(unit, count, 8, 16, 1, dropRate)
        self.block2 = WideNetworkBlock(unit, count, 16, 24, 2, dropRate)
        self.block3 = WideNetworkBlock(unit, count, 24, 32, 2, dropRate)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(32, 5)
        self.nChannels = 32

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.block3(self.block2(self.block1(out)))
        out = self.relu(self.bn1(out))
        out = F.avg_pool2d(out, 4)
        return self.fc(out.view(-1, self.nChannels))


@define(sites=15, additions=6, heads=1)  # 6 units of 2, 3 projections
def wide_resnet() -> nn.Module:
    return WideResNet(WideBasic)


# In training the second convolution of each unit reads a dropout, and its sum keeps only a projection as host
@define(sites=9, additions=3, heads=1, eval_sites=15, eval_additions=6, breaks=("dropout",))
def wide_resnet_dropout() -> nn.Module:
    return WideResNet(WideBasic, dropRate=0.3)


@define(sites=15, additions=6, heads=1)  # this dropout stands before a norm and breaks nothing
def wide_resnet_older() -> nn.Module:
    return WideResNet(WideOlder, dropRate=0.3)


@define(
    sites=9, additions=3, heads=1
)  # 3 units of 2, 3 projections: one unit a stage, the only form that runs
def wide_resnet_and_or() -> nn.Module:
    return WideResNet(WideAndOr, count=1)
