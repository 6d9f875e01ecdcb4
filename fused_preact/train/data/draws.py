"""Random numbers as pure functions of where they are used: no stream whose state a checkpoint would have to keep."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive(seed: int, *where: int | str) -> int:
    """63 bits for the place ``where`` in the run of ``seed``: the same in every process, unrelated elsewhere."""
    words = "/".join(map(str, (seed, *where)))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *where: int | str) -> torch.Generator:
    """A generator on the CPU for the place ``where``: every device sees the same numbers."""
    return torch.Generator().manual_seed(derive(seed, *where))


def permutation(images: int, seed: int, epoch: int) -> Tensor:
    """The order int64 [images] in which ``epoch`` visits the training images."""
    return torch.randperm(images, generator=generator(seed, "order", epoch))
