"""fuse(model, example_input): a wrong match is found and named, and the model stays as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from definitions import DEFINITIONS
from definitions_base import conv3x3
from definitions_residual import KuangliuBasic
from torch import Tensor, nn

from fused_preact import functional
from fused_preact.convert import explain, fuse
from fused_preact.convert.eager import FusedForward

pytestmark = pytest.mark.usefixtures("one_thread")


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A unit with a shortcut of its own, one with a projection, and biases."""
    torch.manual_seed(3)
    model = nn.Sequential(conv3x3(3, 8), KuangliuBasic(8, 8), KuangliuBasic(8, 12, 2))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.to(dtype)


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def state(model: nn.Module) -> dict[str, Any]:
    """All that ``fuse`` must leave alone when it raises."""
    held: dict[str, Any] = {n: t.clone() for n, t in model.state_dict(keep_vars=False).items()}
    for name, module in model.named_modules():
        held[f"{name} flags"] = {
            k: v for k, v in module.__dict__.items() if isinstance(v, bool | int | float)
        }
        held[f"{name} names"] = list(module.__dict__)
        held[f"{name} hooks"] = len(module._forward_hooks)
    for name, parameter in model.named_parameters():
        held[f"{name} grad"] = parameter.grad
        held[f"{name} id"] = id(parameter)
    return held


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        assert same, name


def refused(model: nn.Module, example: Any, error: type[Exception], match: str) -> BaseException:
    """``fuse`` raises, and leaves model, example and random streams alone."""
    before, drawn, drawn_python = state(model), torch.get_rng_state(), random.getstate()
    with pytest.raises(error, match=match) as caught:
        fuse(model, example)
    assert_same(before, state(model))
    assert torch.equal(drawn, torch.get_rng_state())
    assert drawn_python == random.getstate()
    return caught.value


# --- right matches pass ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
@pytest.mark.parametrize(
    "name",
    [
        *("kuangliu_50", "functional_wide_resnet", "timm_resnetv2_18d", "densenet_bc", "drop_path_resnet"),
        *("wide_resnet_dropout", "skipped_units", "half_frozen", "norm_options", "silu"),
    ],
)
@pytest.mark.filterwarnings("ignore:fused_preact.fuse")
def test_a_right_match_passes(name: str, dtype: torch.dtype) -> None:
    definition = DEFINITIONS[name]
    model = definition.build().to(dtype).train()
    x = torch.randn(definition.shape, dtype=dtype)
    before, given = state(model), x.clone()
    drawn, drawn_python = torch.get_rng_state(), random.getstate()
    fuse(model, x)
    after = {name: value for name, value in state(model).items() if not name.endswith(" names")}
    assert_same({name: value for name, value in before.items() if name in after}, after)
    assert torch.equal(x, given)
    assert x.grad is None
    assert torch.equal(drawn, torch.get_rng_state())
    assert drawn_python == random.getstate()
    assert explain(model).fused == (name != "silu")


class Several(nn.Module):
    """Positional and keyword arguments, integers, a dict and a dataclass of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small()
        self.table = nn.Embedding(5, 12)

    def forward(self, x: Tensor, words: Tensor, scale: float = 1.0) -> Any:
        y = self.body(x) * scale
        return {"map": y, "both": Pair(y.mean((2, 3)) + self.table(words), words * 2), "scale": scale}


@dataclass
class Pair:
    first: Tensor
    second: Tensor


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
def test_forms_of_the_example(kind: str) -> None:
    words = torch.tensor([1, 4])
    examples = {
        "tuple": (image(), words, 0.5),
        "list": [image(), words],
        "dict": {"words": words, "x": image(), "scale": 2.0},
    }
    model = fuse(Several(), examples[kind])
    assert explain(model).fused


def test_an_input_that_is_written_to_stays() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.mul_(2))

    x = image()
    fuse(Writes(), x)
    assert torch.equal(x, image())


def test_works_inside_of_no_grad_and_autocast() -> None:
    class Heard(nn.Identity):
        heard: ClassVar[list[bool]] = []

    def hear(*_: Any) -> None:
        Heard.heard.append(torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled())

    model = small().append(Heard())
    model[-1].register_forward_hook(hear)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert explain(fuse(model, image())).fused
    assert Heard.heard
    assert not any(Heard.heard)
    with torch.inference_mode():
        assert explain(fuse(small(), image().clone())).fused


# --- wrong ones are named ---------------------------------------------------------------------------------------

Call = Callable[..., Tensor]


def plant(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Call], Call]) -> None:
    monkeypatch.setattr(functional, "_unit", wrong(functional._unit))


def drops_residual(unit: Call) -> Call:
    def wrong(x: Tensor, sites: Any, projection: Any, identity: bool, *rest: Any) -> Any:
        return unit(x, sites, projection, False, *rest)

    return wrong


def updates_twice(unit: Call) -> Call:
    def wrong(x: Tensor, *rest: Any) -> Any:
        with torch.no_grad():
            unit(x, *rest)
        return unit(x, *rest)

    return wrong


def wrong_dgamma(unit: Call) -> Call:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            return weight.view_as(weight)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * 1.001

    def wrong(x: Tensor, sites: Any, *rest: Any) -> Any:
        bn, conv = sites[-1]
        return unit(x, [*sites[:-1], (bn._replace(weight=Doubled.apply(bn.weight)), conv)], *rest)

    return wrong


def loses_dx(unit: Call) -> Call:
    return lambda x, *rest: unit(x.detach(), *rest)


def other_eps(unit: Call) -> Call:
    def wrong(x: Tensor, sites: Any, *rest: Any) -> Any:
        return unit(x, [(bn._replace(eps=bn.eps * 1.1), conv) for bn, conv in sites], *rest)

    return wrong


def rough_in_float32(unit: Call) -> Call:
    def wrong(x: Tensor, *rest: Any) -> Any:
        y, made = unit(x, *rest)
        return (y if y.dtype == torch.float64 else y * (1 + 2.0**-14)), made

    return wrong


def only_in_evaluation(unit: Call) -> Call:
    def wrong(x: Tensor, sites: Any, *rest: Any) -> Any:
        if not sites[0][0].training:
            sites = [(bn._replace(running_mean=bn.running_mean + 0.1), conv) for bn, conv in sites]
        return unit(x, sites, *rest)

    return wrong


def fails(unit: Call) -> Call:
    def wrong(*args: Any) -> Any:
        raise IndexError("out of bounds")

    return wrong


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (drops_residual, r"in the output \(training, float64\): the error is"),
        (updates_twice, r"in the buffer 1\.bn1\.running_mean \(training, float64\): the error is"),
        (wrong_dgamma, r"in the gradient of 1\.bn2\.weight \(training, float64\): the error is .*allowed is"),
        (loses_dx, r"in the gradient of the input\[0\] \(training, float64\): NoneType instead of"),
        (other_eps, r"in the output \(training, float64\): the error is"),
        (rough_in_float32, r"in the output \(training, float32\): the error is .*, allowed is"),
        (only_in_evaluation, r"in the output \(evaluation, float64\): the error is"),
        (fails, r"fails in training, torch\.float64, .*IndexError: out of bounds"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_wrong_match_is_found_and_named(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Call], Call], named: str
) -> None:
    model = small()
    first = str(refused_by(monkeypatch, model, wrong, named))
    assert "forward" not in {k for m in model.modules() for k in m.__dict__}
    assert str(refused(model, image(), RuntimeError, named)) == first, "two runs say two things"
    torch.randn(7)
    random.random()
    assert str(refused(model, image(), RuntimeError, named)) == first, "it depends on what was drawn before"


def refused_by(monkeypatch: pytest.MonkeyPatch, model: nn.Module, wrong: Any, named: str) -> BaseException:
    plant(monkeypatch, wrong)
    return refused(model, image(), RuntimeError, named)


def test_a_refused_second_conversion_leaves_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is as it was: fused where it had been."""
    model = fuse(small())
    before = {m: m.__dict__["forward"] for m in model.modules() if "forward" in m.__dict__}
    assert before
    plant(monkeypatch, updates_twice)
    with pytest.raises(RuntimeError):
        fuse(model, image())
    assert {m: m.__dict__["forward"] for m in model.modules() if "forward" in m.__dict__} == before


def test_a_counter_that_runs_on_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(unit: Call) -> Call:
        def run(x: Tensor, sites: Any, *rest: Any) -> Any:
            if sites[0][0].training:
                sites[0][0].num_batches_tracked.add_(1)
            return unit(x, sites, *rest)

        return run

    refused_by(
        monkeypatch,
        small(),
        wrong,
        r"the buffer 1\.bn1\.num_batches_tracked .*: the error is 1, allowed is 0",
    )


def test_the_mode_that_the_model_is_in_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(unit: Call) -> Call:
        def run(x: Tensor, sites: Any, *rest: Any) -> Any:
            y, made = unit(x, sites, *rest)
            return (y * 1.01 if len({bn.training for bn, _ in sites}) > 1 else y), made

        return run

    model = small()
    plant(monkeypatch, wrong)
    assert fuse(copy.deepcopy(model), image()) is not None
    model[1].bn1.eval()
    refused(model, image(), RuntimeError, r"the output \(the mode that it is in, float64\)")


# --- examples and models that cannot be compared ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "error", "said"),
    [
        (torch.randn(2, 4, 8, 8), RuntimeError, "the model refuses it in training .*channels"),
        (torch.randn(2, 3, 8, 8).int(), RuntimeError, "the model refuses it in training"),
        ((image(), image()), TypeError, "the model refuses it in training .*positional"),
        ({"picture": image()}, TypeError, "the model refuses it in training .*picture"),
        (
            torch.randn(1, 3, 1, 1),
            ValueError,
            "the model refuses it in training .*Expected more than 1 value",
        ),
    ],
    ids=["channels", "integers", "arguments", "name", "one value"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_what_the_model_refuses(dtype: torch.dtype, example: Any, error: type[Exception], said: str) -> None:
    if isinstance(example, Tensor) and example.is_floating_point():
        example = example.to(dtype)
    raised = refused(small(dtype), example, ValueError, f"^example_input: {said}")
    assert isinstance(raised.__cause__, error)


@pytest.mark.parametrize(
    "example", ["image.png", 3, {1: image()}, {image()}], ids=["str", "int", "keys", "set"]
)
def test_no_example(example: Any) -> None:
    refused(small(), example, TypeError, "^example_input: got .*, allowed are a tensor, a tuple or list")


def test_a_model_that_returns_no_tensor() -> None:
    class Says(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()

        def forward(self, x: Tensor) -> str:
            self.body(x)
            return "a cat"

    refused(Says(), image(), ValueError, "^example_input: .*it returns no tensor")


def test_a_model_that_cannot_be_copied() -> None:
    class Uncopied(nn.Module):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("one of a kind")

    model = small().append(Uncopied())
    model[-1].forward = lambda x: x
    refused(model, image(), ValueError, "^example_input: the model cannot be copied .*one of a kind")


def test_a_model_that_cannot_run_in_float64() -> None:
    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.float32)

    model = nn.Sequential(Single(), small())
    refused(
        model, image(), ValueError, "^example_input: a copy of the model cannot run in float64 in training"
    )

    class Fixed(nn.Module):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            raise NotImplementedError("packed weights")

        def forward(self, x: Tensor) -> Tensor:
            return x

    refused(
        nn.Sequential(Fixed(), small()),
        image(),
        ValueError,
        r"^example_input: the model cannot be converted to torch\.float64 .*packed weights",
    )


def test_a_model_without_weights_on_a_device() -> None:
    with pytest.raises(ValueError, match=r"^example_input: .*meta device"):
        fuse(small().to("meta"), image())


def test_forwards_of_the_copies_are_those_of_the_model() -> None:
    """The copy's forwards look as deep as the model's: a unit with code in a child is one unit there too."""
    model = fuse(DEFINITIONS["pytorchcv_preresnet50"].build())
    twin = copy.deepcopy(model)
    for mine, its in zip(model.modules(), twin.modules(), strict=True):
        a, b = mine.__dict__.get("forward"), its.__dict__.get("forward")
        assert (a is None) == (b is None)
        if isinstance(a, FusedForward):
            assert len(a.inline) == len(b.inline)
            assert b.owner is its
