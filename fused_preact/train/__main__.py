"""``python -m fused_preact.train``."""

import os
import signal
import sys

from .cli import main

try:
    status = main()
except KeyboardInterrupt:  # pressed again while the first one was being reported
    status = 130
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # everything is said and written: nothing to trace at exit
if status == 130:
    # Everything is flushed too. Python itself would kill the process where the KeyboardInterrupt came through exec().
    os._exit(status)
sys.exit(status)
