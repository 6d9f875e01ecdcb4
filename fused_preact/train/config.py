"""What a run is made of: a recipe, and the run's options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

DTYPES = ("float32", "bfloat16", "float16", "float64")
BACKENDS = ("auto", "triton", "cpu", "reference")
SCHEDULES = ("cosine", "step")
DATASETS = ("digits", "cifar10", "cifar100", "imagenet")
INTERPOLATIONS = ("bilinear", "bicubic")
ON_BAD_IMAGE = ("skip", "error")


@dataclass(frozen=True)
class Recipe:
    """How one data set is trained: SGD, its schedule, its augmentation. ``recipes`` has them by name.

    The learning rate rises linearly from ``warmup_lr`` over ``warmup_epochs``, or stays there with
    ``warmup_constant``; then it either falls as half a cosine to zero (``schedule="cosine"``) or is multiplied by
    0.1 at each epoch of ``milestones`` (``schedule="step"``). ``mean`` and ``std`` are per channel and in the units
    of the stored bytes; ``pixel_mean`` subtracts the mean image of the training set instead.

    Digits and CIFAR: flip, pad with ``pad`` zeros after normalisation, crop. Images of files: a crop of ``img_size``
    pixels, either of an area in ``scale`` and an aspect in ``ratio``, resized, or of the image with its shorter side
    resized to one of ``short_side``; then ``color_jitter`` (brightness, contrast and saturation in random order) and
    ``lighting`` (the standard deviation of AlexNet's PCA noise). A test resizes the shorter side to ``val_img_size /
    crop_pct`` and crops the centre, or the corners too, each mirrored, with ``ten_crop``.
    """

    name: str
    model: str
    epochs: int
    batch_size: int
    lr: float
    schedule: str
    milestones: tuple[float, ...]
    warmup_epochs: float
    momentum: float
    nesterov: bool
    weight_decay: float
    decay_norm: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool
    compare_accuracy: bool
    warmup_lr: float = 0.0
    warmup_constant: bool = False
    pixel_mean: bool = False
    smoothing: float = 0.0
    """Share of the label that is spread evenly over all classes."""
    mixup: float = 0.0
    """Alpha of the Beta distribution; 0 is off."""
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    img_size: int | None = None
    """None for the data sets whose images all have one size."""
    scale: tuple[float, ...] = (0.08, 1.0)
    ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    short_side: tuple[int, ...] = ()
    train_interpolation: str = "bicubic"
    color_jitter: float = 0.0
    lighting: float = 0.0
    val_img_size: int | None = None
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    ten_crop: bool = False

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2)):  # BN cannot train on one value per channel
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        for name in ("lr", "weight_decay", "warmup_epochs", "warmup_lr", "mixup", "cutmix", "lighting"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be finite and not negative")
        for name, most in (
            ("momentum", 1),
            ("pad", 32),  # CIFAR's images are 32 wide
            ("mixup_prob", 1),
            ("mixup_switch_prob", 1),
            ("color_jitter", 1),
        ):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 to {most}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing={self.smoothing}: must be 0 to below 1")
        for name, allowed in (
            ("schedule", SCHEDULES),
            ("train_interpolation", (*INTERPOLATIONS, "random")),
            ("interpolation", INTERPOLATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed: {', '.join(allowed)}")
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"mean={self.mean}, std={self.std}: must have a number for each channel")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs}: must be at most epochs={self.epochs}")
        self._check_views()

    def _check_views(self) -> None:
        for name in ("img_size", "val_img_size"):
            size = getattr(self, name)
            if size is not None and not 1 <= size <= 4096:
                raise ValueError(f"{name}={size}: must be 1 to 4096")
        if (self.img_size is None) != (self.val_img_size is None):
            raise ValueError(f"img_size={self.img_size}, val_img_size={self.val_img_size}: both or neither")
        if (self.img_size is not None) != (self.data == "imagenet"):
            raise ValueError(
                f"img_size={self.img_size}: of --data imagenet only, and never without; this is {self.data}"
            )
        for name in ("color_jitter", "lighting", "short_side", "ten_crop"):
            if getattr(self, name) and self.img_size is None:
                raise ValueError(
                    f"{name}={getattr(self, name)}: of --data imagenet only, this is {self.data}"
                )
        if self.pixel_mean and self.img_size is not None:
            raise ValueError(
                "pixel_mean=True: images of files have no mean image; subtract the mean per channel"
            )
        if not 0.1 <= self.crop_pct <= 1:
            raise ValueError(f"crop_pct={self.crop_pct}: must be 0.1 to 1")
        for name, least, most in (("scale", 0.0, 1.0), ("ratio", 0.1, 10.0)):
            pair = getattr(self, name)
            if len(pair) != 2 or not least < pair[0] <= pair[1] <= most:
                raise ValueError(f"{name}={pair}: must be two rising numbers above {least} and up to {most}")
        sides = self.short_side
        if sides and (len(sides) != 2 or not (self.img_size or 1) <= sides[0] <= sides[1]):
            raise ValueError(
                f"short_side={sides}: must be none or two rising numbers from img_size={self.img_size}"
            )

    @property
    def data(self) -> str:
        """The data set: what a recipe's name begins with."""
        return self.name.partition("-")[0]

    def with_epochs(self, epochs: int) -> Recipe:
        """The same recipe squeezed or stretched to ``epochs``: milestones and warm-up keep their share."""
        if epochs == self.epochs:
            return self
        share = epochs / self.epochs
        milestones = tuple(round(milestone * share) for milestone in self.milestones)
        return replace(self, epochs=epochs, milestones=milestones, warmup_epochs=self.warmup_epochs * share)

    def learning_rate(self, epoch: float) -> float:
        """The rate at a point in time, in epochs. A pure function, so a resumed run has no schedule to restore."""
        if epoch < self.warmup_epochs:
            risen = 0.0 if self.warmup_constant else epoch / self.warmup_epochs
            return self.warmup_lr + (self.lr - self.warmup_lr) * risen
        if self.schedule == "step":
            return self.lr * 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        past = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(past, 1.0)))


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's numbers, and where it computes. Saved in every checkpoint."""

    data: str
    recipe: Recipe
    seed: int = 0
    fused: bool = True
    dtype: str = "float32"
    device: str = "cpu"
    backend: str = "auto"
    graph: bool = False
    """Forward and backward as CUDA graphs; on CUDA devices only."""
    deterministic: bool = False
    data_dir: str | None = None
    download: bool = False
    """Fetch CIFAR's archive into ``data_dir`` where it is missing."""
    train_split: str = "train"
    """Folder, or beginning of the shards' names, of the training images in ``data_dir``; of ImageNet only."""
    val_split: str = "val"
    workers: int = 4
    """Processes that decode images; of ImageNet only."""
    on_bad_image: str = "skip"
    """An image that cannot be read: the next one takes its place, or it is an error."""
    limit_train: int | None = None
    limit_test: int | None = None
    order: str | None = None
    """Activation order of the units, None for the model's own (the paper's Fig. 4)."""
    shortcut: str | None = None
    """Kind of shortcut, None for the model's own (the paper's Fig. 2)."""
    body: str | None = None
    """Convolutions of a unit, None for the model's own."""
    sync_bn: bool = False
    """BN statistics of all processes' images instead of each one's own."""
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    grad_accum_steps: int = 1
    """Parts that a process takes its share of a batch in; each has BN statistics of its own."""
    grad_checkpointing: bool = False
    channels_last: bool = True
    compile: bool = False
    fsdp: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("data", DATASETS),
            ("dtype", DTYPES),
            ("backend", BACKENDS),
            ("on_bad_image", ON_BAD_IMAGE),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed: {', '.join(allowed)}")
        if self.recipe.data != self.data:
            raise ValueError(f"data={self.data!r}: the recipe {self.recipe.name!r} is for {self.recipe.data}")
        if not 0 <= self.workers <= 256:
            raise ValueError(f"workers={self.workers}: must be 0 to 256")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed}: allowed: -2^63 to 2^64-1")
        if self.grad_accum_steps < 1:
            raise ValueError(f"grad_accum_steps={self.grad_accum_steps}: must be at least 1")
        if not 0 <= self.model_ema_decay < 1:
            raise ValueError(f"model_ema_decay={self.model_ema_decay}: must be 0 to below 1")
        for name in ("compile", "grad_checkpointing", "fsdp"):
            if self.graph and getattr(self, name):
                raise ValueError(f"graph=True, {name}=True: allowed: one of them")
        if self.compile and self.grad_checkpointing:
            raise ValueError("compile=True, grad_checkpointing=True: allowed: one of them")
        if self.fsdp and self.dtype == "float16":
            raise ValueError(
                "fsdp=True, dtype='float16': no loss scale for shards; allowed: bfloat16, float32"
            )
        if self.graph and not self.device.startswith("cuda"):
            raise ValueError(f"graph=True, device={self.device!r}: CUDA graphs need a CUDA device")
        for name in ("limit_train", "limit_test"):
            limit = getattr(self, name)
            if limit is not None and limit < 2:  # BN cannot train on one value per channel
                raise ValueError(f"{name}={limit}: must be at least 2")

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values only, so that ``torch.load(weights_only=True)`` takes them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The inverse of ``to_dict``; ValueError for what this version would not have written."""
        own = _typed(cls, values, "config")
        return cls(**{**own, "recipe": Recipe(**_typed(Recipe, own["recipe"], "config recipe"))})


def _typed(cls: type, values: object, what: str) -> dict[str, Any]:
    """``values`` if they are what ``asdict`` makes of the dataclass ``cls``, all of them and of its types."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{what}: {type(values).__name__} found, allowed: a dict")
    names = {field.name for field in fields(cls)}
    for found, missing, problem in (
        (names, values, "lacks"),
        (values, names, "of another version, has unknown"),
    ):
        odd = [str(name) for name in found if name not in missing]
        if odd:
            raise ValueError(f"{what}: {problem} {', '.join(sorted(odd))}")
    for name, hint in get_type_hints(cls).items():
        if not _is(values[name], hint):
            raise ValueError(f"{what}: {name}={values[name]!r}, allowed: {getattr(hint, '__name__', hint)}")
    return dict(values)


def _is(value: object, hint: Any) -> bool:
    if is_dataclass(hint):
        return isinstance(value, Mapping)
    if isinstance(hint, UnionType):
        return any(_is(value, one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is(item, get_args(hint)[0]) for item in value)
    # 1 is as good as 1.0; True is neither, though an int to Python. Torch takes no int of any size.
    return type(value) is hint or (hint is float and type(value) is int and abs(value) <= 2**53)
