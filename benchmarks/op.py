"""Every distinct BN -> ReLU -> convolution [+ addition] site of a network, training mode, forward and backward.

"fused" runs as inside a network: the statistics of its input come with it, those of its output are made. "fused alone"
is ``PreActConv2d`` called by itself, which reads its input once more for the statistics.
"""

from __future__ import annotations

from . import counting, micro, networks, options, roofline
from .counting import Kernel
from .networks import SiteCase


def cases(model: str, batch: int, item: int, limit: int = 0) -> list[micro.Case]:
    """The network's distinct sites, those that take most of its FLOPs first."""
    sites = networks.distinct_sites(networks.unit_cases(model))
    sites.sort(key=lambda pair: -pair[1] * pair[0].c * pair[0].k * (pair[0].kernel * pair[0].out) ** 2)
    return [_case(site, count, batch, item) for site, count in (sites[:limit] if limit else sites)]


def _case(site: SiteCase, count: int, batch: int, item: int) -> micro.Case:
    def kernels(schedule: str) -> list[Kernel]:
        return counting.site_kernels(site, batch, item, schedule)

    return micro.Case(
        site.name,
        count,
        site.module(fused=False),
        (batch, site.c, site.h, site.h),
        (batch, site.k, site.out, site.out),
        site.adds,
        networks.bare_convs([site]),
        kernels,
    )


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks op``; exit status 1 where a result was wrong."""
    setting = options.parse(options.parser("op", __doc__), argv)
    item = setting.torch_dtype.itemsize
    found = {m: cases(m, setting.batch_for(m), item, setting.limit) for m in setting.models}
    return micro.run_cases(found, setting, roofline.ceilings(setting.torch_device, setting.torch_dtype))
