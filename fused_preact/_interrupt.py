"""Ctrl-C while one of the package's programs loads: one line and status 130 instead of the traceback of an import.

``python -m`` imports the package, and with it torch, before a line of the program runs; that takes seconds, so the
package's first import has to be this. It does nothing in any other process.
"""

import os
import signal
import sys
from types import FrameType


def quit_at_once(number: int, frame: FrameType | None) -> None:
    """End the process. An extension being initialised drops a KeyboardInterrupt or makes an ImportError of it."""
    try:
        os.write(2, b"\ninterrupted\n")
    finally:  # nobody may be reading
        os._exit(128 + number)


def while_loading() -> None:
    """Let Ctrl-C end the process at once, unless it is ignored (a job in the background) or somebody's own."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, quit_at_once)


def loaded() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is quit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


PROGRAMS = ("fused_preact.train", "fused_preact.predict")

# argv[0] is "-m" only while the interpreter looks for the program: now, for a program of this package.
if sys.argv[:1] == ["-m"] and any(word.endswith(PROGRAMS) for word in sys.orig_argv):
    while_loading()
