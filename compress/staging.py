"""Work in progress, in `.NAME.partial` beside the output: what is being made, and the packed tensors of finished blocks.

Every file appears by a rename, so what is there is whole. `run.json` is the identity of the run: a command that would
make something else may not continue it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import Tensor

from compress.errors import CompressError
from compress.plan import HEAD
from compress.report import ModuleReport
from compress.tensorfile import read_header, write_file, write_whole


def block_file(index: int) -> str:
    return "block-head.safetensors" if index == HEAD else f"block-{index:05d}.safetensors"


def write_block(staging: Path, index: int, packed: dict[str, Tensor], reports: list[ModuleReport]) -> None:
    """The tensors are renamed into place last: their file alone says that the block is finished."""
    file = staging / block_file(index)
    write_whole(file.with_suffix(".json"), [json.dumps([report.to_dict() for report in reports]).encode()])
    write_file(file, packed)


def read_block(staging: Path, index: int) -> tuple[dict[str, Tensor], list[ModuleReport]]:
    file = staging / block_file(index)
    reports = [ModuleReport(**entry) for entry in json.loads(file.with_suffix(".json").read_text())]
    return {name: tensor.read() for name, tensor in read_header(file).items()}, reports


def open_staging(staging: Path, identity: dict[str, str]) -> None:
    state = staging / "run.json"
    if state.is_file():
        before = json.loads(state.read_text())
        changed = [key for key in identity if before.get(key) != identity[key]]
        if changed:
            raise CompressError(
                f"{staging} holds an unfinished run with another {' and '.join(changed)}; "
                "repeat that command to finish it, or remove the directory"
            )
    else:
        shutil.rmtree(staging, ignore_errors=True)  # killed before it had begun
        staging.mkdir()
        write_whole(state, [json.dumps(identity, indent=1).encode()])
