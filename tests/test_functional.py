"""Bad input, one table for every backend; buffers; the choice of a backend."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_preact
from fused_preact import PreActBottleneck, PreActConv2d, models, ops
from fused_preact.functional import (
    BatchNorm,
    Convolution,
    Statistics,
    bn_relu_avg_pool2d,
    preact_conv2d,
    residual_unit,
)

BACKENDS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param(
        "cpu",
        "cpu",
        id="compiled",
        marks=pytest.mark.skipif(ops._cpu_missing is not None, reason=str(ops._cpu_missing)),
    ),
    pytest.param("triton", "cpu", id="interpreter"),
    pytest.param("triton", "cuda", id="cuda", marks=pytest.mark.gpu),
]


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def unit(**changes) -> None:
    site = (
        BatchNorm(running_mean=torch.zeros(4), running_var=torch.ones(4)),
        Convolution(image(4, 4, 3, 3), padding=1),
    )
    arguments = {"input": image(2, 4, 5, 5), "sites": [site]} | changes
    residual_unit(**arguments)


def conv(**changes) -> None:
    arguments = {"input": image(2, 4, 5, 5), "weight": image(6, 4, 3, 3)} | changes
    preact_conv2d(**arguments)


# What is called, the exception, and words that must be in its message: the argument, what came, what is allowed.
BAD: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "rank": (lambda: conv(input=image(2, 4, 5)), ValueError, ["input", "(2, 4, 5)", "[N,C,H,W]"]),
    "integer": (lambda: conv(input=torch.ones(2, 4, 5, 5, dtype=torch.int64)), TypeError, ["input", "int64", "float32"]),
    "weight-rank": (lambda: conv(weight=image(6, 4)), ValueError, ["weight", "(6, 4)", "[K,C/groups,R,S]"]),
    "channels": (lambda: conv(weight=image(6, 5, 3, 3)), ValueError, ["weight", "(6, 5, 3, 3)", "4 channels"]),
    "groups": (lambda: conv(groups=3), ValueError, ["groups 3", "[K,4/groups,R,S]"]),
    "weight-dtype": (
        lambda: conv(weight=image(6, 4, 3, 3, dtype=torch.float64)), TypeError, ["weight", "float64", "float32"],
    ),
    "bias-shape": (lambda: conv(bias=image(5)), ValueError, ["bias", "(5,)", "(6,)"]),
    "bias-dtype": (lambda: conv(bias=image(6).half()), TypeError, ["bias", "float16", "float32"]),
    "bn-weight": (lambda: conv(bn_weight=image(5)), ValueError, ["bn_weight", "(5,)", "(4,)"]),
    "bn-bias-dtype": (lambda: conv(bn_bias=image(4).bfloat16()), TypeError, ["bn_bias", "bfloat16", "float32"]),
    "running-mean": (
        lambda: conv(running_mean=image(4)), ValueError, ["running_mean", "running_var", "both or neither"],
    ),
    "running-var-shape": (
        lambda: conv(running_mean=image(4), running_var=image(3)), ValueError, ["running_var", "(3,)", "(4,)"],
    ),
    "stride": (lambda: conv(stride=0), ValueError, ["stride", "0", "at least 1"]),
    "padding": (lambda: conv(padding=(1, -1)), ValueError, ["padding", "(1, -1)", "at least 0"]),
    "dilation": (lambda: conv(dilation=(1, 2, 3)), ValueError, ["dilation", "(1, 2, 3)", "an integer or two"]),
    "too-small": (lambda: conv(input=image(2, 4, 2, 2)), ValueError, ["input", "(2, 2)", "1x1"]),
    "residual-shape": (
        lambda: conv(residual=image(2, 6, 5, 5)), ValueError, ["residual", "(2, 6, 5, 5)", "(2, 6, 3, 3)"],
    ),
    "residual-dtype": (lambda: conv(residual=image(2, 6, 3, 3).half()), TypeError, ["residual", "float16"]),
    "device": (
        lambda: conv(weight=image(6, 4, 3, 3).to("meta")), ValueError, ["weight", "device meta", "cpu"],
    ),
    "one-value": (
        lambda: conv(input=image(1, 4, 1, 1), weight=image(6, 4, 1, 1), training=True),
        ValueError,
        ["Expected more than 1 value per channel when training", "1, 4, 1, 1"],
    ),
    "no-sites": (lambda: unit(sites=[]), ValueError, ["sites", "none"]),
    "identity-shape": (
        lambda: unit(sites=[(BatchNorm(), Convolution(image(5, 4, 1, 1)))]),
        ValueError,
        ["identity", "(2, 4, 5, 5)", "(2, 5, 5, 5)"],
    ),
    "projection-shape": (
        lambda: unit(projection=Convolution(image(4, 4, 1, 1), stride=2)),
        ValueError,
        ["projection", "(2, 4, 3, 3)", "(2, 4, 5, 5)"],
    ),
    "projection-channels": (
        lambda: unit(projection=Convolution(image(4, 3, 1, 1))), ValueError, ["projection.weight", "4 channels"],
    ),
    "second-site": (
        lambda: residual_unit(
            image(2, 4, 5, 5), [(BatchNorm(), Convolution(image(3, 4, 1, 1))), (BatchNorm(), Convolution(image(4, 4, 1, 1)))]
        ),
        ValueError,
        ["sites[1].conv.weight", "3 channels"],
    ),
    "head-rank": (lambda: bn_relu_avg_pool2d(image(2, 3), BatchNorm()), ValueError, ["input", "(2, 3)"]),
    "head-relu": (
        lambda: bn_relu_avg_pool2d(image(2, 3, 2, 2), BatchNorm(relu=False)), ValueError, ["bn.relu", "False", "True"],
    ),
    "head-bn": (lambda: bn_relu_avg_pool2d(image(2, 3, 2, 2), BatchNorm(image(4))), ValueError, ["bn.weight", "(4,)"]),
    "statistics-device": (
        lambda: conv(training=True, statistics=Statistics(*torch.ones(2, 4, device="meta"))), ValueError, ["statistics.mean", "meta", "cpu"],
    ),
    "statistics-shape": (
        lambda: conv(training=True, statistics=Statistics(image(3), image(3))), ValueError, ["statistics", "(3,)", "(4,)"],
    ),
    "momentum-none": (
        lambda: conv(training=True, momentum=None, running_mean=image(4), running_var=image(4)),
        ValueError,
        ["num_batches_tracked", "momentum=None"],
    ),
    "model-name": (lambda: models.create("resnet51", num_classes=10), ValueError, ["resnet51", "preact_resnet50"]),
    "num-classes": (lambda: models.create("preact_resnet18", num_classes=0), ValueError, ["num_classes", "0"]),
    "shortcut": (
        lambda: models.cifar_preact_resnet20(shortcut="C"), ValueError, ["shortcut", "'C'", "'A'", "'B'"],
    ),
    "unit-shortcut": (lambda: PreActBottleneck(4, 8, shortcut=None), ValueError, ["shortcut", "4 -> 8", "'B'"]),
    "unit-width": (lambda: PreActBottleneck(4, 6), ValueError, ["out_channels", "6", "multiples of 4"]),
    "padding-mode": (
        lambda: Convolution.of(torch.nn.Conv2d(3, 3, 3, padding_mode="reflect")), ValueError, ["padding_mode", "reflect"],
    ),
    "same-even": (
        lambda: Convolution.of(torch.nn.Conv2d(3, 3, 2, padding="same")), ValueError, ["padding", "'same'"],
    ),
    "backend-name": (lambda: fused_preact.backend("cuda").__enter__(), ValueError, ["'cuda'", "'triton'"]),
}  # fmt: skip


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend: str, device: str, case: str) -> None:
    call, exception, words = BAD[case]
    with fused_preact.backend(backend), torch.device(device), pytest.raises(exception) as raised:
        call()
    for word in words:
        word = re.sub("cpu", device, word)
        assert word in str(raised.value), f"{word!r} is not in {raised.value}"


def test_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        with (
            fused_preact.backend("triton"),
            pytest.raises(RuntimeError, match=r"tensors are on cpu.*TRITON_INTERPRET"),
        ):
            conv()


def test_backend_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_triton_missing", lambda: "the package triton is not installed")
    with pytest.raises(RuntimeError, match="triton is not installed"), fused_preact.backend("triton"):
        pass


def test_backend_is_restored_and_nested() -> None:
    from fused_preact.ops import requested_backend

    before = requested_backend()
    with fused_preact.backend("reference"):
        with fused_preact.backend("triton"):
            assert requested_backend() == "triton"
        with pytest.raises(ZeroDivisionError), fused_preact.backend("triton"):
            _ = 1 / 0
        assert requested_backend() == "reference"
    assert requested_backend() == before


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_backward_keeps_the_backend_of_forward(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward runs outside the ``with`` block, and on a GPU in another thread."""
    asked = []
    table = ops.table
    monkeypatch.setattr(ops, "table", lambda name, x: asked.append(name) or table(name, x))
    x = image(2, 4, 5, 5).to(device).requires_grad_()
    with fused_preact.backend(backend):
        y = preact_conv2d(x, image(6, 4, 3, 3).to(device))
    y.sum().backward()
    assert set(asked) == {backend}


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_empty_batch(backend: str, device: str) -> None:
    x = image(0, 4, 5, 5).to(device).requires_grad_()
    weight = image(6, 4, 3, 3).to(device).requires_grad_()
    with fused_preact.backend(backend):
        y = preact_conv2d(x, weight, padding=1, training=True)
    assert y.shape == (0, 6, 5, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics(training: bool, momentum: float | None) -> None:
    """Three steps of ``nn.BatchNorm2d`` itself, cumulative average included."""
    bn = torch.nn.BatchNorm2d(4, momentum=momentum).train(training)
    expected = torch.nn.BatchNorm2d(4, momentum=momentum).train(training)
    weight = image(6, 4, 1, 1)
    for _ in range(3):
        x = image(2, 4, 3, 3)
        args = BatchNorm.of(bn)
        preact_conv2d(
            x, weight, bn_weight=args.weight, bn_bias=args.bias, running_mean=args.running_mean,
            running_var=args.running_var, num_batches_tracked=args.num_batches_tracked, training=args.training,
            momentum=args.momentum, eps=args.eps,
        )  # fmt: skip
        expected(x)
    for name, buffer in bn.named_buffers():
        torch.testing.assert_close(buffer, dict(expected.named_buffers())[name], msg=name)


def test_given_statistics_are_used() -> None:
    x, weight = image(2, 4, 5, 5), image(6, 4, 1, 1)
    mean, var = torch.randn(4), torch.rand(4) + 0.5
    y = preact_conv2d(x, weight, training=True, statistics=Statistics(mean, var))
    normalised = F.batch_norm(x, mean, var, training=False)
    torch.testing.assert_close(y, F.conv2d(F.relu(normalised), weight))


def test_returned_statistics_are_those_of_the_output() -> None:
    sites = [(BatchNorm(), Convolution(image(4, 4, 3, 3), padding=1))]
    y, statistics = residual_unit(image(2, 4, 5, 5), sites, return_statistics=True)
    assert statistics is not None
    torch.testing.assert_close(statistics.mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(statistics.var, y.var((0, 2, 3), correction=0))
    assert residual_unit(image(2, 4, 5, 5), sites)[1] is None


def test_what_passed_is_checked_again_when_it_changes() -> None:
    """The checks are remembered by shapes, dtypes and constants, not by module."""
    site = PreActConv2d(4, 6, 3, stride=[1, 1], padding=1)
    x = image(2, 4, 5, 5)
    assert site(x).shape == site(x).shape == (2, 6, 5, 5)
    with pytest.raises(ValueError, match="input: got shape"):
        site(x[0])
    site.conv.stride = (0, 1)
    with pytest.raises(ValueError, match="stride: got"):
        site(x)
    site.conv.stride = (2, 1)
    assert site(x).shape == (2, 6, 3, 5)
    site.conv.to(torch.bfloat16)
    with pytest.raises(TypeError, match="weight: got dtype"):
        site(x)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        site.to(torch.float32)(x[:1, :, :1, :1])


def test_parametrised_parameters_are_read() -> None:
    """A parametrisation takes a parameter's place in its module; the fused call must see its value."""
    site = PreActConv2d(4, 6, 1)
    torch.nn.utils.parametrizations.weight_norm(site.conv)
    plain = copy.deepcopy(site)
    plain.fused = False
    x = image(2, 4, 5, 5)
    torch.testing.assert_close(site(x), plain(x))
