"""Text files, plain or compressed (.gz, .zst), read as UTF-8 in lines or in pieces.

Memory is bounded whatever the file holds.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from retriever.data.records import DataError

LONGEST_RECORD_BYTES = 1 << 26  # of a line, of a CSV field, of one object of a JSON list
_PIECE_BYTES = 1 << 20
_UNREADABLE = (UnicodeDecodeError, EOFError, zlib.error, OSError)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a UTF-8 file, compressed or not. Only a newline ends a line.

    Raises DataError for a file that cannot be opened, a line that is not UTF-8 or longer than LONGEST_RECORD_BYTES, and
    a damaged or truncated compressed file.
    """
    number = 1
    with _opened(path) as stream:
        try:
            while raw := stream.readline(LONGEST_RECORD_BYTES + 1):
                if len(raw) > LONGEST_RECORD_BYTES:  # before decoding: the cut may be inside a character
                    expected = f"expected a line of at most {LONGEST_RECORD_BYTES:,} bytes, received a longer one"
                    raise DataError(expected, path, number)
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, line.removesuffix("\n").removesuffix("\r")
                number += 1
        except _UNREADABLE as error:
            raise _unreadable(error, path, number) from error


def read_pieces(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, compressed or not, in pieces of about 1 MiB. Raises DataError as `read_lines`."""
    decoder, number = codecs.getincrementaldecoder("utf-8-sig")(), 1
    with _opened(path) as stream:
        try:
            while raw := stream.read(_PIECE_BYTES):
                piece = decoder.decode(raw)
                yield piece
                number += piece.count("\n")
            yield decoder.decode(b"", final=True)
        except _UNREADABLE as error:
            raise _unreadable(error, path, number) from error


def _opened(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed where its name ends in .gz or .zst. Raises DataError where it cannot be opened."""
    try:
        if path.suffix == ".zst":
            import pyarrow as pa

            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
        return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise _unreadable(error, path) from error


def _unreadable(error: Exception, path: Path, line: int | None = None) -> DataError:
    """The DataError for what reading `path` raised while it was at `line`."""
    if isinstance(error, UnicodeDecodeError):
        before, wrong = error.object[: error.start], error.object[error.start]
        line, column = (line or 1) + before.count(b"\n"), error.start - (before.rfind(b"\n") + 1)
        return DataError(f"expected UTF-8 text, received byte {wrong:#x} at {column}", path, line)
    if isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error)):
        return DataError(f"expected a complete gzip file: {error}", path, line)
    if path.suffix == ".zst" and isinstance(error, OSError) and error.errno is None:  # the decompressor's
        return DataError(f"expected a complete zstd file: {error}", path, line)
    return DataError(f"expected a readable file: {getattr(error, 'strerror', None) or error}", path)
