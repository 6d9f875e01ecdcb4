"""Networks that came from other frameworks, or are part of larger libraries, with the conventions they kept.

Written from the facts that are known of each structure, not from its code; see ``definitions_base.Definition``.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from definitions_base import Classifier, conv1x1, conv3x3, define
from torch import Tensor, nn

# --- TensorFlow: explicit padding; projections of equal shape; biases; the stride in the last unit ------------------


def fixed_padding(x: Tensor, kernel: int) -> Tensor:
    """Split kernel - 1 over both sides, whatever the size of the map; nothing at all for a 1x1."""
    total = kernel - 1
    begin = total // 2
    return F.pad(x, (begin, total - begin, begin, total - begin))


class TFConv(nn.Module):
    """Pads by a call of its own where it strides."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = fixed_padding(x, self.kernel)
        return self.conv(x)


class TFOfficialUnit(nn.Module):
    """S1, and the first unit of every stage projects even where the shape stays."""

    def __init__(self, channels: int, width: int, stride: int, first: bool) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels, momentum=0.003)
        self.project = TFConv(channels, width, 1, stride) if first else None
        self.conv1 = TFConv(channels, width, 3, stride)
        self.norm2 = nn.BatchNorm2d(width, momentum=0.003)
        self.conv2 = TFConv(width, width, 3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        shortcut = inputs
        inputs = torch.relu(self.norm1(inputs))
        if self.project is not None:
            shortcut = self.project(inputs)
        inputs = self.conv1(inputs)
        inputs = torch.relu(self.norm2(inputs))
        inputs = self.conv2(inputs)
        return inputs + shortcut


class TFOfficialNet(nn.Module):
    def __init__(self, units: int = 2) -> None:
        super().__init__()
        self.stem = TFConv(3, 8, 7, 2)
        self.stages = nn.ModuleList()
        for channels, width, stride in ((8, 8, 1), (8, 16, 2)):
            stage = nn.ModuleList([TFOfficialUnit(channels, width, stride, True)])
            self.stages.append(stage.extend(TFOfficialUnit(width, width, 1, False) for _ in range(1, units)))
        self.norm = nn.BatchNorm2d(16, momentum=0.003)
        self.dense = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        # 'SAME' pads an even map at its end only.
        x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), 3, 2)
        for stage in self.stages:
            for unit in stage:
                x = unit(x)
        x = torch.relu(self.norm(x))
        return self.dense(torch.mean(x, dim=(2, 3)))


# 4 units of 2, 2 projections; a strided one is padded by a call of its own, the 1x1 by zero elements
@define(sites=10, additions=4, heads=1, large=lambda: TFOfficialNet(12))
def tf_official() -> nn.Module:
    return TFOfficialNet()


class SlimUnit(nn.Module):
    """Shortcut: a subsampling max-pool of the raw tensor, or a projection with bias of the activated one."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        inner = width // 4
        self.stride = stride
        self.preact = nn.BatchNorm2d(channels, momentum=0.003)
        self.shortcut = conv1x1(channels, width, stride, bias=True) if channels != width else None
        self.conv1 = conv1x1(channels, inner)
        self.norm1 = nn.BatchNorm2d(inner, momentum=0.003)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 0 if stride > 1 else 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner, momentum=0.003)
        self.conv3 = conv1x1(inner, width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        preact = F.relu(self.preact(x))
        if self.shortcut is not None:
            shortcut = self.shortcut(preact)
        else:
            shortcut = x if self.stride == 1 else F.max_pool2d(x, 1, self.stride)
        residual = F.relu(self.norm1(self.conv1(preact)))
        if self.stride > 1:
            residual = F.pad(residual, [1, 1, 1, 1])
        residual = F.relu(self.norm2(self.conv2(residual)))
        return shortcut + self.conv3(residual)


class SlimNet(nn.Module):
    def __init__(self, width: int = 16, units: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3)
        self.pool1 = nn.MaxPool2d(3, 2, 1)
        same = [SlimUnit(width, width, 1) for _ in range(2, units)]
        self.block1 = nn.Sequential(SlimUnit(8, width, 1), *same, SlimUnit(width, width, 2))
        same = [SlimUnit(2 * width, 2 * width, 1) for _ in range(1, units)]
        self.block2 = nn.Sequential(SlimUnit(width, 2 * width, 1), *same)
        self.postnorm = nn.BatchNorm2d(2 * width, momentum=0.003)
        self.logits = nn.Conv2d(2 * width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.pool1(self.conv1(x))))
        x = F.relu(self.postnorm(x)).mean([2, 3], keepdim=True)
        return self.logits(x).squeeze(3).squeeze(2)


# 4 units of 3, 2 projections
@define(sites=14, additions=4, heads=1, shape=(2, 3, 32, 32), large=lambda: SlimNet(32, 4))
def tf_slim() -> nn.Module:
    return SlimNet()


class KerasUnit(nn.Module):
    """Layers under Keras' names; a last unit takes the stride and max-pools the raw tensor."""

    def __init__(self, channels: int, width: int, stride: int, first: bool) -> None:
        super().__init__()
        inner = width // 4
        bn = partial(nn.BatchNorm2d, eps=1.001e-5, momentum=0.01)
        self.preact_bn = bn(channels)
        self.preact_relu = nn.ReLU()
        self.shortcut_conv = conv1x1(channels, width, stride, bias=True) if first else None
        self.shortcut_pool = nn.MaxPool2d(1, stride) if not first and stride > 1 else None
        self.conv_1 = conv1x1(channels, inner)
        self.bn_1 = bn(inner)
        self.relu_1 = nn.ReLU()
        self.pad_2 = nn.ZeroPad2d((1, 1, 1, 1))
        self.conv_2 = nn.Conv2d(inner, inner, 3, stride, padding="valid", bias=False)
        self.bn_2 = bn(inner)
        self.relu_2 = nn.ReLU()
        self.conv_3 = conv1x1(inner, width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        preact = self.preact_relu(self.preact_bn(x))
        if self.shortcut_conv is not None:
            shortcut = self.shortcut_conv(preact)
        else:
            shortcut = x if self.shortcut_pool is None else self.shortcut_pool(x)
        x = self.relu_1(self.bn_1(self.conv_1(preact)))
        x = self.relu_2(self.bn_2(self.conv_2(self.pad_2(x))))
        x = self.conv_3(x)
        return torch.add(shortcut, x)


def keras_net(width: int, units: int) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1_pad"] = nn.ZeroPad2d(3)
    layers["conv1_conv"] = nn.Conv2d(3, 8, 7, 2)
    layers["pool1_pad"] = nn.ZeroPad2d(1)
    layers["pool1_pool"] = nn.MaxPool2d(3, 2)
    wide = 2 * width
    for number in range(1, units + 1):
        first, last = number == 1, number == units
        unit = KerasUnit(8 if first else width, width, 2 if last else 1, first)
        layers[f"conv2_block{number}"] = unit
    for number in range(1, units + 1):
        layers[f"conv3_block{number}"] = KerasUnit(width if number == 1 else wide, wide, 1, number == 1)
    layers["post_bn"] = nn.BatchNorm2d(wide, eps=1.001e-5, momentum=0.01)
    layers["post_relu"] = nn.ReLU()
    layers["avg_pool"] = nn.AdaptiveAvgPool2d((1, 1))
    layers["flatten"] = nn.Flatten()
    layers["predictions"] = nn.Linear(wide, 5)
    return nn.Sequential(layers)


# 4 units of 3, 2 projections; every 3x3 is padded by a layer of its own
@define(sites=14, additions=4, heads=1, large=lambda: keras_net(32, 4))
def keras_resnet50v2() -> nn.Module:
    return keras_net(16, 2)


# --- Gluon: a norm of the image itself, double norm after the stem, 3x3 convolutions throughout (S1) ----------------


class GluonBottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, downsample: bool) -> None:
        super().__init__()
        inner = width // 4
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv3x3(channels, inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride)
        self.bn3 = nn.BatchNorm2d(inner)
        self.conv3 = conv3x3(inner, width)
        self.downsample = conv1x1(channels, width, stride) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.bn1(x).relu()
        if self.downsample:
            residual = self.downsample(x)
        x = self.conv1(x)
        x = self.conv2(self.bn2(x).relu())
        x = self.conv3(self.bn3(x).relu())
        return x + residual


def gluon_net(width: int, units: int) -> nn.Module:
    wide = 2 * width
    stages = [
        nn.Sequential(
            GluonBottleneck(channels, out, stride, True),
            *(GluonBottleneck(out, out, 1, False) for _ in range(1, units)),
        )
        for channels, out, stride in ((8, width, 1), (width, wide, 2))
    ]
    return nn.Sequential(
        nn.BatchNorm2d(3, affine=False),
        nn.Conv2d(3, 8, 7, 2, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        *stages,
        nn.BatchNorm2d(wide),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(wide, 5),
    )


# BN without affine -> the stem's convolution; 4 units of 3, 2 projections
@define(sites=15, additions=4, heads=1, shape=(2, 3, 32, 32), large=lambda: gluon_net(32, 4))
def gluon_resnet50_v2() -> nn.Module:
    return gluon_net(16, 2)


# --- WiderResNet of inplace_abn: norm and activation in one module, a cloned shortcut, a sum in place ---------------


def norm_act(channels: int, slope: float | None) -> nn.Module:
    """BN and its activation; the original is leaky, which is no ReLU."""
    act = nn.ReLU(inplace=True) if slope is None else nn.LeakyReLU(slope, inplace=True)
    return nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(channels), activation=act))


class IdentityResidualBlock(nn.Module):
    def __init__(
        self,
        channels: int,
        width: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        slope: float | None = None,
    ) -> None:
        super().__init__()
        inner = width // 2
        self.bn1 = norm_act(channels, slope)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv1"] = nn.Conv2d(channels, inner, 1, stride, bias=False)
        layers["bn2"] = norm_act(inner, slope)
        layers["conv2"] = nn.Conv2d(inner, inner, 3, 1, dilation, dilation, groups, bias=False)
        layers["bn3"] = norm_act(inner, slope)
        layers["conv3"] = conv1x1(inner, width)
        self.convs = nn.Sequential(layers)
        if stride != 1 or channels != width:
            self.proj_conv = conv1x1(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "proj_conv"):
            bn1 = self.bn1(x)
            shortcut = self.proj_conv(bn1)
        else:
            shortcut = x.clone()
            bn1 = self.bn1(x)
        out = self.convs(bn1)
        out.add_(shortcut)
        return out


class WiderResNet(nn.Module):
    def __init__(self, slope: float | None = None) -> None:
        super().__init__()
        self.mod1 = nn.Sequential(OrderedDict(conv1=conv3x3(3, 8)))
        block = partial(IdentityResidualBlock, slope=slope)
        self.mod2 = nn.Sequential(OrderedDict(block1=block(8, 16), block2=block(16, 16, groups=4)))
        self.pool3 = nn.MaxPool2d(3, 2, 1)
        self.mod3 = nn.Sequential(
            OrderedDict(block1=block(16, 32, dilation=2), block2=block(32, 32, 2, 2, 2))
        )
        self.bn_out = norm_act(32, slope)
        self.fc = nn.Linear(32, 5)

    def forward(self, img: Tensor) -> Tensor:
        out = self.mod3(self.pool3(self.mod2(self.mod1(img))))
        out = self.bn_out(out)
        return self.fc(out.view(out.shape[0], out.size(1), -1).mean(-1))


# 4 units of 3, 3 projections; the global pool is a mean over a flattened map, which is no head to look for
@define(sites=15, additions=4)
def wider_resnet() -> nn.Module:
    return WiderResNet()


@define(sites=0, residual=False, breaks=("leaky relu",))
def wider_resnet_leaky() -> nn.Module:
    return WiderResNet(slope=0.01)


# --- MONAI: norm-act-conv with one shared activation, ``x += identity``; padded channels; names with a slash --------


class MonaiResBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.norm2 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.conv1 = nn.Sequential(OrderedDict(conv=conv3x3(channels, channels)))
        self.conv2 = nn.Sequential(OrderedDict(conv=conv3x3(channels, channels)))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        x = self.norm1(x)
        x = self.act(x)
        x = self.conv1(x)
        x = self.norm2(x)
        x = self.act(x)
        x = self.conv2(x)
        x += identity
        return x


class HighResBlock(nn.Module):
    """Norm-act-conv chains with dilation; channels that the shortcut lacks are zeros."""

    def __init__(self, channels: int, width: int, dilation: int) -> None:
        super().__init__()
        self.missing = width - channels
        self.layers = nn.ModuleList()
        for given in (channels, width):
            adn = nn.Sequential(OrderedDict(N=nn.BatchNorm2d(given), A=nn.ReLU()))
            conv = nn.Conv2d(given, width, 3, padding=dilation, dilation=dilation)
            self.layers.append(nn.Sequential(OrderedDict(adn=adn, conv=conv)))

    def forward(self, x: Tensor) -> Tensor:
        x_conv = x
        for layer in self.layers:
            x_conv = layer(x_conv)
        begin = self.missing // 2
        return x_conv + F.pad(x, [0, 0, 0, 0, begin, self.missing - begin])


@define(
    sites=9, additions=4
)  # 4 units of 2; the slashed norm before the strided convolution is a site as well
def monai_blocks() -> nn.Module:
    down = nn.Sequential()
    down.add_module("preact_bna/bn", nn.BatchNorm2d(16))
    down.add_module("preact_bna/relu", nn.ReLU())
    down.add_module("conv", conv3x3(16, 16, 2))
    body = nn.Sequential(
        conv3x3(3, 8),
        MonaiResBlock(8),
        HighResBlock(8, 16, 2),
        down,
        MonaiResBlock(16),
        HighResBlock(16, 16, 1),
    )
    return Classifier(body, 16)
