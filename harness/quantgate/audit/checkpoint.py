"""A folder of safetensors, read piece by piece: headers once, then only the rows asked for.

Reads with `pread` instead of mapping the files, so that the memory of an audit is what it holds and
not what the kernel still has mapped.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from quantgate.errors import ArtifactError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


class Checkpoint:
    """The tensors of all shards of a folder, by name; use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers.

        Raises:
            ArtifactError: no weights, a malformed or truncated file, or a tensor stored twice.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._descriptors: dict[Path, int] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ArtifactError(f"{folder}: no *.safetensors in it.")
        for path in files:
            for name, tensor in _read_header(path):
                if name in self.tensors:
                    raise ArtifactError(
                        f"{folder}: {name} is stored twice, in {self.tensors[name].file.name} and "
                        f"{path.name}; which one is loaded depends on the loader. Remove one file."
                    )
                self.tensors[name] = tensor

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> StoredTensor:
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """The whole tensor, in its stored type."""
        stored = self.tensors[name]
        return self._read(stored, 0, stored.num_bytes).reshape(stored.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the first dimension, in the stored type."""
        stored = self.tensors[name]
        row_bytes = prod(stored.shape[1:]) * stored.dtype.itemsize
        data = self._read(stored, start * row_bytes, (stop - start) * row_bytes)
        return data.reshape(stop - start, *stored.shape[1:])

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` in storage order, in the stored type."""
        stored = self.tensors[name]
        size = stored.dtype.itemsize
        return self._read(stored, start * size, (stop - start) * size)

    def _read(self, stored: StoredTensor, offset: int, num_bytes: int) -> Tensor:
        if num_bytes == 0:
            return torch.empty(0, dtype=stored.dtype)
        descriptor = self._descriptors.get(stored.file)
        if descriptor is None:
            descriptor = self._descriptors[stored.file] = os.open(stored.file, os.O_RDONLY)
        buffer = bytearray(num_bytes)
        view = memoryview(buffer)
        done = 0
        while done < num_bytes:
            count = os.preadv(descriptor, [view[done:]], stored.offset + offset + done)
            if count == 0:
                raise ArtifactError(f"{stored.file}: ended while it was read. Copy it again.")
            done += count
        return torch.frombuffer(buffer, dtype=stored.dtype)


def _read_header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    # The safetensors header: eight bytes of little-endian length, then JSON.
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: Mapping[str, Mapping[str, object]] = json.loads(file.read(min(length, size)))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            tensor = _stored_tensor(path, entry, data_start=8 + length)
            if tensor.offset + tensor.num_bytes > size:
                raise ArtifactError(
                    f"{path}: truncated; {name} ends at byte {tensor.offset + tensor.num_bytes} "
                    f"of {size}. Copy it again."
                )
            yield name, tensor
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: not a safetensors file ({error}). Copy it again.") from error


def _stored_tensor(path: Path, entry: Mapping[str, object], *, data_start: int) -> StoredTensor:
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if name not in _DTYPES:
        raise ValueError(f"type {name} is not known")
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError("shape and data_offsets are not lists")
    tensor = StoredTensor(
        file=path,
        dtype=_DTYPES[str(name)],
        shape=tuple(int(length) for length in shape),
        offset=data_start + int(offsets[0]),
    )
    if int(offsets[1]) - int(offsets[0]) != tensor.num_bytes:
        raise ValueError(f"{tensor.shape} of {name} does not fill {offsets}")
    return tensor
