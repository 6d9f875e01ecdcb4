"""Which workflow is tried on which network, and what came of it: the registry that docs/workflows.md is written from.

A cell of the matrix is a test of its own, ``test_workflow[ROW-COLUMN]`` in tests/test_workflows.py, or names one that
was there before. Each row is a function that compares a fused network with the plain one, registered by
:func:`workflow` in tests/workflows_*.py; what it claims ("holds", "holds, not fused", "not") the test holds it to, by
counting the fused calls. ``python tests/workflows.py`` writes the page.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from definitions import DEFINITIONS
from definitions_base import disturb
from helpers import set_fused
from torch import Tensor, nn

import fused_preact
from fused_preact import composite, functional

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "workflows.md"

HOLDS, NOT_FUSED, NOT, NOT_HERE = "holds", "holds, not fused", "not", "not run here"

# --- columns --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A network, plain and fused, and what it is called with."""

    name: str
    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    fuse: Callable[[nn.Module], Any]

    def pair(self, training: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
        """The plain network, and a fused one with the same weights: copies of two that are made once."""
        return tuple(m.to(dtype).train(training) for m in copy.deepcopy(_pair(self)))  # type: ignore[return-value]

    def image(self, count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
        """[count, 3, H, W]."""
        return torch.randn(count, *self.shape[1:], dtype=dtype)


@functools.cache
def _pair(subject: Subject) -> tuple[nn.Module, nn.Module]:
    plain = subject.build()
    return plain, subject.fuse(copy.deepcopy(plain))


def _own() -> nn.Module:
    from fused_preact import PreActBasicBlock, PreActBottleneck, PreActSequential, models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        stages = [
            PreActSequential(PreActBasicBlock(8, 8), PreActBasicBlock(8, 8)),
            PreActSequential(PreActBottleneck(8, 16, 2)),
        ]
        stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
        return disturb(set_fused(models.PreActResNet(stem, stages, 16, 5, True), False))


def _converted(name: str, title: str) -> Subject:
    definition = DEFINITIONS[name]
    return Subject(name, title, definition.build, definition.shape, fused_preact.fuse)


SUBJECTS = {
    subject.name: subject
    for subject in (
        _converted("timm_resnetv2_50", "timm's ResNetV2"),
        _converted("kuangliu_18", "kuangliu's PreActResNet"),
        _converted("wide_resnet", "WideResNet"),
        _converted("densenet_cifar", "DenseNet"),
        Subject("own", "`fused_preact.models`", _own, (2, 3, 16, 16), lambda model: set_fused(model, True)),
    )
}

# --- rows -----------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """What a cell says: one of the four outcomes, the test that shows it, and why it is no plain "holds"."""

    outcome: str
    test: str
    remark: str = ""


@dataclass
class Workflow:
    """A row of the matrix."""

    name: str
    title: str
    group: str
    run: Callable[[Subject], None]
    outcome: str
    ranks: bool
    gpu: bool
    remark: str
    but: dict[str, Claim] = field(default_factory=dict)
    """Cells that are otherwise: another outcome, or a test elsewhere."""

    def test(self, subject: str) -> str:
        """The id of the cell's own test."""
        function = "test_workflow_of_ranks" if self.ranks else "test_workflow"
        return f"test_workflows.py::{function}[{self.name}-{subject}]"

    def claim(self, subject: str) -> Claim:
        """What the cell says."""
        claim = self.but.get(subject, Claim(self.outcome, ""))
        return claim._replace(test=claim.test or self.test(subject))

    def runs(self, subject: str) -> bool:
        """Whether the cell has a test of its own."""
        return self.claim(subject).test == self.test(subject)


WORKFLOWS: dict[str, Workflow] = {}
GROUPS: list[str] = []


def elsewhere(test: str, outcome: str = HOLDS, remark: str = "") -> Claim:
    """A cell whose test was there before."""
    return Claim(outcome, test, remark)


def otherwise(outcome: str, remark: str) -> Claim:
    """A cell with a test of its own and another outcome."""
    return Claim(outcome, "", remark)


def untried(remark: str) -> Claim:
    """A cell without a test."""
    return Claim(NOT_HERE, "-", remark)


def workflow(
    name: str,
    title: str,
    group: str,
    *,
    outcome: str = HOLDS,
    ranks: bool = False,
    gpu: bool = False,
    remark: str = "",
    but: dict[str, Claim] | None = None,
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Register a function as the row ``name``; ``ranks``: two processes run it, ``gpu``: on a CUDA device."""

    def register(run: Callable[[Subject], None]) -> Callable[[Subject], None]:
        assert name not in WORKFLOWS, name
        assert set(but or {}) <= set(SUBJECTS), but
        if group not in GROUPS:
            GROUPS.append(group)
        WORKFLOWS[name] = Workflow(name, title, group, run, outcome, ranks, gpu, remark, dict(but or {}))
        return run

    return register


# --- counting -------------------------------------------------------------------------------------------------


@contextmanager
def counting() -> Iterator[list[int]]:
    """Grows by the number of sites of each fused call; what PyTorch's own operations serve does not count."""
    found: list[int] = []
    composed: list[int] = []
    unit, composition = functional._unit, composite.unit

    def counted(x: Tensor, sites: Any, projection: Any, *rest: Any) -> Any:
        before = counted_so_far()
        result = unit(x, sites, projection, *rest)
        note(before, len(sites) + (projection is not None))
        return result

    def noted(*args: Any) -> Tensor:
        compose()
        return composition(*args)

    def counted_so_far() -> int:
        return len(composed)

    def note(before: int, sites: int) -> bool:
        if len(composed) == before:
            found.append(sites)
        return True

    def compose() -> bool:
        composed.append(1)
        return True

    # Dynamo runs these while it traces, and does not guard on the lists.
    for function in (counted_so_far, note, compose):
        function._dynamo_marked_constant = True  # type: ignore[attr-defined]

    functional._unit, composite.unit = counted, noted
    try:
        yield found
    finally:
        functional._unit, composite.unit = unit, composition


# --- the page -------------------------------------------------------------------------------------------------


def page() -> str:
    """docs/workflows.md."""
    lines = [
        "# Workflows",
        "",
        "Written by `python tests/workflows.py` from the table that the tests run; a test compares the two.",
        "Every cell is a test that compares the fused network with the plain one and counts the fused calls:",
        "`tests/test_workflows.py::test_workflow[ROW-COLUMN]` (or `test_workflow_of_ranks`),",
        "or the one that is named below its table.",
        "",
        "- holds: the same numbers, fused;",
        "- holds, not fused: the same numbers, by PyTorch's own operations;",
        "- not: an error that says so, or what plain PyTorch does not do either;",
        "- not run here: no device, or no test.",
        "",
        "All on a CPU, two processes with gloo; nothing has run on a GPU. The networks of others are the small",
        "re-definitions in `tests/definitions*.py`, converted by `fuse`; the last column is a network of ours.",
        "",
    ]
    names = list(SUBJECTS)
    for group in GROUPS:
        rows = [row for row in WORKFLOWS.values() if row.group == group]
        lines += [f"## {group}", ""]
        lines.append(
            "| workflow | row | " + " | ".join(f"{s.title}: `{s.name}`" for s in SUBJECTS.values()) + " |"
        )
        lines.append("|---|---|" + "---|" * len(names))
        notes: list[str] = []
        for row in rows:
            cells = []
            for name in names:
                claim = row.claim(name)
                text = claim.outcome
                what = []
                if claim.remark:
                    what.append(claim.remark)
                if not row.runs(name) and claim.test != "-":
                    what.append(f"`tests/{claim.test}`")
                if what:
                    note = ": ".join(what)
                    if note not in notes:
                        notes.append(note)
                    text += f" ({notes.index(note) + 1})"
                cells.append(text)
            lines.append(f"| {row.title} | `{row.name}` | " + " | ".join(cells) + " |")
        lines.append("")
        for number, note in enumerate(notes, 1):
            lines.append(f"{number}. {note}")
        remarks = [f"- `{row.name}`: {row.remark}" for row in rows if row.remark]
        lines += [""] * bool(notes) + remarks + [""] * bool(remarks)
    return "\n".join(lines).rstrip() + "\n"


# Each registers its own; by the name of this module, which is another where it is run as a program.
PARTS = ("compiler", "numbers", "training", "transforms", "copies", "ranks", "gpu")


def load() -> dict[str, Workflow]:
    """The whole registry."""
    for part in PARTS:
        import_module(f"workflows_{part}")
    return WORKFLOWS


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import workflows

    workflows.load()
    text = workflows.page()
    PAGE.write_text(text)
