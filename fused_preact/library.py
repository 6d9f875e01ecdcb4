"""Where the kernels are: the package ``fused_preact.kernels``, and the library of compiled CPU kernels.

In an install both lie inside the package. In a checkout the kernels lie beside it, in ``kernels/``, and Python
takes the package from the checkout whenever that is the working folder, whatever is installed and how. So the
checkout's own kernels are found here, and a library of an install serves them if it was built from the same
C++ sources.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator

import torch

__all__ = ["load"]

_PACKAGE = "fused_preact"
_KERNELS = f"{_PACKAGE}.kernels"
_LIBRARY = "_cpu.so"
_HERE = os.path.dirname(os.path.abspath(__file__))


def _register_kernels_of_checkout() -> None:
    """Make the folder ``kernels`` beside the package ``fused_preact.kernels``, where there is none inside it.

    Before any finder is asked: that of an editable install of another checkout would answer with that one's kernels,
    and Python's own would look inside the package only. The other folders of the checkout stay what they are.
    """
    folder = os.path.join(os.path.dirname(_HERE), "kernels")
    inside = os.path.join(_HERE, "kernels", "__init__.py")
    # The second file tells our folder from a package of the same name that happens to be installed beside ours.
    files = [os.path.join(folder, name) for name in ("__init__.py", "sources.py")]
    if _KERNELS in sys.modules or os.path.exists(inside) or not all(map(os.path.exists, files)):
        return
    spec = importlib.util.spec_from_file_location(_KERNELS, files[0], submodule_search_locations=[folder])
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    sys.modules[_KERNELS] = kernels
    try:
        spec.loader.exec_module(kernels)
    except BaseException:
        del sys.modules[_KERNELS]
        raise
    # As an import statement does, for whoever writes fused_preact.kernels.
    vars(sys.modules[_PACKAGE])["kernels"] = kernels


def _installed_libraries() -> Iterator[str]:
    """Where installs on the import path would have the library: wheels first, then editable ones.

    Not by the metadata of the distribution: a build leaves an egg-info in the checkout, which is found first and
    knows of no library.
    """
    for entry in sys.path:
        if isinstance(entry, str):
            yield os.path.join(entry, _PACKAGE, "kernels", _LIBRARY)
    for finder in sys.meta_path:
        # An editable install is a finder that knows its folder by heart. With nowhere to look Python's own are mute.
        find = getattr(finder, "find_spec", None)
        spec = find(_KERNELS, []) if find is not None else None
        if spec is not None and spec.origin is not None:
            yield os.path.join(os.path.dirname(spec.origin), _LIBRARY)


def load() -> tuple[str | None, str | None]:
    """Load the library that setup.py built, which registers its operators.

    Returns the library's path and None, or None and why there is none. Where the C++ sources are at hand, as in a
    checkout, a library that was built from others is refused: a pull may have changed what its operators take.
    """
    _register_kernels_of_checkout()
    kernels = importlib.import_module("fused_preact.kernels")
    sources = importlib.import_module("fused_preact.kernels.sources")
    folder = os.path.dirname(os.path.abspath(str(kernels.__file__)))
    own = os.path.join(folder, _LIBRARY)
    wanted = sources.digest()
    reasons = []
    for path in [own] if wanted is None else [own, *_installed_libraries()]:
        if not os.path.exists(path):
            continue
        built_from = sources.recorded(path)
        if wanted not in (None, built_from):
            fault = (
                "do not record the C++ sources that they were built from"
                if built_from is None
                else f"were built from other C++ sources than those in {folder}/cpu"
            )
            command = (
                f"pip install --no-build-isolation {'-e ' if path == own else ''}{os.path.dirname(folder)}"
            )
            reasons.append(f"the compiled CPU kernels in {path} {fault} ({command} builds them again)")
            continue
        try:
            torch.ops.load_library(path)
        except OSError as error:
            reasons.append(
                f"the compiled CPU kernels do not load, perhaps because torch was updated ({error})"
            )
        else:
            return path, None
    if reasons:
        return None, reasons[0]
    if wanted is None:
        return None, "this build has no compiled CPU kernels (pip install --no-build-isolation builds them)"
    return None, (
        f"there are no compiled CPU kernels in {folder} and none are installed"
        f" (pip install --no-build-isolation {os.path.dirname(folder)} builds them)"
    )
