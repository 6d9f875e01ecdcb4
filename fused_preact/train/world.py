"""The processes of a run: torchrun's ranks, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# Longer than the first compilation of a model on one rank, which the others wait for.
TIMEOUT = timedelta(minutes=10)
LOST = ("connection closed", "connection reset", "timed out", "timeout", "gloo", "nccl", "socket")


@dataclass
class World:
    """Rank ``rank`` of ``size``, and what ranks say to each other beside gradients. Without torchrun: one rank."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    _control: Any = None
    """A gloo group of its own: small messages that wait for no GPU."""
    _pending: tuple[Any, Tensor] | None = field(default=None, repr=False)

    @property
    def first(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of this rank: ``cuda`` is the one of its local rank."""
        if name == "cuda" and self.size > 1:
            return torch.device("cuda", self.local_rank)
        return torch.device(name)

    def broadcast(self, value: T) -> T:
        """Rank 0's ``value``, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, group=self._control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The ``value`` of each rank, on every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._control)
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks of ``tensor``, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def copy_from_first(self, tensors: list[Tensor]) -> None:
        """Overwrite ``tensors`` with rank 0's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def agree(self, save: bool, stop: int) -> tuple[bool, int]:
        """What the ranks said at the previous call: whether any wants to save, the largest ``stop`` of all.

        Every rank calls this equally often and gets the same answer. The votes travel during the step between two
        calls, so nobody waits for them. One rank alone is answered at once.
        """
        if self.size == 1:
            return save, stop
        before, answer = self._pending, (False, 0)
        votes = torch.tensor([int(save), stop])
        self._pending = dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._control, async_op=True), votes
        if before is not None:
            before[0].wait()
            answer = bool(before[1][0]), int(before[1][1])
        return answer

    def forget_votes(self) -> None:
        """Leave the last votes unanswered: they are of a run that has ended."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None

    def first_to(self, what: str) -> bool:
        """Whether this rank is the first to ask; where nobody can tell (torchrun itself is gone) it is."""
        try:
            # torchrun's store is in torchrun's process: it outlives any rank.
            return dist.distributed_c10d._get_default_store().add(what, 1) == 1
        except Exception:
            return True


def join(device: str | None) -> World:
    """The world that torchrun's variables describe, once its ranks have found each other; raises ValueError.

    ``device`` is the flag: without it ranks use GPUs where there are any. Collectives on CPU tensors run on gloo, on
    CUDA tensors on NCCL.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return World()
    rank, size, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = torch.cuda.is_available() and (device or "cuda").startswith("cuda")
    if cuda:
        if device not in (None, "cuda"):
            raise ValueError(f"--device {device}: each process has a GPU of its own; allowed: cuda, cpu")
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"--nproc-per-node: local rank {local}, but this machine has {torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    return World(rank, size, local, dist.new_group(backend="gloo", timeout=TIMEOUT) if size > 1 else None)


def leave() -> None:
    """Take the process group down, if there is one."""
    if dist.is_available() and dist.is_initialized():
        with suppress(Exception):
            dist.destroy_process_group()


def is_loss(error: BaseException) -> bool:
    """Whether ``error`` is what a collective raises where another rank has gone."""
    if not (dist.is_available() and dist.is_initialized()) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in LOST)


def check_together(world: World, work: Callable[[], T]) -> T:
    """``work()`` on every rank; where it fails on any, every rank raises, the first failing rank's words on rank 0.

    For what a user can get wrong, so that no rank waits for one that has given up.
    """
    result, error = None, None
    try:
        result = work()
    except (ValueError, OSError, ImportError, RuntimeError) as caught:
        if world.size == 1 or is_loss(caught):
            raise
        error = caught
    from . import console

    told = world.gather(None if error is None else console.one_line(error))
    for rank, text in enumerate(told):
        if text is not None:
            raise ValueError(text if rank == 0 else f"rank {rank}: {text}") from error
    return result  # type: ignore[return-value]
