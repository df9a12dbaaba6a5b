"""Text files by lines, in blocks: UTF-8 checked, rows cut into fields by whole arrays, never row by row."""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from dynrec_jax.errors import DataError

BLOCK = 8 << 20
# A place is the file's number above this bit and the line's below it.
FILE_SHIFT = 44
GZIP_MAGIC = b"\x1f\x8b"


def require_file(path: Path, what: str) -> Path:
    """The path itself; DataError unless it is a file with something in it."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; expected {what}")
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected {what}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; expected {what}")
    return path


def is_gzip(path: Path) -> bool:
    """Whether a file is packed with gzip, whatever its name."""
    with path.open("rb") as file:
        return file.read(len(GZIP_MAGIC)) == GZIP_MAGIC


def open_bytes(path: Path) -> BufferedIOBase:
    """Opens a file to read its bytes, unpacked where it is gzip."""
    return gzip.open(path) if is_gzip(path) else path.open("rb")


def read_bytes(file: BufferedIOBase, path: Path, size: int = -1) -> bytes:
    """Bytes of what `open_bytes` opened; DataError where a packed file is cut short or damaged."""
    try:
        return file.read(size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: cut short or damaged ({error}); expected a whole gzip file") from None


def is_utf8(path: Path) -> bool:
    """Whether the whole file decodes as UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        try:
            while block := file.read(BLOCK):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def line_blocks(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, list[str]]]:
    """Yields (number of the first line, lines without their ends) for blocks of whole lines, counted from 1.

    A file packed with gzip is unpacked on the way.

    Raises:
      DataError: Bytes that are not text in that encoding, with the line; a packed file that is cut short.
    """
    line, rest = 1, b""
    with open_bytes(path) as file:
        while True:
            block = read_bytes(file, path, BLOCK)
            if not rest and line == 1 and block.startswith(codecs.BOM_UTF8):
                block = block[len(codecs.BOM_UTF8) :]
            rest += block
            whole, newline, tail = (rest, b"", b"") if not block else rest.rpartition(b"\n")
            if block and not newline:
                continue
            if whole or newline:
                lines = decoded(whole, encoding, path, line).split("\n")
                if not block and not lines[-1]:
                    lines.pop()
                yield line, lines
                line += len(lines)
            rest = tail
            if not block:
                return


def decoded(data: bytes, encoding: str, path: Path, first_line: int) -> str:
    """Bytes as text, line ends as line feeds; DataError with the line of the first byte that is none."""
    try:
        return data.decode(encoding).replace("\r\n", "\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        found = f"byte 0x{data[error.start]:02x} is not {encoding.upper()}"
        raise DataError(f"{path}:{line}: {found}; expected text in {encoding.upper()}") from None


def field_blocks(
    path: Path, separator: str, fields: int, encoding: str = "utf-8", skip: int = 0
) -> Iterator[tuple[pa.Array, list[pa.Array]]]:
    """Yields (line numbers, one string array a field) of a file without quotes; blank lines are passed over.

    Args:
      path: The file.
      separator: What separates fields, such as a tab or `::`.
      fields: How many there must be in every line.
      encoding: The file's encoding.
      skip: How many lines to leave out at the top.

    Raises:
      DataError: A line with another number of fields.
    """
    for first, lines in line_blocks(path, encoding):
        text = pa.array(lines, pa.string())
        numbers = pa.array(range(first, first + len(lines)), pa.int64())
        keep = pc.and_(pc.not_equal(pc.utf8_trim_whitespace(text), ""), pc.greater(numbers, skip))
        text, numbers = text.filter(keep), numbers.filter(keep)
        cut = pc.split_pattern(text, separator)
        lengths = pc.list_value_length(cut)
        wrong = pc.index(pc.equal(lengths, fields), False).as_py()
        if wrong >= 0:
            raise DataError(
                f"{path}:{numbers[wrong]}: {lengths[wrong]} fields; expected {fields} between {separator!r}"
            )
        flat = pc.list_flatten(cut)
        columns = [flat.take(pa.array(range(i, len(flat), fields), pa.int64())) for i in range(fields)]
        yield numbers, columns


def first_text_line(path: Path) -> str:
    """The first line of a UTF-8 file, without a byte order mark."""
    for _, lines in line_blocks(path):
        return lines[0]
    return ""
