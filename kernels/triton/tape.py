"""The launches of a function, remembered and made again: what the host does between kernels.

Which kernels a unit's forward or backward starts, on which of its tensors, and what it allocates, follow from shapes,
dtypes, the device and the chooser's tables. So a function is listened to once: every launch with the places of its
tensors, every allocation, and which arguments it wrote to. From then on :func:`replayed` allocates the results, and
one block for everything in between, and starts the kept kernels by their addresses. Unlike a CUDA graph it reads the
tensors that it is given.

Where something else happens (an operation of PyTorch's own, as a copy to channels_last or the library's convolution
on the split path) the function runs as it is, every time.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import choose
from .common import Launcher, Ready, hooked, listening

__all__ = ["replayed"]

Tensors = Sequence[Tensor | None]
Function = Callable[[Any, Any, Tensors], list[Tensor | None]]

_ALIGNMENT = 256  # bytes, in the block; kernels were compiled for multiples of 16
_MOST = 256  # entries of a memo: shapes that keep changing must not fill the memory
_ALLOCATIONS = frozenset(
    (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    )
)


class _Allocation(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    bytes: int


class _Launched(NamedTuple):
    launcher: Launcher
    places: list[int | None]
    """Of its tensors: arguments first, then those held, then allocations, in order; None where there is none."""
    dtypes: list[torch.dtype | None]


class _Recorder(TorchDispatchMode):
    """Notes what a function launches and allocates; ``failed`` says why that cannot be replayed."""

    def __init__(self, tensors: Tensors, held: Sequence[Tensor]) -> None:
        super().__init__()
        self.failed = ""
        self.allocations: list[_Allocation] = []
        self.launches: list[_Launched] = []
        self.before = len(tensors) + len(held)
        self._tensors, self._versions = tensors, [_version(t) for t in tensors]
        # What lies at an address now: freed memory is handed out again and then is the later allocation.
        self._places: dict[int, int] = {}
        for place, tensor in enumerate((*tensors, *held)):
            if tensor is not None:
                if tensor.data_ptr() in self._places and place < len(tensors):
                    self.failed = "two arguments at one address, which next time need not be"
                self._places[tensor.data_ptr()] = place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self._places[out.data_ptr()] = self.before + len(self.allocations)
            size = out.untyped_storage().nbytes()
            self.allocations.append(_Allocation(out.shape, out.stride(), out.dtype, size))
        else:
            self.failed = f"{func} runs beside the launches"
        return out

    def launched(self, launcher: Launcher, tensors: Tensors) -> None:
        """Called by every launch."""
        places = [self.place(t) for t in tensors]
        self.launches.append(_Launched(launcher, places, [None if t is None else t.dtype for t in tensors]))

    def written(self) -> list[int]:
        """Which arguments the function says it wrote to."""
        versions = [_version(t) for t in self._tensors]
        return [i for i, (now, was) in enumerate(zip(versions, self._versions, strict=True)) if now != was]

    def place(self, tensor: Tensor | None) -> int | None:
        """Where the tensor comes from."""
        if tensor is None:
            return None
        found = self._places.get(tensor.data_ptr())
        if found is None:
            self.failed = "a tensor is neither given nor allocated by the function"
        return found


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


class _Tape:
    """A function's launches on tensors of one kind; ValueError, saying why, where it cannot be replayed."""

    def __init__(
        self, recorder: _Recorder, tensors: Tensors, held: Sequence[Tensor], results: Tensors
    ) -> None:
        like = tensors[0]
        assert like is not None
        self._device = like.get_device()
        self._strides = [t.stride() for t in tensors if t is not None]
        self._written = recorder.written()
        made, before = recorder.allocations, recorder.before
        found = [recorder.place(t) for t in results]
        for place, t in zip(found, results, strict=True):
            if place is None or t is None or place < len(tensors):
                continue
            if place < before or (t.shape, t.stride(), t.dtype) != made[place - before][:3]:
                recorder.failed = "a result is held or a view"
        if recorder.failed or not recorder.launches:
            raise ValueError(recorder.failed or "nothing is launched")

        # From first to last launch: what is allocated and not handed out lives in one block, as briefly as it can.
        lives: dict[int, tuple[int, int]] = {}
        for index, launched in enumerate(recorder.launches):
            for place in launched.places:
                if place is not None:
                    lives[place] = (lives.get(place, (index, index))[0], index)
        returned = sorted({place for place in found if place is not None and place >= before})
        inside = [place for place in sorted(lives) if place >= before and place not in returned]
        self._made = [made[place - before][:3] for place in returned]
        self._offsets, self._bytes = packed([(made[place - before].bytes, *lives[place]) for place in inside])

        # The order of the addresses in :meth:`replay`; what is not there is a null pointer.
        fixed = range(len(tensors), before)
        self._fixed = [*(t.data_ptr() for t in held), 0]
        order = {place: i for i, place in enumerate((*range(len(tensors)), *returned, *inside, *fixed, None))}
        self._results = [order[place] for place in found]
        self._steps: list[tuple[Ready, tuple[int, ...], Callable[[Any], Any], tuple[Any, ...]]] = []
        for launcher, places, dtypes in recorder.launches:
            ready = launcher.ready.get(self._device)
            if ready is None or ready.kinds != dtypes:
                raise ValueError("a kernel is not kept")
            pick = operator.itemgetter(*(order[place] for place in places))
            self._steps.append((ready, launcher.grid, pick, launcher.values))

    def replay(self, tensors: Tensors) -> list[Tensor | None] | None:
        """The results on other tensors of the kind; None, with nothing done, where they are not quite of the kind."""
        first, index, like = self._steps[0][0], self._device, tensors[0]
        assert like is not None
        if [t.stride() for t in tensors if t is not None] != self._strides:
            return None
        if first.current_device() != index or hooked():
            return None
        made = [like.new_empty_strided(size, stride, dtype=dtype) for size, stride, dtype in self._made]
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        addresses += [t.data_ptr() for t in made]
        if self._bytes:
            block = like.new_empty(self._bytes, dtype=torch.uint8)
            start = block.data_ptr()
            addresses += [start + offset for offset in self._offsets]
        addresses += self._fixed
        if functools.reduce(operator.or_, addresses) & 15:
            return None
        stream = first.current_stream(index)
        for ready, grid, pick, values in self._steps:
            ready.run(
                *grid, stream, ready.function, ready.metadata, None, None, None, *pick(addresses), *values
            )
        if self._written:
            torch.autograd.graph.increment_version([tensors[i] for i in self._written])  # type: ignore[misc]
        there = [*tensors, *made]
        return [there[i] if i < len(there) else None for i in self._results]


def packed(buffers: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Offsets in one block for buffers of (bytes, first use, last use), and the block's size.

    First fit, the largest first, so that small ones leave no gaps between them: two that are in use at a time do not
    overlap.
    """
    placed: list[tuple[int, int, int, int]] = []  # start, end, first, last
    offsets = [0] * len(buffers)
    for index in sorted(range(len(buffers)), key=lambda i: -buffers[i][0]):
        (size, first, last), offset = buffers[index], 0
        for start, end, begin, until in sorted(placed):
            if begin <= last and first <= until and start < offset + size and offset < end:
                offset = end
        offsets[index] = offset
        placed.append((offset, -(-(offset + size) // _ALIGNMENT) * _ALIGNMENT, first, last))
    return offsets, max((end for _, end, _, _ in placed), default=0)


def replayed(
    table: Any,
    memo: dict[Any, Any],
    key: Any,
    function: Function,
    constants: Any,
    tensors: Tensors,
    held: Sequence[Tensor] = (),
) -> list[Tensor | None]:
    """``function(table, constants, tensors)``; from the third call on its launches without the function.

    ``memo`` belongs to tensors of the same shapes, dtypes and device, and to the tensors ``held`` in ``constants``,
    which stay where they are; ``key`` names what else the function depends on. ``tensors[0]`` is not None.
    """
    like = tensors[0]
    assert like is not None
    state = choose.state(like)
    if state is None:
        return function(table, constants, tensors)
    key = (key, state, *[t is None for t in tensors])
    known = memo.get(key)
    if type(known) is _Tape:
        results = known.replay(tensors)
        return function(table, constants, tensors) if results is None else results
    if type(known) is str:
        return function(table, constants, tensors)
    if known is None:
        # The first call compiles: listening has to wait for kernels that are kept.
        if len(memo) >= _MOST:
            memo.clear()
        memo[key] = False
        return function(table, constants, tensors)
    recorder = _Recorder(tensors, held)
    before, listening.recorder = listening.recorder, recorder
    try:
        with recorder:
            results = function(table, constants, tensors)
    finally:
        listening.recorder = before
    try:
        memo[key] = _Tape(recorder, tensors, held, results)
    except ValueError as why:
        memo[key] = str(why)
    return results
