"""What is built and installed: wheel and sdist hold what the tree holds, and the wheel works away from it.

Everything is built from a copy, so that no build folder of the checkout can lend a file, and installed into a
folder of its own. Nothing here needs a network.
"""

from __future__ import annotations

import email
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fused_preact
from fused_preact import ops
from fused_preact.kernels import sources as cpp

# The builds are shared by the tests: keep them in one worker.
pytestmark = pytest.mark.xdist_group("packaging")

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("__pycache__", "*.py[cod]", "*.so", "_cpu.sources", ".*_cache", "*.egg-info")

# Hides packages as if they were not installed: importing them fails, and find_spec finds nothing.
HIDE = """
import importlib.machinery as machinery
finder = machinery.PathFinder
find = finder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {names!r} else find(name, path, target)
finder.find_spec = find_spec
"""


def sources(*folders: str, suffixes: tuple[str, ...]) -> set[str]:
    """The files of ``folders`` in the checkout with one of ``suffixes``, relative to its root."""
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    return {p.relative_to(ROOT).as_posix() for p in paths if "__pycache__" not in p.parts}


def run(
    *command: str,
    cwd: Path,
    path: tuple[Path, ...] = (),
    python: Path | str = sys.executable,
    **environment: str,
) -> str:
    """Run a Python command without what pytest or the shell has set, and return what it printed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FUSED_PREACT_", "TRITON_", "PYTHON"))}
    kept |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PIP_NO_INDEX": "1", **environment}
    done = subprocess.run(
        [str(python), *command],
        cwd=cwd,
        env=kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


def hidden(folder: Path, *names: str) -> Path:
    """A folder that hides the packages ``names`` from an interpreter with it on PYTHONPATH."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(HIDE.format(names=set(names)))
    return folder


def build(tree: Path, out: Path, kind: str, path: tuple[Path, ...] = (), **environment: str) -> Path:
    """Build the ``kind`` ("wheel" or "sdist") of ``tree`` and return the file."""
    run(
        "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out), cwd=tree, path=path, **environment
    )
    (made,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout without what was built in it."""
    tree = tmp_path_factory.mktemp("copy") / "tree"
    tree.mkdir()
    for folder in ("fused_preact", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns(*GENERATED))
    files = ("setup.py", "pyproject.toml", "MANIFEST.in", "constraints.txt", "LICENSE", "Makefile", "*.md")
    for file in [path for pattern in files for path in ROOT.glob(pattern)]:
        shutil.copy(file, tree)
    return tree


@pytest.fixture(scope="module")
def sdist(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(copy, tmp_path_factory.mktemp("sdist"), "sdist", FUSED_PREACT_BUILD_EXT="0")


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(copy, tmp_path_factory.mktemp("wheel"), "wheel", FUSED_PREACT_BUILD_EXT="0")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed."""
    target = tmp_path_factory.mktemp("installed")
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    run(*command, cwd=target)
    return target


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def contents(wheel: Path) -> set[str]:
    """The files of a wheel beside its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {n for n in archive.namelist() if ".dist-info/" not in n}


def expected_contents() -> set[str]:
    """The tree's own modules and data under their installed names, and nothing else."""
    kernels = sources("kernels", suffixes=(".py", ".json"))
    package = sources("fused_preact", suffixes=(".py", ".typed"))
    assert "fused_preact/py.typed" in package
    return package | {f"fused_preact/{name}" for name in kernels}


def test_wheel_holds_the_modules_of_the_tree_and_no_others(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert contents(wheel) == expected_contents()


def test_sdist_holds_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    wanted = sources("fused_preact", "benchmarks", "tests", suffixes=(".py", ".typed"))
    wanted |= sources("kernels", suffixes=(".py", ".json", ".h", ".inc", ".cpp"))
    wanted |= {"setup.py", "pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "README.md"}
    assert wanted - names == set()
    assert {n for n in names if n.endswith((".pyc", ".so", "_cpu.sources"))} == set()


def test_sdist_builds_the_same_wheel(sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    assert contents(build(tree, tmp_path / "out", "wheel", FUSED_PREACT_BUILD_EXT="0")) == expected_contents()


def test_metadata_requires_torch_as_a_range_and_nothing_else(metadata: Message) -> None:
    required = [Requirement(r) for r in metadata.get_all("Requires-Dist", [])]
    (torch,) = [r for r in required if r.marker is None or "extra" not in str(r.marker)]
    assert torch.name == "torch"
    assert {s.operator for s in torch.specifier} <= {">=", "<", "!="}
    assert ">=" in {s.operator for s in torch.specifier}
    assert {"triton", "train", "test", "dev"} <= set(metadata.get_all("Provides-Extra", []))


def test_metadata_has_the_name_and_version_of_the_package(metadata: Message, wheel: Path) -> None:
    assert metadata["Name"] == "fused_preact"
    assert metadata["Version"] == fused_preact.__version__
    assert metadata["License-File"] == "LICENSE"


@pytest.mark.parametrize("without", ["torch", "compiler"])
def test_builds_without(copy: Path, tmp_path: Path, without: str) -> None:
    """As ``pip install .`` does: isolated builds have no torch, and many machines no working compiler."""
    tree = shutil.copytree(copy, tmp_path / "tree", ignore=shutil.ignore_patterns("build", *GENERATED))
    if without == "torch":
        made = build(tree, tmp_path / "out", "wheel", path=(hidden(tmp_path / "hidden", "torch"),))
    else:
        made = build(tree, tmp_path / "out", "wheel", CC="/bin/false", CXX="/bin/false")
    assert contents(made) == expected_contents()


STUB = """#!/bin/sh
# Compiles and links nothing, at once: makes the file that -o names, and notes how it was called.
echo "$*" >> "$0.calls"
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


def test_compiled_build_records_its_sources(copy: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(copy, tmp_path / "tree", ignore=shutil.ignore_patterns("build", *GENERATED))
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_text(STUB)
    compiler.chmod(0o755)
    environment = {"CC": str(compiler), "CXX": str(compiler), "FUSED_PREACT_BUILD_EXT": "1"}
    run("setup.py", "-q", "bdist_wheel", "-d", str(tmp_path / "out"), cwd=tree, **environment)
    (made,) = (tmp_path / "out").iterdir()
    built = {"fused_preact/kernels/_cpu.so", f"fused_preact/kernels/{cpp.RECORD}"}
    assert contents(made) == expected_contents() | built
    with zipfile.ZipFile(made) as archive:
        assert archive.read(f"fused_preact/kernels/{cpp.RECORD}").decode() == f"{cpp.digest()}\n"
    compiled = compiler.with_name("c++.calls").read_text().splitlines()
    assert len([call for call in compiled if "-c" in call.split() and "bn_stats.cpp" in call]) == 1
    # ... and so does a build in place, as an editable install makes it, of the sources of its day.
    (tree / "kernels" / "cpu" / "more.h").touch()
    run("setup.py", "-q", "build_ext", "--inplace", cwd=tree, **environment)
    assert (tree / "kernels" / "_cpu.so").exists()
    code = "import runpy; print(runpy.run_path('kernels/sources.py')['digest']())"
    assert (
        cpp.recorded(str(tree / "kernels" / "_cpu.so")) == run("-c", code, cwd=tree).strip() != cpp.digest()
    )
    # A build that fails packs nothing of an earlier one.
    assert list(tree.glob("build/lib*/fused_preact/kernels/_cpu.so"))
    environment = {"CC": "/bin/false", "CXX": "/bin/false"}
    run("setup.py", "-q", "bdist_wheel", "-d", str(tmp_path / "failed"), cwd=tree, **environment)
    (failed,) = (tmp_path / "failed").iterdir()
    assert contents(failed) == expected_contents()


def test_build_requires_no_torch(copy: Path) -> None:
    code = "import setuptools.build_meta as b; print(b.get_requires_for_build_wheel())"
    assert "torch" not in run("-c", code, cwd=copy, FUSED_PREACT_BUILD_EXT="0").splitlines()[-1]
    requires = (copy / "pyproject.toml").read_text().partition("[project]")[0]
    assert "setuptools" in requires
    assert "torch" not in requires


USE = """
import sys, torch, fused_preact, fused_preact.kernels
from pathlib import Path
for module in (fused_preact, fused_preact.kernels):
    assert Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__
import warnings
# The wheel is built without a compiler: plain PyTorch serves, and says so once.
warnings.filterwarnings("ignore", "fused_preact: .*compiled CPU kernels", RuntimeWarning)
torch.manual_seed(0)
site = fused_preact.PreActConv2d(3, 5, 3, padding=1)
x = torch.randn(2, 3, 7, 6, requires_grad=True)
y = site(x)
y.square().sum().backward()
plain = site.conv(torch.relu(torch.nn.functional.batch_norm(x, None, None, site.bn.weight, site.bn.bias, True)))
torch.testing.assert_close(y, plain, atol=1e-5, rtol=1e-5)
for name, grad in {"x": x.grad, **{n: p.grad for n, p in site.named_parameters()}}.items():
    assert grad is not None and grad.isfinite().all() and grad.abs().sum() > 0, name
"""


WITH_TRITON = """
import fused_preact.kernels.triton as kernels
assert Path(kernels.__file__).is_relative_to(sys.argv[1]), kernels.__file__
"""

WITHOUT_TRITON = """
import importlib.util
assert importlib.util.find_spec("triton") is None
try:
    with fused_preact.backend("triton"):
        pass
except RuntimeError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError("backend('triton') without triton raised nothing")
"""


def test_installed_wheel_computes_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = USE + (WITH_TRITON if importlib.util.find_spec("triton") else "")
    assert run("-c", code, str(installed), cwd=tmp_path, path=(installed,)) == ""


def test_installed_wheel_computes_without_triton(installed: Path, tmp_path: Path) -> None:
    path = (hidden(tmp_path / "hidden", "triton"), installed)
    assert run("-c", USE + WITHOUT_TRITON, str(installed), cwd=tmp_path, path=path) == ""


# --- inside a checkout -------------------------------------------------------------------------------------
# Its working folder is first on Python's path, so the package is the checkout's own whatever is installed.


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the packages of this one but fused_preact, whose editable install is found anywhere."""
    folder = tmp_path_factory.mktemp("bare")
    run("-m", "venv", "--without-pip", str(folder), cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    for source in [Path(p) for p in sys.path if p.endswith(("site-packages", "dist-packages"))]:
        for entry in source.iterdir():
            if "fused_preact" not in entry.name and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


@pytest.fixture
def clone(copy: Path, tmp_path: Path) -> Path:
    """A checkout to put a library into; its build left an egg-info, as an install from it does."""
    return Path(shutil.copytree(copy, tmp_path / "clone", ignore=shutil.ignore_patterns("build", "tests")))


def lay(folder: Path, record: str | None, library: Path | None = None) -> Path:
    """Put a library into ``folder``, with ``record`` beside it; without ``library`` one that cannot load."""
    made = folder / "_cpu.so"
    if library is None:
        made.write_text("not a library")
    else:
        shutil.copy(library, made)
    if record is not None:
        (folder / cpp.RECORD).write_text(f"{record}\n")
    return made


def served(python: Path, clone: Path, *path: Path) -> str:
    """What ``python -m fused_preact.env`` says in ``clone`` of the compiled CPU kernels."""
    report = run("-m", "fused_preact.env", cwd=clone, path=path, python=python)
    (line,) = [line for line in report.splitlines() if line.startswith("  cpu ")]
    return line.split(maxsplit=1)[1]


# Stands for the finder that setuptools installs, which knows the folder of an editable install by heart.
EDITABLE = """
import importlib.util, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "fused_preact.kernels":
            return importlib.util.spec_from_file_location(name, {init!r})
sys.meta_path.append(Finder)
"""


def editable(folder: Path, tree: Path) -> Path:
    """A folder that gives an interpreter with it on PYTHONPATH the editable install of ``tree``."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(EDITABLE.format(init=str(tree / "kernels" / "__init__.py")))
    return folder


@pytest.mark.parametrize("install", ["nothing", "pure", "editable-elsewhere"])
def test_checkout_runs_whatever_is_installed(
    bare: Path, copy: Path, clone: Path, installed: Path, tmp_path: Path, install: str
) -> None:
    path: tuple[Path, ...] = (installed,) if install == "pure" else ()
    if install == "editable-elsewhere":
        path = (editable(tmp_path / "site", copy),)
    code = USE + (WITH_TRITON if importlib.util.find_spec("triton") else "")
    assert run("-c", code, str(clone), cwd=clone, path=path, python=bare) == ""
    for program in () if install == "editable-elsewhere" else ("fused_preact.train", "benchmarks"):
        assert "usage:" in run("-m", program, "--help", cwd=clone, path=path, python=bare)
    assert served(bare, clone, *path) == (
        f"not available: there are no compiled CPU kernels in {clone}/kernels and none are installed"
        f" (pip install --no-build-isolation {clone} builds them)"
    )


@pytest.mark.skipif(ops._cpu_missing is not None, reason=str(ops._cpu_missing))
@pytest.mark.parametrize("install", ["wheel", "wheel-and-stale-beside", "editable-elsewhere"])
def test_checkout_takes_the_installed_library_of_its_sources(
    bare: Path, copy: Path, clone: Path, installed: Path, tmp_path: Path, install: str
) -> None:
    site = tmp_path / "site"
    if install == "editable-elsewhere":
        tree = shutil.copytree(copy, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("build", "tests"))
        editable(site, tree)
        folder = tree / "kernels"
    else:
        folder = shutil.copytree(installed, site) / "fused_preact" / "kernels"
    library = lay(folder, cpp.digest(), Path(str(ops._cpu_library)))
    if install == "wheel-and-stale-beside":
        lay(clone / "kernels", "0" * 64)
    line = served(bare, clone, site)
    assert line.startswith("available, instruction set ")
    assert line.endswith(f", {library}")


@pytest.mark.parametrize(
    ("where", "record"),
    [("installed", "0" * 64), ("beside", "0" * 64), ("beside", None)],
    ids=["installed-other", "beside-other", "beside-unknown"],
)
def test_checkout_refuses_a_library_of_other_sources(
    bare: Path, clone: Path, installed: Path, tmp_path: Path, where: str, record: str | None
) -> None:
    site = Path(shutil.copytree(installed, tmp_path / "site"))
    library = lay(site / "fused_preact" / "kernels" if where == "installed" else clone / "kernels", record)
    fault = (
        "do not record the C++ sources that they were built from"
        if record is None
        else f"were built from other C++ sources than those in {clone}/kernels/cpu"
    )
    option = "-e " if where == "beside" else ""
    assert served(bare, clone, site) == (
        f"not available: the compiled CPU kernels in {library} {fault}"
        f" (pip install --no-build-isolation {option}{clone} builds them again)"
    )
