"""Rotate a model into another basis without changing its function, so that quantization hurts less.

Papers: SliceGPT arXiv:2401.15024 (the invariance), QuaRot arXiv:2404.00456 (Hadamard bases), ResQ arXiv:2412.14363 (PCA
bases with a high-precision part).

    stream   U_A [d, d], one for the whole model. A norm without gain commutes with it, so the gains go into the linears
             behind them and the residual stream is stored as h U_A: E U_A, (W diag(g)) U_A for readers, U_A^T W for writers.
    heads    U_B [head_dim, head_dim] per layer and KV head, folded into the rows of v_proj and the columns of o_proj.

    hidden   a permutation of the MLP's inner channels, by falling energy from the end: rows of gate and up, columns of down.

Everything is folded into the weights, in fp64 with one final rounding. Tied embeddings stay tied, where published code
unties them: the final norm's gain cannot be folded into a matrix that is also the embedding, so `norm` becomes a layer
that multiplies by U_A^T diag(g) U_A, d^2 numbers instead of vocabulary x d.
The Hadamard transform inside the MLP (U_D) belongs to the storage of down_proj; the one of keys (U_C) to the cache.

Legend: d width of the residual stream, D head_dim, H KV heads, I inputs and N outputs of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.model import decoder_blocks, head_width, is_tied, output_head
from compress.reorder import require_reorderable
from compress.source import Source

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_HIDDEN_WRITERS = ("gate_proj", "up_proj")
_NORMS = {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "post_attention_layernorm": ("gate_proj", "up_proj")}
_WITHOUT = "use --set weights.heads_basis=none --set weights.hidden_high_share=0"
_CHUNK_ROWS = 8192  # rows of the embedding rotated at once in fp64


Basis = Literal["pca", "hadamard", "order", "none"]  # order: a permutation, `compress.reorder`


@dataclass(frozen=True)
class Wanted:
    """What a method wants rotated: the kind of basis and the number of high-precision channels at either place."""

    stream: Basis = "none"
    stream_high: int = 0
    heads: Basis = "none"
    heads_high: int = 0
    hidden_order: bool = False
    weight_share: float = 0.0
    seed: int = 0

    @property
    def turns_stream(self) -> bool:
        """Whether the stream gets other coordinates, not the same in another order."""
        return self.stream in ("pca", "hadamard")


def high_channels(width: int, share: float) -> int:
    """r near `share` of a width: a multiple of 64, of 32 below a width of 1024, of 8 in the tiny ones of tests."""
    unit = 64 if width >= 1024 else 32 if width >= 256 else 8
    return max(unit, round(share * width / unit) * unit) if share else 0


def high_per_head(head_dim: int, share: float) -> int:
    """r of one head, a multiple of 8 where heads are wide enough to leave a choice."""
    unit = 8 if head_dim >= 64 else 2
    return max(unit, round(share * head_dim / unit) * unit) if share else 0


def norm_readers() -> dict[str, tuple[str, ...]]:
    """Each norm of a block and the linears behind it, by their names inside the block."""
    return {norm: tuple(_place(leaf) for leaf in readers) for norm, readers in _NORMS.items()}


def require_rotatable(model: nn.Module, wanted: Wanted) -> None:
    """Refuse architectures whose function these foldings would change, by name."""
    if not wanted.turns_stream:
        require_reorderable(model)
        missing = _missing_linears(model, wanted)
        if missing:
            raise CompressError(f"{type(model).__name__} has no {' and no '.join(missing)} of its own; {_WITHOUT}")
        return
    kind = model.config.get_text_config(decoder=True).model_type
    if kind not in FAMILIES:
        raise CompressError(
            f"{kind} models cannot be rotated: their norms or layers are not those of {', '.join(FAMILIES)}; "
            "use --set weights.stream_basis=order with a resq recipe, or a recipe without a rotation"
        )
    _, blocks = decoder_blocks(model)
    expected = {"input_layernorm", "post_attention_layernorm", "self_attn", "mlp"}
    children = {name for name, _ in blocks[0].named_children()}
    if children != expected or any(not isinstance(blocks[0].get_submodule(_place(leaf)), nn.Linear) for leaf in _READERS):
        raise CompressError(f"{type(model).__name__} cannot be rotated: its blocks hold {', '.join(sorted(children))}")


def _missing_linears(model: nn.Module, wanted: Wanted) -> list[str]:
    """Linears whose rows or columns are to be folded and that a block does not have, fused with others perhaps."""
    needed = [*(["v_proj", "o_proj"] if wanted.heads != "none" else []), *(_HIDDEN_WRITERS if wanted.hidden_order else [])]
    names = {name.rpartition(".")[2] for name, _ in decoder_blocks(model)[1][0].named_modules()}
    return [leaf for leaf in needed if leaf not in names]


@dataclass(frozen=True)
class Rotation:
    """Bases to fold: `stream` `[d, d]` and `heads` `[H, D, D]` per layer; either may be absent."""

    stream: Tensor | None
    heads: Mapping[int, Tensor]
    hidden: Mapping[int, Tensor] = field(default_factory=dict)  # order of the MLP's inner channels, by block


class RotatedSource(Source):
    """A checkpoint read in rotated coordinates: same names, other numbers, fp32, one tensor at a time.

    Everything downstream (calibration, solving, saving) works as on any other checkpoint.
    """

    def __init__(self, source: Source, model: nn.Module, rotation: Rotation) -> None:
        super().__init__(source.path, source.config, dict(source.tensors))
        self.original = source
        self.rotation = rotation
        blocks_name, _ = decoder_blocks(model)
        self.prefix = blocks_name + "."
        self.final_norm = _final_norm(model)
        self.embedding = _name_of(model, model.get_input_embeddings()) + ".weight"
        head = output_head(model)
        self.head = None if is_tied(model) or head is None else head + ".weight"
        self.head_dim = head_width(model)
        if rotation.stream is not None and self.head is None:
            name, d = f"{self.final_norm}.weight", len(rotation.stream)
            self.tensors[name] = replace(self.tensors[name], shape=(d, d), num_bytes=2 * d * d, code="BF16")

    @property
    def stored_bytes(self) -> int:
        return self.original.stored_bytes

    def changed(self) -> list[str]:
        before = set(self.original.changed())
        return [name for name in self.tensors if name in before or self._changes(name)]

    def _changes(self, name: str) -> bool:
        stream = self.rotation.stream is not None
        if not name.startswith(self.prefix):
            return stream and name in {self.embedding, self.head, f"{self.final_norm}.weight"}
        index, leaf, kind = self._parts(name)
        if leaf in _NORMS or leaf in _READERS or leaf in ("o_proj", "down_proj"):
            if index in self.rotation.hidden and leaf in (*_HIDDEN_WRITERS, "down_proj"):
                return stream or kind == "weight" or leaf != "down_proj"
            by_heads = index in self.rotation.heads and leaf in ("v_proj", "o_proj")
            if kind == "bias":
                return (by_heads and leaf == "v_proj") or (stream and leaf in ("o_proj", "down_proj"))
            return stream or by_heads
        return False

    def read(self, name: str) -> Tensor:
        if not self._changes(name):
            return self.original.read(name)
        stream = self.rotation.stream
        if name == self.embedding:
            return _in_chunks(self.original.read(name), lambda rows: rows @ stream)
        if name == self.head:
            gain = self.original.read(f"{self.final_norm}.weight").double()
            return _in_chunks(self.original.read(name), lambda rows: (rows * gain) @ stream)
        if name == f"{self.final_norm}.weight":
            gain = self.original.read(name).double()
            return (torch.ones_like(gain) if self.head else stream.T @ (gain[:, None] * stream)).float()
        return self._read_in_block(name)

    def _read_in_block(self, name: str) -> Tensor:
        index, leaf, kind = self._parts(name)
        stream, heads = self.rotation.stream, self.rotation.heads.get(index)
        tensor = self.original.read(name).double()
        if leaf in _NORMS:
            return torch.ones_like(tensor).float()
        if leaf in _READERS and kind == "weight" and stream is not None:
            norm = next(norm for norm, readers in _NORMS.items() if leaf in readers)
            gain = self.original.read(f"{self.prefix}{index}.{norm}.weight").double()
            tensor = (tensor * gain) @ stream
        if leaf == "v_proj" and heads is not None:
            rows = tensor.unflatten(0, (len(heads), self.head_dim))  # [H, D, I] or [H, D]
            tensor = torch.einsum("hde,hd...->he...", heads, rows).flatten(0, 1)
        if leaf == "o_proj" and kind == "weight" and heads is not None:
            columns = tensor.unflatten(1, (len(heads), -1, self.head_dim))  # [N, H, query heads of one KV head, D]
            tensor = torch.einsum("nhqd,hde->nhqe", columns, heads).flatten(1)
        order = self.rotation.hidden.get(index)
        if order is not None and leaf in _HIDDEN_WRITERS:
            tensor = tensor[order]
        if order is not None and leaf == "down_proj" and kind == "weight":
            tensor = tensor[:, order]
        if leaf in ("o_proj", "down_proj") and stream is not None:
            tensor = stream.T @ tensor
        return tensor.float()

    def _parts(self, name: str) -> tuple[int, str, str]:
        """Block, leaf module and parameter: `model.layers.3.mlp.up_proj.weight` -> (3, "up_proj", "weight")."""
        pieces = name[len(self.prefix) :].split(".")
        return int(pieces[0]), pieces[-2], pieces[-1]


def final_norm_spec(model: nn.Module, source: RotatedSource) -> tuple[str, dict[str, Any]] | None:
    """Name and spec of the layer that stands for the final norm of a tied model; None where the gain could be folded."""
    if source.rotation.stream is None or source.head is not None:
        return None
    norm, width = model.get_submodule(source.final_norm), len(source.rotation.stream)
    epsilon = getattr(norm, "variance_epsilon", None)
    if epsilon is None:
        raise CompressError(f"{source.final_norm} is a {type(norm).__name__} without variance_epsilon; it cannot be rotated")
    spec = {"format": "rotated_norm", "in_features": width, "out_features": width, "bias": False, "epsilon": epsilon}
    return source.final_norm, spec


def _final_norm(model: nn.Module) -> str:
    blocks_name, _ = decoder_blocks(model)
    return f"{blocks_name.rpartition('.')[0]}.norm".lstrip(".")


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _place(leaf: str) -> str:
    return f"self_attn.{leaf}" if leaf in ("q_proj", "k_proj", "v_proj", "o_proj") else f"mlp.{leaf}"


def _in_chunks(matrix: Tensor, change: Any) -> Tensor:
    return torch.cat([change(rows.double()).float() for rows in matrix.split(_CHUNK_ROWS)])
