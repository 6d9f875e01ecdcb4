"""Which C++ sources a library of compiled kernels was built from: setup.py records it, the loader compares.

setup.py runs this file by its path, where the package cannot be imported yet: standard library only.
"""

import hashlib
import os

__all__ = ["RECORD", "digest", "recorded"]

RECORD = "_cpu.sources"
"""The file beside the library that holds the digest of its sources."""

_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cpu")


def digest() -> str | None:
    """SHA-256 over names and contents of the C++ sources, in sorted order; None where there are none (a wheel)."""
    try:
        names = sorted(n for n in os.listdir(_FOLDER) if n.endswith((".cpp", ".h", ".inc")) and n[0] != ".")
    except FileNotFoundError:
        return None
    total = hashlib.sha256()
    for name in names:
        with open(os.path.join(_FOLDER, name), "rb") as file:
            content = file.read()
        # The length keeps the end of one file and the start of the next apart.
        total.update(f"{name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest() if names else None


def recorded(library: str) -> str | None:
    """The digest of the sources that ``library`` was built from; None where nothing beside it says so."""
    try:
        with open(os.path.join(os.path.dirname(library), RECORD), encoding="ascii") as file:
            return file.read().strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
