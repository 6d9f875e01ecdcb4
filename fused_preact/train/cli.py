"""The command line of ``python -m fused_preact.train``: what it says, and its exit status."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fused_preact import _interrupt

from . import console, signals, world
from .parser import complain, parser
from .world import World


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0; 2 for bad input, found before training starts; 1 for divergence, a file that could not be written or a process
    that was lost; 130 for Ctrl-C, 143 for SIGTERM. All but 0 come with one line on stderr, from one process. A closed
    pipe behind stdout or stderr only silences it.
    """
    out, ranks = None, World()
    try:
        args = parser().parse_args(argv)
        try:
            ranks = world.join(args.device)
            from .prepare import prepare  # not at the top: --help should not wait for it

            work, out = prepare(args, ranks)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            complain(console.one_line(error))
            return 2
        _interrupt.loaded()
        if ranks.size > 1:
            signals.watch(lambda: _lost(ranks, out, "this one waits in vain"))
        with signals.handled():
            work()
        world.leave()
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)
    except FloatingPointError as error:
        complain(console.one_line(error))
        return 1
    except OSError as error:
        ranks.first_to("speak")  # the others will miss this one, and need not say so
        with suppress(OSError):
            console.write(sys.stderr, f"error: {console.one_line(error)}; {_how_to_go_on(out)}\n")
        return 1
    except RuntimeError as error:
        if not world.is_loss(error):
            ranks.first_to("speak")
            raise
        _lost(ranks, out, console.one_line(error))
        return 1
    except KeyboardInterrupt as error:
        number = signals.number_of(error)
        word = "interrupted" if number == 2 else "terminated"
        if ranks.first:
            with suppress(OSError):
                console.write(sys.stderr, f"\n{word}; {_how_to_go_on(out)}\n")
        return 128 + number
    return 0


def _lost(ranks: World, out: Path | None, why: str) -> None:
    """Say, on the first rank to notice, that another is gone."""
    if ranks.first_to("speak"):
        with suppress(OSError):
            known = re.search(r"connection (closed|reset)[\w ]*|timed out|timeout", why, re.IGNORECASE)
            why = known[0].lower() if known else why[:150]
            text = f"error: a process of {ranks.size} was lost ({why}), so all end; {_how_to_go_on(out)}\n"
            console.write(sys.stderr, text)


def _how_to_go_on(out: Path | None) -> str:
    if out is None:
        return "nothing was written"
    if (out / "study.json").exists():
        return f"the runs so far are in {out}, go on with --resume {out}"
    if (out / "last.pt").exists():
        return f"the last checkpoint is {out / 'last.pt'}, go on with --resume {out}"
    return f"no checkpoint was written in {out}"
