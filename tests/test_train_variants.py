"""Networks of the paper's tables learn to read digits; all of them, and for longer, are in docs/paper.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from fused_preact.train import cli, paper
from fused_preact.train.config import Config
from fused_preact.train.data import DataSet, load
from fused_preact.train.fit import Options, fit
from fused_preact.train.networks import build_model
from fused_preact.train.recipes import RECIPES
from fused_preact.train.study import Study

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 5  # of 21 steps
LEARN = {  # a kind of unit each; those that need more than five epochs are left to the whole tables
    (1, "conv"),
    (1, "shortcut_gating:-6"),
    (2, "bn_after_addition"),
    (2, "relu_only_preact"),
}


def study(table: int, *depths: int) -> Study:
    return Study(Config("digits", RECIPES["digits"].with_epochs(EPOCHS)), 1, table, depths)


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load("digits")


@pytest.mark.parametrize(("table", "kind"), sorted(LEARN))
def test_a_variant_learns_the_digits(table: int, kind: str, digits: DataSet, tmp_path: Path) -> None:
    (cell,) = (c for c in study(table, 20).cells if kind in (c.shortcut, c.order))
    rows = fit(study(table, 20).run_config(cell, 0), digits, tmp_path, options=Options(quiet=True)).rows
    assert max(row["test_acc"] for row in rows) > 90


@pytest.mark.parametrize("table", paper.TABLES)
def test_every_network_of_the_tables_can_be_built(table: int, data: DataSet) -> None:
    asked = study(table, 20, 29)
    found = {}
    for cell in asked.cells:
        model = build_model(asked.run_config(cell, 0), data, fused=True)
        found[cell] = sum(p.numel() for p in model.parameters())
    if table == 2:  # "the same components, only the orders are different"
        assert len({found[cell] for cell in found if cell.body == "basic"}) == 1


def test_a_row_of_a_table_goes_through_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--table", "3", "--depth", "20", "--epochs", "1", "--limit-train", "64", "--limit-test", "20"]
    assert cli.main([*flags, "--device", "cpu", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "| ResNet-20 (1 layer a unit) |       original |" in shown
    assert "8.91 | ResNet-110 |" in shown
