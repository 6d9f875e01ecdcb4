"""Every workflow of tests/workflows.py on every network, and the page that is written from the same table."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import workflows
from torch import distributed
from workflows import HOLDS, NOT_FUSED, NOT_HERE, ROOT, SUBJECTS, Workflow, counting

pytestmark = [pytest.mark.usefixtures("one_thread", "exact_float32")]

ROWS = workflows.load()


def _cells(ranks: bool) -> list[Any]:
    found = []
    for row in ROWS.values():
        for subject in SUBJECTS:
            if row.ranks == ranks and row.runs(subject):
                marks = [pytest.mark.gpu] if row.gpu else []
                found.append(pytest.param(row, subject, id=f"{row.name}-{subject}", marks=marks))
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("row", "subject"), _cells(False))
def test_workflow(row: Workflow, subject: str) -> None:
    with counting() as fused:
        row.run(SUBJECTS[subject])
    outcome = row.claim(subject).outcome
    if outcome in (HOLDS, NOT_HERE):
        assert fused, "it holds, but nothing ran fused"
    elif outcome == NOT_FUSED:
        assert not fused, "it is said to run as written"


@pytest.mark.xdist_group("sync_batch_norm")
@pytest.mark.skipif(not distributed.is_available(), reason="this torch was built without torch.distributed")
@pytest.mark.parametrize(("row", "subject"), _cells(True))
def test_workflow_of_ranks(row: Workflow, subject: str, two_ranks: Any) -> None:
    two_ranks(f"{row.name}-{subject}")


def test_the_page_is_what_the_table_writes() -> None:
    assert workflows.PAGE.read_text() == workflows.page(), "run: python tests/workflows.py"


def test_tests_that_are_named_exist(request: pytest.FixtureRequest) -> None:
    """By their function; where the session has collected the file, by their whole name."""
    collected = {item.nodeid.removeprefix("tests/") for item in request.session.items}
    whole = len(request.config.args) == 0 or request.config.args == ["tests"]
    files = {name.partition("::")[0] for name in collected} if whole else set()
    for row in ROWS.values():
        for subject in SUBJECTS:
            test = row.claim(subject).test
            if test == "-":
                continue
            file, _, name = test.partition("::")
            tree = ast.parse((ROOT / "tests" / file).read_text())
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name.partition("[")[0] in functions, test
            # (Those for a GPU are collected by a session of their own.)
            assert row.gpu or file not in files or test in collected, test
