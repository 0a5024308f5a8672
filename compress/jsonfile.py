"""JSON files of a checkpoint: read with an error that names the file, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.tensorfile import write_whole


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; CompressError when the file holds anything else."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CompressError(f"{file} is not valid JSON; fetch it again") from error
    if not isinstance(data, dict):
        raise CompressError(f"{file} holds a {type(data).__name__}, expected an object; fetch it again")
    return data


def write_json(path: Path, data: Any) -> None:
    write_whole(path, [(json.dumps(data, indent=2) + "\n").encode()])
