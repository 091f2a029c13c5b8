"""Parquet files that detect changes after writing, by a checksum of every page and of the schema.

A page's checksum covers its data. Names, types and metadata (including class names) are in the footer, which Parquet
does not protect: their checksum is an extra entry of the metadata. Files without checksums are read unchecked.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from weaksam.core import storage
from weaksam.errors import DamagedError

_CHECKSUM = b"weaksam.schema_crc32"


def write_parquet(uri: str, table: pa.Table) -> None:
    """Writes a table in one atomic step."""
    metadata = dict(table.schema.metadata or {}) | {_CHECKSUM: _checksum(table.schema)}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd", write_page_checksum=True)
    storage.write_bytes(uri, sink.getvalue().to_pybytes())


def read_parquet(uri: str, *, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads the table of a file, or only the given columns.

    Raises:
        FileNotFoundError: there is no such object.
        DamagedError: the object is not Parquet, or was altered after it was written.
        StorageError: the object could not be read.
    """
    files, path = storage.filesystem(uri)
    try:
        with files.open_input_file(path) as handle:
            return _parse(handle, columns)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise
    except Exception:  # a fault of storage or content: if the whole object can be read, it is the content
        content = storage.read_bytes(uri)
    try:
        return _parse(pa.BufferReader(content), columns)
    except Exception as error:  # a parser may raise anything on damaged bytes
        raise DamagedError(f"{uri}: damaged ({' '.join(str(error).split())}): remove it") from error


def _parse(source: pa.NativeFile, columns: Sequence[str] | None) -> pa.Table:
    file = pq.ParquetFile(source, page_checksum_verification=True)
    metadata = dict(file.schema_arrow.metadata or {})
    written = metadata.pop(_CHECKSUM, None)
    if written is not None and written != _checksum(file.schema_arrow):
        raise ValueError("the checksum of its schema is another")
    return file.read(columns=None if columns is None else list(columns)).replace_schema_metadata(metadata or None)


def _checksum(schema: pa.Schema) -> bytes:
    metadata = sorted((key, value) for key, value in (schema.metadata or {}).items() if key != _CHECKSUM)
    content = json.dumps([_described(field) for field in schema]).encode() + repr(metadata).encode()
    return f"{zlib.crc32(content):08x}".encode()


def _described(field: pa.Field) -> list:
    """Returns name and type of a field, with nested fields, in a form independent of the pyarrow version."""
    return [field.name, _type_of(field.type)]


def _type_of(kind: pa.DataType) -> Any:
    if pa.types.is_struct(kind):
        return [_described(kind.field(index)) for index in range(kind.num_fields)]
    if pa.types.is_fixed_size_list(kind):
        return [kind.list_size, _type_of(kind.value_type)]
    if pa.types.is_list(kind):  # the name of the element field depends on the Parquet writer
        return [_type_of(kind.value_type)]
    return str(kind)
