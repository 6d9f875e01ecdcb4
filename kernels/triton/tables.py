"""Tables of measured choices: where they are kept, how they are read and written.

A table belongs to one device, one version of Triton and one version of these kernels (``KERNELS``); another one's is
not used. There are two: the one that the user tuned, in the cache folder, and the one that the package ships in
``tuned/``. An entry of the first counts before one of the second, and where neither has one the heuristic of
:mod:`.configs` chooses.

A choice depends on files and on the device, never on a clock: every rank of a job that sees the same files chooses
the same. Without a common file system, tune on rank 0 and copy its file (``python -m fused_preact.env`` prints where
it is).
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton

__all__ = ["KERNELS", "cache_folder", "cache_path", "entries", "read", "reload", "shipped_path", "write"]

KERNELS = 1
"""Raised with every change of a convolution kernel that makes earlier measurements worthless."""

Entries = dict[str, dict[str, Any]]


def cache_folder() -> Path:
    """``FUSED_PREACT_CACHE``, else ``fused_preact`` in the user's cache folder (``XDG_CACHE_HOME``, ~/.cache)."""
    own = os.environ.get("FUSED_PREACT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_preact"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_path(device: str) -> Path:
    """The user's table for the device of that name; versions are part of it, so an update never reads an old one."""
    return cache_folder() / f"{_slug(device)}-triton-{triton.__version__}-kernels-{KERNELS}.json"


def shipped_path(device: str) -> Path:
    """The table that the package ships for the device of that name, whether or not there is one."""
    return Path(__file__).parent / "tuned" / f"{_slug(device)}.json"


def read(path: Path, device: str) -> Entries:
    """The entries of a table, none where there is no file or it belongs to other versions.

    Raises ValueError, naming the file, for one that is not a table of this device.
    """
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as a tuned table ({error})") from error
    try:
        if table["device"] != device:
            raise ValueError(f"{path}: it is a table of {table['device']!r}, this is {device!r}")
        if (table["triton"], table["kernels"]) != (triton.__version__, KERNELS):
            return {}
        found = dict(table["entries"])
        for entry in found.values():
            _check(entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a tuned table ({type(error).__name__}: {error})") from error
    return found


def _check(entry: Mapping[str, Any]) -> None:
    config = entry["config"]
    if entry["path"] in ("split", "loaded", "stored") and config is None:
        return
    numbers = len(config) == 6 and all(isinstance(v, int) and v >= 0 for v in config)
    if entry["path"] != "fused" or not numbers:
        raise TypeError(f"the entry {dict(entry)}")


def write(path: Path, device: str, entries: Entries) -> None:
    """Replace a table at once: a reader sees the old or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"device": device, "triton": triton.__version__, "kernels": KERNELS, "entries": entries}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)


@functools.cache
def entries(device: str) -> Entries:
    """What is known of the device of that name, read once per process; {} for a device without a name.

    A file that cannot be used is named in one warning and otherwise ignored; nothing here writes to it.
    """
    found: Entries = {}
    if not device:
        return found
    for source, path in (("shipped", shipped_path(device)), ("cache", cache_path(device))):
        try:
            table = read(path, device)
        except ValueError as error:
            warnings.warn(f"fused_preact: ignored {error}", RuntimeWarning, stacklevel=2)
            continue
        found.update({key: {**entry, "source": source} for key, entry in table.items()})
    return found


def reload() -> None:
    """Forget what was read, so that the next choice reads the files again."""
    entries.cache_clear()
