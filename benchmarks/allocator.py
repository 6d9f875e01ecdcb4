"""The C library's memory allocator: every timed candidate runs under one stated setting.

glibc maps each block above 32 MiB (at most) anew and returns it when it is freed, and trims its heap: eager PyTorch,
which allocates a tensor for every intermediate result, then pays for the kernel's zeroing of the same pages in every
step. How much varies with the machine's state, so ratios would not repeat, and they would flatter whoever allocates
less. Timed commands therefore run with freed blocks kept and huge pages asked for, which is eager at its best; the
system's default is what users have unless they change it, and ``--allocator default`` measures that.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import MutableMapping, Sequence

KEPT, DEFAULT = "kept", "default"
TUNABLES = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=18446744073709551615:glibc.malloc.hugetlb=1"
"""Never map a block of its own, never give back the heap's end, advise huge pages (glibc 2.35)."""
_STARTED = "FUSED_PREACT_BENCH_ALLOCATOR"


def _own(environment: MutableMapping[str, str]) -> list[str]:
    """What the user has set, as "NAME=value"."""
    found = [f"{k}={v}" for k, v in sorted(environment.items()) if k.startswith("MALLOC_")]
    tunables = environment.get("GLIBC_TUNABLES", "")
    if "glibc.malloc." in tunables:
        found.append(tunables)
    preloaded = environment.get("LD_PRELOAD", "")
    if "malloc" in preloaded:
        found.append(f"LD_PRELOAD={preloaded}")
    return found


def name() -> str:
    """What is in force in this process: "kept", "default", or the user's own setting."""
    return os.environ.get(_STARTED) or "; ".join(_own(os.environ)) or DEFAULT


def wanted(arguments: Sequence[str]) -> str:
    """What ``--allocator`` asks for; needed before there is a parser, as the process has to start again."""
    for index, argument in enumerate(arguments):
        if argument.startswith("--allocator="):
            return argument.partition("=")[2]
        if argument == "--allocator" and index + 1 < len(arguments):
            return arguments[index + 1]
    return KEPT


def prepare(arguments: Sequence[str], environment: MutableMapping[str, str]) -> bool:
    """Set what ``--allocator kept`` needs; whether the process has to start again for it to be read.

    Never twice, and a setting of the user's own stays.
    """
    if wanted(arguments) != KEPT or environment.get(_STARTED) or _own(environment):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    given = environment.get("GLIBC_TUNABLES")
    environment["GLIBC_TUNABLES"] = f"{given}:{TUNABLES}" if given else TUNABLES
    environment[_STARTED] = KEPT
    return True


def start_again() -> None:
    """Replace this process by itself under the wanted setting; returns where that is in force, or not to be had."""
    if prepare(sys.argv[1:], os.environ):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
