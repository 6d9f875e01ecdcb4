"""What people add to a pre-activation unit, and the ways in which they spell it.

Dropped paths, squeeze-and-excitation, blurred downsampling, functional code, control flow, norms with other options.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from definitions_base import (
    Classifier,
    chain,
    conv1x1,
    conv3x3,
    define,
    disturb_norm,
    disturb_statistics,
    norm_relu,
)
from definitions_residual import KuangliuBasic, KuangliuNet
from torch import Tensor, nn

# --- stochastic depth: a scaled branch, a masked sample, a whole unit that is not run -------------------------------


def drop_path(x: Tensor, p: float, training: bool) -> Tensor:
    """Whole samples to zero; the mask's shape is computed from that of ``x``, so a trace holds tuples of sizes."""
    if p == 0.0 or not training:
        return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    mask = x.new_empty(shape).bernoulli_(1 - p)
    mask.div_(1 - p)
    return x * mask


class DropPathUnit(KuangliuBasic):
    p = 0.3

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        out = drop_path(out, self.p, self.training)
        return out + shortcut


# 5 units of 2, 2 projections, which are the only hosts in training
@define(sites=12, additions=2, eval_additions=5, breaks=("drop path",))
def drop_path_resnet() -> nn.Module:
    return KuangliuNet(DropPathUnit)


class SkippedUnit(KuangliuBasic):
    """With chance p the unit is not run at all: a draw in Python, which a trace records as it happened to fall."""

    p = 0.5

    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < self.p:
            return x
        return super().forward(x)


# A unit of 2 before and one behind, with projections; in between two units of 2 that may not run in training
@define(sites=10, additions=4, hidden=4, hidden_additions=2, drawn=True, breaks=("random control flow",))
def skipped_units() -> nn.Module:
    body = [KuangliuBasic(8, 16, 2), SkippedUnit(16, 16), SkippedUnit(16, 16), KuangliuBasic(16, 24, 2)]
    return Classifier(nn.Sequential(conv3x3(3, 8), *body), 24)


# --- between the last convolution and the sum, or between an activation and its convolution ------------------------


class SqueezeUnit(KuangliuBasic):
    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__(channels, width, stride)
        self.fc1 = nn.Conv2d(width, width // 4, 1)
        self.fc2 = nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        w = F.avg_pool2d(out, out.size(2))
        w = F.relu(self.fc1(w))
        w = torch.sigmoid(self.fc2(w))
        out = out * w
        out += shortcut
        return out


# 5 units of 2, 2 projections: the only hosts
@define(sites=12, additions=2, breaks=("squeeze and excitation",))
def squeeze_excitation() -> nn.Module:
    return KuangliuNet(SqueezeUnit)


class BlurPool(nn.Module):
    """A fixed binomial filter a channel, over a reflected border; its strided convolution is no site."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filt", torch.outer(line, line).expand(channels, 1, 3, 3).clone())
        self.pad = nn.ReflectionPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.pad(x), self.filt, stride=2, groups=x.shape[1])


class BlurUnit(KuangliuBasic):
    """Anti-aliased: dense convolutions, and a blur that takes the stride before the second and in the shortcut."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__(channels, width, 1)
        self.blur: nn.Module = nn.Identity()
        if stride > 1:
            self.blur = BlurPool(width)
            self.shortcut = nn.Sequential(BlurPool(channels), conv1x1(channels, width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.blur(F.relu(self.bn2(out)))
        out = self.conv2(out)
        return shortcut + out


# 5 units of 2; the 2 downsampling ones keep their first only
@define(sites=8, additions=3, breaks=("blur pool",), large=lambda: KuangliuNet(BlurUnit, units=6))
def blurred_downsampling() -> nn.Module:
    return KuangliuNet(BlurUnit)


# --- spellings of the ReLU and of the sum ---------------------------------------------------------------------------


def method_relu(x: Tensor) -> Tensor:
    return x.relu()


def method_relu_(x: Tensor) -> Tensor:
    return x.relu_()


def method_add(a: Tensor, b: Tensor) -> Tensor:
    return a.add(b)


def method_add_(a: Tensor, b: Tensor) -> Tensor:
    return a.add_(b)


def augmented_add(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


def reversed_add(a: Tensor, b: Tensor) -> Tensor:
    return torch.add(b, other=a)


def add_with_alpha(a: Tensor, b: Tensor) -> Tensor:
    return torch.add(input=a, other=b, alpha=1)


def scaled_add(a: Tensor, b: Tensor) -> Tensor:
    return torch.add(b, a, alpha=0.5)


RELUS: list[Callable[[Tensor], Tensor]] = [
    F.relu,
    partial(F.relu, inplace=True),
    F.relu_,
    torch.relu,
    torch.relu_,
    method_relu,
    method_relu_,
    nn.ReLU(),
]
SUMS = [
    operator.add,
    operator.iadd,
    method_add,
    method_add_,
    augmented_add,
    reversed_add,
    add_with_alpha,
    scaled_add,
]


class SpelledUnit(nn.Module):
    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.relu, self.sum = RELUS[number], SUMS[number]
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        self.convs = nn.ModuleList([conv3x3(width, width, bias=number % 2 == 0), conv3x3(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            out = conv(self.relu(norm(out)))
        return self.sum(out, x)


class SpelledNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv3x3(3, 8)
        self.blocks = nn.ModuleList(SpelledUnit(8, number) for number in range(len(RELUS)))
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).relu_().mean(dim=(-2, -1))


@define(
    sites=16, additions=7, heads=1, breaks=("scaled sum",)
)  # 8 units of 2; the last sum scales the convolution
def spellings() -> nn.Module:
    return SpelledNet()


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.fn = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def nested_conv(channels: int, width: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Sequential(*norm_relu(channels)), nn.Sequential(conv3x3(channels, width, stride)))


@define(
    sites=6, additions=2, heads=1
)  # 2 units of 2, 2 convolutions in between; Sequentials in Sequentials only
def nested_sequentials() -> nn.Module:
    net = nn.Sequential(conv3x3(3, 8))
    for channels, width in ((8, 16), (16, 24)):
        net.append(Residual(nested_conv(channels, channels), nn.Sequential(nested_conv(channels, channels))))
        net.append(nested_conv(channels, width, 2))
    return net.append(nn.Sequential(*norm_relu(24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)))


# --- functional code ------------------------------------------------------------------------------------------------


class FunctionalWideResNet(nn.Module):
    """All parameters in one dict, all layers calls with tensors, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.params = nn.ParameterDict({"conv0": self._weight(3, 8, 3)})
        self.plan = [("g0_b0", 8, 16, 1), ("g0_b1", 16, 16, 1), ("g1_b0", 16, 32, 2), ("g1_b1", 32, 32, 1)]
        for name, channels, width, _ in self.plan:
            self._norm(f"{name}_bn0", channels)
            self._norm(f"{name}_bn1", width)
            self.params[f"{name}_conv0"] = self._weight(channels, width, 3)
            self.params[f"{name}_conv1"] = self._weight(width, width, 3)
            if channels != width:
                self.params[f"{name}_convdim"] = self._weight(channels, width, 1)
        self._norm("bn", 32)
        self.params["fc_weight"] = nn.Parameter(torch.randn(5, 32) / 6)
        self.params["fc_bias"] = nn.Parameter(torch.zeros(5))

    @staticmethod
    def _weight(channels: int, width: int, kernel: int) -> nn.Parameter:
        return nn.Parameter(nn.init.kaiming_normal_(torch.empty(width, channels, kernel, kernel)))

    def _norm(self, name: str, channels: int) -> None:
        weight, bias = torch.empty(channels), torch.empty(channels)
        mean, var = torch.empty(channels), torch.empty(channels)
        disturb_norm(weight, bias)
        disturb_statistics(mean, var)
        self.params[f"{name}_weight"], self.params[f"{name}_bias"] = nn.Parameter(weight), nn.Parameter(bias)
        self.register_buffer(f"{name}_running_mean", mean)
        self.register_buffer(f"{name}_running_var", var)

    def _norm_relu(self, x: Tensor, name: str) -> Tensor:
        out = F.batch_norm(
            x,
            getattr(self, f"{name}_running_mean"),
            getattr(self, f"{name}_running_var"),
            weight=self.params[f"{name}_weight"],
            bias=self.params[f"{name}_bias"],
            training=self.training,
        )
        return F.relu(out, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        params = self.params
        x = F.conv2d(x, params["conv0"], padding=1)
        for name, channels, width, stride in self.plan:
            o1 = self._norm_relu(x, f"{name}_bn0")
            y = F.conv2d(o1, params[f"{name}_conv0"], stride=stride, padding=1)
            o2 = self._norm_relu(y, f"{name}_bn1")
            z = F.conv2d(o2, params[f"{name}_conv1"], stride=1, padding=1)
            if channels != width:
                x = z + F.conv2d(o1, params[f"{name}_convdim"], stride=stride)
            else:
                x = z + x
        o = F.avg_pool2d(self._norm_relu(x, "bn"), 8, 1, 0)
        return F.linear(o.view(o.size(0), -1), params["fc_weight"], params["fc_bias"])


@define(sites=10, additions=4, heads=1)  # 4 units of 2, 2 projections
def functional_wide_resnet() -> nn.Module:
    return FunctionalWideResNet()


# --- control flow, shared modules, norms with other options ---------------------------------------------------------


class GatedUnit(KuangliuBasic):
    """What it computes depends on what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if out.abs().amax() > 1e4:
            out = out * 1e-2
        return out


# 4 units of 2, 2 projections; the gated unit of 2 and its sum cannot be traced, its neighbours can
@define(
    sites=10,
    additions=4,
    traceable=False,
    hidden=2,
    hidden_additions=1,
    breaks=("data-dependent control flow",),
)
def gated_unit() -> nn.Module:
    body = [KuangliuBasic(8, 16, 2), GatedUnit(16, 16), KuangliuBasic(16, 16), KuangliuBasic(16, 24, 2)]
    return Classifier(nn.Sequential(conv3x3(3, 8), *body), 24)


class TiedNet(nn.Module):
    """One unit that runs twice: its norms see two inputs, and their statistics move twice a step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv3x3(3, 8)
        self.unit = KuangliuBasic(8, 8)
        self.last = KuangliuBasic(8, 16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = self.unit(x)
        return self.last(x).mean((2, 3))


@define(sites=7, additions=3, breaks=("shared norm",))  # 2 runs of 2, a unit of 2 and its projection
def tied_unit() -> nn.Module:
    return TiedNet()


NORM_OPTIONS = [
    {"eps": 1e-3, "momentum": 0.01},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


class OptionUnit(KuangliuBasic):
    def __init__(self, channels: int, width: int, stride: int, number: int) -> None:
        super().__init__(channels, width, stride)
        self.bn1 = nn.BatchNorm2d(channels, **NORM_OPTIONS[number])
        self.bn2 = nn.BatchNorm2d(width, **NORM_OPTIONS[number])


@define(sites=11, additions=5)  # 5 units of 2, one projection
def norm_options() -> nn.Module:
    units = [OptionUnit(8 if i == 0 else 16, 16, 2 if i == 0 else 1, i) for i in range(len(NORM_OPTIONS))]
    return Classifier(nn.Sequential(conv3x3(3, 8), *units), 16)


class HalfFrozenNet(KuangliuNet):
    """Fine-tuning: the first layer's norms stay in eval mode whatever ``train`` says, with frozen parameters."""

    def __init__(self) -> None:
        super().__init__(KuangliuBasic)
        self.layer1.requires_grad_(False)

    def train(self, mode: bool = True) -> HalfFrozenNet:
        super().train(mode)
        self.layer1.eval()
        return self


@define(sites=12, additions=5)  # as kuangliu_18
def half_frozen() -> nn.Module:
    return HalfFrozenNet()


class PostActivation(nn.Module):
    """ResNet v1: its first norm is a site, its second is added before the ReLU and is none."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(conv1x1(channels, width, stride), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


# The second convolution of each of 3 units; the first of all, which reads the stem's BN-ReLU and is the shortcut too
@define(sites=4, additions=0, residual=False, breaks=("sum between norm and ReLU",))
def post_activation() -> nn.Module:
    units = chain(PostActivation, [(8, 1), (16, 2), (16, 1)], 8)
    return Classifier(nn.Sequential(conv3x3(3, 8), *norm_relu(8), *units), 16)
