"""The chooser: both paths against the oracle, what the tables say, and what becomes of tables that are not right."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import CASES, DEVICES, Case, assert_within_policy, make_site, triton_ops

import fused_preact
from fused_preact import PreActBottleneck, env, reference

pytest.importorskip("triton")
from fused_preact.kernels.triton import choose, tables
from fused_preact.kernels.triton.common import Device
from fused_preact.kernels.triton.configs import ConvConfig, flat_taps, heuristic
from fused_preact.kernels.triton.geometry import Geometry

ODD = Device("cuda", 90, 132, "NVIDIA Odd 9000 (test)")
PROBLEM = choose.Problem(
    "fprop",
    Geometry(2, 64, 8, 8, 32, 3, 3, 8, 8, (1, 1), (1, 1), (1, 1), 1),
    torch.bfloat16,
    "tf32",
)
SOME_CONFIG = ConvConfig(64, 32, 32, 4, 2)
SOME = {"path": "fused", "config": [64, 32, 32, 4, 2, 0]}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder and an empty folder of shipped tables, read anew."""
    monkeypatch.setenv("FUSED_PREACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "shipped_path", lambda device: tmp_path / f"shipped {device}.json")
    choose.reload()
    yield tables.cache_path(ODD.name)
    choose.reload()


# --- the split path -------------------------------------------------------------------------------------------

SPLIT = [
    pytest.param(CASES[i].values[0], dtype, groups, id=f"{str(dtype)[6:]}-g{groups}-{CASES[i].id}")
    for i, dtype, groups in (
        (0, torch.float32, 1),
        (0, torch.bfloat16, 1),
        (3, torch.float32, 1),
        (5, torch.float16, 1),
        (9, torch.float32, 2),
        (6, torch.float32, 16),
        (6, torch.bfloat16, 4),
    )
]


@pytest.mark.usefixtures("poisoned", "exact_float32")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("case", "dtype", "groups"), SPLIT)
def test_split_path(device: str, case: Case, dtype: torch.dtype, groups: int) -> None:
    s = make_site(case, dtype, device)
    if groups > 1 and case.k % groups:
        s.weight, s.bias = s.weight[:4], s.bias[:4]
        s.residual, s.dy = s.residual[:, :4], s.dy[:, :4]
    s.weight = s.weight[:, : case.c // groups].contiguous()
    constants = (*s.constants[:3], groups)
    d = s.double()
    # Groups need no forcing: no other path serves them.
    fused = ("fused", ConvConfig(64, 32, 32, 4, 2))
    with choose.forced(*(("split", None) if groups == 1 else fused)):
        y, mean, var = triton_ops.conv_fprop(
            s.x, s.scale, s.shift, s.weight, s.bias, s.residual, *constants, True
        )
        bare, *nothing = triton_ops.conv_fprop(s.x, s.scale, s.shift, s.weight, None, None, *constants, False)
        g, sum_g, sum_gx = triton_ops.conv_dgrad(
            s.dy, s.weight, s.x, s.scale, s.shift, s.mean, s.da, *constants
        )
        da, *_ = triton_ops.conv_dgrad(s.dy, s.weight, s.x, *(None,) * 4, *constants)
        dweight = triton_ops.conv_wgrad(s.dy, s.x, s.scale, s.shift, s.weight, *constants)

    def fprop(t, added):
        extras = (t.bias, t.residual) if added else (None, None)
        return reference.conv_fprop(t.x, t.scale, t.shift, t.weight, *extras, *constants, False)[0]

    def dgrad(t, masked):
        vectors = (t.scale, t.shift, t.mean, t.da) if masked else (None,) * 4
        return reference.conv_dgrad(t.dy, t.weight, t.x, *vectors, *constants)

    assert_within_policy("y", y, fprop(s, True), fprop(d, True))
    assert_within_policy("bare y", bare, fprop(s, False), fprop(d, False))
    assert all(t.numel() == 0 for t in nothing)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for name, actual, eager, exact in zip(
        ("mean", "var"), (mean, var), reference.bn_stats(y), reference.bn_stats(y.double()), strict=True
    ):
        assert_within_policy(name, actual, eager, exact)
    eager, exact = dgrad(s, True), dgrad(d, True)
    assert_within_policy("g", g, eager[0], exact[0])
    sizes, centred = exact[0].abs(), (d.x - d.mean.view(1, -1, 1, 1)).abs()
    for name, actual, same, right, terms in (
        ("sum_g", sum_g, eager[1], exact[1], sizes),
        ("sum_gx", sum_gx, eager[2], exact[2], sizes * centred),
    ):
        assert_within_policy(name, actual, same, right, terms=terms.sum((0, 2, 3)), terms_dtype=dtype)
    assert_within_policy("da", da, dgrad(s, False)[0], dgrad(d, False)[0])
    exact_dw = reference.conv_wgrad(d.dy, d.x, d.scale, d.shift, d.weight, *constants)
    eager_dw = reference.conv_wgrad(s.dy, s.x, s.scale, s.shift, s.weight, *constants)
    assert_within_policy("dweight", dweight, eager_dw, exact_dw)
    assert dweight.stride() == s.weight.stride()


def test_split_path_of_a_unit_saves_what_the_fused_one_saves() -> None:
    def run(path: str) -> tuple[int, torch.Tensor]:
        torch.manual_seed(0)
        unit = PreActBottleneck(8, 16, 2)
        x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
        storages: dict[int, int] = {}

        def note(t: torch.Tensor) -> torch.Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        config = ConvConfig(64, 16, 16, 4, 2)
        with (
            fused_preact.backend("triton"),
            choose.forced(path, None if path == "split" else config),
            torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        ):
            y = unit(x)
            y.square().sum().backward()
        return sum(storages.values()), x.grad

    (fused_bytes, fused_dx), (split_bytes, split_dx) = run("fused"), run("split")
    assert split_bytes == fused_bytes
    torch.testing.assert_close(split_dx, fused_dx, rtol=1e-4, atol=1e-5)


FLAT = [
    pytest.param(CASES[i].values[0], dtype, id=f"{str(dtype)[6:]}-{CASES[i].id}")
    for i, dtype in ((0, torch.float32), (0, torch.bfloat16), (10, torch.float32), (11, torch.float32))
]


@pytest.mark.usefixtures("poisoned", "exact_float32")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("case", "dtype"), FLAT)
def test_one_loop_over_the_taps(device: str, case: Case, dtype: torch.dtype) -> None:
    """With four warps and all channels in one block the taps are one loop; with eight they are nested loops."""
    s = make_site(case, dtype, device)
    d = s.double()
    flat, nested = ConvConfig(64, 32, 64, 4, 3), ConvConfig(64, 32, 64, 8, 3)
    geometry = Geometry.of(s.x.shape, s.weight.shape, *s.constants)
    for depth in (geometry.c, geometry.k):
        assert flat_taps(geometry, depth, flat)
        assert not flat_taps(geometry, depth, nested)
        assert not flat_taps(geometry._replace(stride=(2, 1)), depth, flat)
    assert not flat_taps(geometry, 65, flat)

    def everything(config: ConvConfig):
        with choose.forced("fused", config):
            y, *_ = triton_ops.conv_fprop(
                s.x, s.scale, s.shift, s.weight, s.bias, s.residual, *s.constants, True
            )
            g, *_ = triton_ops.conv_dgrad(s.dy, s.weight, s.x, s.scale, s.shift, s.mean, s.da, *s.constants)
        return y, g

    def by_reference(t):
        y, *_ = reference.conv_fprop(t.x, t.scale, t.shift, t.weight, t.bias, t.residual, *t.constants, False)
        return y, reference.conv_dgrad(t.dy, t.weight, t.x, t.scale, t.shift, t.mean, t.da, *t.constants)[0]

    for config in (flat, nested):
        for name, actual, eager, exact in zip(
            ("y", "g"), everything(config), by_reference(s), by_reference(d), strict=True
        ):
            assert_within_policy(name, actual, eager, exact)


# --- how a pending BN backward reaches dgrad and wgrad ---------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "kernel", "way"),
    [(64, 1, "loaded"), (256, 1, "loaded"), (512, 1, "stored"), (64, 3, "stored"), (256, 3, "stored")],
)
def test_a_pending_bn_is_applied_where_that_moves_less(
    cache: Path, channels: int, kernel: int, way: str
) -> None:
    """In a 1x1 site every element of dy is read once, or by two tiles of C; with more the pass pays."""
    padding = (kernel // 2,) * 2
    geometry = Geometry(256, channels, 56, 56, 64, kernel, kernel, 56, 56, (1, 1), padding, (1, 1), 1)
    problem = choose.Problem("apply", geometry, torch.bfloat16, "tf32", ("weight_grad",))
    assert choose.chosen(problem, ODD) == (way, None, "heuristic")
    other = {"path": "stored" if way == "loaded" else "loaded", "config": None, "ms": 1.0}
    tables.write(cache, ODD.name, {problem.key: other})
    choose.reload()
    assert choose.chosen(problem, ODD) == (other["path"], None, "cache"), "a measurement overrides the count"
    # A library convolution can only read what is stored.
    split = {"path": "split", "config": None, "ms": 1.0}
    pending = problem._replace(op="wgrad", extras=("pending",))
    assert pending.key == problem._replace(op="wgrad").key.replace("wgrad", "wgrad pending")
    tables.write(cache, ODD.name, {pending.key: split})
    choose.reload()
    assert choose.chosen(problem, ODD).path == "stored"


def test_what_can_be_forced() -> None:
    for path, config in (("fused", None), ("loaded", SOME_CONFIG), ("fast", None)):
        with pytest.raises(ValueError, match="path, config"), choose.forced(path, config):
            pass


# --- the tables -----------------------------------------------------------------------------------------------


def test_without_tables_the_heuristic_chooses(cache: Path) -> None:
    choice = choose.chosen(PROBLEM, ODD)
    g = PROBLEM.geometry
    assert choice == ("fused", heuristic("fprop", g, torch.bfloat16, "tf32", ODD), "heuristic")
    assert not cache.parent.exists(), "nothing is written by choosing"


def test_cache_comes_before_shipped_before_heuristic(cache: Path) -> None:
    other = PROBLEM._replace(op="wgrad")
    split = {"path": "split", "config": None, "ms": 1.0}
    tables.write(tables.shipped_path(ODD.name), ODD.name, {PROBLEM.key: split, other.key: split})
    tables.write(cache, ODD.name, {PROBLEM.key: SOME})
    choose.reload()
    assert choose.chosen(PROBLEM, ODD) == ("fused", ConvConfig(64, 32, 32, 4, 2), "cache")
    assert choose.chosen(other, ODD) == ("split", None, "shipped")
    assert choose.chosen(PROBLEM._replace(op="dgrad"), ODD).source == "heuristic"
    assert choose.chosen(PROBLEM, ODD._replace(name="another")).source == "heuristic"
    # The batch's neighbourhood shares an entry, another one does not.
    near = PROBLEM._replace(geometry=PROBLEM.geometry._replace(n=1, h=10, oh=10, w=8, ow=8))
    assert choose.chosen(near, ODD).source == "cache"
    assert (
        choose.chosen(PROBLEM._replace(geometry=PROBLEM.geometry._replace(n=64)), ODD).source == "heuristic"
    )


def test_a_table_is_read_once(cache: Path) -> None:
    choose.chosen(PROBLEM, ODD)
    tables.write(cache, ODD.name, {PROBLEM.key: SOME})
    assert choose.chosen(PROBLEM._replace(extras=("stats",)), ODD).source == "heuristic"
    choose.reload()
    assert choose.chosen(PROBLEM, ODD).source == "cache"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"device": "NVIDIA Odd 9000 (test)"}',
        json.dumps({"device": "other", "triton": "0", "kernels": 0, "entries": {}}),
        "entry without a config",
        "entry with a text",
        "entry with a path that is not one",
    ],
)
def test_a_file_that_is_not_right_is_ignored_with_one_warning(cache: Path, content: str) -> None:
    bad = {
        "entry without a config": {"path": "fused"},
        "entry with a text": {"path": "fused", "config": [64, 32, "32", 4, 2, 0]},
        "entry with a path that is not one": {"path": "fast", "config": None},
    }.get(content)
    cache.parent.mkdir(parents=True)
    if bad is None:
        cache.write_text(content)
    else:
        tables.write(cache, ODD.name, {PROBLEM.key: bad})
    before = cache.read_text()
    choose.reload()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for op in ("fprop", "dgrad"):
            assert choose.chosen(PROBLEM._replace(op=op), ODD).source == "heuristic"
    assert [str(cache) in str(w.message) for w in caught] == [True]
    assert cache.read_text() == before


@pytest.mark.parametrize("field", ["triton", "kernels"])
def test_a_table_of_other_versions_is_not_used(cache: Path, field: str) -> None:
    tables.write(cache, ODD.name, {PROBLEM.key: SOME})
    table = json.loads(cache.read_text())
    cache.write_text(json.dumps({**table, field: "0"}))
    choose.reload()
    assert choose.chosen(PROBLEM, ODD).source == "heuristic"


def test_writing_leaves_nothing_half_done(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.write(cache, ODD.name, {PROBLEM.key: SOME})
    before = cache.read_text()

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tables.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tables.write(cache, ODD.name, {})
    assert cache.read_text() == before


def test_folder_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSED_PREACT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert tables.cache_folder() == Path("/x/fused_preact")
    monkeypatch.setenv("FUSED_PREACT_CACHE", "/y")
    assert tables.cache_path("NVIDIA H100 80GB HBM3").parent == Path("/y")
    assert "nvidia-h100-80gb-hbm3" in tables.cache_path("NVIDIA H100 80GB HBM3").name


def test_env_says_how_to_tune(cache: Path) -> None:
    report = env.report()
    assert str(cache.parent) in report
    assert "python -m fused_preact.tune" in report


def test_shipped_tables_are_readable() -> None:
    for path in Path(tables.__file__).parent.glob("tuned/*.json"):
        tables.read(path, json.loads(path.read_text())["device"])
