"""What a run is made of: the recipe of each data set, with the reason beside every number, and the run's options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

DTYPES = ("float32", "bfloat16", "float16")
BACKENDS = ("auto", "triton", "cpu", "reference")
SCHEDULES = ("cosine", "step")


@dataclass(frozen=True)
class Recipe:
    """How one data set is trained: SGD, its schedule, its augmentation.

    The learning rate rises linearly over ``warmup_epochs``; then it either falls as half a cosine to zero
    (``schedule="cosine"``) or is multiplied by 0.1 at each epoch of ``milestones`` (``schedule="step"``).
    ``mean`` and ``std`` are per channel and in the units of the stored bytes.
    """

    model: str
    epochs: int
    batch_size: int
    lr: float
    schedule: str
    milestones: tuple[int, ...]
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

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2)):  # BN cannot train on one value per channel
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        for name in ("lr", "weight_decay", "warmup_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be finite and not negative")
        for name, most in (("momentum", 1), ("pad", 32)):  # CIFAR's images are 32 wide
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 to {most}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: allowed: {', '.join(SCHEDULES)}")
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"mean={self.mean}, std={self.std}: must have a number for each channel")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs}: must be at most epochs={self.epochs}")

    def with_epochs(self, epochs: int) -> Recipe:
        """The same recipe squeezed or stretched to ``epochs``: milestones and warm-up keep their share."""
        share = epochs / self.epochs
        milestones = tuple(round(milestone * share) for milestone in self.milestones)
        return replace(self, epochs=epochs, milestones=milestones, warmup_epochs=self.warmup_epochs * share)

    def learning_rate(self, epoch: float) -> float:
        """The rate at a point in time, in epochs. A pure function, so a resumed run has no schedule to restore."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        if self.schedule == "step":
            return self.lr * 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        past = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(past, 1.0)))


def _cifar(mean: tuple[float, ...], std: tuple[float, ...]) -> Recipe:
    return Recipe(
        model="cifar_preact_resnet20",  # the smallest; the paper's tables use 110, 164 and 1001
        epochs=164,  # the paper's 64k iterations of 128 images are 163.8 epochs of 50,000
        batch_size=128,  # the paper's, on 2 GPUs: its BN saw 64 images, here BN sees all 128
        lr=0.1,  # paper
        schedule="step",
        milestones=(81, 122),  # the paper's 32k and 48k iterations, as the official code counts them
        warmup_epochs=0.0,  # "not necessary for our proposed Residual Unit"; the paper's 400 steps are 1.02
        momentum=0.9,  # paper
        nesterov=True,  # official code; the paper does not say
        weight_decay=1e-4,  # paper
        decay_norm=True,  # the official code decays every parameter, those of BN and the biases included
        mean=mean,  # fb.resnet.torch: of the training set, 0-255
        std=std,  # the data's own; the often copied .2023/.1994/.2010 is not
        pad=4,  # paper
        flip=True,  # paper
        compare_accuracy=False,  # a second run of 164 epochs is asked for with --plain, never slipped in
    )


RECIPES: Mapping[str, Recipe] = {
    "digits": Recipe(
        model="cifar_preact_resnet20",
        epochs=30,  # under a minute on 2 CPU cores
        batch_size=64,  # 21 steps an epoch
        lr=0.1,  # paper
        schedule="cosine",  # ends at zero, so the last epoch is as good as the best and needs no picking
        milestones=(),
        warmup_epochs=0.0,  # the paper finds none needed; two epochs of it changed nothing, the mean of 5 seeds
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,  # paper; 5e-4 gave 0.1 % less, the mean of 5 seeds
        decay_norm=True,
        mean=(0.0,),  # so that blank paper is 0 and every zero padding, ours and the convs', continues it
        std=(8.0,),  # half the range of 0 to 16; their root mean square is 7.8
        pad=1,  # a shift by one pixel: the digits fill the 8 pixels' height
        flip=False,  # a mirrored digit is not a digit
        compare_accuracy=True,  # the plain model trains in seconds too
    ),
    "cifar10": _cifar((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": _cifar((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
}


def recipe_for(data: str) -> Recipe:
    """The recipe of a data set by name."""
    if data not in RECIPES:
        raise ValueError(f"data={data!r}: unknown data set; allowed: {', '.join(RECIPES)}")
    return RECIPES[data]


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
    limit_train: int | None = None
    limit_test: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("data", tuple(RECIPES)), ("dtype", DTYPES), ("backend", BACKENDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed: {', '.join(allowed)}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed}: allowed: -2^63 to 2^64-1")
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
