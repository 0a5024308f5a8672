"""Sort the channels of the residual stream by energy, in models whose stream cannot be rotated.

Norms behind a block (Gemma 2 and 3) scale the stream channel by channel with data-dependent factors, so no rotation can be
folded through them. A permutation can: elementwise operations and norms commute with it. Columns of the embedding and of
every linear that reads the stream, rows of those that write it and the gains of all its norms change places, and the
function stays the same to the last bit but for the order of sums. The largest channels, now last, get the high-precision
part; the others are spread by a Hadamard transform at the linears' inputs, in their storage layer. Idea of outlier
channels in high precision: QUIK, arXiv:2310.09259.
Cost: nothing at run time but the transform; nothing in bytes; tied embeddings stay tied.
"""

from __future__ import annotations

from torch import Tensor, nn

from compress.errors import CompressError
from compress.model import decoder_blocks, inputs_of
from compress.source import Source

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text")
_WRITERS = ("heads", "hidden")  # linears that read these write the stream


def stream_readers(block: nn.Module, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The linears of a block that read the stream, one list per norm: those of attention and those of the MLP."""
    readers: dict[str, tuple[str, ...]] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and inputs_of(model, name, module)[0] == "stream":
            part = name.partition(".")[0]
            readers[part] = (*readers.get(part, ()), name)
    return readers


def require_reorderable(model: nn.Module) -> None:
    """Refuse architectures where something this file does not know reads or writes the stream, by name."""
    kind = model.config.get_text_config(decoder=True).model_type
    if kind not in FAMILIES:
        raise CompressError(f"the stream of {kind} models cannot be reordered; known are {', '.join(FAMILIES)}")


class ReorderedSource(Source):
    """A checkpoint read with the channels of its residual stream in another order; names and shapes stay."""

    def __init__(self, source: Source, model: nn.Module, order: Tensor) -> None:
        super().__init__(source.path, source.config, source.tensors)
        self.original = source
        self.order = order
        self.dims = _stream_dims(model)

    def changed(self) -> list[str]:
        return [name for name in self.tensors if name in self.dims]

    def read(self, name: str) -> Tensor:
        tensor = self.original.read(name)
        return tensor.index_select(self.dims[name], self.order) if name in self.dims else tensor


def _stream_dims(model: nn.Module) -> dict[str, int]:
    """The dimension of each parameter that runs along the stream, by name."""
    _, blocks = decoder_blocks(model)
    width = model.config.get_text_config(decoder=True).hidden_size
    inside = {id(module) for block in blocks for _, module in block.named_modules()}
    dims = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            dims[f"{name}.weight"] = 1
        elif isinstance(module, nn.Linear):
            writes = id(module) in inside and inputs_of(model, name, module)[0] in _WRITERS
            dims[f"{name}.weight"] = 0 if writes else 1
            if writes and module.bias is not None:
                dims[f"{name}.bias"] = 0
        elif ".self_attn." not in name and [tuple(p.shape) for p in module.parameters(recurse=False)] == [(width,)]:
            dims[f"{name}.weight"] = 0  # a norm of the stream; those of queries and keys lie inside attention
    return dims
