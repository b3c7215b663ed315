"""Text files as their readers take them: UTF-8, plain or gzipped, by lines or by pieces, in bounded memory."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, cast

from retriever.data.records import DataError

LONGEST_RECORD_BYTES = 1 << 26  # of a line, or of one object of a JSON list
_PIECE_BYTES = 1 << 20


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a UTF-8 file, gzipped or not. Only a newline ends a line.

    Raises DataError for a file that cannot be opened, a line that is not UTF-8 or longer than LONGEST_RECORD_BYTES, and
    a damaged or truncated gzip file.
    """
    number = 0
    with readable(path) as stream:
        try:
            for number, raw in enumerate(iter(partial(stream.readline, LONGEST_RECORD_BYTES + 1), b""), start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if len(raw) > LONGEST_RECORD_BYTES:
                    raise DataError(
                        f"expected a line of at most {LONGEST_RECORD_BYTES:,} bytes, received a longer one",
                        path,
                        number,
                    )
                yield number, line.removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"expected UTF-8 text, received {_bytes_at(error)}", path, number) from error
        except (EOFError, zlib.error, OSError) as error:
            raise _unreadable(error, path, number + 1) from error


def read_pieces(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, gzipped or not, in pieces of about 1 MiB. Raises DataError as `read_lines`, without a
    line.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with readable(path) as stream:
        try:
            while raw := stream.read(_PIECE_BYTES):
                yield decoder.decode(raw)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise DataError(f"expected UTF-8 text, received {_bytes_at(error)}", path) from error
        except (EOFError, zlib.error, OSError) as error:
            raise _unreadable(error, path) from error


@contextmanager
def readable(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed where its name ends in .gz. Raises DataError where it cannot be opened."""
    try:
        stream = _open(path)
    except OSError as error:
        raise _unreadable(error, path) from error
    with stream:
        yield stream


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _unreadable(error: Exception, path: Path, line: int | None = None) -> DataError:
    if isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error)):
        return DataError(f"expected a complete gzip file: {error}", path, line)
    return DataError(f"expected a readable file: {getattr(error, 'strerror', None) or error}", path)


def _bytes_at(error: UnicodeDecodeError) -> str:
    return f"byte {error.object[error.start]:#x} at {error.start}"
