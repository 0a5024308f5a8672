"""What an unfinished run leaves: only the same run goes on from it, and nothing in it is believed unchecked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from compress.blockwise import Silent
from compress.errors import CompressError
from compress.recipe import Recipe
from compress.report import ModuleReport
from compress.run import run
from compress.staging import locked, staging_of
from helpers import save_tiny, tiny_recipe

RECIPE = {**tiny_recipe(), "weights": {"method": "svd_llm", "ratio": 0.3}}


class StopIn(Silent):
    """Ctrl-C when the first matrix of a block is done."""

    def __init__(self, block: str) -> None:
        self.block = block

    def matrix(self, module: ModuleReport) -> None:
        if f".{self.block}." in module.name:
            raise KeyboardInterrupt


def interrupted(model: Path, output: Path, block: str = "2", recipe: dict = RECIPE) -> Path:
    """The staging directory of a run that was stopped inside a block."""
    with pytest.raises(KeyboardInterrupt):
        run(model, Recipe.from_dict(recipe), output, progress=StopIn(block))
    return staging_of(output)


def change_last_row(model: Path, name: str) -> None:
    """Beyond the first 4 KB of every matrix: a fingerprint of the beginnings cannot see it."""
    tensors = load_file(model / "model.safetensors")
    tensors[name][-1] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "model.layers.1.input_layernorm", "model.embed_tokens"])
def test_blocks_of_a_changed_model_are_not_continued(name: str, model: Path, tmp_path: Path) -> None:
    staging = interrupted(model, tmp_path / "out")
    change_last_row(model, f"{name}.weight")
    before = sorted(staging.iterdir())
    with pytest.raises(CompressError, match="another model"):
        run(model, Recipe.from_dict(RECIPE), tmp_path / "out")
    assert sorted(staging.iterdir()) == before


def test_a_change_in_a_block_that_is_not_yet_done_is_no_obstacle(model: Path, tmp_path: Path) -> None:
    interrupted(model, tmp_path / "out")
    change_last_row(model, "model.layers.2.mlp.down_proj.weight")
    run(model, Recipe.from_dict(RECIPE), tmp_path / "out")
    run(model, Recipe.from_dict(RECIPE), tmp_path / "fresh")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "fresh" / "model.safetensors").read_bytes()


def test_blocks_without_a_target_count_too(model: Path, tmp_path: Path) -> None:
    """Block 0 is left as it is, but the inputs of block 1 have gone through it."""
    recipe = {**RECIPE, "weights": {**RECIPE["weights"], "targets": ["*.[12].*_proj"]}}
    interrupted(model, tmp_path / "out", recipe=recipe)
    change_last_row(model, "model.layers.0.mlp.down_proj.weight")
    with pytest.raises(CompressError, match=r"block-00001\.safetensors was made from another model"):
        run(model, Recipe.from_dict(recipe), tmp_path / "out")


def test_bases_depend_on_every_block(model: Path, tmp_path: Path) -> None:
    recipe = {**RECIPE, "weights": {"method": "resq", "sweeps": 0, "refits": 0}}
    interrupted(model, tmp_path / "out", block="1", recipe=recipe)
    change_last_row(model, "model.layers.2.mlp.down_proj.weight")
    with pytest.raises(CompressError, match=r"bases\.safetensors was made from another model"):
        run(model, Recipe.from_dict(recipe), tmp_path / "out")


def other_shape(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: tensor[1:].contiguous() for name, tensor in tensors.items()}, path)


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no json": ("block-00001.json", lambda p: p.write_text("{"), r"block-00001\.json is damaged; remove .*block-00001\.\*"),
    "list": ("block-00001.json", lambda p: p.write_text("[]"), "block-00001.json is damaged"),
    "bytes": ("block-00001.json", lambda p: p.write_bytes(b"\xff\xfe"), "block-00001.json is damaged"),
    "no figures": ("block-00001.json", lambda p: p.unlink(), "block-00001.json is damaged"),
    "truncated": ("block-00000.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-9]), "00000.safetensors is damaged"),
    "other shape": ("block-00000.safetensors", other_shape, "00000.safetensors is damaged"),
    "no identity": ("run.json", lambda p: p.write_text("{"), "another model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_work_is_one_clear_line(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    file, damage, message = DAMAGE[kind]
    staging = interrupted(tiny_llama, tmp_path / "out")
    damage(staging / file)
    with pytest.raises(CompressError, match=message) as caught:
        run(tiny_llama, Recipe.from_dict(RECIPE), tmp_path / "out")
    assert "\n" not in str(caught.value) and (staging / "block-00000.safetensors").exists()


def test_a_removed_block_is_made_again(tiny_llama: Path, tmp_path: Path) -> None:
    staging = interrupted(tiny_llama, tmp_path / "out")
    for file in staging.glob("block-00000.*"):
        file.unlink()
    run(tiny_llama, Recipe.from_dict(RECIPE), tmp_path / "out")
    run(tiny_llama, Recipe.from_dict(RECIPE), tmp_path / "fresh")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "fresh" / "model.safetensors").read_bytes()


def test_work_left_behind_a_finished_output_is_removed(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    """As if killed between the rename of the output and the removal of the work."""
    with monkeypatch.context() as patched:
        patched.setattr("compress.run.shutil.rmtree", lambda *_, **__: None)
        run(tiny_llama, Recipe.from_dict(RECIPE), tmp_path / "out")
    staging = staging_of(tmp_path / "out")
    assert (staging / "run.json").exists()
    with pytest.raises(CompressError, match="finished run of this recipe"):
        run(tiny_llama, Recipe.from_dict(RECIPE), tmp_path / "out")
    assert not staging.exists()


def test_work_of_another_run_behind_an_output_is_kept(tiny_llama: Path, tiny_compressed: Path, tmp_path: Path) -> None:
    staging = interrupted(tiny_llama, tmp_path / "out")
    shutil.copytree(tiny_compressed, tmp_path / "out")
    with pytest.raises(CompressError, match="finished run of another recipe"):
        run(tiny_llama, Recipe.from_dict(RECIPE), tmp_path / "out")
    assert (staging / "block-00001.safetensors").exists()


def test_two_processes_do_not_share_an_output(tiny_llama: Path, tmp_path: Path) -> None:
    staging = interrupted(tiny_llama, tmp_path / "out")
    with locked(staging), pytest.raises(CompressError, match=r"another process is at work in .*out\.partial"):
        run(tiny_llama, Recipe.from_dict(RECIPE), tmp_path / "out")
    run(tiny_llama, Recipe.from_dict(RECIPE), tmp_path / "out")
    assert not staging.exists()


def test_another_version_does_not_continue_a_run(tiny_llama: Path, tmp_path: Path) -> None:
    staging = interrupted(tiny_llama, tmp_path / "out")
    state = json.loads((staging / "run.json").read_text())
    (staging / "run.json").write_text(json.dumps({**state, "torch version": "1.13", "transformers version": "4.0"}))
    with pytest.raises(CompressError, match="another torch version and transformers version"):
        run(tiny_llama, Recipe.from_dict(RECIPE), tmp_path / "out")


def test_a_lock_on_work_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    with locked(tmp_path / ".out.partial"):
        assert (tmp_path / ".out.partial" / "lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_between_the_stages_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = save_tiny(tmp_path / "tiny")
    monkeypatch.setattr("compress.run.check_blocks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tiny, Recipe.from_dict(tiny_recipe()), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_the_recipe_of_a_result_repeats_its_run(tmp_path: Path) -> None:
    """Also where the recipe names another model than the one that was given."""
    tiny = save_tiny(tmp_path / "tiny")
    run(tiny, Recipe.from_dict({**tiny_recipe(dictionary="identity"), "model": "some/other"}), tmp_path / "out")
    again = Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert again.model == str(tiny)
    run(again.model, again, tmp_path / "again")
    one, two = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert one.read_bytes() == two.read_bytes()
