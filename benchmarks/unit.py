"""Every distinct residual unit of a network, training mode, forward and backward.

"fused" runs as inside a network: the statistics of its input come with it, those of its output are made. "fused
alone" is the unit called by itself.
"""

from __future__ import annotations

from . import counting, micro, networks, options, roofline
from .counting import Kernel
from .networks import UnitCase


def cases(model: str, batch: int, item: int, limit: int = 0) -> list[micro.Case]:
    """The network's distinct units, the most frequent first."""
    units = networks.distinct_units(networks.unit_cases(model))
    units.sort(key=lambda pair: -pair[1])
    return [_case(unit, count, batch, item) for unit, count in (units[:limit] if limit else units)]


def _case(unit: UnitCase, count: int, batch: int, item: int) -> micro.Case:
    def kernels(schedule: str) -> list[Kernel]:
        return counting.unit_kernels(unit, batch, item, schedule)

    last = unit.sites[-1]
    convs = networks.bare_convs([*unit.sites, *([unit.projection] if unit.projection else [])])
    module = unit.unit
    module.fused = False
    shape = (batch, unit.c, unit.h, unit.h)
    out_shape = (batch, last.k, last.out, last.out)
    return micro.Case(unit.name, count, module, shape, out_shape, False, convs, kernels)


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks unit``; exit status 1 where a result was wrong."""
    setting = options.parse(options.parser("unit", __doc__), argv)
    item = setting.torch_dtype.itemsize
    found = {m: cases(m, setting.batch_for(m), item, setting.limit) for m in setting.models}
    return micro.run_cases(found, setting, roofline.ceilings(setting.torch_device, setting.torch_dtype))
