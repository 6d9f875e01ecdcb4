"""What is said on stdout and stderr, where the reader may be gone: training goes on without one."""

from __future__ import annotations

import errno
import os
from typing import TextIO


def write(stream: TextIO | None, text: str) -> None:
    """Write ``text`` out at once. A reader that has gone (``| head``, a closed terminal) silences the stream.

    Raises OSError, with the stream's name, for what a reader cannot do, such as a full disk behind ``>``.
    """
    if stream is None:  # closed before the interpreter started
        return
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:  # a path in an encoding that the stream has not
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError as error:
        _silence(stream)
        if not (
            isinstance(error, ConnectionError) or error.errno == errno.EIO
        ):  # EIO: a terminal that hung up
            raise OSError(error.errno, error.strerror, getattr(stream, "name", "stream")) from error


def one_line(error: BaseException) -> str:
    """What ``error`` says, with the system's own words for an OSError."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def _silence(stream: TextIO) -> None:
    """Point the stream's descriptor at nothing: what its buffer still holds is written again at interpreter exit."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):  # a stream of Python's own
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)
