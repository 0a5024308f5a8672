"""Safetensors files, read and written tensor by tensor without holding one in memory.

The format is eight bytes of header length, a JSON header, then raw bytes. Tensors that are not compressed are copied from
file to file as bytes: no dtype can change on the way, and a 1 GB embedding costs 16 MB of memory. Nothing is unpickled.
Files appear whole: written beside their final name, flushed to the disk, renamed.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError

_CHUNK_BYTES = 16 << 20
_MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library itself
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `num_bytes` at `offset` of `path`."""

    path: Path
    code: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        if self.code not in DTYPES:
            raise CompressError(f"{self.path}: dtype {self.code} is not supported")
        return DTYPES[self.code]

    def read(self) -> Tensor:
        """A private copy; no memory map stays behind, so resident memory is what it looks like."""
        buffer = bytearray(self.num_bytes)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            view, done = memoryview(buffer), 0
            while done < self.num_bytes:
                count = file.readinto(view[done:])
                if not count:
                    raise CompressError(f"{self.path} is truncated; fetch it again")
                done += count
        if not buffer:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(buffer, dtype=self.dtype).view(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """Its bytes as they are written, a few at a time; whole numbers of elements."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            left = self.num_bytes
            while left:
                chunk = file.read(min(left, _CHUNK_BYTES))
                if len(chunk) < min(left, _CHUNK_BYTES):
                    raise CompressError(f"{self.path} is truncated; fetch it again")
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True)
class CastTensor(StoredTensor):
    """A stored tensor that reads and is written in another floating point dtype."""

    stored: StoredTensor

    @classmethod
    def of(cls, stored: StoredTensor, dtype: torch.dtype) -> CastTensor:
        num_bytes = prod(stored.shape) * dtype.itemsize
        return cls(stored.path, _CODES[dtype], stored.shape, stored.offset, num_bytes, stored)

    def read(self) -> Tensor:
        return self.stored.read().to(self.dtype)

    def chunks(self) -> Iterator[bytes]:
        for chunk in self.stored.chunks():
            values = torch.frombuffer(bytearray(chunk), dtype=self.stored.dtype).to(self.dtype)
            yield values.view(torch.uint8).numpy().tobytes()


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file; CompressError when the file cannot be what its header says."""
    size = path.stat().st_size
    damaged = f"{path} is damaged"
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise CompressError(f"{damaged}: no safetensors header; fetch it again")
        try:
            header = json.loads(file.read(length))
            if not isinstance(header.pop("__metadata__", {}), dict):
                raise ValueError("__metadata__ is no mapping")
            tensors = {name: _entry(path, 8 + length, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CompressError(f"{damaged}: its header is not valid; fetch it again") from error
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset != end:  # the format allows neither gaps nor overlaps
            raise CompressError(f"{damaged}: tensor {name} does not begin where the one before it ends; fetch it again")
        end += tensor.num_bytes
        if end > size:
            raise CompressError(f"{damaged}: tensor {name} lies beyond its {size} bytes; fetch it again")
        if tensor.code in DTYPES and tensor.num_bytes != prod(tensor.shape) * tensor.dtype.itemsize:
            raise CompressError(f"{damaged}: tensor {name} has {tensor.num_bytes} bytes for shape {list(tensor.shape)}")
    if end != size:
        raise CompressError(f"{damaged}: {size - end} bytes behind the last tensor; fetch it again")
    return tensors


def _entry(path: Path, data: int, entry: dict[str, Any]) -> StoredTensor:
    begin, end = entry["data_offsets"]
    sizes = all(type(number) is int and number >= 0 for number in [*entry["shape"], begin, end])
    if not sizes or begin > end or not isinstance(entry["dtype"], str):
        raise ValueError(f"impossible entry {entry}")
    return StoredTensor(path, entry["dtype"], tuple(entry["shape"]), data + begin, end - begin)


def write_file(path: Path, tensors: Mapping[str, Tensor | StoredTensor]) -> None:
    """Write tensors in the order given; the file appears whole or not at all."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        code = tensor.code if isinstance(tensor, StoredTensor) else _CODES[tensor.dtype]
        size = tensor.num_bytes if isinstance(tensor, StoredTensor) else tensor.numel() * tensor.element_size()
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterable[bytes | memoryview]:
        yield struct.pack("<Q", len(text)) + text
        for tensor in tensors.values():
            if isinstance(tensor, StoredTensor):
                yield from tensor.chunks()
            elif tensor.numel():
                yield memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())

    write_whole(path, parts())


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write beside `path`, flush to the disk, rename; on any failure the unfinished file is removed."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with open(unfinished, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
