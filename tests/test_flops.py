"""What torch.utils.flop_counter counts of the operations: as much as of PyTorch's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import COMPILED, set_fused
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fused_preact
from fused_preact import PreActBasicBlock, PreActBottleneck, PreActSequential, models, optimize_for_inference
from fused_preact.functional import BatchNorm, Convolution, bn_relu_avg_pool2d, preact_conv2d, residual_unit

SERVED = pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("cpu", marks=COMPILED)])


def counted(run: Callable[[], Any]) -> tuple[int, set[str]]:
    """FLOPs, and the operations that they are of."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops(), {
        str(op).partition(".")[0] for op in counter.get_flop_counts()["Global"]
    }


def expected_of(backend: str) -> set[str]:
    return {"aten"} if backend == "reference" else {"fused_preact"}


# --- functions without modules --------------------------------------------------------------------------------

SITES = {
    "3x3": ((12, 8, 3, 3), {"padding": 1}),
    "stride": ((12, 8, 3, 3), {"padding": 1, "stride": 2}),
    "1x1": ((5, 8, 1, 1), {}),
    "awkward": ((7, 8, 2, 5), {"padding": (1, 3), "stride": (3, 2), "dilation": (2, 1)}),
}
NEEDS = {
    "all": ("x", "weight", "gamma"),
    "weight": ("weight",),
    "input": ("x",),
    "affine": ("gamma",),
    "frozen": ("x", "gamma"),
    "nothing": (),
}


@SERVED
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("name", SITES)
def test_site(name: str, needs: str, training: bool, backend: str) -> None:
    shape, arguments = SITES[name]
    x, weight, gamma = torch.randn(3, 8, 9, 7), torch.randn(shape), torch.rand(8)
    mean, var = torch.zeros(8), torch.ones(8)
    for key in NEEDS[needs]:
        {"x": x, "weight": weight, "gamma": gamma}[key].requires_grad_()

    def backward(y: Tensor) -> None:
        if NEEDS[needs]:
            y.sum().backward()

    def ours() -> None:
        backward(
            preact_conv2d(
                x,
                weight,
                bn_weight=gamma,
                running_mean=mean,
                running_var=var,
                training=training,
                **arguments,  # type: ignore[arg-type]
            )
        )

    def plain() -> None:
        z = F.batch_norm(x, mean, var, gamma, training=training)
        backward(F.conv2d(F.relu(z), weight, **arguments))  # type: ignore[arg-type]

    with fused_preact.backend(backend):
        found, ops = counted(ours)
    assert ops - {"Global"} == expected_of(backend)
    assert found == counted(plain)[0] > 0


@SERVED
@pytest.mark.parametrize("groups", [2, 4, 8])
def test_groups(groups: int, backend: str) -> None:
    """PyTorch's own formula takes the weight gradient of a grouped convolution for that of a dense one."""
    n, c, k, oh, ow, r, s = 2, 8, 16, 5, 4, 3, 3
    x = torch.randn(n, c, 9, 7, requires_grad=True)
    weight = torch.randn(k, c // groups, r, s, requires_grad=True)

    def ours() -> None:
        preact_conv2d(x, weight, training=True, stride=2, padding=1, groups=groups).sum().backward()

    one = 2 * n * oh * ow * k * (c // groups) * r * s
    with fused_preact.backend(backend):
        assert (
            counted(lambda: preact_conv2d(x.detach(), weight.detach(), padding=1, stride=2, groups=groups))[0]
            == one
        )
        if backend != "reference":
            assert counted(ours)[0] == 3 * one


@SERVED
@pytest.mark.parametrize("projected", [True, False])
def test_unit_and_head(projected: bool, backend: str) -> None:
    torch.manual_seed(0)
    unit: Any = PreActBottleneck(8, 16 if projected else 8, 2 if projected else 1)
    head = nn.BatchNorm2d(16 if projected else 8)
    x = torch.randn(2, 8, 6, 7, requires_grad=True)

    def ours() -> None:
        y, statistics = residual_unit(
            x,
            [(BatchNorm.of(bn), Convolution.of(conv)) for bn, conv in unit.sites()],
            Convolution.of(unit.shortcut) if projected else None,
            return_statistics=True,
        )
        bn_relu_avg_pool2d(y, BatchNorm.of(head), statistics).sum().backward()

    def plain() -> None:
        F.relu(head(unit._plain(x))).mean((2, 3)).sum().backward()

    with fused_preact.backend(backend):
        found, ops = counted(ours)
    assert ops - {"Global"} == expected_of(backend)
    assert found == counted(plain)[0] > 0


def test_models() -> None:
    """The counter hooks all modules, so that they run one by one: step and inference, folded or not."""
    x = torch.randn(2, 3, 16, 16)
    found = []
    for fused in (True, False):
        model = models.cifar_preact_resnet20(fused=fused)
        step = counted(lambda model=model: model(x).sum().backward())[0]
        with torch.no_grad():
            plain = counted(lambda model=model: model.eval()(x))[0]
            optimize_for_inference(model)(x)
            found.append((step, plain, counted(lambda model=model: model(x))[0]))
    assert found[0] == found[1]
    assert found[0][0] > found[0][1] == found[0][2] > 0


# --- folded -----------------------------------------------------------------------------------------------------


def _biased() -> nn.Module:
    unit: Any = PreActBasicBlock(8, 12, 2)
    unit.conv1 = nn.Conv2d(8, 12, (3, 5), (2, 1), (1, 4), (1, 2))
    unit.conv2 = nn.Conv2d(12, 12, (1, 3), (1, 2), (0, 1))
    unit.shortcut = nn.Conv2d(8, 12, 1, (2, 2))
    return unit


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "identity": lambda: PreActBasicBlock(8, 8),
    "projection": lambda: PreActBottleneck(8, 24, 2),
    "dilation": lambda: PreActBasicBlock(8, 8, dilation=2),
    "awkward": _biased,
    "sequence": lambda: PreActSequential(
        PreActBasicBlock(8, 12, 2), PreActBottleneck(12, 12), PreActSequential(PreActBottleneck(12, 16, 2))
    ),
}


def folded(module: Any, x: Tensor) -> Callable[[], Any]:
    """What runs the folded weights of an optimised module, without the call of the module."""
    optimize_for_inference(module)(x)
    run = module._folded._state.fold.run
    return lambda: run(x)


@SERVED
@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str, backend: str) -> None:
    module, x = set_fused(CHAINS[name]().eval(), True), torch.randn(3, 8, 9, 11)
    with torch.no_grad():
        with fused_preact.backend(backend):
            found, ops = counted(folded(module, x))
        assert ops - {"Global"} == expected_of(backend)
        assert found == counted(lambda: module(x))[0] > 0


@COMPILED
def test_a_chain_is_one_operation() -> None:
    module, x = CHAINS["sequence"]().eval(), torch.randn(3, 8, 9, 11)
    with torch.no_grad():
        run = folded(module, x)
        with FlopCounterMode(display=False) as counter:
            run()
    assert [str(op) for op in counter.get_flop_counts()["Global"]] == ["fused_preact.unit_chain"]


@COMPILED
def test_a_shortcut_of_zeros_multiplies_nothing() -> None:
    module, x = PreActBasicBlock(8, 12, 2, shortcut="A").eval(), torch.randn(3, 8, 9, 11)
    with torch.no_grad():
        found, _ = counted(folded(module, x))
        plain, _ = counted(lambda: module(x))
    assert plain - found == 2 * 3 * 5 * 6 * 12 * 8, "as a convolution it would"


@COMPILED
@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_stem(size: tuple[int, int]) -> None:
    stem, x = models.preact_resnet18().eval().stem, torch.randn(2, 3, *size)
    model = PreActSequential(stem, PreActBasicBlock(64, 64)).eval()
    with torch.no_grad():
        optimize_for_inference(model)(x)
        run: Any = stem._folded._state.fold.run  # type: ignore[union-attr]
        found, ops = counted(lambda: run(x))
        assert ops - {"Global"} == {"fused_preact"}
        assert found == counted(lambda: stem(x))[0] > 0


# --- when the counter learns of the formulas ---------------------------------------------------------------------

NAMES = """
import torch
found = {str(op) for op in torch.utils.flop_counter.flop_registry}
wanted = {f"fused_preact.{name}" for name in
          ("conv_fprop", "conv_fprop_bn", "conv_dgrad", "conv_wgrad", "conv_backward")}
from fused_preact import ops
if ops.compiled_for_cpu():
    wanted |= {"fused_preact.unit_chain", "fused_preact.stem_conv_pool"}
assert wanted <= found, wanted - found
assert not any("fused_preact" in type(finder).__module__ for finder in sys.meta_path)
"""
ORDERS = {
    "before": "import fused_preact, torch.utils.flop_counter",
    "after": "import torch.utils.flop_counter, fused_preact",
    "from": "import fused_preact\nfrom torch.utils.flop_counter import FlopCounterMode",
    "looked-for": "import fused_preact, importlib.util\n"
    "assert importlib.util.find_spec('torch.utils.flop_counter') is not None\nimport torch.utils.flop_counter",
    "by-attribute": "import fused_preact, importlib\nimportlib.import_module('torch.utils.flop_counter')",
}


@pytest.mark.parametrize("order", ORDERS)
def test_order_of_imports(order: str) -> None:
    _python(f"import sys\n{ORDERS[order]}\n{NAMES}")


def test_the_package_imports_no_counter() -> None:
    _python(
        "import sys, torch\nbefore = set(sys.modules)\nimport fused_preact\n"
        "assert 'torch.utils.flop_counter' not in set(sys.modules) - before\n"
        "assert 'triton' not in set(sys.modules) - before"
    )


def _python(code: str) -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
