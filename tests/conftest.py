"""Which device the kernels run on in this process, and buffers that show what was never written.

``pytest -m gpu`` compiles the kernels and runs them on the CUDA device; every other run interprets them on CPU
tensors. One process cannot do both: Triton decides at import.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        import fused_preact  # noqa: F401
    except ModuleNotFoundError as error:
        raise pytest.UsageError(
            f"{error}: install the checkout first, `make test` or "
            "`pip install --no-deps --no-build-isolation -e .`"
        ) from error


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    reason = None
    if not torch.cuda.is_available():
        reason = "needs a CUDA device, and there is none"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        reason = "needs compiled kernels: run `pytest -m gpu`"
    if reason:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Tests compare numbers, not speed, and may run beside each other."""
    import torch

    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def fresh_seed() -> None:
    import torch

    torch.manual_seed(0)


class _PoisoningTorch:
    """``torch`` whose uninitialised buffers hold NaN, so that an element never written is seen."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def empty(self, *args: Any, **kwargs: Any) -> Any:
        return self._poison(self._torch.empty(*args, **kwargs))

    def empty_like(self, *args: Any, **kwargs: Any) -> Any:
        return self._poison(self._torch.empty_like(*args, **kwargs))

    def _poison(self, tensor: Any) -> Any:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that the launchers and the reference allocate is filled with NaN."""
    import torch

    import fused_preact.reference
    from fused_preact.kernels import triton as package

    modules = [fused_preact.reference]
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        modules.append(importlib.import_module(module.name))
    poisoning = _PoisoningTorch(torch)
    for module in modules:
        if hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", poisoning)
        for name in ("empty_floats", "empty_image"):
            if hasattr(module, name):
                allocate = getattr(module, name)
                monkeypatch.setattr(
                    module, name, lambda *args, allocate=allocate: allocate(*args).fill_(torch.nan)
                )


@pytest.fixture
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 means float32: TF32 has tests of its own."""
    import torch

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def without_gradients() -> Iterator[None]:
    import torch

    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and stall on it where the machine is shared."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training script builds the tiny model whatever the name."""
    from train_helpers import tiny

    from fused_preact import models

    monkeypatch.setattr(models, "create", tiny)


@pytest.fixture(scope="module")
def data() -> Any:
    """A hundred and fifty of the handwritten digits."""
    from fused_preact.train.data import load

    return load("digits", limit_train=100, limit_test=50)


@pytest.fixture(scope="session")
def two_ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], None]:
    """Fails where a scenario of tests/sync_ranks.py went wrong; two processes run all that the session asks for.

    The id of a test that asks for this fixture is the name of its scenario. Such tests are one ``xdist_group``.
    """
    from fused_preact import ops

    folder = tmp_path_factory.mktemp("ranks")
    wanted = [item.callspec.id for item in request.session.items if "two_ranks" in item.fixturenames]  # type: ignore[attr-defined]
    if ops._cpu_missing is not None:
        wanted = [name for name in wanted if not name.startswith("compiled-kernels")]
    code = "import sys; sys.path[:0] = ['', 'tests']; import sync_ranks, workflows; workflows.load(); sync_ranks.main"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", f"{code}({rank}, {str(folder)!r}, {wanted!r})"],
            cwd=Path(__file__).resolve().parents[1],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    paths = [folder / f"{rank}.json" for rank in range(2)]
    results = [json.loads(path.read_text()) if path.exists() else {} for path in paths]

    def check(name: str) -> None:
        for rank, (wrong, output) in enumerate(zip(results, said, strict=True)):
            assert name in wrong, f"rank {rank} did not come so far:\n{output[-2000:]}"
            assert not wrong[name], f"rank {rank}: " + "\n".join(wrong[name])

    return check


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred photographs, as class folders and as shards."""
    from image_helpers import write_folders, write_shards

    root = tmp_path_factory.mktemp("images")
    write_folders(root / "folders")
    write_shards(root / "shards")
    return root


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A small tree of class folders, to be damaged."""
    from image_helpers import write_folders

    return write_folders(tmp_path / "data", train=8, val=3)
