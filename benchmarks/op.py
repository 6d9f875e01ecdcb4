"""Every distinct BN -> ReLU -> convolution [+ addition] site of a network, training mode, forward and backward.

"fused" runs as inside a network: the statistics of its input come with it, those of its output are made. "fused
alone" is ``PreActConv2d`` called by itself, which reads its input once more for the statistics.
"""

from __future__ import annotations

from . import counting, micro, networks, options, roofline
from .counting import Kernel
from .networks import SiteCase
from .options import Setting


def cases(model: str, batch: int, item: int, limit: int = 0) -> list[micro.Case]:
    """The network's distinct sites, those that take most of its FLOPs first."""
    sites = networks.distinct_sites(networks.unit_cases(model))
    sites.sort(key=lambda pair: -pair[1] * pair[0].c * pair[0].k * (pair[0].kernel * pair[0].out) ** 2)
    return [site_case(site, count, batch, item) for site, count in (sites[:limit] if limit else sites)]


def site_case(site: SiteCase, count: int, batch: int, item: int) -> micro.Case:
    """A site as something to measure; ``item``: bytes of an element."""

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


def check(found: dict[str, list[micro.Case]], setting: Setting) -> int:
    """Whether every case is right, without timing; 1 where one is not."""
    rows = []
    for model, cases_of in found.items():
        for case in cases_of:
            wrong = micro.problems(case, setting, batch=case.in_shape[0])
            for subject in micro.subjects(setting):
                row = setting.row(
                    model, case.in_shape[0], case=case.name, candidate=subject.name, phase="check"
                )
                row.status = wrong.get(subject.name, "ok")
                rows.append(row)
    setting.finish(rows)
    return micro.failed(rows)


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks op``; exit status 1 where a result was wrong."""
    parser = options.parser("op", __doc__)
    parser.add_argument(
        "--check", type=int, metavar="BATCH", help="only compare with float64, on so many images"
    )
    parser.add_argument("--slice", default="0/1", metavar="I/N", help="the I-th of N slices of the cases")
    setting = options.parse(parser, argv)
    first, step = map(int, setting.extra.slice.split("/"))
    item = setting.torch_dtype.itemsize
    found = {}
    for model in setting.models:
        batch = setting.extra.check or setting.batch_for(model)
        found[model] = cases(model, batch, item, setting.limit)[first::step]
    if setting.extra.check:
        return check(found, setting)
    return micro.run_cases(found, setting, roofline.ceilings(setting.torch_device, setting.torch_dtype))
