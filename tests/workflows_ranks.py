"""Workflows of two processes, which run these functions side by side (tests/sync_ranks.py); gloo."""

from __future__ import annotations

import copy
from typing import Any

import sync_ranks
import torch
from sync_ranks import close, mine, note, step
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from workflows import NOT, SUBJECTS, WORKFLOWS, Subject, counting, elsewhere, workflow

GROUP = "Two processes"
DROPPED = {
    "timm_resnetv2_50": elsewhere(
        "test_sync_batch_norm.py::test_conversion_of_definitions[fused-then-converted-timm_resnetv2_18d]",
        NOT,
        "`convert_sync_batchnorm` drops the activation inside of `BatchNormAct2d`, fused or not, as PyTorch does it",
    )
}


def parallel(s: Subject, accumulate: bool = False, **options: bool) -> None:
    """Two steps by DDP, each rank with norms of its own: fused as plain."""
    pairs = [(m, DistributedDataParallel(m, **options)) for m in s.pair()]  # type: ignore[arg-type]
    for number in range(2):
        x = mine(s.image(4), (2, 2))
        for _, wrapped in pairs:
            with wrapped.no_sync() if accumulate and not number else sync_ranks.nothing():
                wrapped(x).square().sum().backward()
    (plain, _), (model, _) = pairs
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        close(name, q.grad, p.grad)
    first = next(model.parameters()).grad
    for other in sync_ranks.joined(first):
        note(torch.equal(other, first), "the ranks differ")
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        close(name, a, b)


def ddp(name: str, title: str, **options: bool) -> None:
    workflow(name, title, GROUP, ranks=True)(lambda s: parallel(s, **options))


ddp("ddp", "DistributedDataParallel")
ddp("ddp-static-graph", "... static_graph", static_graph=True)
ddp("ddp-find-unused-parameters", "... find_unused_parameters", find_unused_parameters=True)
ddp("ddp-gradient-as-bucket-view", "... gradient_as_bucket_view", gradient_as_bucket_view=True)
ddp("ddp-no-sync", "... no_sync, accumulating", accumulate=True)


def joined_batch(s: Subject, wrap: Any) -> None:
    """SyncBatchNorm: two processes are one on the joined batch, parts of 3 and 1."""
    plain, model = s.pair()
    call, summed = wrap(model)
    split = (3, 1)
    for _ in range(2):
        x = s.image(4)
        with torch.no_grad():
            dy = torch.randn_like(copy.deepcopy(plain)(x))
        expected_y, expected_dx = step(plain, x, dy)
        y, dx = step(call, mine(x, split), mine(dy, split))
        close("y", y, mine(expected_y, split))
        close("dx", dx, None if expected_dx is None else mine(expected_dx, split))
    grads = sync_ranks.grads(model, summed)
    for name, p in plain.named_parameters():
        grad = grads[name]
        close(name, None if grad is None else grad * (1 if summed else 2), p.grad)
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        close(name, a, b)
    sync_ranks.same_bits(model)


@workflow(
    "ddp-sync-batch-norm",
    "... SyncBatchNorm: one process on the joined batch",
    GROUP,
    ranks=True,
    but=DROPPED,
    remark="DDP itself refuses a CPU model with SyncBatchNorm children: convert the wrapped model there",
)
def ddp_synchronised(s: Subject) -> None:
    def wrap(model: nn.Module) -> tuple[Any, bool]:
        wrapped = DistributedDataParallel(model)
        nn.SyncBatchNorm.convert_sync_batchnorm(wrapped)
        return wrapped, False

    joined_batch(s, wrap)


@workflow(
    "compile-sync-batch-norm",
    "torch.compile(fuse(model)) with SyncBatchNorm",
    GROUP,
    ranks=True,
    but={
        **DROPPED,
        "own": elsewhere("test_sync_batch_norm.py::test_two_ranks[compiled]"),
        "wide_resnet": elsewhere(
            "-", "not run here", "no test: Dynamo takes seconds, and nothing in it depends on the network"
        ),
        "densenet_cifar": elsewhere(
            "-", "not run here", "no test: Dynamo takes seconds, and nothing in it depends on the network"
        ),
    },
)
def compiled_synchronised(s: Subject) -> None:
    def wrap(model: nn.Module) -> tuple[Any, bool]:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return torch.compile(model, backend="eager", fullgraph=True), True

    joined_batch(s, wrap)


@workflow(
    "compile-backend-sync-batch-norm",
    'torch.compile(model, backend="fused_preact") with SyncBatchNorm, without `fuse`',
    GROUP,
    ranks=True,
    outcome=NOT,
    remark="Dynamo traces into PyTorch's module before any backend is asked, and that refuses CPU tensors; on a GPU "
    "its norm is a Function of its own, and no site. `torch.compile(fuse(model))` runs fused",
    but={
        **dict.fromkeys(
            ("timm_resnetv2_50", "wide_resnet", "densenet_cifar"),
            elsewhere("-", "not run here", "no test: nothing in it depends on the network"),
        ),
        "own": elsewhere("test_sync_batch_norm.py::test_two_ranks[compiled]", "holds", "fused by itself"),
    },
)
def backend_synchronised(s: Subject) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(s.pair()[0])
    function = torch.compile(model, backend="fused_preact", options={"then": "eager"})
    try:
        function(s.image())
    except ValueError as error:
        note("SyncBatchNorm expected input tensor to be on GPU" in str(error), str(error))
    else:
        note(False, "no error")


@workflow("fsdp2", "FSDP2 `fully_shard`, blocks and network", GROUP, ranks=True)
def sharded(s: Subject) -> None:
    """Two steps of SGD: fused as plain."""
    pair = s.pair()
    for m in pair:
        for block in m.modules():
            if block is not m and len(list(block.children())) > 3 and not isinstance(block, nn.Sequential):
                fully_shard(block)
        fully_shard(m)
    optimisers = [torch.optim.SGD(m.parameters(), 0.01) for m in pair]
    for _ in range(2):
        x = mine(s.image(4), (2, 2))
        outputs = []
        for m, optimiser in zip(pair, optimisers, strict=True):
            optimiser.zero_grad()
            y = m(x)
            y.square().mean().backward()
            optimiser.step()
            outputs.append(y.detach())
        close("y", outputs[1], outputs[0])
    plain, model = pair
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        close(name, whole(q), whole(p))
        close(
            f"d{name}", None if q.grad is None else whole(q.grad), None if p.grad is None else whole(p.grad)
        )
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        close(name, a, b)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _scenario(row: Any, subject: str) -> None:
    def run() -> None:
        with counting() as fused:
            row.run(SUBJECTS[subject])
        note(bool(fused) != (row.claim(subject).outcome == NOT), f"{len(fused)} fused calls")

    sync_ranks.scenario(f"{row.name}-{subject}")(run)


for _row in list(WORKFLOWS.values()):
    for _subject in SUBJECTS:
        if _row.ranks and _row.runs(_subject):
            _scenario(_row, _subject)
