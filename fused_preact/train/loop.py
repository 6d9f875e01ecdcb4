"""One epoch of training, one evaluation, and the re-estimation of BN statistics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config, Recipe
from .data import Batches, DataSet, Source, plain_batches
from .log import Log

WARMUP_STEPS = 5  # of a process: allocator, library plans, compiled kernels; not counted in images/s


@dataclass(frozen=True)
class EpochStats:
    """Means over one pass; accuracy in percent."""

    loss: float
    accuracy: float
    images_per_s: float
    seconds: float


def build_model(config: Config, data: DataSet, *, fused: bool) -> nn.Module:
    """The model of ``config`` with the initial weights of its seed, the same for fused and plain."""
    from fused_preact import models  # not at the top: --help should not wait for the kernels

    torch.manual_seed(config.seed)
    return models.create(
        config.recipe.model, num_classes=data.num_classes, fused=fused, in_channels=data.in_channels
    )


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """One group, or with ``decay_norm=False`` a second one without decay: BN parameters and biases, the vectors."""
    params = [p for p in model.parameters() if p.requires_grad]
    if recipe.decay_norm:
        return [{"params": params, "weight_decay": recipe.weight_decay}]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD with the recipe's settings over ``model``'s parameters."""
    return torch.optim.SGD(
        parameter_groups(model, recipe), lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov
    )


def logits_of(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """float32 logits [N,classes] of images [N,C,H,W], or the mean of each image's views [N,views,C,H,W]."""
    if images.ndim == 4:
        return model(images).float()
    return model(images.flatten(0, 1)).float().unflatten(0, images.shape[:2]).mean(1)


class Trainer:
    """A model with its optimizer, loss scaler and batches: what a checkpoint has to restore."""

    def __init__(self, config: Config, data: DataSet, *, fused: bool) -> None:
        self.config, self.recipe, self.data = config, config.recipe, data
        self.device = torch.device(config.device)
        self.dtype = getattr(torch, config.dtype)
        model = build_model(config, data, fused=fused)
        self.model = model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(self.model, self.recipe)
        # fp16 gradients underflow without a loss scale; float32 and bfloat16 have the range.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.batches = Batches(data.train, self.recipe, config.seed)
        self._warm = False
        self._recorded: tuple[torch.Size, Callable[[Tensor], Tensor]] | None = None

    def autocast(self) -> torch.autocast:
        """Mixed precision for the forward pass; off for float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One SGD step. Returns the mean loss and the number of right answers, on the device: no sync here."""
        self.optimizer.zero_grad(set_to_none=True)
        model = self._record(images) if self.config.graph else self.model
        with self.autocast():
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.smoothing)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if labels.ndim == 2:  # of mixup or cutmix: right is the larger share
            labels = labels.argmax(1)
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()

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

    def train_epoch(self, epoch: int, log: Log) -> EpochStats:
        """Epoch number ``epoch``, counted from 0."""
        self.model.train()
        steps = len(self.batches)
        skip = min(WARMUP_STEPS, steps - 1) if not self._warm else 0
        loss_sum = torch.zeros((), device=self.device, dtype=torch.float64)
        right = torch.zeros((), device=self.device, dtype=torch.int64)
        seen = timed = 0
        begin = start = time.perf_counter()
        for i, (images, labels) in enumerate(self.batches.epoch(epoch)):
            if i == skip:
                self._synchronise()
                start = time.perf_counter()
            # The middle of the step: neither the first step of a warm-up nor the last of a cosine is wasted at 0.
            self.set_learning_rate(epoch + (i + 0.5) / steps)
            loss, hits = self.step(images, labels)
            loss_sum += loss * len(labels)
            right += hits
            seen += len(labels)
            timed += len(labels) if i >= skip else 0
            if log.due():  # reading the sums waits for the device, so only as often as a bar is redrawn
                now = time.perf_counter()
                rate = timed / (now - start) if timed else seen / (now - begin)
                log.bar(epoch, i + 1, steps, loss_sum.item() / seen, 100 * right.item() / seen, rate)
        self._synchronise()
        end = time.perf_counter()
        self._warm = True
        return EpochStats(
            loss_sum.item() / seen, 100 * right.item() / seen, timed / (end - start), end - begin
        )

    def evaluate(self, split: Source | None = None) -> EpochStats:
        """Loss and accuracy on ``split`` (default: the test split) with the running statistics, one view each."""
        split = self.data.test if split is None else split
        self.model.eval()
        loss = torch.zeros((), device=self.device, dtype=torch.float64)
        right = torch.zeros((), device=self.device, dtype=torch.int64)
        start = time.perf_counter()
        with torch.no_grad(), self.autocast():
            for images, labels in plain_batches(split, self.recipe):
                logits = logits_of(self.model, images)
                loss += F.cross_entropy(logits, labels, reduction="sum")
                right += (logits.argmax(1) == labels).sum()
        mean_loss, accuracy = loss.item() / len(split), 100 * right.item() / len(split)
        seconds = time.perf_counter() - start
        return EpochStats(mean_loss, accuracy, len(split) / seconds, seconds)

    def recalibrate(self) -> None:
        """Replace BN's running statistics by the plain average over the training images, not augmented.

        The exponential average lags behind the weights; the published ResNet-v2 models were recomputed like this.
        As in training, an image left over for a batch of its own is left out.
        """
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # PyTorch's cumulative average
        self.model.train()
        with torch.no_grad(), self.autocast():
            for images, _ in plain_batches(self.data.train, self.recipe, at_least=2):
                self.model(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
