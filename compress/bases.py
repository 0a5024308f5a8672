"""Bases of methods that rotate, and of the KV cache: second moments of the whole model, before anything else.

`compress.moments` gathers the moments; if asked, the Gram matrices of the weights that read the same directions are mixed
in: a direction matters by how large it is and by how strongly it is read (CoQuant, arXiv:2604.26378). The bases are kept in
the staging directory, so a resumed run uses the same ones. Cost: one d x d eigendecomposition, and one per block and head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.blockwise import Progress
from compress.cache import packed_layers
from compress.cache.attached import CACHE_MODULE, SIDES
from compress.calibrate import data
from compress.errors import CompressError
from compress.lineage import Lineage
from compress.model import head_width, kv_heads
from compress.moments import Moments, gather
from compress.orthonormal import hadamard_basis, pca_basis
from compress.plan import HEAD
from compress.prepare import Prepared, skeleton_of
from compress.reorder import ReorderedSource
from compress.rotation import (
    RotatedSource,
    Rotation,
    Wanted,
    final_norm_spec,
    high_per_head,
    norm_readers,
    require_rotatable,
)
from compress.source import Source
from compress.staging import BASES, write_bases
from compress.tensorfile import read_header, write_file

_CACHE_SEED = 17  # the random rotations inside the parts of the cache's bases


def rotation_bases(prepared: Prepared, wanted: Wanted, moments: Moments | None) -> dict[str, Tensor]:
    """`stream` `[d, d]` and `heads.<block>` `[H, D, D]` in fp64, `hidden.<block>` a permutation."""
    model, plan = prepared.model, prepared.plan
    config = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(wanted.seed)
    bases: dict[str, Tensor] = {}
    if wanted.stream == "hadamard":
        bases["stream"] = hadamard_basis(config.hidden_size, generator)
    elif wanted.stream == "pca":
        moment = _mixed(moments.stream, lambda: _reader_gram(prepared), wanted.weight_share)
        bases["stream"] = pca_basis(moment, wanted.stream_high, generator)
    elif wanted.stream == "order":
        bases["order"] = moments.stream.argsort(stable=True)
    if wanted.hidden_order:
        bases.update({f"hidden.{index}": energy.argsort(stable=True) for index, energy in moments.hidden.items()})
    width, heads = head_width(model), kv_heads(model)
    for index in range(plan.num_blocks if wanted.heads != "none" else 0):
        if wanted.heads == "hadamard":
            bases[f"heads.{index}"] = hadamard_basis(width).expand(heads, -1, -1).contiguous()
            continue
        weights = _output_gram(prepared, index, heads, width) if wanted.weight_share else None
        bases[f"heads.{index}"] = torch.stack(
            [
                pca_basis(
                    _mixed(moment, lambda head=head, weights=weights: weights[head], wanted.weight_share),
                    wanted.heads_high,
                    generator,
                )
                for head, moment in enumerate(moments.values[index])
            ]
        )
    return bases


def _mixed(moment: Tensor, weights: Callable[[], Tensor], share: float) -> Tensor:
    """Moments of inputs and of weights, each brought to trace one."""
    if not share:
        return moment
    other = weights().to(moment.device)  # made from stored weights, on the CPU
    tiny = torch.finfo(moment.dtype).tiny  # a part that is all zero has no say
    return sum(part * m / m.diagonal().sum().clamp_min(tiny) for part, m in ((1 - share, moment), (share, other)))


def _reader_gram(prepared: Prepared) -> Tensor:
    """Sum of W^T W over all linears that read the stream, gains of the norms included."""
    total: Tensor | float = 0.0
    for index in range(prepared.plan.num_blocks):
        prefix = f"{prepared.plan.blocks_name}.{index}."
        for norm, readers in norm_readers().items():
            gain = prepared.source.read(f"{prefix}{norm}.weight").float()
            for reader in readers:
                weight = prepared.source.read(f"{prefix}{reader}.weight").float() * gain
                total = total + (weight.T @ weight).double()
    return total


def _output_gram(prepared: Prepared, index: int, heads: int, width: int) -> Tensor:
    """W_o^T W_o of the columns that read each KV head, `[H, D, D]`."""
    weight = prepared.source.read(f"{prepared.plan.blocks_name}.{index}.self_attn.o_proj.weight").double()
    columns = weight.unflatten(1, (heads, -1, width))  # [N, H, query heads, D]
    return torch.einsum("nhqd,nhqe->hde", columns, columns)


def wanted_rotation(prepared: Prepared) -> Wanted | None:
    """The rotation that the rules of a recipe ask for; None when none does.

    Raises:
        CompressError: rules that ask for different rotations, or a model that cannot be rotated.
    """
    config = prepared.model.config.get_text_config(decoder=True)
    asked = prepared.recipe.rotations(config.hidden_size, head_width(prepared.model))
    if len(asked) > 1:
        raise CompressError("the rules ask for different rotations of one model; give all of them the same basis options")
    if not asked:
        return None
    (wanted,) = asked
    require_rotatable(prepared.model, wanted)
    return wanted


def rotated(prepared: Prepared, tokens: data.Tokens, staging: Path, lineage: Lineage, progress: Progress) -> Prepared:
    """The same run on the rotated model and with the cache's bases, if its recipe asks for them."""
    wanted, kv = wanted_rotation(prepared), prepared.recipe.kv_cache
    if wanted is None and kv is None:
        return prepared
    file = staging / BASES
    if not file.exists():
        by_moments = [kv.basis if kv else "none", *((wanted.stream, wanted.heads) if wanted else ())]
        calibrated = kv is not None and kv.metric == "calibration"
        ordered = wanted is not None and wanted.hidden_order
        stream = wanted.stream if wanted else "none"
        asked = ordered or calibrated or {"pca", "order"} & {*by_moments}
        moments = gather(prepared, tokens, progress, stream, hidden=ordered) if asked else None
        try:
            bases = rotation_bases(prepared, wanted, moments) if wanted else {}
            bases.update(cache_bases(prepared, moments, folded="heads.0" in bases))
            if calibrated:
                bases.update(cache_metrics(prepared, moments))
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise CompressError(f"bases: {error}") from error
        write_bases(staging, lineage.of(HEAD) if moments else "", bases)
    stored = {name: tensor.read() for name, tensor in read_header(file).items()}
    if kv:
        prepared = replace(prepared, plan=replace(prepared.plan, cache=_saved_cache(prepared, stored)))
    if wanted is None:
        return prepared
    by_block = {
        part: {int(name.split(".")[1]): basis for name, basis in stored.items() if name.startswith(part + ".")}
        for part in ("heads", "hidden")
    }
    source, model = prepared.source, prepared.model
    if "order" in stored:
        source = ReorderedSource(source, model, stored["order"])
    source = RotatedSource(source, model, Rotation(stored.get("stream"), **by_block))
    norm = final_norm_spec(model, source)
    plan = prepared.plan if norm is None else replace(prepared.plan, others={norm[0]: norm[1]})
    prepared = replace(prepared, source=source, plan=plan)
    return replace(prepared, model=skeleton_of(prepared))  # moments have left weights in the other one


def cache_bases(prepared: Prepared, moments: Moments | None, *, folded: bool) -> dict[str, Tensor]:
    """`keys.<block>` and `values.<block>` `[H, D, D]` of the KV cache; no values where v_proj is already in its basis."""
    kv, model = prepared.recipe.kv_cache, prepared.model
    if kv is None or kv.basis == "none":
        return {}
    width, heads = head_width(model), kv_heads(model)
    high, generator = high_per_head(width, kv.high_share), torch.Generator().manual_seed(_CACHE_SEED)
    bases = {}
    for index in range(prepared.plan.num_blocks):
        sides = {"keys": moments and moments.keys, "values": moments and moments.values}
        for side, of_side in sides.items():
            if side == "values" and folded:
                continue
            share = kv.query_share if side == "keys" else 0.0
            bases[f"{side}.{index}"] = (
                hadamard_basis(width).expand(heads, -1, -1).contiguous()
                if kv.basis == "hadamard"
                else torch.stack(
                    [
                        pca_basis(_mixed(moment, lambda query=query: query, share), high, generator)
                        for moment, query in zip(of_side[index], moments.queries[index], strict=True)
                    ]
                )
            )
    return bases


def cache_metrics(prepared: Prepared, moments: Moments) -> dict[str, Tensor]:
    """`metrics.<block>` `[H, D, D]`, the moments of the queries of every layer that is packed, mean diagonal 1."""
    metrics = {}
    for index in packed_layers(prepared.model.config.get_text_config(decoder=True)):
        moment = moments.queries[index]
        metrics[f"metrics.{index}"] = moment / moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
    return metrics


def _saved_cache(prepared: Prepared, bases: dict[str, Tensor]) -> dict[str, Any]:
    kv, model = prepared.recipe.kv_cache, prepared.model
    width = head_width(model)
    options = kv.options.model_dump()
    if kv.high_share:
        options["high_channels"] = high_per_head(width, kv.high_share)
    layers = {side: [int(name.split(".")[1]) for name in bases if name.startswith(side + ".")] for side in SIDES}
    return {"method": kv.method, "options": options, "bases": layers, "heads": kv_heads(model), "head_dim": width}


def write_cache_bases(staging: Path) -> list[Path]:
    """The cache's bases in fp32 under the names of the module that holds them in a loaded model."""
    stored = read_header(staging / BASES)
    file = staging / "cache-bases.safetensors"
    tensors = {
        f"{CACHE_MODULE}.{name}": tensor.read().float()
        for name, tensor in stored.items()
        if name.startswith(tuple(f"{side}." for side in SIDES))
    }
    write_file(file, tensors)
    return [file]


def write_rotated(source: Source, names: list[str], staging: Path) -> list[Path]:
    """The rotated tensors that no method packs (embedding, norms), each in a file of its own, in their stored dtype."""
    files = []
    for number, name in enumerate(sorted(names)):
        file = staging / f"rotated-{number:05d}.safetensors"
        write_file(file, {name: source.read(name).to(source.tensors[name].dtype)})
        files.append(file)
    return files
