"""Which form and how many bytes each matrix gets: prices that mean what they say, an exact knapsack, a kept budget."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress
from compress import trials
from compress.blockwise import Silent, compress_blocks, start_runner
from compress.calibrate import sensitivity
from compress.calibrate.blocks import BlockRunner
from compress.calibrate.sensitivity import StoredStates, output_gradients, through_block
from compress.errors import CompressError
from compress.forecast import forecast_table, logits_bytes, predicted_memory_bytes, states_bytes, trial_flops
from compress.forms import Forms, is_open, kinds_of, open_jobs, sizes_of, spec_of
from compress.knapsack import choose
from compress.layers import Spec, compressed_matrices, dense_bytes, packed_bytes
from compress.linalg import SecondMoment
from compress.methods import Site, cospadi
from compress.model import materialise, materialise_head
from compress.plan import Job, added_bytes, planned_bytes
from compress.prepare import prepare, skeleton_of
from compress.recipe import Recipe
from compress.report import megabytes
from compress.run import _tokens, run
from compress.tensorfile import write_file
from helpers import save_tiny, tiny_model, tiny_recipe, tiny_tokenizer


def test_knapsack_is_exact() -> None:
    draw = random.Random(1)
    for _ in range(200):
        sizes = [[4 * draw.randint(1, 30) for _ in range(draw.randint(1, 4))] for _ in range(draw.randint(1, 5))]
        costs = [[draw.random() for _ in row] for row in sizes]
        limit = draw.randint(sum(map(min, sizes)), sum(map(max, sizes)) + 5)
        picks = choose(sizes, costs, limit)
        assert sum(row[pick] for row, pick in zip(sizes, picks, strict=True)) <= limit
        fitting = (
            sum(row[pick] for row, pick in zip(costs, all_picks, strict=True))
            for all_picks in itertools.product(*(range(len(row)) for row in sizes))
            if sum(row[pick] for row, pick in zip(sizes, all_picks, strict=True)) <= limit
        )
        assert sum(row[pick] for row, pick in zip(costs, picks, strict=True)) == pytest.approx(min(fitting))


def test_knapsack_in_coarser_units_keeps_to_the_limit() -> None:
    sizes, costs = [[3, 10**9 + 7], [5, 10**9 + 9]], [[1.0, 0.0], [2.0, 0.0]]
    assert choose(sizes, costs, 10**9 + 20) == [0, 1]
    assert choose(sizes, costs, 2 * 10**9 + 10**5) == [1, 1]


def test_knapsack_without_room() -> None:
    with pytest.raises(ValueError, match="smallest choice"):
        choose([[5, 6], [7]], [[1.0, 0.0], [1.0]], 11)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


@pytest.mark.parametrize(("family", "places"), [("llama", 64), ("qwen2", 64), ("llama", 7)])
def test_sensitivity_equals_the_gradient_of_the_whole_model(
    family: str, places: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when logits are taken `places` of each sample at a time, which do not divide its length."""
    path = save_tiny(tmp_path / "tiny", family)
    prepared = prepare(path, Recipe.from_dict(tiny_recipe()), "cpu")
    tokens = _tokens(prepared, None)
    runner = start_runner(prepared, tokens)
    vocabulary, samples = prepared.model.config.vocab_size, len(runner.batches[0][0])
    monkeypatch.setattr(sensitivity, "_LOGITS", places * samples * vocabulary)
    name, states, found = prepared.plan.blocks_name, StoredStates(tmp_path / "states"), {}
    for index in range(prepared.plan.num_blocks):
        materialise(prepared.model, prepared.source, f"{name}.{index}.", torch.float32, prepared.device)
        states.put(index, runner.hidden)
        runner.run(index, keep=True)
    materialise_head(prepared.model, prepared.source, name, torch.float32, prepared.device)
    gradients = output_gradients(runner, seed=3)
    for index in reversed(range(prepared.plan.num_blocks)):
        runner.hidden = states.get(index)
        linears = {job.name: prepared.model.get_submodule(job.name) for job in prepared.plan.by_block[index]}
        of_block = through_block(runner, index, gradients, linears, linears)
        found.update(of_block)

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    for module_name in found:
        module = model.get_submodule(module_name)
        module.register_forward_pre_hook(lambda module, args, name=module_name: inputs.update({name: args[0]}))
        module.register_forward_hook(lambda module, args, output, name=module_name: outputs.update({name: output}))
    generator, expected, count = torch.Generator().manual_seed(3), dict.fromkeys(found, 0.0), 0
    weighted, of_tokens = dict.fromkeys(found, 0.0), {name: [] for name in found}
    for ids, _ in runner.batches:
        logits, sampled = model(ids).logits, []
        for part in logits.detach().split(places, dim=1):
            drawn = torch.multinomial(part.flatten(0, 1).softmax(dim=-1), 1, generator=generator)
            sampled.append(drawn.view(part.shape[:2]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat(sampled, 1).flatten(), reduction="sum")
        for key, gradient in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
            squares, x = gradient.flatten(0, 1).double().square(), inputs[key].detach().flatten(0, 1).double()
            expected[key] = expected[key] + squares.sum(dim=0)
            weighted[key] = weighted[key] + x.T @ (x * squares.sum(dim=1, keepdim=True))
            of_tokens[key].append(squares.sum(dim=1).view(ids.shape))
        count += ids.numel()
    for key, value in found.items():
        assert torch.allclose(value.outputs_N, expected[key] / count, rtol=1e-3, atol=1e-9)
        moments = weighted[key] / expected[key].sum()
        assert float((value.inputs_II - moments).norm() / moments.norm()) < 1e-3
        alike = next(names for names in ALIKE if key.endswith(names))
        shares = [torch.cat(of_tokens[key.rpartition(".")[0] + name]) for name in alike]
        mean = sum(share / share.mean() for share in shares) / len(shares)
        assert torch.allclose(value.tokens_BL.double(), mean, rtol=1e-2, atol=1e-3)


DOCUMENTS = [line for line in trials.__doc__.splitlines() if line][-6:]
ALIKE = [(".q_proj", ".k_proj", ".v_proj"), (".o_proj",), (".gate_proj", ".up_proj"), (".down_proj",)]


@pytest.mark.parametrize("method", ["gptq", "cospadi"])
def test_what_is_fitted_serves_the_tokens_that_count(method: str, tmp_path: Path) -> None:
    """Each of two runs wins by its own weights; they are found in batches of 16 samples and used in one of 40."""
    path = save_tiny(tmp_path / "tiny")
    options = {"gptq": {"bits": 3, "group_size": 0}, "cospadi": {"dictionary": "identity", "ratio": 0.5}}
    errors = {}
    for share in (0.0, 1.0):
        calibration = {"dataset": "python-docs", "samples": 40, "length": 64, "token_weighting": share}
        recipe = Recipe.from_dict({"calibration": calibration, "weights": {"method": method, **options[method]}})
        run(path, recipe, tmp_path / f"out{share}")
        layers = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{share}")
        assert not (tmp_path / f"out{share}" / "allocation.json").exists()
        for judge in (0.0, 1.0):
            weighted = recipe.model_copy(
                update={"calibration": recipe.calibration.model_copy(update={"token_weighting": judge})}
            )
            prepared = prepare(path, weighted, "cpu")
            tokens = _tokens(prepared, None)
            counts = trials.run_trials(prepared, [], tokens, tmp_path, Silent()).tokens if judge else {}
            runner = start_runner(prepared, tokens)
            materialise(prepared.model, prepared.source, "model.layers.0.", torch.float32, prepared.device)
            linears = {job.name: prepared.model.get_submodule(job.name) for job in prepared.plan.by_block[0]}
            grams = runner.grams(0, linears, keep=False, weights=counts)
            errors[share, judge] = sum(
                SecondMoment(grams[name].mean()).relative_error(
                    linear.weight.detach(), layers.get_submodule(name).dense_weight().detach()
                )
                for name, linear in linears.items()
            )
    assert errors[1.0, 1.0] < 0.99 * errors[0.0, 1.0] and errors[0.0, 0.0] < 0.99 * errors[1.0, 0.0]


def test_what_is_fitted_to_does_not_judge(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weighed tokens, batches 0 and 2 are fitted to and batch 1 judges: 40 samples of 64 tokens in batches of 16."""
    recipe = tiny_recipe(dictionary="identity", allocation="search", ratio=0.3)
    recipe["calibration"] |= {"samples": 40, "token_weighting": 0.5}
    prepared = prepare(tiny, Recipe.from_dict(recipe), "cpu")
    tokens, fitted, judges = _tokens(prepared, None), [], []
    grams, back = BlockRunner.grams, trials.through_block

    def watched_grams(runner: BlockRunner, *args: object, weights: dict, **options: object) -> dict:
        fitted.extend(weights.values())
        return grams(runner, *args, weights=weights, **options)

    def watched_back(*args: object) -> dict:
        judges.append(list(args[-1]))
        return back(*args)

    monkeypatch.setattr(BlockRunner, "grams", watched_grams)
    monkeypatch.setattr(trials, "through_block", watched_back)

    class Counting(Silent):
        def count(self, total: int, what: str) -> Callable[[], None]:
            stages.append((total, what))
            return lambda: steps.append(what)

    stages: list[tuple[int, str]] = []
    steps: list[str] = []
    found = trials.run_trials(prepared, open_jobs(prepared.plan), tokens, tmp_path, Counting())
    assert stages == [(len(steps), "matrices tried")] == [(len(found.candidates), "matrices tried")]
    assert judges == [[1]] * prepared.plan.num_blocks and len(fitted) == len(found.tokens) == len(prepared.plan.jobs)
    for weights in fitted:
        assert not weights[16:32].any() and weights[:16].all() and weights[32:].all()
    for name, weights in found.tokens.items():  # those of the run know nothing of it
        assert weights.min() >= 0.5 and float(weights.mean()) == pytest.approx(1, rel=1e-4), name


def test_moments_come_from_the_batches_that_judge(tiny: Path) -> None:
    prepared = prepare(tiny, Recipe.from_dict(tiny_recipe()), "cpu")
    found = []
    for batches, judging in ((slice(None), [1]), (slice(1, 2), None)):
        runner = start_runner(prepared, _tokens(prepared, None), batch_tokens=128)
        materialise(prepared.model, prepared.source, "model.layers.0.", torch.float32, prepared.device)
        runner.hidden, runner.batches = runner.hidden[batches], runner.batches[batches]
        gradients = [torch.ones_like(hidden) * (1 + hidden.sin()) for hidden in runner.hidden]
        linears = {job.name: prepared.model.get_submodule(job.name) for job in prepared.plan.by_block[0]}
        found.append(through_block(runner, 0, gradients, linears, linears, judging))
    for name, one in found[0].items():
        assert torch.allclose(one.inputs_II, found[1][name].inputs_II, rtol=1e-4)
        assert not torch.allclose(one.outputs_N, found[1][name].outputs_N, rtol=1e-2)  # these are of all batches


def test_weights_of_tokens_reach_a_rotated_model(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "tiny", num_attention_heads=4, num_key_value_heads=2)
    files = []
    for share in (0.0, 0.7):
        calibration = {"samples": 6, "length": 100, "layout": "documents", "token_weighting": share}
        recipe = Recipe.from_dict({"calibration": calibration, "weights": {"method": "resq"}})
        run(path, recipe, tmp_path / f"out{share}", texts=DOCUMENTS)
        files.append((tmp_path / f"out{share}" / "model.safetensors").read_bytes())
    assert files[0] != files[1]


def test_what_lies_behind_the_blocks_is_dropped_on_the_way_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head and an embedding of its own are as large as many blocks."""
    prepared = prepare(save_tiny(tmp_path / "tiny", tie_word_embeddings=False), Recipe.from_dict(tiny_recipe()), "cpu")
    models, seen = [], []
    monkeypatch.setattr(trials, "skeleton_of", lambda prepared: models.append(skeleton_of(prepared)) or models[-1])

    def watched(*arguments: object) -> dict:
        head, embedding = models[0].get_output_embeddings().weight, models[0].get_input_embeddings().weight
        seen.append(head.is_meta and embedding.is_meta and not models[0].model.norm.weight.is_meta)
        return through_block(*arguments)

    monkeypatch.setattr(trials, "through_block", watched)
    calibration = prepared.recipe.calibration.model_copy(update={"token_weighting": 0.5})
    prepared = replace(prepared, recipe=prepared.recipe.model_copy(update={"calibration": calibration}))
    trials.run_trials(prepared, [], _tokens(prepared, None), tmp_path, Silent())
    assert seen == [True] * 3


def test_padding_has_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the head takes some places of each sample at a time."""
    path = save_tiny(tmp_path / "tiny")
    calibration = {"samples": 6, "length": 100, "layout": "documents", "token_weighting": 1.0}
    recipe = {**tiny_recipe(), "calibration": calibration, "refine": {"epochs": 1}}
    prepared = prepare(path, Recipe.from_dict(recipe), "cpu")
    tokens = _tokens(prepared, DOCUMENTS)
    assert not tokens.mask.all()
    monkeypatch.setattr(sensitivity, "_LOGITS", 37 * len(tokens.ids) * prepared.model.config.vocab_size)

    def watched(runner: BlockRunner, batches: int | None) -> list[torch.Tensor]:
        gradients = output_gradients(runner, batches)
        for (_, mask), gradient in zip(runner.batches, gradients, strict=True):
            assert torch.equal(gradient.any(dim=-1), mask)
        return gradients

    monkeypatch.setattr("compress.passes.output_gradients", watched)
    found = trials.run_trials(prepared, [], tokens, tmp_path, Silent()).tokens
    blocks = {f"model.layers.{index}" for index in range(prepared.plan.num_blocks)}
    assert found.keys() == {job.name for job in prepared.plan.jobs} | blocks
    assert all(torch.allclose(found[block], found[f"{block}.mlp.down_proj"], rtol=1e-4) for block in blocks), (
        "it adds to the block's output"
    )
    for weights in found.values():
        assert weights.shape == tokens.ids.shape and not weights[~tokens.mask].any()
        assert float(weights.sum()) == pytest.approx(tokens.count, rel=1e-4)


def total_bytes(path: Path) -> tuple[int, int]:
    specs = compressed_matrices(AutoModelForCausalLM.from_pretrained(path)).values()
    return sum(map(packed_bytes, specs)), sum(map(dense_bytes, specs))


SEARCHES = {
    "bf16": {"ratio": 0.3, "dictionary": "identity"},
    "widths": {"ratio": 0.75, "value_bits": "auto", "dictionary": "identity", "group_size": 32},
    "low rank": {"method": "svd_llm", "ratio": 0.3},
    "rotated": {"method": "resq", "ratio": 0.75, "high_bits": 6},
}


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)
def test_a_search_keeps_its_total_and_spreads_it(options: dict, tiny: Path, tmp_path: Path) -> None:
    weights = {"method": "cospadi", "allocation": "search", **options}
    recipe = Recipe.from_dict({**tiny_recipe(), "weights": weights})
    run(tiny, recipe, tmp_path / "out")
    packed, dense = total_bytes(tmp_path / "out")
    assert options["ratio"] <= 1 - packed / dense < options["ratio"] + 0.06
    record = json.loads((tmp_path / "out" / "allocation.json").read_text())
    chosen = {name: entry["candidates"][entry["chosen"]] for name, entry in record.items()}
    assert len({(c["bytes"], name.rpartition(".")[2]) for name, c in chosen.items()}) > 7  # not the same for all blocks
    price = sum(c["price"] for c in chosen.values())
    by_ratio = {}  # what the same choice for every matrix would cost, where it fits
    for entry in record.values():
        for candidate in entry["candidates"]:
            key = json.dumps(candidate["options"], sort_keys=True)
            bytes_, cost, seen = by_ratio.get(key, (0, 0.0, 0))
            by_ratio[key] = (bytes_ + candidate["bytes"], cost + candidate["price"], seen + 1)
    same = [cost for bytes_, cost, seen in by_ratio.values() if seen == len(record) and bytes_ <= packed]
    assert all(price <= cost for cost in same)


def test_a_rotated_model_is_searched_as_it_will_be_stored(tmp_path: Path) -> None:
    """One large channel, which a rotation spreads: trials have the errors of the run, not those of the plain model."""
    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=2)
    for block in model.model.layers:
        block.input_layernorm.weight.data[5] *= 30
    model.save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    weights = {"allocation": "search", **SEARCHES["rotated"]}
    report = run(tmp_path / "tiny", Recipe.from_dict({**tiny_recipe(), "weights": weights}), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "allocation.json").read_text())
    for module in report.modules:
        chosen = record[module.name]["candidates"][record[module.name]["chosen"]]
        assert chosen["options"].get("bits", 4) == module.spec["bits"]
        assert 0.7 < module.error / chosen["error"] < 1.3, module.name


def test_auto_takes_the_better_dictionary(tiny: Path, tmp_path: Path) -> None:
    run(tiny, Recipe.from_dict(tiny_recipe(dictionary="auto", ratio=0.3)), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "allocation.json").read_text())
    specs = compressed_matrices(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    for name, entry in record.items():
        assert len(entry["candidates"]) > 1
        best = min(entry["candidates"], key=lambda candidate: candidate["price"])
        assert entry["candidates"][entry["chosen"]] == best
        assert specs[name]["unit_atoms"] == best["options"]["dictionary"].startswith("identity")
    untried = {name.rpartition(".")[2] for name in specs.keys() - record.keys()}
    assert untried == {"k_proj", "v_proj", "down_proj"}, "more inputs than outputs"
    assert all(spec["unit_atoms"] and not spec["num_atoms"] for name, spec in specs.items() if name not in record)


def test_dictionaries_are_compared_on_all_neurons(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample might leave out the few neurons that count."""
    prepared = prepare(tiny, Recipe.from_dict(tiny_recipe(dictionary="auto", ratio=0.3)), "cpu")
    found = []
    for neurons in (256, 4):
        monkeypatch.setattr("compress.forms._NEURONS", neurons)
        folder = tmp_path / str(neurons)
        folder.mkdir()
        found.append(trials.run_trials(prepared, open_jobs(prepared.plan), _tokens(prepared, None), folder, Silent()))
    assert found[0].candidates == found[1].candidates and all(len(each) == 3 for each in found[0].candidates.values())


def test_auto_tries_nothing_where_inputs_outnumber_outputs() -> None:
    options = cospadi.Config(ratio=0.3)
    assert [form.dictionary for form in cospadi.kinds(Site(128, 64), options)] == ["identity"]
    assert len(cospadi.kinds(Site(64, 64), options)) == 3
    rounded = cospadi.Config(ratio=0.3, dictionary_bits=4)  # so that many more fit
    assert len(cospadi.kinds(Site(128, 64), rounded)) == 3


WIDE = Site(576, 1536)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block of the sizes of SmolLM2."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    return save_tiny(tmp_path_factory.mktemp("wide") / "tiny", num_hidden_layers=1, **sizes)


def tried_specs(path: Path, **weights: object) -> dict[str, list[Spec]]:
    """What a search tries, by matrix."""
    prepared = prepare(path, Recipe.from_dict({**tiny_recipe(), "weights": {"allocation": "search", **weights}}), "cpu")
    return {
        job.name.rpartition(".")[2]: [
            spec for form in sizes_of(job, job.rule.options) if (spec := spec_of(prepared.model, prepared.source, job, form))
        ]
        for job in prepared.plan.jobs
    }


def kept_shares(specs: list[Spec], ratio: float) -> list[float]:
    """Their bytes, relative to what a matrix keeps if all keep the same."""
    return [packed_bytes(spec) / dense_bytes(spec) / (1 - ratio) for spec in specs]


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.7, 0.75, 0.8, 0.87])
def test_a_search_for_widths_has_a_floor_and_room(ratio: float, wide: Path) -> None:
    """No candidate is below half of the share, by the bytes it takes; some are smaller than it and some larger."""
    specs = tried_specs(wide, method="cospadi", dictionary="identity", value_bits="auto", ratio=ratio)["up_proj"]
    kept = kept_shares(specs, ratio)
    assert 0.475 <= min(kept) < 1 < max(kept)
    sparse = {
        round(16 * share * (1 - ratio), 1) for share, spec in zip(kept, specs, strict=True) if spec["num_nonzeros"] < 576
    }
    assert ratio < 0.75 or any(2.2 < bits < 3 for bits in sparse)  # where they beat a mixture of 2 and 3 bits


@pytest.mark.parametrize(("ratio", "widths"), [(0.5, 4), (0.72, 6), (0.75, 6)])
def test_widths_of_a_rotated_model_have_the_same_floor(ratio: float, widths: int, wide: Path) -> None:
    """The high part counts: at 4.5 bits 2 and 4 are just enough, and 2 alone, which down_proj has, are not."""
    specs = tried_specs(wide, method="resq", high_bits=6, ratio=ratio)
    assert {len(specs[name]) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")} == {widths}
    for kept in (kept_shares(of_matrix, ratio) for of_matrix in specs.values()):
        assert 0.475 <= min(kept) < 1 < max(kept)


def test_the_floor_is_one_of_searches(wide: Path, tmp_path: Path) -> None:
    """4 bits of all weights are a third of what ratio 0.2 leaves: without a search they may be the best there is."""
    weights = {"method": "cospadi", "value_bits": 4}
    prepared = prepare(wide, Recipe.from_dict({**tiny_recipe(), "weights": weights}), "cpu")
    job = next(job for job in prepared.plan.jobs if job.name.endswith("q_proj"))
    specs = [spec_of(prepared.model, prepared.source, job, form) for form in kinds_of(job)]
    assert all(specs) and packed_bytes(specs[0]) < 0.3 * dense_bytes(specs[0])
    balanced = {"method": "cospadi", "balance": "2:4", "value_bits": 8}
    report = run(save_tiny(tmp_path / "model"), Recipe.from_dict({**tiny_recipe(), "weights": balanced}), tmp_path / "out")
    assert all(module.spec["balance"] == 4 for module in report.modules)
    with pytest.raises(
        CompressError, match=r"[kq]_proj: its largest forms keep less of it .* raise the ratio, or give wider"
    ):
        prepare(wide, Recipe.from_dict({**tiny_recipe(), "weights": {**weights, "allocation": "search"}}), "cpu")


UNUSUAL = {
    "falcon": {"num_kv_heads": 1, "new_decoder_architecture": False, "parallel_attn": True, "bias": False},
    "gpt_neox": {},  # whose files call the head embed_out
}


@pytest.mark.parametrize("family", UNUSUAL)
def test_gradients_of_unusual_models(family: str, tmp_path: Path) -> None:
    """Falcon adds to the output of a linear in place."""
    source = save_tiny(tmp_path / "model", family, **UNUSUAL[family])
    weights = {"method": "cospadi", "dictionary": "identity", "ratio": 0.4, "allocation": "search"}
    rules = [{"method": "none", "targets": ["*head"]}, {**weights, "targets": ["*"]}]
    recipe = {**tiny_recipe(), "weights": rules}
    recipe["calibration"] = {**recipe["calibration"], "token_weighting": 0.5}
    report = run(source, Recipe.from_dict(recipe), tmp_path / "out")
    assert len(report.modules) == 3 * 4 and len({module.packed_bytes for module in report.modules}) > 2


def test_a_search_that_has_no_choice_still_counts_as_one(wide: Path) -> None:
    weights = {"method": "resq", "allocation": "search", "ratio": 0.1, "bits": 8, "high_bits": 8}
    prepared = prepare(wide, Recipe.from_dict({**tiny_recipe(), "weights": weights}), "cpu")
    assert open_jobs(prepared.plan) == list(prepared.plan.jobs)


@pytest.mark.parametrize(("ratio", "told"), [(0.3, True), (0.75, False)])
def test_a_search_says_what_it_cannot_fill(ratio: float, told: bool, tiny: Path, tmp_path: Path) -> None:
    """11.2 bits per weight, where no form has more than 8."""
    weights = {"method": "resq", "high_bits": 6, "allocation": "search", "ratio": ratio}
    progress, notes = Silent(), []
    progress.note = notes.append
    run(tiny, Recipe.from_dict({**tiny_recipe(), "weights": weights}), tmp_path / "out", progress=progress)
    packed, dense = total_bytes(tmp_path / "out")
    assert ((1 - ratio) * dense - packed > 0.01 * dense) == told
    unused = f"search: only {megabytes(packed)} are used, because no larger forms of the matrices were tried"
    assert (unused in notes) == told


def test_bases_outlive_an_interrupt_of_the_trials(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.from_dict({**tiny_recipe(), "weights": {"allocation": "search", **SEARCHES["rotated"]}})
    whole, one = trials.backwards, tmp_path / ".out.partial" / "bases.safetensors"
    monkeypatch.setattr(trials, "backwards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tiny, recipe, tmp_path / "out")
    before = one.stat().st_mtime_ns
    monkeypatch.setattr(
        trials, "backwards", lambda *args: pytest.fail("made again") if one.stat().st_mtime_ns != before else whole(*args)
    )
    run(tiny, recipe, tmp_path / "out")


def test_a_target_size_counts_the_norm_of_a_rotated_model(tiny: Path, tmp_path: Path) -> None:
    dense = prepare(tiny, Recipe.from_dict(tiny_recipe()), "cpu")
    wanted = dense.source.stored_bytes - dense.replaced_bytes + dense.plan.dense_bytes // 3
    weights = {"method": "resq", "high_bits": 6, "allocation": "search", "target_size": wanted}
    run(tiny, Recipe.from_dict({**tiny_recipe(), "weights": weights}), tmp_path / "out")
    stored = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert 0.95 * wanted < stored <= wanted


@pytest.mark.parametrize(
    ("weights", "cache"),
    [
        (
            {"method": "resq", "high_bits": 6, "allocation": "search"},
            {"method": "per_token", "basis": "pca"},
        ),  # values folded
        ({"method": "rtn"}, {"method": "per_token", "basis": "hadamard"}),
        ({"method": "rtn"}, {"method": "squat", "window": 8, "group_size": 8, "metric": "calibration"}),
    ],
    ids=["folded", "both sides", "metrics"],
)
def test_what_a_kv_cache_adds_is_counted(weights: dict, cache: dict, tiny: Path, tmp_path: Path) -> None:
    """Of a search the size that it must keep to; of one form for all the size that a dry run shows."""
    recipe = Recipe.from_dict({**tiny_recipe(), "weights": weights, "kv_cache": cache})
    prepared = prepare(tiny, recipe, "cpu")
    rest = prepared.source.stored_bytes - prepared.replaced_bytes + added_bytes(prepared.model, recipe)
    if "allocation" in weights:
        wanted = rest + prepared.plan.dense_bytes // 3
        recipe = Recipe.from_dict({**recipe.resolved(), "weights": {**weights, "target_size": wanted}})
        assert 0.95 * wanted < run(tiny, recipe, tmp_path / "out").checkpoint_bytes <= wanted
    else:
        assert run(tiny, recipe, tmp_path / "out").checkpoint_bytes == rest + sum(map(planned_bytes, prepared.plan.jobs))


def test_a_size_without_room_is_refused_before_the_search(wide: Path) -> None:
    weights = {"method": "resq", "high_bits": 6, "allocation": "search", "target_bits": 2}
    with pytest.raises(CompressError, match=r"smallest forms of \*_proj take .* MB, the budget leaves them .* larger size"):
        prepare(wide, Recipe.from_dict({**tiny_recipe(), "weights": weights}), "cpu")


def test_trials_of_other_weights_are_not_resumed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.from_dict(tiny_recipe(dictionary="identity", allocation="search", ratio=0.3))
    monkeypatch.setattr("compress.run.compress_blocks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tiny, recipe, tmp_path / "out")
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][-1, -1] += 1
    save_file(tensors, tiny / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("compress.run.compress_blocks", compress_blocks)
    with pytest.raises(CompressError, match="unfinished run with another block weights"):
        run(tiny, recipe, tmp_path / "out")
    assert (tmp_path / ".out.partial" / "allocation.json").exists(), "left as it is"


def test_a_search_of_widths_leaves_the_head_to_a_rule_of_its_own(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "tiny", tie_word_embeddings=False)
    weights = {"allocation": "search", **SEARCHES["rotated"], "targets": ["*_proj", "lm_head"]}
    with pytest.raises(CompressError, match="lm_head: a search is for the matrices of a block"):
        prepare(path, Recipe.from_dict({**tiny_recipe(), "weights": weights}), "cpu")


def test_widths_that_nobody_searches_for_fill_their_share(tmp_path: Path) -> None:
    """The head's, those of a dry run, and those of one size: the widest codes that all weights may have, or a search."""
    for ratio, bits in ((0.4, 8), (0.5, 6), (0.7, 4), (0.75, 3), (0.9, 3)):
        options = cospadi.Config(ratio=ratio, dictionary="identity", value_bits="auto")
        spec = cospadi.plan(WIDE, options)
        assert spec["value_bits"] == bits and (spec["num_nonzeros"] == 576) == (ratio < 0.9)
    for ratio, bits in ((0.4, 8), (0.65, 8), (0.7, 6), (0.8, 4)):  # half of the weights and a mask
        options = cospadi.Config(ratio=ratio, dictionary="identity", value_bits="auto", balance="2:4")
        assert cospadi.plan(WIDE, options)["value_bits"] == bits
        assert [form.value_bits for form in cospadi.alternatives(WIDE, options)][-1] == bits
    path = save_tiny(tmp_path / "tiny", tie_word_embeddings=False)
    recipe = tiny_recipe(dictionary="identity", value_bits="auto", ratio=0.8, group_size=0)
    recipe["weights"]["targets"] = ["*_proj", "lm_head"]
    jobs = prepare(path, Recipe.from_dict(recipe), "cpu").plan.jobs
    assert {is_open(job) for job in jobs if job.name != "lm_head"} == {True}
    assert [is_open(job) for job in jobs if job.name == "lm_head"] == [False]


RULES = {  # options, and the share of their bf16 bytes that matrices then have
    "bits": ({"target_bits": 15.5}, 15.5 / 16),
    "search": ({"ratio": 0.5, "value_bits": "auto", "dictionary": "identity", "allocation": "search"}, 0.5),
    "width": ({"ratio": 0.65, "value_bits": "auto", "dictionary": "identity"}, 0.35),
    "ratio": ({"ratio": 0.3}, 0.7),
    "gptq": ({"method": "gptq", "bits": 4, "group_size": 32}, 4.5 / 16),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("options", "share"), RULES.values(), ids=RULES)
def test_a_target_size_counts_what_other_rules_make(options: dict, share: float, first: bool, tiny: Path) -> None:
    dense = prepare(tiny, Recipe.from_dict(tiny_recipe()), "cpu")
    wanted = dense.source.stored_bytes - dense.replaced_bytes + dense.plan.dense_bytes * 3 // 5
    rules = [
        {"method": "cospadi", **options, "targets": ["*self_attn*"]},
        {"method": "cospadi", "target_size": wanted, "allocation": "search", "targets": ["*mlp*"]},
    ]
    prepared = prepare(tiny, Recipe.from_dict({**tiny_recipe(), "weights": rules if first else rules[::-1]}), "cpu")
    others = prepared.source.stored_bytes - prepared.replaced_bytes
    assert others + sum(map(planned_bytes, prepared.plan.jobs)) == pytest.approx(wanted, abs=1)
    attention = [job for job in prepared.plan.jobs if "self_attn" in job.name]
    assert sum(map(planned_bytes, attention)) == pytest.approx(
        share * sum(dense_bytes(job.spec) for job in attention), rel=0.05
    )


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [{"method": "none", "targets": ["*_proj"]}, {"target_size": "1MB", "targets": ["*q_proj"]}],
            "earlier rules take all",
        ),
        ([{"target_size": "1MB", "targets": ["*q_proj"]}, {"target_size": "2MB", "targets": ["*k_proj"]}], "in one rule"),
    ],
)
def test_impossible_target_sizes(rules: list[dict], message: str, tiny: Path) -> None:
    weights = [{"method": "cospadi", **rule} for rule in rules]
    with pytest.raises(CompressError, match=message):
        prepare(tiny, Recipe.from_dict({**tiny_recipe(), "weights": weights}), "cpu")


def test_the_dry_runs_time_counts_the_trials(tiny: Path) -> None:
    flops, disk = {}, {}
    for name, changes in {
        "given": {"dictionary": "identity"},
        "weighted": {"dictionary": "identity"},
        "fisher": {"dictionary": "learned", "weighting": "fisher"},
        "tried": {"dictionary": "auto"},
        "searched": {"dictionary": "auto", "allocation": "search"},
    }.items():
        recipe = tiny_recipe(ratio=0.3, **changes)
        recipe["calibration"]["token_weighting"] = 0.5 if name == "weighted" else 0
        prepared = prepare(tiny, Recipe.from_dict(recipe))
        flops[name], disk[name] = trial_flops(prepared), states_bytes(prepared)
        logits = 16 * 1024 * prepared.model.config.vocab_size if disk[name] else 0
        assert logits_bytes(prepared) == logits
        assert predicted_memory_bytes(prepared) > (700 << 20) + logits
        counts = prepared.block_parameters()
        blocks = prepared.model.get_submodule(prepared.plan.blocks_name)
        assert counts == [sum(p.numel() for p in block.parameters()) for block in blocks]
        if name == "weighted":  # a matrix of the first block alone: the passes are those of all
            recipe["weights"]["targets"] = ["*.0.mlp.down_proj"]
            one = trial_flops(prepare(tiny, Recipe.from_dict(recipe)))
            assert flops[name] == one > 8 * 64 * sum(counts) * (2 + 6)
    assert flops["given"] == 0 < flops["tried"] < flops["searched"] and flops["weighted"] > 0 < flops["fisher"]
    blocks, width = prepared.plan.num_blocks, prepared.model.config.hidden_size
    whole = 8 * 64 * width * 4 * blocks
    assert disk == {"given": 0, "weighted": whole, "fisher": whole, "tried": 0, "searched": whole}


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_the_dry_run_shows_the_size_that_a_search_will_fill(share: float, tiny: Path) -> None:
    uniform = prepare(tiny, Recipe.from_dict(tiny_recipe(dictionary="identity")), "cpu")
    others = uniform.source.stored_bytes - uniform.replaced_bytes
    wanted = others + round(share * uniform.plan.dense_bytes)
    searched = tiny_recipe(allocation="search", value_bits="auto", dictionary="identity", target_size=wanted)
    prepared = prepare(tiny, Recipe.from_dict(searched), "cpu")
    assert others + sum(map(planned_bytes, prepared.plan.jobs)) == pytest.approx(wanted)
    columns = forecast_table(prepared).columns
    rows = dict(zip(columns[0].cells, zip(*(column.cells for column in columns[1:]), strict=True), strict=True))
    assert rows["whole checkpoint"][-1] == megabytes(wanted) and "found by the search" in rows["3 x q_proj"]
    assert "found by the search" not in [*forecast_table(uniform).columns[3].cells]


def test_a_killed_search_resumes_with_the_same_bytes(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(dictionary="identity", allocation="search", ratio=0.3)
    recipe = Recipe.from_dict({**recipe, "calibration": {**recipe["calibration"], "token_weighting": 0.5}})
    run(tiny, recipe, tmp_path / "whole")
    done = []

    class Killed(Silent):
        def matrix(self, module: object) -> None:
            done.append(module)
            if len(done) == 10:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny, recipe, tmp_path / "resumed", progress=Killed())
    assert (tmp_path / ".resumed.partial" / "allocation.json").exists()
    monkeypatch.setattr("compress.allocation.run_trials", lambda *_: pytest.fail("searched again"))
    run(tiny, recipe, tmp_path / "resumed")
    for file in ("model.safetensors", "allocation.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()


@pytest.mark.parametrize(
    ("options", "weighting"),
    [({"dictionary": "auto", "ratio": 0.3}, 0.0), ({"dictionary": "auto", "ratio": 0.3}, 0.5), (SEARCHES["rotated"], 0.0)],
)
def test_trials_resume_after_the_last_block(
    options: dict, weighting: float, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed among the second block's matrices, then among the third's, whose file is damaged after that."""
    recipe = {**tiny_recipe(), "weights": {"method": "cospadi", "allocation": "search", **options}}
    recipe["calibration"]["token_weighting"] = weighting
    recipe = Recipe.from_dict(recipe)
    run(tiny, recipe, tmp_path / "whole")
    tried, one = [], trials._tried
    monkeypatch.setattr(trials, "_tried", lambda *args: (tried.append(args[1].name), one(*args))[1])

    class Killed(Silent):
        def __init__(self, after: int) -> None:
            self.left = after

        def count(self, total: int, what: str) -> Callable[[], None]:
            return self.step

        def step(self) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    staging = tmp_path / ".resumed.partial"
    for after in (10, 18):
        with pytest.raises(KeyboardInterrupt):
            run(tiny, recipe, tmp_path / "resumed", progress=Killed(after))
        assert len(list(staging.glob("tried-*.json"))) == after // 7
    assert len(tried) == 10 + (18 - 7)
    next(iter(sorted(staging.glob("tried-*.json")))).write_text('{"form": 1')
    run(tiny, recipe, tmp_path / "resumed")
    blocks = prepare(tiny, recipe, "cpu").plan.num_blocks
    assert len(tried) == 10 + (18 - 7) + 7 * (blocks - 1)
    for file in ("model.safetensors", "allocation.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)
def test_trials_serve_another_size(options: dict, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The total is kept without trials, and the size they were made for comes out as it was, byte by byte."""
    weights = {"method": "cospadi", "allocation": "search", **options}
    recipe = Recipe.from_dict({**tiny_recipe(), "weights": weights})
    run(tiny, recipe, tmp_path / "first")
    monkeypatch.setattr("compress.allocation.run_trials", lambda *_: pytest.fail("searched again"))
    other = Recipe.from_dict({**tiny_recipe(), "weights": weights | {"target_bits": 16 * (1.1 - options["ratio"])}})
    monkeypatch.setattr("compress.run.compress_blocks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tiny, other, tmp_path / "second", trials_from=tmp_path / "first")
    monkeypatch.setattr("compress.run.compress_blocks", compress_blocks)
    run(tiny, other, tmp_path / "second", trials_from=tmp_path / "first")
    assert "the run, with the trials of first in place of its own" in (tmp_path / "second" / "README.md").read_text()
    packed, dense = total_bytes(tmp_path / "second")
    first, _ = total_bytes(tmp_path / "first")
    assert first < packed <= round((1.1 - options["ratio"]) * dense)
    run(tiny, recipe, tmp_path / "third", trials_from=tmp_path / "first")
    for file in ("model.safetensors", "allocation.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "third" / file).read_bytes()


def test_trials_of_another_size_keep_the_floor(tiny: Path, tmp_path: Path) -> None:
    """No matrix gets less than half of what it would have if all had the same."""
    searched = {"dictionary": "identity", "allocation": "search"}
    run(tiny, Recipe.from_dict(tiny_recipe(**searched, ratio=0.5)), tmp_path / "half")
    run(tiny, Recipe.from_dict(tiny_recipe(**searched, ratio=0.05)), tmp_path / "most", trials_from=tmp_path / "half")
    first, second = (json.loads((tmp_path / name / "allocation.json").read_text()) for name in ("half", "most"))
    kept = [1 - candidate["options"]["ratio"] for entry in second.values() for candidate in entry["candidates"]]
    assert min(kept) >= 0.475 and all(len(second[name]["candidates"]) < len(first[name]["candidates"]) for name in first)
    far = Recipe.from_dict(tiny_recipe(**searched, ratio=0.8))
    with pytest.raises(CompressError, match=r"finds no room: .*; search again without --trials-from"):
        run(tiny, far, tmp_path / "far", trials_from=tmp_path / "half")


def test_trials_of_something_else_are_refused(tiny: Path, tmp_path: Path) -> None:
    searched = {"dictionary": "identity", "allocation": "search"}
    run(tiny, Recipe.from_dict(tiny_recipe(**searched)), tmp_path / "first")

    def refused(
        message: str, path: Path = tiny, trials: str = "first", calibration: dict | None = None, **weights: str
    ) -> None:
        recipe = tiny_recipe(**weights)
        recipe = Recipe.from_dict(recipe | {"calibration": recipe["calibration"] | (calibration or {})})
        with pytest.raises(CompressError, match=message):
            run(path, recipe, tmp_path / "out", trials_from=tmp_path / trials)
        assert not list(tmp_path.glob("*out*"))

    refused("tiny holds no trials; give --trials-from a checkpoint made by a search", trials="tiny", **searched)
    refused("another model;", save_tiny(tmp_path / "other", "qwen2"), **searched)
    edited = shutil.copytree(tiny, tmp_path / "edited")
    tensors = load_file(edited / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][-1, -1] += 1
    save_file(tensors, edited / "model.safetensors", {"format": "pt"})
    refused("another model;", edited, **searched)
    refused("had balance none .here 2:4.; give all but the size as it was", **searched, balance="2:4")
    refused("had other calibration tokens;", calibration={"samples": 2}, **searched)
    refused("no gradients; leave out token_weighting", calibration={"token_weighting": 0.5}, **searched)
    refused("needs allocation: search", dictionary="auto")
    refused("needs allocation: search", dictionary="identity")
    file = tmp_path / "first" / "allocation.json"
    file.write_text(file.read_text().replace('"ratio"', '"rate"'))
    refused("allocation.json is damaged; search again", **searched)
    (tmp_path / "first" / "report.json").unlink()
    refused("does not say what its trials were made for; search again", **searched)


def test_trials_of_another_run_do_not_continue_this_one(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.from_dict(tiny_recipe(dictionary="identity", allocation="search"))
    run(tiny, recipe, tmp_path / "first")
    monkeypatch.setattr("compress.run.compress_blocks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tiny, recipe, tmp_path / "out", trials_from=tmp_path / "first")
    monkeypatch.undo()
    with pytest.raises(CompressError, match="an unfinished run with another trials; repeat that command"):
        run(tiny, recipe, tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "missing", "other tokens"])
def test_what_a_search_left_is_checked(damage: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file is named and nothing is thrown away; without the choices it is searched again."""
    recipe = tiny_recipe(dictionary="identity", allocation="search", ratio=0.3)
    recipe["calibration"]["token_weighting"] = 0.5
    recipe = Recipe.from_dict(recipe)
    monkeypatch.setattr("compress.run.compress_blocks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tiny, recipe, tmp_path / "out")
    staging, again = tmp_path / ".out.partial", []
    monkeypatch.setattr("compress.allocation.run_trials", lambda *_: again.append(1) or pytest.fail("searched again"))
    file = staging / "sensitivity.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "other tokens":
        write_file(file, {"tokens.model.layers.0.self_attn.q_proj": torch.ones(3, 5)})
    else:
        (staging / "allocation.json").unlink()
    if damage == "missing":
        with pytest.raises(pytest.fail.Exception):
            run(tiny, recipe, tmp_path / "out")
    else:
        with pytest.raises(
            CompressError, match=r"sensitivity.safetensors is damaged; remove .*\.out\.partial to start again"
        ):
            run(tiny, recipe, tmp_path / "out")
        assert file.exists() and not again


def test_target_size_and_bits(tiny: Path, tmp_path: Path) -> None:
    prepared = prepare(tiny, Recipe.from_dict(tiny_recipe()), "cpu")
    dense = prepared.plan.dense_bytes  # half of what the fp32 checkpoint holds for them
    target_size = prepared.source.stored_bytes - 2 * dense + int(0.8 * dense)
    for number, target in enumerate(({"target_size": target_size}, {"target_bits": 6.0, "value_bits": 4})):
        out = tmp_path / f"out{number}"
        report = run(tiny, Recipe.from_dict(tiny_recipe(dictionary="identity", **target)), out)
        if "target_size" in target:
            assert 0.9 * target["target_size"] < report.checkpoint_bytes <= target["target_size"]
        else:
            assert 16 * total_bytes(out)[0] / total_bytes(out)[1] <= 6.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_size": "1kB"}, "cannot be met: .*choose a size between"),
        ({"target_size": "1TB"}, "cannot be met: .*choose a size between"),
        ({"target_size": "much"}, "target_size"),
        ({"target_size": "1MB", "target_bits": 3}, "exclude each other"),
        ({"target_bits": 1e-17}, "target_bits 1e-17 leaves nothing of the matrices"),
    ],
    ids=["small", "large", "no size", "both", "no bits"],
)
def test_impossible_targets(options: dict, message: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=message):
        compress.compress_model(tiny, tiny_recipe(**options), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_weighting_asks_for_sensitivities_and_changes_the_atoms(tiny: Path, tmp_path: Path) -> None:
    outputs = {}
    for weighting in ("none", "fisher"):
        out = tmp_path / weighting
        options = {"weighting": weighting, "ratio": 0.5, "iterations": 6, "refits": 12}
        run(tiny, Recipe.from_dict(tiny_recipe(**options)), out)
        specs = compressed_matrices(AutoModelForCausalLM.from_pretrained(out))
        assert len(specs) == 21 and (out / "allocation.json").exists() == (weighting == "fisher")
        outputs[weighting] = (out / "model.safetensors").read_bytes()
    assert outputs["none"] != outputs["fisher"]


def test_weighted_atoms_serve_the_neurons_that_count() -> None:
    from compress.layers import build
    from compress.linalg import SecondMoment
    from compress.methods import Site, cospadi

    weight, x = torch.randn(80, 48), torch.randn(1000, 48) * torch.logspace(0, -1, 48)
    gram = (x.T @ x / len(x)).double()
    importance = torch.cat([torch.full((40,), 100.0), torch.ones(40)]).double()
    for kind in ("learned", "identity+learned"):
        errors = {}
        for weighting in ("none", "fisher"):
            config = cospadi.Config(dictionary=kind, ratio=0.5, weighting=weighting)
            spec = {**cospadi.plan(Site(48, 80), config), "in_features": 48, "out_features": 80, "bias": False}
            layer = build(spec)
            layer.load_state_dict(cospadi.compress(weight, SecondMoment(gram).for_outputs(importance), spec, config))
            miss = (weight - layer.dense_weight()).double()
            errors[weighting] = float(((miss @ gram) * miss).sum(dim=1) @ importance)
        assert errors["fisher"] < 0.97 * errors["none"]


def test_the_choices_are_shown_drawn_and_kept(tiny: Path, tmp_path: Path) -> None:
    from compress.checkpoint import read_report
    from compress.picture import draw

    recipe = tiny_recipe(dictionary="identity", allocation="search", ratio=0.3)
    model = compress.compress_model(tiny, recipe, tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "allocation.json").read_bytes() == (tmp_path / "out" / "allocation.json").read_bytes()
    report = read_report(tmp_path / "out")
    for suffix in ("png", "svg"):
        draw(report, tmp_path / f"bits.{suffix}")
        assert (tmp_path / f"bits.{suffix}").stat().st_size > 10_000
    with pytest.raises(CompressError, match=r"must end in \.png, \.svg, \.pdf"):
        draw(report, tmp_path / "bits.txt")


def test_a_sample_of_neurons_tells_what_all_would_cost() -> None:
    """Whether they count alike, or a few of them for nearly everything."""
    errors = torch.rand(4096) + 0.5
    for importance in (None, torch.zeros(4096), torch.rand(4096), 1 / (torch.rand(4096) + 1e-3)):
        rows, share = trials._sample(importance, 4096, 16)
        assert len(rows) == 256 == len(rows.unique())
        counts = torch.ones(4096) if importance is None or not importance.any() else importance
        assert 0.9 < share * float(errors[rows] @ counts[rows]) / float(errors @ counts) < 1.1


def test_forms_are_judged_by_name_and_shape() -> None:
    """The up_proj of an expert and the wider one of a shared expert are different matrices."""
    rule = Recipe.load("cospadi-20").weights[0]
    wide, narrow = (
        Job(f"layers.0.{name}.up_proj", 0, {"in_features": 64, "out_features": outputs}, rule)
        for name, outputs in (("shared", 128), ("expert", 32))
    )
    forms = Forms()
    for _ in range(10):
        forms.note(wide, 1)
    assert forms.worth_it(wide, 3) == [1] and forms.worth_it(narrow, 1) == [0]
