"""Networks without residual sums (DenseNet, DPN), and structures that a matcher must leave as they are."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from definitions_base import BatchNormAct2d, Classifier, conv1x1, conv3x3, define, norm_relu
from definitions_residual import KuangliuBasic
from torch import Tensor, nn

# --- DenseNet: a concatenation in front of each norm; transitions ---------------------------------------------------


class DenseLayer(nn.Module):
    """BC: 1x1 and 3x3. Takes all features so far as a list, or the one tensor at the start."""

    def __init__(self, channels: int, growth: int, drop_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv1x1(channels, 2 * growth)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(2 * growth, growth)
        self.drop_rate = float(drop_rate)

    def forward(self, features: Tensor | list[Tensor]) -> Tensor:
        given = [features] if isinstance(features, Tensor) else features
        narrow = self.conv1(self.relu1(self.norm1(torch.cat(given, 1))))
        new = self.conv2(self.relu2(self.norm2(narrow)))
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new


class DenseBlock(nn.ModuleDict):
    def __init__(self, count: int, channels: int, growth: int, drop_rate: float) -> None:
        super().__init__()
        for i in range(count):
            self.add_module(f"denselayer{i + 1}", DenseLayer(channels + i * growth, growth, drop_rate))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = conv1x1(channels, width)
        self.pool = nn.AvgPool2d(2, 2)


class DenseNet(nn.Module):
    def __init__(self, drop_rate: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(3, 8, 7, 2, 3, bias=False),
                norm0=nn.BatchNorm2d(8),
                relu0=nn.ReLU(inplace=True),
                pool0=nn.MaxPool2d(3, 2, 1),
                denseblock1=DenseBlock(3, 8, 4, drop_rate),
                transition1=Transition(20, 10),
                denseblock2=DenseBlock(2, 10, 4, drop_rate),
                norm5=nn.BatchNorm2d(18),
            )
        )
        self.classifier = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        out = F.relu(features, inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        return self.classifier(torch.flatten(out, 1))


# 5 layers of 2 and a transition; dropout stands behind the convolutions
@define(sites=11, heads=1, residual=False, shape=(2, 3, 32, 32))
def densenet_bc() -> nn.Module:
    return DenseNet(drop_rate=0.1)


class CifarDenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv1x1(channels, 4 * growth)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = conv3x3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([out, x], 1)


class CifarTransition(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = conv1x1(channels, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class CifarDenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 8)
        self.dense1 = nn.Sequential(CifarDenseLayer(8, 4), CifarDenseLayer(12, 4))
        self.trans1 = CifarTransition(16, 8)
        self.dense2 = nn.Sequential(CifarDenseLayer(8, 4), CifarDenseLayer(12, 4))
        self.bn = nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.dense2(self.trans1(self.dense1(self.conv1(x))))
        out = F.avg_pool2d(F.relu(self.bn(out)), 8)
        return self.linear(out.view(out.size(0), -1))


@define(sites=9, heads=1, residual=False)  # 4 layers of 2, a transition
def densenet_cifar() -> nn.Module:
    return CifarDenseNet()


# --- DPN: one part of a convolution's channels is added, the other concatenated; groups -----------------------------


class BnActConv2d(nn.Module):
    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.bn = BatchNormAct2d(channels, eps=1e-3)
        self.conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(x))


class CatBnAct(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = BatchNormAct2d(channels, eps=1e-3)

    def forward(self, x: Tensor | tuple[Tensor, ...]) -> Tensor:
        if isinstance(x, tuple):
            x = torch.cat(x, dim=1)
        return self.bn(x)


class DualPathBlock(nn.Module):
    def __init__(self, channels: int, added: int, grown: int, kind: str) -> None:
        super().__init__()
        self.added = added
        self.project = None
        if kind != "normal":
            self.project = BnActConv2d(channels, added + 2 * grown, 1, 2 if kind == "down" else 1)
        self.c1x1_a = BnActConv2d(channels, 8, 1)
        self.c3x3_b = BnActConv2d(8, 8, 3, 2 if kind == "down" else 1, groups=4)
        self.c1x1_c = BnActConv2d(8, added + grown, 1)

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x_in = torch.cat(x, dim=1) if isinstance(x, tuple) else x
        if self.project is None:
            x_s1, x_s2 = x[0], x[1]
        else:
            x_s = self.project(x_in)
            x_s1, x_s2 = x_s[:, : self.added], x_s[:, self.added :]
        x_in = self.c1x1_c(self.c3x3_b(self.c1x1_a(x_in)))
        out1, out2 = x_in[:, : self.added], x_in[:, self.added :]
        return x_s1 + out1, torch.cat([x_s2, out2], dim=1)


class DPN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv1_conv=nn.Conv2d(3, 8, 3, 2, 1, bias=False),
                conv1_bn=BatchNormAct2d(8, eps=1e-3),
                conv1_pool=nn.MaxPool2d(3, 2, 1),
                conv2_1=DualPathBlock(8, 12, 4, "proj"),  # 12 and 8 + 4 channels
                conv2_2=DualPathBlock(24, 12, 4, "normal"),  # 12 and 16
                conv3_1=DualPathBlock(28, 16, 4, "down"),  # 16 and 12
                conv3_2=DualPathBlock(28, 16, 4, "normal"),  # 16 and 16
                conv5_bn_ac=CatBnAct(32),
            )
        )
        self.classifier = nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(x).flatten(1)


# 4 blocks of 3, 2 projections; the sums take slices of convolutions
@define(sites=14, heads=1, residual=False, shape=(2, 3, 32, 32), breaks=("slice before the sum",))
def dual_path() -> nn.Module:
    return DPN()


# --- to be left alone: other norms, other activations, other convolutions -------------------------------------------


class StdConv2d(nn.Conv2d):
    """Standardises its weight by a call of batch_norm whose input is no activation."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-8).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BitBottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        inner = width // 4
        self.gn1 = nn.GroupNorm(4, channels)
        self.conv1 = StdConv2d(channels, inner, 1, bias=False)
        self.gn2 = nn.GroupNorm(2, inner)
        self.conv2 = StdConv2d(inner, inner, 3, stride, 1, bias=False)
        self.gn3 = nn.GroupNorm(2, inner)
        self.conv3 = StdConv2d(inner, width, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = StdConv2d(channels, width, 1, stride, bias=False) if channels != width else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.gn1(x))
        residual = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.relu(self.gn2(out)))
        out = self.conv3(self.relu(self.gn3(out)))
        return out + residual


@define(sites=0, residual=False, breaks=("group norm", "computed weight"))
def bit_resnetv2() -> nn.Module:
    root = nn.Sequential(StdConv2d(3, 8, 7, 2, 3, bias=False), nn.ConstantPad2d(1, 0), nn.MaxPool2d(3, 2))
    return Classifier(nn.Sequential(root, BitBottleneck(8, 16, 1), BitBottleneck(16, 16, 1)), 16)


class UntouchedUnit(KuangliuBasic):
    """kuangliu's unit under its names, with another activation, norm or convolution."""

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        act: nn.Module | None = None,
        norm: Any = nn.BatchNorm2d,
        **options: Any,
    ) -> None:
        super().__init__(channels, width)
        self.bn1, self.bn2 = norm(channels), norm(width)
        self.act = nn.ReLU(inplace=True) if act is None else act
        if options:
            self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False, **options)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(self.act(self.bn2(out)))
        out += shortcut
        return out


def untouched(**options: Any) -> nn.Module:
    unit = partial(UntouchedUnit, **options)
    return Classifier(nn.Sequential(conv3x3(3, 8), unit(8, 8), unit(8, 8)), 8)


@define(sites=0, residual=False, breaks=("activation",))
def leaky_relu() -> nn.Module:
    return untouched(act=nn.LeakyReLU(0.1, inplace=True))


@define(sites=0, residual=False, breaks=("activation",))
def silu() -> nn.Module:
    return untouched(act=nn.SiLU(inplace=True))


@define(sites=0, residual=False, breaks=("activation",))
def gelu() -> nn.Module:
    return untouched(act=nn.GELU())


@define(sites=0, residual=False, breaks=("activation",))
def relu6() -> nn.Module:
    return untouched(act=nn.ReLU6(inplace=True))


@define(sites=0, residual=False, breaks=("padding",))
def reflected_padding() -> nn.Module:
    return untouched(padding_mode="reflect")


@define(sites=0, residual=False, breaks=("instance norm",))
def instance_norm() -> nn.Module:
    return untouched(norm=partial(nn.InstanceNorm2d, affine=True, track_running_stats=True))


class RegNetUnit(nn.Module):
    """Pre-activated with SiLU and squeeze-and-excitation; the shortcut takes the activated tensor (S3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (
            nn.BatchNorm2d(width),
            nn.BatchNorm2d(width),
            nn.BatchNorm2d(width),
        )
        self.conv1 = conv1x1(width, width)
        self.conv2 = conv3x3(width, width, groups=4)
        self.squeeze = nn.Sequential(nn.Conv2d(width, 4, 1), nn.SiLU(), nn.Conv2d(4, width, 1), nn.Sigmoid())
        self.conv3 = conv1x1(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(x))
        out = self.conv2(F.silu(self.norm2(self.conv1(x))))
        out = out * self.squeeze(out.mean((2, 3), keepdim=True))
        return self.conv3(F.silu(self.norm3(out))) + x


@define(sites=0, residual=False, breaks=("activation", "squeeze and excitation"))
def regnetv() -> nn.Module:
    return Classifier(nn.Sequential(conv3x3(3, 8), RegNetUnit(8), RegNetUnit(8)), 8)


@define(
    sites=1, residual=False, breaks=("transposed convolution", "padding", "pad value")
)  # the last one only
def decoder() -> nn.Module:
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        *norm_relu(8),
        nn.ConvTranspose2d(8, 8, 4, 2, 1),
        *norm_relu(8),
        nn.ReflectionPad2d(1),
        nn.Conv2d(8, 8, 3),
        *norm_relu(8),
        nn.ConstantPad2d(1, 0.5),
        nn.Conv2d(8, 8, 3),
        *norm_relu(8),
        nn.ZeroPad2d((0, 1, 0, 1)),  # symmetric is what a convolution can do
        nn.Conv2d(8, 8, 2),
        *norm_relu(8),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 8, 3, padding=1),
        *norm_relu(8),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        *norm_relu(8),
        conv3x3(8, 8),
    )
    return Classifier(body, 8)


class VideoUnit(nn.Module):
    """Three dimensions; option A subsamples and cuts the gradient by way of ``data``."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm3d(channels)
        self.conv1 = nn.Conv3d(channels, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.stride, self.missing = stride, width - channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        residual = x
        if self.missing:
            residual = F.avg_pool3d(x, kernel_size=1, stride=self.stride)
            residual = F.pad(residual.data, (0, 0, 0, 0, 0, 0, 0, self.missing))
        out += residual
        return out


@define(sites=0, residual=False, shape=(2, 3, 4, 8, 8), breaks=("three dimensions",))
def video_preact() -> nn.Module:
    stem = nn.Conv3d(3, 8, 3, 1, 1, bias=False)
    layers = [
        stem,
        VideoUnit(8, 8, 1),
        VideoUnit(8, 16, 2),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ]
    return nn.Sequential(*layers)
