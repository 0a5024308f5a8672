"""From a wanted size to a ratio: `target_size` and `target_bits` of a rule become the ratio of its matrices."""

from __future__ import annotations

from compress.errors import CompressError
from compress.report import megabytes


def needs_budget(options: object) -> bool:
    """Whether a rule's options name a size in place of a ratio."""
    return any(getattr(options, key, None) is not None for key in ("target_size", "target_bits"))


def settled(options: object, dense_bytes: int, other_bytes: int) -> object:
    """The options with a ratio in place of the wanted size.

    Args:
        dense_bytes: bf16 bytes of the matrices that the rule compresses.
        other_bytes: of everything else in the checkpoint.
    Raises:
        CompressError: a size that compressing these matrices cannot reach, or both kinds of target.
    """
    size, bits = options.target_size, options.target_bits
    if size is not None and bits is not None:
        raise CompressError("recipe: weights.target_size and weights.target_bits exclude each other; give one of them")
    ratio = 1 - (bits / 16 if bits is not None else (size - other_bytes) / dense_bytes)
    if not 0 <= ratio < 1:
        if bits is not None:
            raise CompressError(f"recipe: weights.target_bits {bits} leaves nothing of the matrices; choose more")
        least, most = megabytes(other_bytes), megabytes(dense_bytes + other_bytes)
        raise CompressError(
            f"recipe: weights.target_size {megabytes(size)} cannot be met: the matrices to compress take "
            f"{megabytes(dense_bytes)}, everything else {least}; choose a size between {least} and {most}"
        )
    return options.model_copy(update={"ratio": ratio, "target_size": None, "target_bits": None})
