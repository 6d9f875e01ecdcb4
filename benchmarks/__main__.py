"""``python -m benchmarks COMMAND``."""

from __future__ import annotations

import sys

from . import compile as compile_command

COMMANDS = {"compile": compile_command.main}


def main() -> int:
    """Run the command named first with the arguments after it."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        came = repr(sys.argv[1]) if len(sys.argv) > 1 else "nothing"
        print(
            f"usage: python -m benchmarks COMMAND ...; COMMAND: got {came}, allowed are {', '.join(COMMANDS)}"
        )
        return 2
    return COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
