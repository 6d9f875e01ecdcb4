"""Peak memory, the bytes kept for the backward pass, and the fused model timed against the plain one."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Config
from .data import DataSet
from .loop import WARMUP_STEPS, Trainer


class PeakMemory:
    """Peak bytes since construction: CUDA's allocator, or on a CPU the resident set of the whole process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.what = "CUDA tensors" if device.type == "cuda" else "the resident set of this process"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # Linux: set VmHWM back to what is resident now
        except OSError:
            self.what += " since its start"

    def read(self) -> int:
        """Bytes; 0 where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            pass
        try:
            import resource
            import sys
        except ImportError:  # Windows
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def saved_bytes(trainer: Trainer) -> int:
    """Bytes that one training step of ``trainer`` keeps alive between forward and backward.

    Every storage counts once and whole, parameters and buffers not at all. Moves the running statistics and the
    data stream, so give it a trainer made for the purpose.
    """
    model = trainer.model
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images, labels = next(trainer.batches.epoch(0))
    model.train()
    # A kept storage lives until the loss goes, so no address is counted for two storages.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), trainer.autocast():
        loss = trainer.loss(model(trainer.as_wanted(images)), labels)
    del loss
    return sum(kept.values())


@dataclass(frozen=True)
class StepComparison:
    """Training steps of the fused and the plain model, taken in turns."""

    fused_images_per_s: float
    plain_images_per_s: float
    speedup: float  # median over the pairs of plain seconds / fused seconds
    low: float  # the pairs' quartiles: how far the speedup can be trusted
    high: float
    pairs: int


def compare_steps(config: Config, data: DataSet, budget_s: float = 15.0, block: int = 4) -> StepComparison:
    """Train both models from the same weights on the same batches, in alternating blocks of steps.

    Machine noise hits both halves of a pair alike, and the order within a pair alternates, so the median of the
    pairs' ratios is steadier than a ratio of two separate runs. Takes about ``budget_s`` seconds.
    """
    trainers = [Trainer(config, data, fused=fused) for fused in (True, False)]
    trainers[1].model.load_state_dict(trainers[0].model.state_dict())
    batches = list(itertools.islice(trainers[0].batches.epoch(0), block))
    batches = [batch for batch in batches if len(batch[1]) == len(batches[0][1])]  # no smaller last one
    for trainer in trainers:
        trainer.model.train()
        trainer.set_learning_rate(config.recipe.warmup_epochs)
        for step in range(WARMUP_STEPS):
            trainer.step(*batches[step % len(batches)])

    def seconds(trainer: Trainer) -> float:
        def steps() -> None:
            for step in range(block):
                trainer.step(*batches[step % len(batches)])

        return _timed(steps, trainer.device)

    times: list[tuple[float, float]] = []
    end = time.perf_counter() + budget_s
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        pair = [0.0, 0.0]
        for which in (0, 1) if len(times) % 2 == 0 else (1, 0):
            pair[which] = seconds(trainers[which])
        times.append((pair[0], pair[1]))
    images = block * len(batches[0][1])
    ratios = [plain / fused for fused, plain in times]
    low, _, high = statistics.quantiles(ratios, n=4)
    return StepComparison(
        fused_images_per_s=images / statistics.median(fused for fused, _ in times),
        plain_images_per_s=images / statistics.median(plain for _, plain in times),
        speedup=statistics.median(ratios),
        low=low,
        high=high,
        pairs=len(times),
    )


def _timed(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
