"""The policy of what is right, and inputs awkward enough to show what is wrong."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_preact import functional, ops, reference

ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 2.0**-52}

DEVICES = [pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
]

COMPILED = pytest.mark.skipif(ops._cpu_missing is not None, reason=str(ops._cpu_missing))
BACKENDS = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("reference", "cpu", id="reference"),
        pytest.param("cpu", "cpu", id="compiled", marks=COMPILED),
        pytest.param("triton", "cpu", id="interpreter"),
        pytest.param("triton", "cuda", id="cuda", marks=pytest.mark.gpu),
    ],
)
FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)

triton_ops = ops._triton
"""The Triton launchers behind the same checks as the registered ops, whatever the device."""


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def assert_within_policy(
    name: str,
    actual: Tensor,
    eager: Tensor,
    oracle: Tensor,
    *,
    ulps: float = 4,
    terms: Tensor | None = None,
    terms_dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> None:
    """The error is at most twice that of the same computation in eager PyTorch, plus a few ulp.

    ``oracle`` is the float64 reference, ``eager`` the same-dtype computation. An ulp is taken of each element, and of
    the tensor's root mean square for those near zero; of a sum that cancels it is taken of ``terms``, the sum of
    the terms' magnitudes, which were stored in ``terms_dtype``. ``compiled``: no kernel of Triton's interpreter.
    """
    assert actual.shape == oracle.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    )
    if actual.numel() == 0:
        return
    exact = oracle.double()
    error = (actual.double() - exact).abs()
    assert not error.isnan().any(), f"{name}: {int(error.isnan().sum())} of {error.numel()} elements are NaN"
    worst_eager = (eager.double() - exact).abs().max()
    size = exact.abs() + exact.square().mean().sqrt() if terms is None else terms.double()
    allowed = 2 * worst_eager + ulps * ULP[actual.dtype] * size
    if interpreting() and not compiled and torch.bfloat16 in (actual.dtype, terms_dtype):
        # The interpreter truncates where the hardware rounds to nearest: one more ulp, there only.
        allowed += 2 * ULP[torch.bfloat16] * size
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{name}: error {error.flatten()[worst]:.3e} at {int(worst)} where {allowed.flatten()[worst]:.3e} is allowed "
        f"(value {exact.flatten()[worst]:.3e}, eager's worst error {worst_eager:.3e})"
    )


@dataclass(frozen=True)
class Case:
    """One convolution site. Sizes are chosen to leave ragged tails in every tile."""

    n: int = 2
    c: int = 17
    h: int = 7
    w: int = 9
    k: int = 33
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def id(self) -> str:
        """A readable test id."""
        kernel = "x".join(map(str, self.kernel))
        parts = [f"n{self.n}c{self.c}h{self.h}w{self.w}k{self.k}", kernel]
        for letter, pair, usual in (
            ("s", self.stride, (1, 1)),
            ("p", self.padding, None),
            ("d", self.dilation, (1, 1)),
        ):
            if pair != usual:
                parts.append(letter + "x".join(map(str, pair)))
        return "-".join(parts)

    @property
    def constants(self) -> tuple[Any, ...]:
        """stride, padding, dilation and groups, as the ops take them."""
        return list(self.stride), list(self.padding), list(self.dilation), 1

    @property
    def out_size(self) -> tuple[int, int]:
        """OH, OW."""
        return reference.conv_output_size(
            (self.h, self.w), self.kernel, self.stride, self.padding, self.dilation
        )


def _case(**kwargs: Any) -> Any:
    case = Case(**kwargs)
    return pytest.param(case, id=case.id)


CASES = [
    _case(),
    _case(kernel=(1, 1), padding=(0, 0), c=16, k=32, h=8, w=8),
    _case(kernel=(1, 1), padding=(0, 0), c=3, k=65, h=5, w=3),
    _case(kernel=(1, 1), padding=(0, 0), stride=(2, 2), c=65, k=5),
    _case(kernel=(1, 1), padding=(1, 1), c=5, k=3),
    _case(stride=(2, 2), c=100, k=17),
    _case(stride=(2, 2), h=8, w=8, c=16, k=16),
    _case(stride=(3, 2), kernel=(5, 3), padding=(2, 1), c=3, k=3, h=11),
    _case(stride=(2, 2), dilation=(2, 2), padding=(2, 2), c=4, k=5),
    _case(stride=(3, 3), dilation=(2, 2), padding=(0, 1), c=4, k=5, h=9, w=11),
    _case(dilation=(2, 3), padding=(2, 3), c=1, k=1),
    _case(kernel=(2, 4), padding=(1, 2), c=8, k=9),
    _case(kernel=(7, 7), stride=(2, 2), padding=(3, 3), c=3, k=8, h=12, w=13),
    _case(n=1, h=1, w=1, c=65, k=100, kernel=(1, 1), padding=(0, 0)),
    _case(n=1, h=1, w=2, c=17, k=3),
    # One row more than a tile of 128 (or 64): the last tile holds a single row.
    _case(n=1, h=43, w=3, c=17, k=3, kernel=(1, 1), padding=(0, 0)),
]


@dataclass
class Site:
    """Random tensors of a case, and the vectors that its kernels take."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor
    dy: Tensor
    da: Tensor
    mean: Tensor
    scale: Tensor
    shift: Tensor
    rstd: Tensor
    constants: tuple[Any, ...] = field(default=())

    def double(self) -> Site:
        """The same values in float64, for the oracle."""
        tensors = {k: v.double() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Site(**tensors, constants=self.constants)


def make_site(
    case: Case, dtype: torch.dtype, device: str, memory_format: torch.memory_format = torch.channels_last
) -> Site:
    """A site with beta > 0 (so a padded tap that is not 0 shows) and gammas negative, zero and positive."""
    c, k = case.c, case.k
    x = torch.randn(case.n, c, case.h, case.w) * 1.5 + 0.5
    gamma = torch.linspace(-1, 1.5, c)[torch.randperm(c)]
    gamma[c // 2] = 0.0 if c > 1 else 0.7
    beta = torch.rand(c) + 0.3
    x = x.to(dtype)
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    # With a single pixel s x + t would be all cancellation, and the interpreter's fma rounds twice.
    var = var.clamp_min(0.1)
    scale, shift, rstd = reference.bn_scale_shift(mean, var, gamma, beta, 1e-5)
    fan_in = c * case.kernel[0] * case.kernel[1]
    weight = torch.randn(k, c, *case.kernel) / fan_in**0.5
    out = (case.n, k, *case.out_size)
    tensors = {
        "x": x,
        "weight": weight.to(dtype),
        "bias": torch.randn(k).to(dtype),
        "residual": torch.randn(out).to(dtype),
        "dy": torch.randn(out).to(dtype),
        "da": torch.randn(x.shape).to(dtype),
    }
    images = {
        name: (t.to(device).contiguous(memory_format=memory_format) if t.dim() == 4 else t.to(device))
        for name, t in tensors.items()
    }
    vectors = {"mean": mean, "scale": scale, "shift": shift, "rstd": rstd}
    return Site(**images, **{n: v.to(device) for n, v in vectors.items()}, constants=case.constants)


def plain_site(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    **conv: Any,
) -> Tensor:
    """The definition through PyTorch's own autograd: conv2d(relu(batch_norm(x)))."""
    return F.conv2d(F.relu(F.batch_norm(x, None, None, gamma, beta, True, 0.0, eps)), weight, bias, **conv)


class MixedUnit(nn.Module):
    """Three sites, the first and the last without a ReLU, and a projection (or the identity) as shortcut."""

    RELUS = (False, True, False)

    def __init__(self, channels: int, width: int, stride: int = 1, fused: bool = True) -> None:
        super().__init__()
        self.bns = nn.ModuleList([nn.BatchNorm2d(c) for c in (channels, 5, 7)])
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(channels, 5, 3, stride, 1, bias=False),
                nn.Conv2d(5, 7, 1, bias=False),
                nn.Conv2d(7, width, 3, padding=1),
            ]
        )
        self.shortcut = nn.Conv2d(channels, width, 1, stride) if stride > 1 or channels != width else None
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            sites = [
                (functional.BatchNorm.of(bn, relu), functional.Convolution.of(conv))
                for bn, conv, relu in zip(self.bns, self.convs, self.RELUS, strict=True)
            ]
            shortcut = None if self.shortcut is None else functional.Convolution.of(self.shortcut)
            return functional.residual_unit(x, sites, shortcut)[0]
        y, added = x, x
        for bn, conv, relu in zip(self.bns, self.convs, self.RELUS, strict=True):
            a = F.relu(bn(y)) if relu else bn(y)
            if self.shortcut is not None and y is x:
                added = self.shortcut(a)
            y = conv(a)
        return y + added


def set_fused(module: nn.Module, fused: bool) -> nn.Module:
    for child in module.modules():
        if hasattr(child, "fused"):
            child.fused = fused
    return module


def disturb(module: nn.Module) -> nn.Module:
    """Betas above zero, gammas of both signs and running statistics that are not 0 and 1."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            if child.affine:
                nn.init.uniform_(child.bias, 0.1, 0.6)
                nn.init.uniform_(child.weight, -1, 1.5)
            if child.track_running_stats:
                nn.init.normal_(child.running_mean, 0.2)
                nn.init.uniform_(child.running_var, 0.5, 2)
    return module
