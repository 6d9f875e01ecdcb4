"""Tables 1 to 3 of the paper (arXiv:1603.05027) as networks to train, with the errors that it reports.

Its figures are test errors in percent on CIFAR, each the median of five runs; "fail" is an error above 20 %. Nets of
another depth are held against the paper's net of the same kind: 110 layers with units of two 3x3 convolutions, 164
with bottlenecks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FAIL = 20.0  # percent of error: "fail" in Table 1
TABLES = (1, 2, 3)
TITLES = {1: "shortcut connections", 2: "orders of activation", 3: "original units and full pre-activation"}
PAPER_DEPTHS = {1: (110,), 2: (110, 164), 3: (110, 164, 1001)}
SMALL_DEPTHS = {1: (20,), 2: (20, 29), 3: (20, 29)}  # for the digits: 6n+2 and 9n+2 with n = 3


@dataclass(frozen=True)
class Cell:
    """One figure of a table: a network and the paper's error for it, "" where the paper has none."""

    row: str
    column: str
    model: str
    order: str | None = None
    shortcut: str | None = None
    body: str | None = None
    paper: str = ""

    @property
    def folder(self) -> str:
        """A name for its files."""
        words = [self.model, self.body, self.order, self.shortcut]
        return "-".join(word.replace(":", "_") for word in words if word)


SHORTCUTS = (  # Table 1: case, our name, CIFAR-10 error of ResNet-110
    ("original", "A", "6.61"),
    ("constant scaling, 0 x + F", "scaling:0:1", "fail"),
    ("constant scaling, 0.5 x + F", "scaling:0.5:1", "fail"),
    ("constant scaling, 0.5 x + 0.5 F", "scaling:0.5:0.5", "12.35"),
    ("exclusive gating, b = 0", "exclusive_gating:0", "fail"),  # the paper: from 0 to -5
    ("exclusive gating, b = -6", "exclusive_gating:-6", "8.70"),
    ("exclusive gating, b = -7", "exclusive_gating:-7", "9.81"),
    ("shortcut-only gating, b = 0", "shortcut_gating:0", "12.86"),
    ("shortcut-only gating, b = -6", "shortcut_gating:-6", "6.91"),
    ("1x1 conv shortcut", "conv", "12.22"),
    ("dropout shortcut, p = 0.5", "dropout:0.5", "fail"),
)
ORDERS = (  # Table 2: case, our name, CIFAR-10 errors of ResNet-110 and ResNet-164
    ("original", "original", "6.61", "5.93"),
    ("BN after addition", "bn_after_addition", "8.17", "6.50"),
    ("ReLU before addition", "relu_before_addition", "7.84", "6.14"),
    ("ReLU-only pre-activation", "relu_only_preact", "6.71", "5.91"),
    ("full pre-activation", "preact", "6.37", "5.46"),
)
NETS = {  # Table 3: errors of original and pre-activation units
    ("cifar10", "single", 110): ("9.90", "8.91"),
    ("cifar10", "basic", 110): ("6.61", "6.37"),
    ("cifar10", "bottleneck", 164): ("5.93", "5.46"),
    ("cifar10", "bottleneck", 1001): ("7.61", "4.92"),
    ("cifar100", "bottleneck", 164): ("25.16", "24.33"),
    ("cifar100", "bottleneck", 1001): ("27.82", "22.71"),
}


def body_of(depth: int) -> str:
    """Basic units for 6n+2 layers, bottlenecks for 164 and the other 9n+2; raises ValueError."""
    if depth > 2 and (depth - 2) % 6 == 0 and depth != 164:
        return "basic"
    if depth > 2 and (depth - 2) % 9 == 0:
        return "bottleneck"
    raise ValueError(f"--depth {depth}: allowed: 6n+2 and 9n+2, such as 20, 29, 56, 110, 164, 1001")


def cells(table: int, depths: Sequence[int], data: str) -> list[Cell]:
    """The networks of ``table`` with ``depths`` layers; raises ValueError for what is not there."""
    if table not in TABLES:
        raise ValueError(f"--table {table}: allowed: {', '.join(map(str, TABLES))}")
    bodies = {depth: body_of(depth) for depth in depths}
    if table == 1:
        return [
            Cell(
                case,
                f"ResNet-{depth}",
                f"cifar_resnet{depth}",
                order="original",
                # The paper's ResNet-110 pads with zeros; a bottleneck's identity changes size by projections.
                shortcut="B" if (shortcut, body) == ("A", "bottleneck") else shortcut,
                body=body,
                paper=error,
            )
            for depth, body in bodies.items()
            for case, shortcut, error in SHORTCUTS
        ]
    if table == 2:
        return [
            Cell(
                case,
                f"ResNet-{depth}",
                f"cifar_resnet{depth}",
                order=order,
                body=body,
                paper=basic if body == "basic" else bottleneck,
            )
            for depth, body in bodies.items()
            for case, order, basic, bottleneck in ORDERS
        ]
    nets = list(bodies.items())
    nets[:0] = [(depth, "single") for depth, body in nets if body == "basic"][:1]
    of = data if data == "cifar100" else "cifar10"
    found = []
    for depth, body in nets:
        figures = NETS.get((of, body, depth)) or NETS.get((of, body, 164 if body == "bottleneck" else 110))
        for column, order, error in zip(
            ("original", "pre-activation"), ("original", "preact"), figures or ("", ""), strict=True
        ):
            row = f"ResNet-{depth}{' (1 layer a unit)' if body == 'single' else ''}"
            found.append(Cell(row, column, f"cifar_resnet{depth}", order=order, body=body, paper=error))
    return found


def paper_net(cell: Cell, table: int) -> str:
    """The paper's network whose error stands beside ``cell``'s."""
    depth = int(cell.model.rpartition("resnet")[2])
    if table == 1:
        return "ResNet-110"
    if depth in (164, 1001) or cell.body != "bottleneck":
        return f"ResNet-{depth if depth in (110, 164, 1001) else 110}"
    return "ResNet-164"
