"""Folded weights after writes to their origins that PyTorch does not count: collectives, NumPy, shared memory.

A right output is that of a copy of the model, which folds its own: the same bits.
"""

from __future__ import annotations

import copy
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import COMPILED, disturb
from torch import Tensor, nn

import fused_preact
from fused_preact import (
    PreActBasicBlock,
    PreActBottleneck,
    PreActSequential,
    folding,
    ops,
    optimize_for_inference,
)

pytestmark = pytest.mark.usefixtures("without_gradients")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)


def _biased_unit() -> nn.Module:
    unit: Any = PreActBottleneck(16, 24, 2)
    unit.conv2 = nn.Conv2d(6, 6, 3, 2, 1)
    unit.shortcut = nn.Conv2d(16, 24, 1, 2)
    return unit


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "unit": (_biased_unit, (2, 16, 6, 5)),
    "sequence": (
        lambda: PreActSequential(PreActBasicBlock(16, 24, 2), PreActBasicBlock(24, 24)),
        (2, 16, 6, 5),
    ),
    "cifar": (lambda: fused_preact.models.cifar_preact_resnet20(num_classes=5), (1, 3, 12, 12)),
    "imagenet": (lambda: fused_preact.models.preact_resnet18(num_classes=5), (1, 3, 32, 32)),
}


def build(
    name: str, dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.contiguous_format
) -> tuple[nn.Module, Tensor]:
    """An optimised model that has folded its weights, and its input."""
    make, shape = MODELS[name]
    torch.manual_seed(1)
    model = disturb(make()).eval().to(dtype).to(memory_format=layout)
    x = torch.randn(shape).to(dtype)
    optimize_for_inference(model)(x)
    return model, x


def origins(model: nn.Module) -> dict[str, Tensor]:
    """What folded weights are made of."""
    found = {}
    for path, module in model.named_modules():
        if getattr(module, "_folded", None) is not None:
            for name, tensor in (*module.named_parameters(path), *module.named_buffers(path)):
                if tensor.is_floating_point():
                    found[name] = tensor
    return found


def fresh(model: nn.Module, x: Tensor) -> Tensor:
    """The output of folded weights that are made now."""
    return copy.deepcopy(model)(x)


def states(model: nn.Module) -> list[Any]:
    return [m._folded._state for m in model.modules() if getattr(m, "_folded", None) is not None]  # type: ignore[union-attr]


@pytest.fixture(params=["compiled", "fallback"])
def fingerprints(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What looks for the writes: the compiled operation, or PyTorch where there is none."""
    if request.param == "fallback":
        monkeypatch.setattr(ops, "_cpu_missing", "taken away by a test")
    elif ops._cpu_missing is not None:
        pytest.skip(str(ops._cpu_missing))
    return request.param


# --- in this process ------------------------------------------------------------------------------------------


def _numpy(t: Tensor) -> None:
    integers = {2: torch.int16, 4: torch.int32}[t.element_size()]
    array = t.detach().view(integers).numpy()
    array[...] = (t * 1.5).view(integers).numpy()


def _bytes(t: Tensor) -> None:
    new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t * 1.5)
    ctypes.memmove(t.data_ptr(), new.data_ptr(), new.numel() * new.element_size())


def _version_kept(t: Tensor) -> None:
    with torch.autograd._unsafe_preserve_version_counter(t):
        t.mul_(1.5)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "numpy": _numpy,
    "data": lambda t: t.data.mul_(1.5),
    "data-of-detached": lambda t: t.detach().data.mul_(1.5),
    "dlpack": lambda t: torch.from_dlpack(t.detach().data).mul_(1.5),
    "storage": lambda t: t.untyped_storage().copy_((t * 1.5).untyped_storage()),
    "memory": _bytes,
    "version-kept": _version_kept,
}


@pytest.mark.parametrize("write", WRITES)
@LAYOUTS
@DTYPES
def test_writes_of_a_whole_tensor(
    dtype: torch.dtype, layout: torch.memory_format, write: str, fingerprints: str
) -> None:
    model, x = build("unit", dtype, layout)
    old = model(x)
    for name, tensor in origins(model).items():
        version, before = tensor._version, tensor.clone()
        WRITES[write](tensor)
        assert tensor._version == version, f"{name}: a write that counts is another test's"
        torch.testing.assert_close(tensor, before * 1.5, msg=name)
        y = model(x)
        assert torch.equal(y, fresh(model, x)), name
        assert not torch.equal(y, old), name
        old = y


@pytest.mark.parametrize("name", ["sequence", "cifar", "imagenet"])
@LAYOUTS
@DTYPES
def test_writes_into_a_net(
    name: str, dtype: torch.dtype, layout: torch.memory_format, fingerprints: str
) -> None:
    """One tensor after the other; the chains in which none was written to keep their weights."""
    model, x = build(name, dtype, layout)
    tensors = origins(model)
    for index, tensor in enumerate(tensors.values()):
        if name == "imagenet" and index % 8:
            continue
        before = states(model)
        WRITES["data"](tensor)
        y = model(x)
        assert sum(a is not b for a, b in zip(before, states(model), strict=True)) == 1, list(tensors)[index]
        if index % 16 == 0:
            assert torch.equal(y, fresh(model, x)), list(tensors)[index]
    assert torch.equal(model(x), fresh(model, x))


@pytest.mark.parametrize("name", ["unit", "cifar", "imagenet"])
@DTYPES
def test_writes_of_one_element_of_a_vector(name: str, dtype: torch.dtype, fingerprints: str) -> None:
    model, x = build(name, dtype)
    written = 0
    vectors = [(key, t) for key, t in origins(model).items() if t.dim() < 2]
    for key, tensor in vectors[:: {"unit": 1, "cifar": 5, "imagenet": 9}[name]]:
        for place in {0, tensor.numel() // 2, tensor.numel() - 1}:
            before = states(model)
            tensor.data[place] += 0.5
            changed = [not state.watched.unchanged() for state in before]
            assert sum(changed) == 1, f"{key}[{place}]"
            written += 1
            if name == "unit":
                assert torch.equal(model(x), fresh(model, x)), f"{key}[{place}]"
            else:
                tensor.data[place] -= 0.5
                if any(not state.watched.unchanged() for state in before):  # rounded
                    model(x)
    assert written > 15


def test_counted_writes_of_one_element_of_a_weight(fingerprints: str) -> None:
    """What PyTorch counts is seen wherever it is."""
    model: Any = build("cifar")[0]
    x = torch.randn(1, 3, 12, 12)
    weight = model.stages[2][1].conv1.weight
    for place in range(0, weight.numel(), 1777):
        before = states(model)
        weight.view(-1)[place] += 4
        y = model(x)
        assert sum(a is not b for a, b in zip(before, states(model), strict=True)) == 1, place
        assert torch.equal(y, fresh(model, x)), place


def test_nothing_is_made_again_without_a_write(fingerprints: str) -> None:
    model: Any = build("cifar")[0]
    x = torch.randn(1, 3, 12, 12)
    # Not equal to itself, but the bytes are.
    model.stages[0][0].conv1.weight[0, 0, 0, 0] = torch.nan
    model.stages[0][0].bn2.bias[1] = torch.nan
    model(x)
    before = states(model)
    model(x)
    model(x.contiguous(memory_format=torch.channels_last))
    assert all(a is b for a, b in zip(before, states(model), strict=True))


def test_calling_it_again_folds_again(fingerprints: str) -> None:
    """What the docstring says to do after a write that may go unseen: here of any one element of a weight."""
    model: Any = build("cifar")[0]
    x = torch.randn(1, 3, 12, 12)
    weight = model.stages[2][1].conv1.weight
    for place in range(0, weight.numel(), 1777):
        weight.data.view(-1)[place] += 4
        assert torch.equal(optimize_for_inference(model)(x), fresh(model, x)), place


# --- other processes ------------------------------------------------------------------------------------------


PLACES = {
    "net-running_var": ("cifar", "stages.1.1.bn2.running_var"),
    "net-bias": ("cifar", "stages.0.2.bn1.bias"),
    "net-weight": ("cifar", "stages.1.2.conv2.weight"),
    "unit-running_var": ("unit", "bn2.running_var"),
    "unit-bias": ("unit", "conv2.bias"),
    "unit-weight": ("unit", "shortcut.weight"),
}
COLLECTIVES: dict[str, Callable[[Tensor], Any]] = {
    "all_reduce": lambda t: dist.all_reduce(t),
    "broadcast": lambda t: dist.broadcast(t, 0),
}
CASES = [
    (collective, place, dtype, layout, fallback)
    for collective in COLLECTIVES
    for place in PLACES
    for dtype in (torch.float32, torch.bfloat16)
    for layout in (torch.contiguous_format, torch.channels_last)
    for fallback in (False, True)
]


def _name(case: tuple[Any, ...]) -> str:
    collective, place, dtype, layout, fallback = case
    short = f"{dtype}-{layout}".replace("torch.", "")
    return f"{collective}-{place}-{short}{'-fallback' * fallback}"


def _rank(rank: int, folder: str, missing: str | None) -> None:
    """One of two processes: all cases, into a file of the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    with torch.no_grad():
        for case in CASES:
            collective, place, dtype, layout, fallback = case
            ops._cpu_missing = "taken away by a test" if fallback else missing
            name, path = PLACES[place]
            model, x = build(name, dtype, layout)
            tensor = model.state_dict(keep_vars=True)[path]
            tensor.mul_(1 + rank)
            old, version = model(x), tensor._version
            COLLECTIVES[collective](tensor)
            y = model(x)
            found[_name(case)] = (
                torch.equal(y, fresh(model, x)),
                not torch.equal(y, old),
                tensor._version == version,
            )
    torch.save(found, os.path.join(folder, f"found{rank}"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def collectives(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[bool, bool, bool]]]:
    """What each rank found."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = str(tmp_path_factory.mktemp("ranks"))
    mp.spawn(_rank, (folder, ops._cpu_missing), nprocs=2)
    return [torch.load(os.path.join(folder, f"found{rank}")) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES, ids=map(_name, CASES))
def test_collectives(case: tuple[Any, ...], collectives: list[dict[str, tuple[bool, bool, bool]]]) -> None:
    for rank, found in enumerate(collectives):
        right, moved, uncounted = found[_name(case)]
        assert right, f"rank {rank}"
        assert moved or (case[0], rank) == ("broadcast", 0), f"rank {rank}: the write shows"
        assert uncounted, f"rank {rank}: PyTorch counts it now, say so in optimize_for_inference"


def _write_shared(tensors: list[Tensor], asked: Any, done: Any) -> None:
    with torch.no_grad():
        for index in iter(asked.get, None):
            tensors[index].mul_(1.5)
            done.put(index)


@pytest.fixture
def other_process() -> Iterator[Callable[[list[Tensor]], Callable[[int], None]]]:
    """``other_process(tensors)(i)`` lets another process write to the i-th of the shared tensors."""
    context = mp.get_context("spawn")
    asked, done = context.Queue(), context.Queue()
    processes: list[Any] = []

    def start(tensors: list[Tensor]) -> Callable[[int], None]:
        process = context.Process(target=_write_shared, args=(tensors, asked, done), daemon=True)
        process.start()
        processes.append(process)

        def write(index: int) -> None:
            asked.put(index)
            assert done.get(timeout=120) == index

        return write

    yield start
    asked.put(None)
    for process in processes:
        process.join(30)
        process.kill()


@LAYOUTS
def test_shared_memory(
    layout: torch.memory_format, other_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    for dtype in (torch.float32, torch.bfloat16):
        model, x = build("unit", dtype, layout)
        models.append((model.share_memory(), x))
    tensors = [t for model, _ in models for t in origins(model).values()]
    write = other_process(tensors)
    for missing in (ops._cpu_missing, "taken away by a test"):
        monkeypatch.setattr(ops, "_cpu_missing", missing)
        for model, x in models:
            old = model(x)
            for name, tensor in origins(model).items():
                version = tensor._version
                write(next(i for i, t in enumerate(tensors) if t is tensor))
                assert tensor._version == version
                y = model(x)
                assert torch.equal(y, fresh(model, x)), name
                assert not torch.equal(y, old), name
                old = y


# --- the fingerprint --------------------------------------------------------------------------------------------


def flipped(t: Tensor) -> Iterator[int]:
    """Changes one byte after the other of what ``t`` refers to, and each one back."""
    memory = (ctypes.c_uint8 * (t.numel() * t.element_size())).from_address(t.data_ptr())
    for index in range(len(memory)):
        memory[index] ^= 0x10
        yield index
        memory[index] ^= 0x10


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 33, 200])
@DTYPES
def test_every_byte_of_a_vector_counts(dtype: torch.dtype, length: int, fingerprints: str) -> None:
    vectors = [torch.randn(5).to(dtype), torch.randn(length).to(dtype), torch.randn(3).to(dtype)]
    before = folding.fingerprint(vectors)
    for index in flipped(vectors[1]):
        assert folding.fingerprint(vectors) != before, index
    assert folding.fingerprint(vectors) == before


@pytest.mark.parametrize("shape", [(3, 2, 1, 1), (2, 2, 3, 3), (4, 8, 2, 2)])
def test_every_byte_of_a_small_weight_counts(shape: tuple[int, ...], fingerprints: str) -> None:
    """Of 512 bytes at most."""
    weight = torch.randn(shape)
    before = folding.fingerprint([weight])
    for index in flipped(weight):
        assert folding.fingerprint([weight]) != before, index


@pytest.mark.parametrize("shape", [(16, 16, 3, 3), (5, 40, 1, 1), (33, 100)], ids=str)
def test_every_seventh_of_a_weight_counts(shape: tuple[int, ...], fingerprints: str) -> None:
    """A write of that much memory in one piece, wherever it begins."""
    weight = torch.randn(shape)
    memory = weight.view(-1).view(torch.uint8)
    before = folding.fingerprint([weight])
    length = (memory.numel() - 64) // 7 + 1
    for start in [*range(0, memory.numel() - length, 36), memory.numel() - length]:
        memory[start : start + length] ^= 0x10
        assert folding.fingerprint([weight]) != before, start
        memory[start : start + length] ^= 0x10
    assert folding.fingerprint([weight]) == before


@pytest.mark.parametrize("shape", [(7,), (3, 2, 1, 1), (2, 11), (0,), (9, 16, 1, 1)], ids=str)
def test_what_lies_beside_does_not_count(shape: tuple[int, ...], fingerprints: str) -> None:
    whole = torch.randn(400)
    count = torch.Size(shape).numel()
    inside = whole[100 : 100 + count].view(shape)
    before = folding.fingerprint([inside])
    whole[:100] += 1
    whole[100 + count :] += 1
    assert folding.fingerprint([inside]) == before


SHAPES = [(129,), (7, 33), (5, 16, 3, 3), (16, 5, 1, 1), (64, 32, 3, 3), (1, 1, 40, 40), (300, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "view", ["dense", "channels-last", "every-second", "transposed", "offset", "expanded"]
)
def test_writes_of_all_elements(shape: tuple[int, ...], view: str, fingerprints: str) -> None:
    t = torch.randn(shape)
    if view == "channels-last":
        t = t[(...,) + (None,) * (4 - t.dim())].contiguous(memory_format=torch.channels_last)
    elif view == "every-second":
        t = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    elif view == "transposed":
        t = t.transpose(0, -1)
    elif view == "offset":
        t = torch.randn(shape[0] + 1, *shape[1:])[1:]
    elif view == "expanded":
        t = t[:1].expand(shape)
    others = [torch.randn(3), torch.randn(4, 4)]
    before = folding.fingerprint([t, *others])
    assert folding.fingerprint([t, *others]) == before
    (t[:1] if view == "expanded" else t).mul_(1 + 2**-10)
    assert folding.fingerprint([t, *others]) != before


def test_what_a_view_leaves_out_does_not_count(fingerprints: str) -> None:
    whole = torch.randn(40, 8, 3, 6)
    view = whole[..., ::2]
    before = folding.fingerprint([view])
    whole[..., 1::2] += 1
    assert folding.fingerprint([view]) == before
    view += 1
    assert folding.fingerprint([view]) != before


def test_empty_tensors_and_scalars(fingerprints: str) -> None:
    scalar = torch.tensor(1.5)
    tensors = [torch.empty(0), torch.empty(0, 3), torch.empty(2, 0, 3, 3), scalar, torch.empty(0)]
    before = folding.fingerprint(tensors)
    for index in flipped(scalar):
        assert folding.fingerprint(tensors) != before, index
    assert folding.fingerprint(tensors) == before
    assert folding.fingerprint(tensors[:1]) == folding.fingerprint([torch.empty(0)])


def test_places_count(fingerprints: str) -> None:
    """The same values elsewhere."""
    a, b = torch.randn(70), torch.randn(70)
    assert folding.fingerprint([a, b]) != folding.fingerprint([b, a])
    assert folding.fingerprint([a]) != folding.fingerprint([a.flip(0)])
    assert folding.fingerprint([a]) != folding.fingerprint([a.roll(16)])


@COMPILED
def test_the_operation_is_a_number() -> None:
    t = torch.randn(100)
    assert isinstance(torch.ops.fused_preact.fingerprint([t]), int)
    assert torch.ops.fused_preact.fingerprint([t]) == torch.ops.fused_preact.fingerprint([t.clone()])
