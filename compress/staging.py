"""Work in progress, in `.NAME.partial` beside the output: what is being made, and the packed tensors of finished blocks.

    run.json              the identity of the run: a command that would make something else may not continue it
    bases.*               bases of a rotation or a KV cache, and the hash of the weights they were made from
    tried-*.json          the candidates of a block's matrices, until all have been tried
    allocation.json       how every matrix is stored, and sensitivity.safetensors, what the output minds of it
    block-*.safetensors   the packed tensors of a finished block
    block-*.json          its figures, and the hash of the weights it was made from (`compress.lineage`)
    states/               hidden states on their way through a backward pass
    lock                  held by the process that works here

Every file appears by a rename, so what is there is whole; what a run goes on from is checked, states are made anew.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from compress.errors import CompressError
from compress.layers import layer_class
from compress.lineage import Lineage
from compress.plan import HEAD, Plan
from compress.report import ModuleReport
from compress.source import REPORT
from compress.tensorfile import StoredTensor, read_header, write_file, write_whole

BASES = "bases.safetensors"
TRIED = "tried-*.json"
_STATE, _LOCK = "run.json", "lock"


def staging_of(output: Path) -> Path:
    """Where the work on an output directory lies until it is complete."""
    return output.absolute().with_name(f".{output.name}.partial")


def is_vacant(output: Path) -> bool:
    """Whether a directory can be renamed to this place: nothing is there, or an empty directory that can be taken away."""
    if not os.path.lexists(output):
        return True
    given = output.is_symlink() or os.path.ismount(output) or output == Path.cwd()
    return output.is_dir() and not given and not any(output.iterdir())


def publish(whole: Path, output: Path) -> None:
    """Rename a complete directory to its vacant place."""
    if output.exists():  # not every system renames onto an empty directory
        output.rmdir()
    os.rename(whole, output)


def block_file(index: int) -> str:
    return "block-head.safetensors" if index == HEAD else f"block-{index:05d}.safetensors"


def finished_blocks(staging: Path, plan: Plan) -> set[int]:
    """The blocks, HEAD among them, that need no more work."""
    return {index for index in [*range(plan.num_blocks), HEAD] if (staging / block_file(index)).exists()}


def write_block(staging: Path, index: int, made_from: str, packed: dict[str, Tensor], reports: list[ModuleReport]) -> None:
    """The tensors are renamed into place last: their file alone says that the block is finished."""
    file = staging / block_file(index)
    record = {"made_from": made_from, "modules": [report.to_dict() for report in reports]}
    write_whole(file.with_suffix(".json"), [json.dumps(record).encode()])
    write_file(file, packed)


def read_block(staging: Path, index: int) -> tuple[dict[str, Tensor], list[ModuleReport]]:
    """A finished block; CompressError when its files are damaged."""
    tensors = {name: tensor.read() for name, tensor in read_header(staging / block_file(index)).items()}
    return tensors, _record(staging, index)[1]


def write_bases(staging: Path, made_from: str, bases: dict[str, Tensor]) -> None:
    """As `write_block`; `made_from` is empty for bases that are no function of the weights."""
    file = staging / BASES
    write_whole(file.with_suffix(".json"), [json.dumps({"made_from": made_from}).encode()])
    write_file(file, bases)


def _record(staging: Path, index: int) -> tuple[str, list[ModuleReport]]:
    file = (staging / block_file(index)).with_suffix(".json")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return record["made_from"], [ModuleReport(**entry) for entry in record["modules"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompressError(_damaged(file)) from error


def _damaged(file: Path) -> str:
    return f"{file} is damaged; remove {file.with_suffix('.*')}, and the same command makes them again"


def open_staging(staging: Path, identity: dict[str, str]) -> None:
    """Begin a run in a locked directory, or make sure that this one may continue what lies there.

    Raises:
        CompressError: the work there is another run's. It is left as it is.
    """
    state = staging / _STATE
    if not state.is_file():  # new, or killed before it had begun
        clear(staging)
        write_whole(state, [json.dumps(identity, indent=1).encode()])
        return
    before = _read_json(state)
    changed = [key for key in {**identity, **before} if before.get(key) != identity.get(key)]
    if changed:
        raise CompressError(
            f"{staging} holds an unfinished run with another {' and '.join(changed)}; "
            "repeat that command to finish it, or remove the directory"
        )


def check_blocks(staging: Path, plan: Plan, lineage: Lineage) -> None:
    """Make sure that the finished blocks in a directory are whole and were made from this model.

    Raises:
        CompressError: they are not. They are left as they are.
    """
    for index in sorted(finished_blocks(staging, plan), key=lambda index: (index == HEAD, index)):
        _check_block(staging, index, plan, lineage)


def check_bases(staging: Path, lineage: Lineage) -> None:
    """The same for bases, if there are any."""
    if (staging / BASES).exists():
        made_from = _read_json((staging / BASES).with_suffix(".json")).get("made_from")
        _stored(staging / BASES)
        if made_from:
            _require_same(made_from, lineage.of(HEAD), staging / BASES)


def _check_block(staging: Path, index: int, plan: Plan, lineage: Lineage) -> None:
    file = staging / block_file(index)
    made_from, _ = _record(staging, index)
    expected = {
        f"{job.name}.{key}": (tuple(shape), dtype)
        for job in plan.by_block.get(index, ())
        for key, (shape, dtype) in layer_class(job.spec["format"]).tensors(job.spec).items()
    }
    if {name: (tensor.shape, tensor.dtype) for name, tensor in _stored(file).items()} != expected:
        raise CompressError(_damaged(file))
    _require_same(made_from, lineage.of(index), file)


def _stored(file: Path) -> dict[str, StoredTensor]:
    try:
        return read_header(file)
    except CompressError as error:
        raise CompressError(_damaged(file)) from error


def _require_same(made_from: str, now: str, file: Path) -> None:
    if made_from != now:
        raise CompressError(
            f"{file} was made from another model: weights have changed since; remove {file.parent} to start again"
        )


def clear(staging: Path) -> None:
    """Empty a locked directory but for its lock."""
    for path in staging.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def locked(staging: Path) -> Iterator[None]:
    """Make the directory and hold its lock, which the system releases however this process ends.

    Raises:
        CompressError: another process works there.
    """
    lock = _take_lock(staging)
    try:
        yield
    finally:
        if not (staging / _STATE).exists():  # nothing has begun: leave nothing behind
            shutil.rmtree(staging, ignore_errors=True)
        lock.close()


def _take_lock(staging: Path) -> IO[str]:
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:  # Windows has no such locks: two runs at once are the user's to avoid there
        staging.mkdir(exist_ok=True)
        return io.StringIO()
    while True:
        staging.mkdir(exist_ok=True)
        try:
            file = open(staging / _LOCK, "w")  # noqa: SIM115  open as long as the lock is held
        except FileNotFoundError:
            continue  # another run has just removed the directory
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise CompressError(
                f"another process is at work in {staging}; wait until it is done, or choose another -o"
            ) from error
        except OSError:
            return file  # a file system without locks
        if _is_at(file.fileno(), staging / _LOCK):
            return file
        file.close()  # removed between opening and locking: what we hold is nobody's lock


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def identity_of(output: Path) -> dict[str, Any]:
    """The identity of the run that made a finished checkpoint; empty when the directory holds none."""
    identity = _read_json(output / REPORT).get("identity")
    return identity if isinstance(identity, dict) else {}


def forget_finished(staging: Path, output: Path) -> None:
    """Remove the work of a run that was killed after its output had appeared: both carry the same identity."""
    identity = identity_of(output)
    if identity and identity == _read_json(staging / _STATE):
        shutil.rmtree(staging, ignore_errors=True)


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where the file holds none, which is no run's identity."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
