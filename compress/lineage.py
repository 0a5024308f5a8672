"""Which weights a finished block was made from: hashes that a resumed run compares, so that two models never mix.

A block's result depends on its own tensors and, through the hidden states, on those of every block before it and on the
embedding. So the hash of block n covers the bytes of blocks 0 to n; what lies outside the blocks is part of the run's
identity. A fingerprint of names, shapes and first bytes would not do: a model edited in the last row of one matrix is
another model. Cost: every tensor is read a second time, from the system's cache, and hashed (about 1 GB/s).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from compress.errors import CompressError
from compress.plan import HEAD, Plan
from compress.source import Source
from compress.tensorfile import StoredTensor

_CHUNK_BYTES = 16 << 20


class Lineage:
    """`of(index)`: hash of everything in the original's blocks that the result of block `index` depends on."""

    def __init__(self, source: Source, plan: Plan) -> None:
        self.source, self.plan = source, plan
        self._running = hashlib.sha256()
        self._known: list[str] = []  # by block

    def of(self, index: int) -> str:
        """The hash of blocks 0 to `index`; of all blocks for HEAD."""
        last = self.plan.num_blocks - 1 if index == HEAD else index
        while len(self._known) <= last:
            prefix = f"{self.plan.blocks_name}.{len(self._known)}."
            names = [name for name in self.source.tensors if name.startswith(prefix)]
            _update(self._running, self.source, names)
            self._known.append(self._running.hexdigest())
        return self._known[last]


def model_identity(source: Source, plan: Plan) -> str:
    """Hash of the config, of every tensor's name and shape, and of the bytes of all tensors outside the blocks."""
    digest = hashlib.sha256(source.fingerprint().encode())
    _update(digest, source, [name for name in source.tensors if not name.startswith(f"{plan.blocks_name}.")])
    return digest.hexdigest()


def _update(digest: Any, source: Source, names: Iterable[str]) -> None:
    for name in sorted(names):
        tensor = source.tensors[name]
        digest.update(f"{name} {tensor.code} {tensor.shape} ".encode())
        for chunk in _chunks(tensor):
            digest.update(chunk)


def _chunks(tensor: StoredTensor) -> Iterable[bytes]:
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset)
        left = tensor.num_bytes
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise CompressError(f"{tensor.path} is truncated; fetch it again")
            left -= len(chunk)
            yield chunk
