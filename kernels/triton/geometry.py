"""A convolution's sizes and constants, read from its tensors once and handed to kernels and configurations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Geometry"]


class Geometry(NamedTuple):
    """[n,c,h,w] convolved with [k,c/groups,r,s] -> [n,k,oh,ow]."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    oh: int
    ow: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(
        cls,
        x: Sequence[int],
        weight: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Geometry:
        """The geometry of the convolution of an ``x`` [N,C,H,W] with a ``weight`` [K,C/groups,R,S]."""
        n, c, h, w = x
        k, _, r, s = weight
        oh = (h + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
        ow = (w + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
        constants = ((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]))
        return cls(n, c, h, w, k, r, s, oh, ow, *constants, groups)

    @property
    def rows(self) -> int:
        """Output pixels of the batch."""
        return self.n * self.oh * self.ow

    @property
    def pointwise(self) -> bool:
        """Whether every output pixel reads the one input pixel of the same index."""
        return self.r * self.s == 1 and max(self.stride) == 1 and max(self.padding) == 0

    def arguments(self) -> dict[str, int]:
        """What all three convolution kernels take of it, by the names of their arguments."""
        return {
            "H": self.h,
            "W": self.w,
            "C": self.c,
            "OH": self.oh,
            "OW": self.ow,
            "K": self.k,
            "R": self.r,
            "S": self.s,
            "STRIDE_H": self.stride[0],
            "STRIDE_W": self.stride[1],
            "PAD_H": self.padding[0],
            "PAD_W": self.padding[1],
            "DILATION_H": self.dilation[0],
            "DILATION_W": self.dilation[1],
            "POINTWISE": self.pointwise,
        }
