"""Forwards of every kind: what they write to, return, draw, ask for and are called with."""

from __future__ import annotations

import collections
import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convert_helpers import (
    Block,
    assert_close,
    assert_same_step,
    awkward,
    counts,
    pair,
    seeded,
    step,
    tensors_of,
    watching,
)
from torch import Tensor, nn

from fused_preact import fuse
from fused_preact.convert import program

pytestmark = pytest.mark.usefixtures("one_thread")


# --- forwards of every kind ------------------------------------------------------------------------------


class Probe(nn.Module):
    """Norms and convolutions, and a forward of the test's own."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv, self.conv2 = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 1)
        self.list: list[Any] = []
        self.last: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def site(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x)))


def probe(forward: Callable[..., Any]) -> Any:
    cls = type("Probe", (Probe,), {"forward": forward})
    globals()["Probe_"] = cls
    return awkward(cls(None))


def four(size: int = 5, count: int = 2) -> Tensor:
    return torch.randn(count, 4, size, size, dtype=torch.float64)


def _write_between(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    a = F.relu(self.bn(x))
    x.mul_(2)
    return self.conv(a) + x


def _write_activation(self: Any, x: Tensor) -> Tensor:
    a = F.relu(self.bn(x))
    a.mul_(2)
    return self.conv(a)


def _write_view(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    a = F.relu(self.bn(x))
    x.view(-1).mul_(2)
    return self.conv(a) + x


def _write_shortcut(self: Any, x: Tensor) -> Tensor:
    shortcut = x * 1
    out = self.site(x)
    shortcut += 1
    return out + shortcut


def _write_through_another_name(self: Any, x: Tensor) -> Tensor:
    y = self.site(x)
    z = y
    y += x
    return z * 2


def _view_of_the_sum(self: Any, x: Tensor) -> Tensor:
    y = self.site(x)
    v = y.flatten(1)
    y += x
    return v * 2


def _sum_into_the_shortcut(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    v = x[:, :2]
    x += self.site(x)
    return v * 2


def _sum_into_another(self: Any, x: Tensor) -> Tensor:
    other = self.conv2(x)
    other += self.site(x)
    return other * 2


def _sum_into_another_with_a_view(self: Any, x: Tensor) -> Tensor:
    other = self.conv2(x)
    view = other[:, :2]
    other += self.site(x)
    return view * 2


def _numbers(self: Any, x: Tensor) -> Tensor:
    height = x.shape[2]
    more = height
    more += 1
    return self.site(x) * height + more


def _broadcast(self: Any, x: Tensor) -> Tensor:
    return self.site(x) + x[:, :, :1, :1]


def _broadcast_up(self: Any, x: Tensor) -> Tensor:
    return self.conv(F.relu(self.bn(x[:1]))) + x


def _two_dtypes(self: Any, x: Tensor) -> Tensor:
    return self.site(x) + x.float()


def _twice(self: Any, x: Tensor) -> Tensor:
    return self.site(self.site(x))


def _norm_twice(self: Any, x: Tensor) -> Tensor:
    return self.conv(F.relu(self.bn(x))) + self.conv2(F.relu(self.bn(x * 2)))


def _sum_of_one(self: Any, x: Tensor) -> Tensor:
    y = self.site(x)
    return y + y


def _tuple(self: Any, x: Tensor) -> Any:
    y = self.site(x)
    return y, (x, self.conv2(F.relu(self.bn2(y))))


def _dict(self: Any, x: Tensor) -> Any:
    y = self.site(x)
    return {"y": y, "rest": [x, self.conv2(F.relu(self.bn2(y)))]}


def _ordered(self: Any, x: Tensor) -> Any:
    return collections.OrderedDict(y=self.site(x), x=x)


Pair = collections.namedtuple("Pair", "y x")


def _named(self: Any, x: Tensor) -> Any:
    return Pair(self.site(x), x)


def _draws(self: Any, x: Tensor) -> Tensor:
    return self.site(x) if random.random() < 0.5 else self.conv2(x)


def _draws_a_tensor(self: Any, x: Tensor) -> Tensor:
    return self.site(x) * torch.rand(1, dtype=torch.float64)


def _sets(self: Any, x: Tensor) -> Tensor:
    self.last = y = self.site(x)
    return y


def _appends(self: Any, x: Tensor) -> Tensor:
    y = self.site(x)
    self.list.append(y)
    return y


def _asks(self: Any, x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return self.site(x)
    return self.conv2(x[0])


def _shapes(self: Any, x: Tensor) -> Tensor:
    if x.shape[2] > 4:
        x = x[:, :, 1:]
    return self.site(x)


def _no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        a = F.relu(self.bn(x))
    return self.conv(a)


def _saved_elsewhere(self: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return self.site(x)


def _no_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return self.site(x)


def _asks_for_grad(self: Any, x: Tensor) -> Tensor:
    return self.site(x) * (2 if torch.is_grad_enabled() else 3)


def _detached(self: Any, x: Tensor) -> Tensor:
    return self.conv(F.relu(self.bn(x.detach()))) + x


def _norm_of_lines(self: Any, x: Tensor) -> Tensor:
    return self.site(x) + F.batch_norm(x.flatten(2), None, None, training=True).view_as(x)


def _kept_activation(self: Any, x: Tensor) -> Any:
    a = F.relu(self.bn(x))
    return self.conv(a), a


def _kept_norm(self: Any, x: Tensor) -> Any:
    z = self.bn(x)
    return self.conv(F.relu(z)), z


def _two_readers(self: Any, x: Tensor) -> Tensor:
    a = F.relu(self.bn(x))
    return torch.cat([self.conv(a), self.conv2(a)], 1)


def _three_readers(self: Any, x: Tensor) -> Tensor:
    a = F.relu(self.bn(x))
    return self.conv(a) + self.conv2(a) + a


# Forward, and how many sites and additions run fused (None: that depends).
FORWARDS: dict[str, tuple[Callable[..., Any], tuple[int, int] | None]] = {
    "x written between": (_write_between, (0, 0)),
    "activation written": (_write_activation, (0, 0)),
    "x written through a view": (_write_view, (0, 0)),
    "shortcut written": (_write_shortcut, None),
    "sum with another name": (_write_through_another_name, (1, 1)),
    "view of a sum": (_view_of_the_sum, (1, 0)),
    "sum into the shortcut": (_sum_into_the_shortcut, (1, 0)),
    "sum into another": (_sum_into_another, (1, 1)),
    "sum into another with a view": (_sum_into_another_with_a_view, (1, 0)),
    "numbers": (_numbers, (1, 0)),
    "sum that broadcasts": (_broadcast, None),
    "sum that broadcasts the branch": (_broadcast_up, None),
    "sum of two dtypes": (_two_dtypes, None),
    "module called twice": (_twice, (2, 0)),
    "norm called twice": (_norm_twice, (2, 1)),
    "sum of one value": (_sum_of_one, (1, 0)),
    "returns a tuple": (_tuple, (2, 0)),
    "returns a dict": (_dict, (2, 0)),
    "returns an OrderedDict": (_ordered, (0, 0)),
    "returns a namedtuple": (_named, (1, 0)),
    "draws in Python": (_draws, (0, 0)),
    "draws a tensor": (_draws_a_tensor, (0, 0)),
    "sets an attribute": (_sets, (0, 0)),
    "appends to a list": (_appends, (0, 0)),
    "asks for a tensor": (_asks, (0, 0)),
    "asks for a shape": (_shapes, (0, 0)),
    "no_grad inside": (_no_grad, (0, 0)),
    "what is saved goes elsewhere": (_saved_elsewhere, (0, 0)),
    "autocast inside": (_no_autocast, (1, 0)),
    "asks whether gradients are wanted": (_asks_for_grad, (1, 0)),
    "detached": (_detached, (1, 1)),
    "other norms": (_norm_of_lines, None),
    "activation returned": (_kept_activation, (0, 0)),
    "norm returned": (_kept_norm, (0, 0)),
    "two readers": (_two_readers, (2, 0)),
    "three readers": (_three_readers, (0, 0)),
}


@pytest.mark.filterwarnings("ignore:.*found nothing to fuse")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", FORWARDS)
def test_forwards(name: str, training: bool) -> None:
    forward, expected = FORWARDS[name]
    random.seed(1)  # the first draw takes the branch with the site
    plain, model = pair(probe(forward).train(training))
    x = four()
    refused = raises(copy.deepcopy(plain), x)  # then the values alone are compared, below
    for _ in range(0 if refused else 2):
        assert_same_step(plain, model, x)
    seeded()
    a = model(x)
    seeded()
    b = plain(x)
    assert type(a) is type(b)
    with torch.no_grad():
        seeded()
        a = model(x)
        seeded()
        for one, other in zip(tensors_of(a), tensors_of(plain(x)), strict=True):
            assert_close("without gradients", one, other)
    assert len(model.list) == len(plain.list)
    assert (model.last is None) == (plain.last is None)
    if expected is not None:
        with watching(model) as ran:
            model(x)
        assert (len(ran.sites), ran.additions) == expected


def raises(model: nn.Module, x: Tensor) -> bool:
    """Whether it writes to what autograd has kept."""
    try:
        step(model, (x,))
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return True
    return False


def _optional(
    self: Any, x: Tensor, residual: Tensor | None = None, scale: float = 1, *, negate: bool = False
) -> Tensor:
    y = self.site(x)
    if residual is not None:
        y = y + residual
    if scale is True:
        y = y + 5
    return (-y if negate else y) * scale


def _listed(self: Any, xs: list[Tensor]) -> Tensor:
    return self.conv(F.relu(self.bn(torch.cat([x[:, :2] for x in xs], 1))))


def _variable(self: Any, *xs: Tensor) -> Tensor:
    return sum(self.site(x) for x in xs)


def _keywords(self: Any, x: Tensor, **options: Any) -> Tensor:
    y = self.site(x)
    return y + options["other"] if "other" in options else y


def calls_of(
    x: Tensor, y: Tensor
) -> dict[str, list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]]:
    return {
        "optional": [
            (_optional, (x,), {}),
            (_optional, (x, y), {}),
            (_optional, (x,), {"residual": y}),
            (_optional, (x, None, 3), {}),
            (_optional, (x, None, 3.0), {"negate": True}),
            (_optional, (x, None, True), {}),
            (_optional, (x, None, 1), {}),
            (_optional, (), {"x": x, "negate": True}),
            (_optional, (x, None, torch.tensor(2.0, dtype=torch.float64)), {}),
        ],
        "listed": [(_listed, ([x, y],), {}), (_listed, ((y, x),), {})],
        "variable": [(_variable, (x,), {}), (_variable, (x, y), {})],
        "keywords": [(_keywords, (x,), {}), (_keywords, (x,), {"other": y})],
    }


@pytest.mark.filterwarnings("ignore:.*found nothing to fuse")
@pytest.mark.parametrize("kind", ["optional", "listed", "variable", "keywords"])
def test_arguments(kind: str) -> None:
    x, y = four(), four()
    calls = calls_of(x, y)[kind]
    plain, model = pair(probe(calls[0][0]).eval())
    for _ in range(2):
        for _, args, kwargs in calls:
            assert_close(f"{args} {kwargs}", model(*args, **kwargs), plain(*args, **kwargs))


def test_forms_of_arguments_are_bounded() -> None:
    plain, model = pair(probe(_optional).eval())
    x = four()
    for i in range(30):
        assert_close("output", model(x, None, i / 7), plain(x, None, i / 7))
    assert len(model.forward.programs) <= 8
    with watching(model) as ran:
        assert_close("an array", model(x, None, [2.0][0]), plain(x, None, 2.0))
    assert ran.composites == 0


class Options:
    """An argument that is no tensor, and changes."""

    scale = 1.0
    __hash__ = None  # type: ignore[assignment]


def _with_options(self: Any, x: Tensor, options: Any = None) -> Tensor:
    y = self.site(x)
    return y if options is None else y * options.scale


def test_arguments_that_change() -> None:
    plain, model = pair(probe(_with_options).eval())
    x, options = four(), Options()
    for scale in (1.0, 2.0):
        options.scale = scale
        assert_close("output", model(x, options), plain(x, options))


def test_a_module_that_cannot_be_traced_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.last is not None and x.sum() < 0:
            x = -x
        return self.site(x)

    model = fuse(probe(forward))
    model.last = "asked for"
    traces: list[int] = []
    trace = program.trace
    monkeypatch.setattr(program, "trace", lambda *args: traces.append(1) or trace(*args))
    for _ in range(3):
        model(four())
    assert len(traces) == 1
    model.last = None
    with watching(model) as ran:
        model(four())
    assert ran.counts == (1, 0, 0)


def test_input_written_afterwards() -> None:
    """As PyTorch says it, or right."""
    for shape in ((2, 4, 5, 5), (2, 4, 1, 7)):
        plain, model = pair(probe(lambda self, x: self.site(x)))
        results = []
        for m in (plain, model):
            torch.manual_seed(0)
            leaf = torch.randn(shape, dtype=torch.float64, requires_grad=True)
            x = leaf * 1
            y = m(x)
            with torch.no_grad():
                x.mul_(2)
            try:
                y.sum().backward()
                results.append(leaf.grad)
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                results.append(None)
        assert results[1] is None or results[0] is not None


def test_a_static_input_that_numpy_writes_to() -> None:
    """Several convolutions share the statistics of x, for one call only."""
    plain, model = pair(probe(_two_readers))
    x = four()
    for _ in range(2):
        x.numpy()[...] = torch.randn(2, 4, 5, 5).numpy()
        assert_close("output", model(x), plain(x))
    assert not x.__dict__


class Between(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        x = self[0](x)
        x.mul_(3).add_(1)
        return self[1](x)


def test_what_a_unit_makes_is_written_to_before_the_next() -> None:
    """Its statistics came with it, and are no longer its own."""
    plain, model = pair(awkward(Between(Block(4, 4), Block(4, 4))))
    assert_same_step(plain, model, four())
    assert counts(model, four()) == (4, 2, 0)


def test_autocast_with_a_float32_shortcut() -> None:
    plain, model = pair(probe(lambda self, x: self.site(x) + x).float())
    x = four().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == plain(x).dtype == torch.float32


class Body(Probe):
    """Returns its first activation too, which only some callers want."""

    def forward(self, x: Tensor) -> Any:
        a = F.relu(self.bn(x))
        return self.conv2(F.relu(self.bn2(self.conv(a)))), a


@pytest.mark.parametrize("wanted", [False, True])
def test_what_a_child_returns_and_nobody_reads(wanted: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y, a = self.run(x)
        return y * 2 + a if wanted else y * 2

    model = probe(forward)
    model.run = awkward(Body(None))
    plain, model = pair(model)
    assert_same_step(plain, model, four())
    assert counts(model, four())[0] == (1 if wanted else 2)


def test_a_context_inside_counts_in_every_context() -> None:
    """What a forward sets around a part of itself, called where it makes no difference and where it does."""
    plain, model = pair(probe(_no_autocast).float())
    x = four().float()
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert model(x).dtype == plain(x).dtype == torch.float32
    plain, model = pair(probe(_no_grad))
    x = four()
    with torch.no_grad():
        model(x), plain(x)
    assert_same_step(plain, model, x)
