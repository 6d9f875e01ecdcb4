"""``python -m fused_preact.train``."""

import os
import signal
import sys

from .cli import main
from .signals import number_of

try:
    status = main()
except KeyboardInterrupt as error:  # again while the first one was being reported
    status = 128 + number_of(error)
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # everything is said and written: nothing to trace at exit
if status > 128 or (status and "RANK" in os.environ):
    # Everything is flushed too. Python itself would kill the process where the KeyboardInterrupt came through exec(),
    # and the threads of a process group that has lost a rank may wait for it.
    os._exit(status)
sys.exit(status)
