"""One epoch of training, one evaluation, and the re-estimation of BN statistics."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config
from .data import Batches, DataSet, plain_batches
from .data.draws import derive
from .ema import EMA
from .log import Log
from .networks import build_model, build_optimizer, checkpoint_units, spread
from .world import World

WARMUP_STEPS = 5  # of a process: allocator, library plans, compiled kernels; not counted in images/s


@dataclass(frozen=True)
class EpochStats:
    """Means over one pass; accuracies in percent."""

    loss: float
    accuracy: float
    images_per_s: float
    seconds: float
    top5: float = 0.0


class Sums:
    """What one rank has added up in an epoch so far, over all processes that it has been trained by."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device, dtype=torch.float64)
        self.right = torch.zeros((), device=device, dtype=torch.int64)
        self.seen = self.timed = 0  # images; those of timed_seconds, after the warm-up
        self.seconds = self.timed_seconds = 0.0
        self._last: float | None = None
        self._timing = False

    def tick(self, *, timed: bool = False) -> None:
        """Count the seconds since the last tick; from ``timed`` on as those of the images that are ``timed``."""
        now = time.perf_counter()
        if self._last is not None:
            self.seconds += now - self._last
            self.timed_seconds += now - self._last if self._timing else 0.0
        self._last, self._timing = now, self._timing or timed

    def pause(self) -> None:
        """Tick, and count no seconds from here on."""
        self.tick()
        self._last = None

    def add(self, loss: Tensor, right: Tensor, images: int, *, timed: bool) -> None:
        """One step's mean loss and right answers."""
        self.loss += loss * images
        self.right += right
        self.seen += images
        self.timed += images if timed else 0

    def state(self) -> dict[str, float]:
        """Plain numbers, every digit; waits for the device."""
        loss, right = self.loss.item(), self.right.item()
        if self._last is not None:
            self.tick()
        return {
            "loss": loss,
            "right": right,
            "seen": self.seen,
            "timed": self.timed,
            "seconds": self.seconds,
            "timed_seconds": self.timed_seconds,
        }

    def load(self, states: list[dict[str, float]], world: World) -> None:
        """Go on from the ``states`` of all ranks; where their number has changed, rank 0 goes on from all of them."""
        mine = [states[world.rank]] if len(states) == world.size else states if world.first else []
        self.loss.fill_(sum(state["loss"] for state in mine))
        self.right.fill_(sum(int(state["right"]) for state in mine))
        self.seen = sum(int(state["seen"]) for state in mine)
        self.timed = sum(int(state["timed"]) for state in mine)
        self.seconds = max(state["seconds"] for state in states)
        self.timed_seconds = max(state["timed_seconds"] for state in states)

    @staticmethod
    def of(states: list[dict[str, float]]) -> EpochStats:
        """The means over the ranks' ``states``, added in their order."""
        total = {name: sum(state[name] for state in states) for name in ("loss", "right", "seen", "timed")}
        seconds = max(state["seconds"] for state in states)
        timed = max(state["timed_seconds"] for state in states)
        rate = total["timed"] / timed if total["timed"] and timed else total["seen"] / max(seconds, 1e-9)
        return EpochStats(total["loss"] / total["seen"], 100 * total["right"] / total["seen"], rate, seconds)


def logits_of(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Logits [N,classes], at least float32, of images [N,C,H,W], or means over views of [N,views,C,H,W]."""
    logits = model(images.flatten(0, -4))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if images.ndim == 4 else logits.unflatten(0, images.shape[:2]).mean(1)


class Trainer:
    """A model with its optimizer, loss scaler and batches: what a checkpoint has to restore.

    ``epoch``, counted from 0, and ``step_in_epoch``, steps done in it, are where training is. Nothing random is kept:
    batches and the stream of dropout are functions of the seed and of that place.
    """

    def __init__(self, config: Config, data: DataSet, *, fused: bool, world: World | None = None) -> None:
        self.config, self.recipe, self.data = config, config.recipe, data
        self.world = world or World()
        self.device = self.world.device(config.device)
        self.dtype = getattr(torch, config.dtype)
        model = build_model(config, data, fused=fused).to(self.device)
        if config.dtype == "float64":
            model = model.double()
        # fully_shard cuts up contiguous weights only; images stay channels_last.
        if config.channels_last and not (config.fsdp and self.world.size > 1):
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.grad_checkpointing:
            checkpoint_units(model)
        self.model = model
        self.forward = spread(model, config, self.world, self.device)
        if config.compile:
            self.forward.compile()
        self.optimizer = build_optimizer(self.model, self.recipe)
        # fp16 gradients underflow without a loss scale; float32 and bfloat16 have the range.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.ema = EMA(self.model, config.model_ema_decay) if config.model_ema else None
        self.batches = Batches(
            data.train, self.recipe, config.seed, rank=self.world.rank, world=self.world.size
        )
        self.epoch = self.step_in_epoch = 0
        self.sums = Sums(self.device)
        self._warm = False
        self._recorded: tuple[torch.Size, Callable[[Tensor], Tensor]] | None = None

    def autocast(self) -> torch.autocast:
        """Mixed precision for the forward pass; off for float32 and float64."""
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype in (torch.bfloat16, torch.float16)
        )

    def step(self, images: Tensor, labels: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
        """One SGD step on this rank's share of a batch of ``count`` images, in ``grad_accum_steps`` parts.

        Gradients are those of the mean over the ``count`` images. Returns this rank's mean loss and number of right
        answers, on the device: no sync here.
        """
        self.optimizer.zero_grad(set_to_none=True)
        images = self.as_wanted(images)
        # Two images at least: BN cannot train on one value per channel.
        parts = min(self.config.grad_accum_steps, max(len(labels) // 2, 1))
        loss = torch.zeros((), device=self.device)
        right = torch.zeros((), device=self.device, dtype=torch.int64)
        pairs = list(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True))
        for number, (some_images, some_labels) in enumerate(pairs):
            with self._gradients(travel=number == len(pairs) - 1):
                forward = self._record(some_images) if self.config.graph else self.forward
                with self.autocast():
                    logits = forward(some_images)
                    part = self.loss(logits, some_labels)
                # Averaged over the ranks, this is the part's share in the mean over the whole batch.
                share = len(some_labels) * self.world.size / (count or len(labels) * self.world.size)
                self.scaler.scale(part if share == 1 else part * share).backward()
            own = len(some_labels) / len(labels)
            loss = part.detach() if own == 1 else loss + own * part.detach()
            right = right + _right(logits, some_labels)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss, right

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy that training minimises."""
        return F.cross_entropy(logits, labels, label_smoothing=self.recipe.smoothing)

    def _gradients(self, *, travel: bool) -> Any:
        """Around a backward pass: gradients are summed over the ranks with the last part only."""
        if self.world.size == 1:
            return nullcontext()
        if self.config.fsdp:
            self.forward.set_requires_gradient_sync(travel)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if travel else cast(Any, self.forward).no_sync()

    def as_wanted(self, images: Tensor) -> Tensor:
        """``images`` in the model's memory format and dtype."""
        if not self.config.channels_last:
            images = images.contiguous()
        return images.double() if self.dtype == torch.float64 else images

    def _record(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        """The model as two CUDA graphs, recorded for batches like the first; the model itself for another batch."""
        if self._recorded is None:
            # The recording runs a few steps: their batch statistics are taken back.
            buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
            # Autocast's cache of cast weights would outlive the recording.
            enabled = self.dtype != torch.float32
            with torch.autocast(self.device.type, self.dtype, enabled, cache_enabled=False):
                # Around the model, whose own forward stays as it is for evaluation and the last batch of an epoch.
                around = nn.Sequential(self.model)
                replay = torch.cuda.make_graphed_callables(around, (images.clone(),))
            self._recorded = images.shape, cast(Callable[[Tensor], Tensor], replay)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
        shape, replay = self._recorded
        return replay if images.shape == shape else self.model

    def set_learning_rate(self, epoch: float) -> float:
        """Set every group's rate to the schedule's at ``epoch`` and return it."""
        rate = self.recipe.learning_rate(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def train_epoch(self, log: Log, after_step: Callable[[], None] = lambda: None) -> EpochStats:
        """The rest of epoch ``epoch`` from ``step_in_epoch`` on. ``after_step`` may save the trainer, and raise."""
        self.model.train()
        steps, sums = len(self.batches), self.sums
        skip = min(self.step_in_epoch + (0 if self._warm else WARMUP_STEPS), steps - 1)
        sums.tick()
        batches = self.batches.epoch(self.epoch, self.step_in_epoch)
        for i, (images, labels) in enumerate(batches, start=self.step_in_epoch):
            if i == skip:
                self._synchronise()
                sums.tick(timed=True)
            # The middle of the step: neither the first step of a warm-up nor the last of a cosine is wasted at 0.
            self.set_learning_rate(self.epoch + (i + 0.5) / steps)
            torch.manual_seed(derive(self.config.seed, "step", self.epoch, i, self.world.rank))  # for dropout
            loss, right = self.step(images, labels, self.batches.count(i))
            if self.ema is not None:
                self.ema.update(self.epoch * steps + i)
            sums.add(loss, right, len(labels), timed=i >= skip)
            self.step_in_epoch = i + 1
            if log.bar(self.epoch, i + 1, steps):
                # Reading the sums waits for the device, so only as often as the bar is redrawn.
                now = sums.of([sums.state()])
                log.detail(now.loss, now.accuracy, now.images_per_s * self.world.size)
            after_step()
        self._synchronise()
        sums.pause()
        self._warm = True
        return sums.of(self.world.gather(sums.state()))

    def next_epoch(self) -> None:
        """Stand at the beginning of the epoch after this one."""
        self.epoch, self.step_in_epoch, self.sums = self.epoch + 1, 0, Sums(self.device)

    def evaluate(
        self, after_batch: Callable[[], None] = lambda: None, batches: int | None = None
    ) -> EpochStats:
        """Loss and accuracies on the test split with the running statistics, or on its first ``batches``.

        Each image counts once, on the rank that has it. Of an image in several views the logits are averaged.
        """
        self.world.copy_from_first(list(self.model.buffers()))
        self.model.eval()
        loss = torch.zeros((), device=self.device, dtype=torch.float64)
        counts = torch.zeros(3, device=self.device, dtype=torch.int64)
        start = time.perf_counter()
        for images, labels in itertools.islice(self._plain(self.data.test), batches):
            if len(labels):
                with torch.no_grad(), self.autocast():
                    logits = logits_of(self.model, self.as_wanted(images))
                loss += F.cross_entropy(logits, labels, reduction="sum")
                counts[0] += (logits.argmax(1) == labels).sum()
                best = logits.topk(min(5, logits.shape[1])).indices
                counts[1] += (best == labels[:, None]).sum()
                counts[2] += len(labels)
            after_batch()
        told = self.world.gather((loss.item(), *counts.tolist()))
        total, right, in_five, seen = (sum(column) for column in zip(*told, strict=True))
        seconds = time.perf_counter() - start
        return EpochStats(
            total / seen, 100 * right / seen, seen / seconds, seconds, top5=100 * in_five / seen
        )

    def recalibrate(self, count: int | None = None) -> None:
        """Replace BN's running statistics by the plain average over the training images, not augmented.

        ``count`` of them, at equal distances, or all. The exponential average lags behind the weights; the published
        ResNet-v2 models were recomputed like this. As in training, an image left over for a batch of its own is left
        out. Ranks average what they found.
        """
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # PyTorch's cumulative average
        self.model.train()
        with torch.no_grad(), self.autocast():
            for images, _ in self._plain(self.data.train.spread(count), at_least=2):
                # Of several views any serves: the recipe's first.
                self.model(self.as_wanted(images[:, 0] if images.ndim == 5 else images))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            for statistics in (norm.running_mean, norm.running_var):
                assert statistics is not None
                self.world.sum(statistics).div_(self.world.size)

    def _plain(self, source: Any, at_least: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        return plain_batches(
            source, self.recipe, rank=self.world.rank, world=self.world.size, at_least=at_least
        )

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """How many answers are right; of a mixed image's labels the larger one counts."""
    return (logits.detach().argmax(1) == (labels.argmax(1) if labels.ndim == 2 else labels)).sum()
