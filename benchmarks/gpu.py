"""Every GPU kernel checked against fp64, then timed against torch in bf16, with the roofline beside it. One call.

    python -P benchmarks/gpu.py                   # on a machine with a GPU: about ten minutes
    python -P benchmarks/gpu.py --check           # correctness alone
    python -P benchmarks/gpu.py --check --device cpu --parts layers attention

Shapes are the four distinct linears of Llama-3-8B and of Llama-3.2-1B. Times are medians of a CUDA graph that runs the layer
over copies of its weights which together exceed the L2 cache, so that weights come from memory as they do in a model.
`roofline` is the time that the bytes of the packed weight, inputs and outputs take at the memory bandwidth that a plain copy
reaches here; `of_roofline` is the share of it that was reached, `ratio` the speed-up over bf16. One JSON line per case.
Others' kernels for the same linears (`gpu_peers.py`) are lines of the same table; attention and whole models follow
(`gpu_models.py`).

Inputs that a form rounds are checked against the rounding of the CPU. A number between two codes may fall to either side, so
that a few codes in a hundred thousand differ, each by one step: hence their wider bound.
"""

from __future__ import annotations

import argparse
import json
import sys
from copy import deepcopy
from pathlib import Path
from statistics import median

import torch

from compress.kernels.pack import pack_signed
from compress.kernels.sparse_dictionary import pack_mask
from compress.layers import CompressedLinear, build, packed_bytes
from compress.layers.sparse_dictionary import all_atoms
from compress.linalg import largest_per_row
from compress.methods import Site, load
from compress.recipe import Recipe

sys.path.append(str(Path(__file__).parent))  # python -P leaves it out; no file here may be called as a package is
import gpu_models
import gpu_peers

SHAPES = {
    "8b": {"q_proj": (4096, 4096), "k_proj": (4096, 1024), "up_proj": (4096, 14336), "down_proj": (14336, 4096)},
    "1b": {"q_proj": (2048, 2048), "k_proj": (2048, 512), "up_proj": (2048, 8192), "down_proj": (8192, 2048)},
}
FORMS = {
    "gptq-w4": [],
    "gptq-w4 8 bits": ["weights.bits=8"],
    "gptq-w4 3 bits": ["weights.bits=3"],
    "resq-w4": [],
    "gptq-w4a4": [],
    "gptq-w8a8": [],
    "resq": [],
    "resq-plus": [],
    "cospadi-20": [],
    "cospadi-40": [],
    "cospadi-40-learned": [],
    "cospadi-75 4 bits": ["weights.value_bits=4"],
}
CHECKED = {"q_proj": (512, 768), "o_proj": (512, 384), "down_proj": (1536, 576)}
BATCHES = (1, 16, 256, 2048)
PARTS = ("layers", "peers", "attention", "models")
L2_BYTES = 128 << 20  # more than any card has


def random_layer(form: str, name: str, shape: tuple[int, int], device: str) -> CompressedLinear:
    """A layer of the form that a recipe plans for a linear, filled with random codes."""
    rule = Recipe.load(form.split()[0], FORMS[form]).weights[0]
    inputs, outputs = shape
    place = {"o_proj": "heads", "down_proj": "hidden"}.get(name, "stream")
    site = Site(inputs, outputs, place, heads=inputs // 64 if place == "heads" else 0)
    sizes = {"in_features": inputs, "out_features": outputs, "bias": False}
    spec = {**load(rule.method).plan(site, rule.options), **sizes}
    layer = build(spec).to(device)
    for key, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, device=device) * 0.02)
        elif key == "mask":
            chosen = largest_per_row(torch.rand(outputs, all_atoms(spec), device=device), spec["num_nonzeros"])
            tensor.copy_(pack_mask(chosen))
        elif key == "values" or key in ("low", "high"):
            bits = spec.get("value_bits") or spec["bits" if key == "low" else "high_bits"]
            width = spec.get("num_nonzeros") or (spec["high_features"] if key == "high" else inputs - spec["high_features"])
            half = 1 << (bits - 1)
            tensor.copy_(pack_signed(torch.randint(-half, half, (outputs, width), device=device), bits))
        else:
            tensor.random_(0, 256)
    return layer


@torch.inference_mode()
def error(layer: CompressedLinear, x: torch.Tensor) -> float:
    """Of the layer in the dtype of x, relative to the norm of the fp64 product of what a CPU sees of x and the weight."""
    seen = layer.seen_input(layer.spec, x.cpu()).double()
    want = seen @ deepcopy(layer).cpu().dense_weight().double().T
    return float((layer(x).cpu().double() - want).norm() / want.norm())


@torch.inference_mode()
def seconds(functions: list, x: torch.Tensor, rounds: int = 20, most: float = 0.5) -> float:
    """Median time of one call, from a CUDA graph of all of them; they are alike but for where their weights lie. Rounds end
    after `most` seconds, but not before the third."""
    for function in functions[:2]:
        function(x)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function(x)
    times = []
    while len(times) < rounds and (len(times) < 3 or sum(times) * len(functions) < most):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / len(functions))
    return median(times)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds([lambda _: target.copy_(source)], source)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="correctness alone")
    parser.add_argument("--time", action="store_true", help="times alone")
    parser.add_argument("--device", default="cuda", help="cpu: try the script itself, with --check")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--layers", nargs="+", default=list(SHAPES["8b"]), choices=list(SHAPES["8b"]), help="to time")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="tokens at a time, to time")
    parser.add_argument("--compile", action="store_true", help="decode models with torch.compile")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.device == "cuda":
        print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)
    wrong = check_layers(options.forms, options.device) if "layers" in options.parts and not options.time else 0
    if "attention" in options.parts:
        few = {"totals": ((2, 300),)} if options.device == "cpu" else {}
        wrong += not gpu_models.attention(options.device, None if options.check or wrong else seconds, **few)
    if options.check or wrong:
        return 1 if wrong else 0
    if {"layers", "peers"} & {*options.parts}:
        forms = options.forms if "layers" in options.parts else []
        time_layers(options.shapes, options.layers, forms, options.batches, "peers" in options.parts)
    if "models" in options.parts:
        gpu_models.decoding(options.shapes, options.device, options.compile)
    return 0


def check_layers(forms: list[str], device: str) -> int:
    """How many cases are wrong; each is printed."""
    wrong = 0
    for form in forms:
        for name, shape in CHECKED.items():
            layer = random_layer(form, name, shape, device)
            rounds = layer.spec.get("activation_bits", 16) < 16
            for tokens in (1, 3, 16, 17, 64, 65, 130, 300):
                for dtype, bound in ((torch.float32, 5e-3 if rounds else 2e-4), (torch.bfloat16, 2e-2)):
                    found = error(layer, torch.randn(tokens, shape[0], device=device).to(dtype))
                    if not found < bound:
                        wrong += 1
                        print(
                            json.dumps(
                                {"wrong": form, "shape": shape, "tokens": tokens, "dtype": str(dtype), "error": found}
                            )
                        )
    print(json.dumps({"checked": len(forms), "wrong": wrong}), flush=True)
    return wrong


def time_layers(shapes: list[str], names: list[str], forms: list[str], batches: list[int], peers: bool) -> None:
    bandwidth = copy_bandwidth()
    print(json.dumps({"bytes_per_second": bandwidth}))
    known = {batch: usable_peers(batch) if peers else [] for batch in batches}
    for size in shapes:
        for name in names:
            shape = SHAPES[size][name]
            copies = max(2, -(-L2_BYTES // (2 * shape[0] * shape[1])))
            weights = [torch.randn(shape[1], shape[0], device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
            dense = {}
            for batch in batches:
                x = torch.randn(batch, shape[0], device="cuda", dtype=torch.bfloat16)
                dense[batch] = seconds([lambda x, w=w: x @ w.T for w in weights], x)
            del weights
            for form in forms:
                one = random_layer(form, name, shape, "cuda")
                size_bytes = packed_bytes(one.spec)
                layers = [one] + [deepcopy(one) for _ in range(1, -(-L2_BYTES // size_bytes))]
                for batch in batches:
                    x = torch.randn(batch, shape[0], device="cuda", dtype=torch.bfloat16)
                    least = (size_bytes + 2 * batch * sum(shape)) / bandwidth
                    print_line(size, name, form, batch, seconds(layers, x), dense[batch], least)
                del layers
            for peer in dict.fromkeys(one for ones in known.values() for one in ones):
                one = gpu_peers.PEERS[peer](*shape, "cuda")
                runs = [one.run] + [gpu_peers.PEERS[peer](*shape, "cuda").run for _ in range(1, -(-L2_BYTES // one.bytes))]
                for batch in (batch for batch in batches if peer in known[batch]):
                    x = gpu_peers.inputs_of(peer, batch, shape[0], "cuda")
                    least = (one.bytes + x.nbytes + one.run(x).nbytes) / bandwidth
                    print_line(size, name, peer, batch, seconds(runs, x), dense[batch], least)
                del one, runs


def usable_peers(batch: int) -> list[str]:
    """The peers that can be measured at a batch; why others cannot is printed."""
    found = dict(gpu_peers.usable(batch, "cuda"))
    for peer, why in found.items():
        if why:
            print(json.dumps({"left_out": peer, "batch": batch, "why": why}), flush=True)
    return [peer for peer, why in found.items() if not why]


def print_line(size: str, name: str, form: str, batch: int, took: float, dense: float, least: float) -> None:
    """One case: its time, the dense layer's and the least that its bytes take, in seconds."""
    line = {
        "model": size, "layer": name, "form": form, "batch": batch, "microseconds": round(1e6 * took, 2),
        "dense": round(1e6 * dense, 2), "ratio": round(dense / took, 2),
        "roofline": round(1e6 * least, 2), "of_roofline": round(least / took, 2),
    }  # fmt: skip
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
