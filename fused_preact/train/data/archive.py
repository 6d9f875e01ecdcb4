"""Reading tar archives that may be damaged or hostile: nothing is unpacked to disk, so no member name can do harm."""

from __future__ import annotations

import io
import tarfile
from typing import IO

PIECE = 2**20  # bytes asked for at once of an archive; a header that claims to be longer is refused


class Pieces(io.BufferedIOBase):
    """An archive as tarfile sees it: a header that claims to be longer than any is refused before it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= PIECE:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


def check_plain(member: tarfile.TarInfo) -> None:
    """ReadError unless ``member`` is a file whose bytes stand in the archive as they are."""
    if not member.isreg() or member.issparse():
        raise tarfile.ReadError(f"{member.name} is a link or no plain file")
