"""The paper's analysis: its equations and the values expected of them, and the program that shows them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import disturb
from torch import Tensor, nn

from fused_preact import PreActSequential, ResidualUnit, models
from fused_preact.propagation import Snapshot, cli, measure
from fused_preact.propagation.measure import terms
from fused_preact.units import BODIES, ORDERS, make_unit

EXACT = ("relu_before_addition", "relu_only_preact", "preact")
KINDS = ("A", "B", "scaling:0.5:0.7", "exclusive_gating:-1", "shortcut_gating:-2", "conv", "dropout")


def net(depth: int = 110, **options: Any) -> models.ResNet:
    torch.manual_seed(0)
    return models.create(f"cifar_resnet{depth}", num_classes=10, **options)


def images(count: int = 4, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % 10


def worst(snapshot: Snapshot, name: str) -> float:
    values = [getattr(unit, name) for unit in snapshot.units]
    return max(value for value in values if value is not None)


# --- the measurement itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
def test_a_unit_taken_apart(order: str, kind: str) -> None:
    """f(h + F) is the unit's output, and h is s x wherever an s is given."""
    for body in BODIES:
        torch.manual_seed(3)
        unit = disturb(make_unit(8, 8, order=order, shortcut=kind, body=body, fused=False)).double()
        x = torch.randn(3, 8, 6, 5, dtype=torch.float64)
        found = terms(unit, x, seed=5)
        torch.manual_seed(5)
        y = found.h + found.f
        if isinstance(unit, ResidualUnit):
            y = unit.run(unit.after, y)
        torch.manual_seed(5)
        torch.testing.assert_close(y, unit(x), rtol=1e-12, atol=1e-12)
        assert (found.s is None) == (kind == "conv")
        if found.s is not None:
            torch.testing.assert_close(found.h, found.s * x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("order", "kind"), [("original", "B"), ("preact", "exclusive_gating"), ("preact", "A")]
)
def test_gradients_are_those_of_autograd(order: str, kind: str) -> None:
    """Unit by unit the same norms as one backward pass through the whole network; the model is left as it was."""
    model = net(20, order=order, shortcut=kind)
    before = copy.deepcopy(model.state_dict())
    x, labels = images()
    found = measure(model, x, labels)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    whole = copy.deepcopy(model).double()
    kept: list[Tensor] = []
    for stage in whole.stages:
        for unit in stage:
            unit.fused = False
            unit.register_forward_pre_hook(lambda _, args: kept.append(args[0]) or args[0].retain_grad())
    loss = F.cross_entropy(whole(x.double()), labels)
    loss.backward()
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    assert [u.gradient for u in found.units] == pytest.approx([t.grad.norm().item() for t in kept], rel=1e-9)
    assert [u.signal for u in found.units] == pytest.approx(
        [t.square().mean().sqrt().item() for t in kept], rel=1e-9
    )


# --- the paper's statements ----------------------------------------------------------------------------------------


def test_additive_form_and_two_term_gradient_at_rounding_level() -> None:
    """Full pre-activation ResNet-110, every stage: about 5e-16 in float64, 2e-7 in float32 (Eqs. 4 and 5)."""
    model = net(order="preact")
    for dtype, additive, two_term in ((torch.float64, 2e-15, 1e-15), (torch.float32, 1e-6, 5e-7)):
        found = measure(model, *images(), dtype=dtype)
        assert {u.stage for u in found.units if u.additive is not None} == {1, 2, 3}
        assert 0 < worst(found, "additive") < additive
        assert 0 < worst(found, "two_term") < two_term
        assert found.units[0].shortcut_term == 1.0


@pytest.mark.parametrize("order", ORDERS)
def test_exact_where_f_is_the_identity(order: str) -> None:
    """With every shortcut; with a ReLU after the addition both are approximations, and far off at initialisation."""
    for kind in KINDS:
        found = measure(net(20, order=order, shortcut=kind), *images(4, 8))
        if order in EXACT:
            assert worst(found, "two_term") < 1e-14, kind
            assert kind == "conv" or worst(found, "additive") < 1e-14, kind
        else:
            assert worst(found, "two_term") > 1e-2, kind


@pytest.mark.parametrize(("factor", "expected"), [(0.5, 5.55e-17), (0.9, 3.38e-3), (1.0, 1.0), (1.1, 171.9)])
def test_product_of_the_factors(factor: float, expected: float) -> None:
    """54 units, f the identity, F forced to 0: |g_0| / |g_54| is the factor's 54th power; so is the shortcut term."""
    units = PreActSequential(
        *(ResidualUnit(4, 4, order="preact", shortcut=f"scaling:{factor}") for _ in range(54))
    )
    for unit in units:
        nn.init.zeros_(unit.conv2.weight)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    y = units.double()(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert (x.grad.norm() / dy.norm()).item() == pytest.approx(factor**54, rel=1e-12)
    assert factor**54 == pytest.approx(expected, rel=2e-3)
    found = measure(net(shortcut=f"scaling:{factor}"), *images(2, 8))
    assert found.units[0].shortcut_term == pytest.approx(factor**54, rel=1e-12)


@pytest.mark.parametrize(
    ("bias", "carry", "over_54"),
    [(0, 0.5, 5.6e-17), (-5, 0.99331, 0.696), (-6, 0.99753, 0.875), (-7, 0.99909, 0.952)],
)
def test_gates_by_their_bias(bias: int, carry: float, over_54: float) -> None:
    """What ranks "fail" before "works" in Table 1: 1 - g, and its 54th power."""
    model = net(shortcut=f"shortcut_gating:{bias}")
    for unit in model.modules():
        if isinstance(unit, ResidualUnit):
            nn.init.zeros_(unit.gate.weight)
    first = measure(model, *images(2, 8)).units[0]
    assert first.factor == pytest.approx(carry, abs=6e-6)
    assert first.shortcut_term == pytest.approx(over_54, rel=1e-2)


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        ("A", 1 - 1e-12, 1 + 1e-12),
        ("scaling:0.5", 7.629e-6, 7.63e-6),
        ("shortcut_gating:0", 4e-6, 2e-5),  # 2^-17 by the bias alone; W_g is random
        ("shortcut_gating:-6", 0.9, 0.96),
    ],
)
def test_original_units_whose_branch_is_zero(kind: str, least: float, most: float) -> None:
    """Real ReLUs, F = 0: |g_1| / |g_18| over the 17 units of stage 1."""
    model = net(shortcut=kind)
    for unit in model.stages[0]:
        nn.init.zeros_(unit.bn2.weight)
    units = measure(model, *images()).units
    assert least <= units[0].gradient / units[17].gradient <= most


def test_nothing_passes_17_dropouts() -> None:
    """Raw dropout and F = 0: an element in 2^17 survives stage 1, of these 16,384 none."""
    model = net(shortcut="dropout")
    for unit in model.stages[0]:
        nn.init.zeros_(unit.bn2.weight)
    found = measure(model, *images())
    assert found.units[0].gradient == 0 < found.last_gradient
    assert found.units[0].signal > 0 == found.units[17].signal


def test_total_gradients_explode_where_the_shortcut_term_vanishes() -> None:
    """At initialisation, for factors below 1: what vanishes is the shortcut term, never the whole gradient."""
    ratio = {}
    for kind in ("A", "scaling:0.5", "scaling:0.5:0.5", "scaling:0:1"):
        found = measure(net(shortcut=kind), *images(4, 8))
        ratio[kind] = found.units[0].gradient / found.last_gradient
        if kind != "A":
            assert found.units[0].shortcut_term < 1e-16
            assert ratio[kind] > 1e4
    assert ratio["A"] < 1e3


def test_share_of_negative_sums() -> None:
    """y_l < 0 before the ReLU, at initialisation: 17 % in ResNet-110, half in a plain net."""
    for kind, share in (("A", 0.17), ("scaling:0:1", 0.5)):
        units = measure(net(shortcut=kind), *images()).units
        assert sum(u.negative for u in units) / len(units) == pytest.approx(share, abs=0.02)


def test_small_weights_do_not_make_the_gradient_vanish() -> None:
    """All F scaled by epsilon: the gradient at a stage's begin becomes the one at its end."""
    model = net(order="preact")
    for stage in model.stages:
        for unit in stage:
            unit.conv2.weight.data.mul_(1e-6)
    units = measure(model, *images()).units
    assert units[1].gradient == pytest.approx(units[17].gradient, rel=1e-3)


def test_relu_before_addition_never_lets_x_fall() -> None:
    found = measure(net(order="relu_before_addition"), *images())
    inside = [u for u in found.units if u.additive is not None]
    assert min(u.smallest_step for u in inside) >= 0
    assert all(u.negative == 0 for u in inside)


# --- the program ---------------------------------------------------------------------------------------------------


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, JSON and figures, at initialisation and while training on the digits."""
    arguments = ["--model", "cifar_resnet14", "--order", "preact", "--shortcut", "A", "scaling:0.5"]
    arguments += ["--data", "digits", "--steps", "4", "--batch-size", "8", "--out", str(tmp_path / "new")]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "holds: preact A, step 4, additive form: residual" in out
    assert "holds: preact scaling:0.5, step 0, shortcut term: 0.5^6 0.0156 (expected 0.0156)" in out
    assert "DOES NOT" not in out
    content = json.loads((tmp_path / "new" / "propagation.json").read_text())
    assert [v["label"] for v in content["variants"]] == ["preact A", "preact scaling:0.5"]
    assert [s["step"] for s in content["variants"][0]["snapshots"]] == [0, 1, 2, 3, 4]
    assert len(content["variants"][0]["snapshots"][0]["units"]) == 6
    assert content["settings"]["steps"] == 4
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {
        *("propagation.json", "gradients.png", "shortcut_term.png"),
        *("negative.png", "additive.png", "two_term.png"),
    }
    for path in (tmp_path / "new").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_gates_get_a_figure_and_their_nominal_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "cifar_resnet8", "--shortcut", "shortcut_gating:-6", "--image-size", "8"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "1 - g = 0.99753, over 3 units 0.993" in capsys.readouterr().out
    assert (tmp_path / "gates.png").exists()


def test_a_statement_that_does_not_hold_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A broken unit: its output is not h + F."""
    real = ResidualUnit.forward_with_statistics

    def broken(self: Any, *args: Any) -> Any:
        y, statistics = real(self, *args)
        return y + 1e-3 * y.square(), statistics

    monkeypatch.setattr(ResidualUnit, "forward_with_statistics", broken)
    arguments = ["--model", "cifar_resnet20", "--order", "relu_only_preact", "--image-size", "8"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 1
    assert "DOES NOT HOLD: relu_only_preact, step 0, additive form" in capsys.readouterr().out


def test_a_diverged_training_is_null_in_the_json(tmp_path: Path) -> None:
    arguments = ["--model", "cifar_resnet8", "--data", "digits", "--steps", "8", "--lr", "1e30"]
    assert cli.main([*arguments, "--batch-size", "4", "--out", str(tmp_path)]) == 0
    content = json.loads(
        (tmp_path / "propagation.json").read_text(), parse_constant=lambda word: pytest.fail(word)
    )
    assert content["variants"][0]["snapshots"][-1]["loss"] is None
    assert math.isfinite(content["variants"][0]["snapshots"][0]["loss"])


BAD = {
    "model": (["--model", "resnet19"], ["name", "'resnet19'", "resnet50"]),
    "order": (["--order", "post"], ["order", "'post'", "original"]),
    "contradiction": (["--model", "cifar_preact_resnet20", "--order", "original"], ["order", "'preact'"]),
    "shortcut": (["--shortcut", "A", "gate"], ["shortcut", "'gate'", "'shortcut_gating[:gate_bias]'"]),
    "body": (["--model", "cifar_resnet29", "--body", "basic"], ["depth", "29", "6n+2"]),
    "data": (["--data", "cifar10"], ["--data", "cifar10", "digits"]),
    "steps": (["--steps", "5"], ["--steps", "5", "--data digits"]),
    "negative": (["--data", "digits", "--steps", "-1"], ["--steps", "-1", "0 or more"]),
    "batch": (["--batch-size", "1"], ["--batch-size", "1", "2 or more"]),
    "size": (["--data", "digits", "--image-size", "32"], ["--image-size", "32", "8x8"]),
    "lr": (["--lr", "nan"], ["--lr", "nan", "above 0"]),
    "number": (["--steps", "many"], ["--steps", "many"]),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_line(bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = BAD[bad]
    out = tmp_path / "out"
    assert cli.main([*arguments, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("error: ")
    for word in words:
        assert word in said
    assert not out.exists()


def test_an_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("mine")
    assert cli.main(["--model", "cifar_resnet8", "--out", str(tmp_path / "taken")]) == 2
    assert str(tmp_path / "taken") in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"
