"""What ``fuse`` leaves as it was: names, copies, modes, transforms, threads; and what it refuses."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convert_helpers import (
    ALL,
    Block,
    Net,
    assert_close,
    assert_same,
    assert_same_step,
    awkward,
    counts,
    image,
    net,
    pair,
    seeded,
    state_of,
    step,
)
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from fused_preact import backend, explain, functional, fuse, models, unfuse

pytestmark = pytest.mark.usefixtures("one_thread")


# --- what stays ------------------------------------------------------------------------------------------


def test_model_keeps_its_modules_parameters_and_names() -> None:
    model = net()
    modules = [(n, id(m), type(m)) for n, m in model.named_modules()]
    tensors = [(n, id(t)) for n, t in [*model.named_parameters(), *model.named_buffers()]]
    keys, printed = list(model.state_dict()), repr(model)
    assert fuse(model) is model
    model(image())
    assert [(n, id(m), type(m)) for n, m in model.named_modules()] == modules
    assert [(n, id(t)) for n, t in [*model.named_parameters(), *model.named_buffers()]] == tensors
    assert list(model.state_dict()) == keys
    assert repr(model) == printed


def test_unfuse_gives_back_what_was_there() -> None:
    model = net()
    before = state_of(model)
    held = {name: id(value) for name, m in model.named_modules() for value in (m._modules, m._parameters)}
    assert unfuse(fuse(model)) is model
    after = state_of(model)
    assert after.keys() == before.keys()
    for name in before:
        assert list(after[name]) == list(before[name]), name
        assert all(after[name][key] is value for key, value in before[name].items()), name
    assert held == {
        name: id(value) for name, m in model.named_modules() for value in (m._modules, m._parameters)
    }
    assert counts(model, image()) == (0, 0, 0)
    assert unfuse(model) is model


def test_fuse_restores_modes_and_random_streams() -> None:
    model = net()
    model.layer[0].eval()
    flags = [m.training for m in model.modules()]
    seeded(1)
    expected = torch.rand(3), random.random()
    seeded(1)
    fuse(model)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert [m.training for m in model.modules()] == flags


def test_fuse_twice() -> None:
    plain, model = pair(net())
    assert_same(plain, fuse(model))


def test_unfuse_leaves_a_forward_that_somebody_put_there() -> None:
    model = fuse(net())
    mine = model.layer[0].forward = lambda x: x
    unfuse(model)
    assert model.layer[0].__dict__["forward"] is mine
    assert "forward" not in model.layer[1].__dict__


def test_it_looks_like_the_forward_that_was_written() -> None:
    """torch.export reads the code of a forward, others the names of its arguments."""
    plain, model = pair(net())
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert model.forward.__name__ == "forward"
    assert model.forward.__code__ is Net.forward.__code__


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("nested", [False, True], ids=["itself", "inside"])
def test_a_network_of_ours_is_left_alone(nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is fused by itself, statistics handed on to the head; what is not ours in it is fused."""
    own: Any = models.cifar_preact_resnet20().double()
    model: Any = nn.Sequential(own) if nested else own
    computed: list[int] = []
    stats = functional.ops.reference.bn_stats
    monkeypatch.setattr(functional.ops.reference, "bn_stats", lambda x: computed.append(1) or stats(x))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with backend("reference"):
        expected = model(x)
        once = len(computed)
        before = state_of(model)
        assert fuse(model) is model
        assert state_of(model).keys() == before.keys()
        assert not [n for n, m in model.named_modules() if "forward" in m.__dict__]
        assert torch.equal(model(x), expected)
        assert len(computed) == 2 * once, "the head has its statistics computed again"
    assert {row.path for row in explain(model).rows} == {"own unit", "own head"}
    assert explain(model).fused
    own.stages[0][1] = awkward(Block(16, 16))
    left = [row.path for row in explain(model).rows if not row.fused]
    assert left == ["unit", "unit"]
    plain = copy.deepcopy(model)
    fuse(model)
    where = "0.stages.0.1" if nested else "stages.0.1"
    assert [n for n, m in model.named_modules() if "forward" in m.__dict__] == [where]
    assert explain(model).fused
    assert_same_step(plain, model, x)


WRAPPED = {
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda m: torch.compile(m, backend="eager"),
    "symbolic_trace": fx.symbolic_trace,
}


@pytest.mark.parametrize("way", WRAPPED)
def test_wrapped_models(way: str) -> None:
    """What is inside is fused; a module whose code FX wrote is one as others are."""
    plain = net()
    model: Any = fuse(WRAPPED[way](copy.deepcopy(plain)))
    assert explain(model).fused
    if way != "torch.compile":
        x = torch.ones(2, 3, 6, 6, dtype=torch.float64)
        assert counts(getattr(model, "module", model), x) == ALL
        plain(x)
        assert_close("output", model(x), plain(x))


# --- copies ----------------------------------------------------------------------------------------------


def _through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": _through_file,
}


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a call"])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_fused_and_independent(way: str, ran: bool) -> None:
    plain, model = pair(net())
    if ran:
        for m in (plain, model):
            m(torch.ones(2, 3, 6, 6, dtype=torch.float64))
    twin = COPIES[way](model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for b in model.buffers():
            b.zero_()
    assert_same(plain, twin)
    assert all(p.grad is None for p in model.parameters())
    assert all((b == 0).all() for b in model.buffers())


def test_a_dropped_model_goes_away() -> None:
    model = fuse(net())
    model(image())
    gone = weakref.ref(model.layer[0].conv1)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_load_state_dict(assign: bool) -> None:
    plain, model = pair(net())
    model(image())
    state = {k: v * 0.7 if v.is_floating_point() else v + 4 for k, v in plain.state_dict().items()}
    for m in (plain, model):
        m.load_state_dict(copy.deepcopy(state), assign=assign)
    assert_same(plain, model)


def test_to_empty() -> None:
    plain = net()
    with torch.device("meta"):
        model = fuse(Net().double())
    model.to_empty(device="cpu").load_state_dict(plain.state_dict())
    assert_same(plain, model)


# --- modes, dtypes, formats --------------------------------------------------------------------------------


def test_modes_take_turns() -> None:
    plain, model = pair(net())
    for training in (True, False, True, False):
        assert_same(plain.train(training), model.train(training))


def test_dropout_breaks_its_site_in_training_only() -> None:
    plain, model = pair(net(p=0.4))
    for _ in range(2):
        assert_same(plain.train(), model.train(), (3, 1, 1))
        assert_same(plain.eval(), model.eval())


def test_frozen_statistics() -> None:
    plain, model = pair(net())
    for m in (plain, model):
        m.layer[0].bn2.eval()
        m.bn.eval()
    assert_same(plain, model)
    before = model.bn.running_mean.clone()
    model(image())
    assert torch.equal(model.bn.running_mean, before)


@pytest.mark.parametrize("frozen", ["layer.0", "bn1", "conv", "weight", "stem", ""])
def test_frozen_subsets(frozen: str) -> None:
    plain, model = pair(net())
    for m in (plain, model):
        for name, p in m.named_parameters():
            p.requires_grad_(frozen not in name)
    if frozen == "":
        x = image()
        assert torch.equal(model(x).isfinite(), plain(x).isfinite())
        assert not model(x).requires_grad
        return
    assert_same(plain, model)


def test_dtypes_change() -> None:
    plain, model = pair(net().float())
    x = image(torch.float32)
    model(x), plain(x)
    plain.load_state_dict(model.state_dict())
    assert_same(plain.double(), model.double())
    model.to(torch.float32)
    assert model(image(torch.float32)).dtype == torch.float32


def test_optimiser_and_decay_by_type() -> None:
    plain, model = pair(net())
    optimisers = []
    for m in (plain, model):
        norms = [p for c in m.modules() if isinstance(c, nn.BatchNorm2d) for p in c.parameters(recurse=False)]
        rest = [p for p in m.parameters() if not any(p is n for n in norms)]
        groups = [{"params": rest, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
        optimisers.append(torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    for seed in range(3):
        for m, optimiser in zip((plain, model), optimisers, strict=True):
            torch.manual_seed(seed)
            optimiser.zero_grad()
            m(image()).square().sum().backward()
            optimiser.step()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert_close(name, q, p)


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_memory_formats(memory_format: torch.memory_format) -> None:
    plain, model = pair(net().layer[0].to(memory_format=memory_format))
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64).contiguous(memory_format=memory_format)
    assert_same_step(plain, model, x)
    assert model(x).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batches_of_one_and_none(count: int, training: bool) -> None:
    plain, model = pair(net().train(training))
    x = image(count=count)
    assert_same_step(plain, model, x)


def test_one_value_per_channel_is_refused_as_by_pytorch() -> None:
    plain, model = pair(net())
    for m in (plain, model):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            m(image(count=1, size=1))


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_gradients(context: Any, training: bool) -> None:
    plain, model = pair(net().train(training))
    x = image()
    with context():
        expected = plain(x)
        assert_close("output", model(x), expected)
        assert counts(model, x) == ALL
    plain(x)
    assert_same(plain, model) if not training else None


# --- transforms and tracers ------------------------------------------------------------------------------


def test_fx_symbolic_trace() -> None:
    plain, model = pair(net())
    model(image())
    graphs = [[(n.op, str(n.target)) for n in fx.symbolic_trace(m).graph.nodes] for m in (plain, model)]
    assert graphs[0] == graphs[1]


class Checkpointed(nn.Sequential):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        for unit in self:
            x = checkpoint(unit, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_checkpoint(reentrant: bool) -> None:
    model = net()
    model.layer = Checkpointed(*model.layer)
    model.layer.reentrant = reentrant
    plain, model = pair(model)
    expected, actual = step(plain, (image(),)), None
    torch.manual_seed(0)
    plain.load_state_dict(model.state_dict())
    x = image()
    expected, actual = step(plain, (x,)), step(model, (x,))
    counters = {name for name in expected if "running" in name or "num_batches" in name}
    for name in expected.keys() - counters:
        assert_close(name, actual[name], expected[name])
    for name in counters:
        if "num_batches" in name:
            assert 1 <= actual[name] <= expected[name], name  # once, where plain counts some twice
    assert counts(model, x) == ALL


class Recomputing(Block):
    """Its own forward recomputes part of itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn2(checkpoint(self.first, x, use_reentrant=False)))) + x

    def first(self, x: Tensor) -> Tensor:
        return self.conv1(F.relu(self.bn1(x)))


def test_a_checkpoint_inside_stays_one() -> None:
    plain, model = pair(awkward(Recomputing(6, 6)))
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    calls = 0
    for m in (plain, model):
        before = calls

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        with pytest.MonkeyPatch.context() as patch:
            forward = nn.Conv2d.forward
            patch.setattr(nn.Conv2d, "forward", lambda *a, forward=forward: count() or forward(*a))
            m(x).sum().backward()
        assert calls - before == 3


# --- threads, averages, replicas -------------------------------------------------------------------------


def test_threads() -> None:
    """The first call, which traces, from several at once, beside one that runs another model."""
    plain, model = pair(net().eval())
    other = net().eval()
    inputs = [image() for _ in range(6)]
    results: list[Any] = [None] * len(inputs)
    call = nn.Module.__call__

    def work(i: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(5):
                    other(inputs[i])
                    results[i] = model(inputs[i])
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nn.Module.__call__ is call
    for x, result in zip(inputs, results, strict=True):
        assert isinstance(result, Tensor), result
        assert_close("output", result, plain(x))
    assert counts(model, inputs[0]) == ALL


def test_another_thread_runs_a_model_while_one_is_traced() -> None:
    other, x = net().eval(), image()
    results: list[Any] = []

    def work() -> None:
        try:
            with torch.no_grad():
                results.append(other(x))
        except Exception as error:
            results.append(error)

    class Meeting(Block):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            return super().forward(x)

    expected = other(x)
    model = fuse(awkward(Meeting(6, 6)))
    model(torch.randn(2, 6, 5, 5, dtype=torch.float64))
    assert results
    for result in results:
        assert isinstance(result, Tensor), result
        assert_close("output", result, expected)


def test_outputs_can_be_saved_and_loaded() -> None:
    model = fuse(net().layer)
    file = io.BytesIO()
    with torch.no_grad():
        torch.save(model(torch.randn(2, 6, 5, 5, dtype=torch.float64)), file)
    file.seek(0)
    assert torch.load(file).shape == (2, 8, 3, 3)


# --- what cannot be fused --------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [fuse, unfuse])
@pytest.mark.parametrize(
    "wrong", [None, 3, "model", nn.ReLU, F.relu], ids=lambda w: getattr(w, "__name__", str(w))
)
def test_no_module(function: Callable[..., Any], wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"model: got \w+, allowed is a torch.nn.Module"):
        function(wrong)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_scripted() -> None:
    with pytest.raises(TypeError, match="scripted"):
        fuse(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))))


def test_lazy_parameters() -> None:
    model = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), nn.LazyConv2d(4, 1))
    before = state_of(model)
    with pytest.raises(ValueError, match=r"uninitialised parameter '2\.weight'"):
        fuse(model)
    assert {n: list(d) for n, d in state_of(model).items()} == {n: list(d) for n, d in before.items()}
    model(torch.randn(2, 5, 4, 4))
    assert counts(fuse(model), torch.randn(2, 5, 4, 4)) == (1, 0, 0)


def test_lazy_norms() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d(affine=False), nn.ReLU(), nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match="uninitialised"):
        fuse(model)


def test_nothing_to_fuse_warns_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    before = state_of(model)
    with pytest.warns(UserWarning, match="found nothing to fuse in Sequential") as warned:
        assert fuse(model) is model
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert state_of(model) == before
