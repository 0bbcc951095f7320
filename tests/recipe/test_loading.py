"""How the values of a recipe are read, merged, typed and written. Refusals are in `test_bad_input`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_dist.engine import optimizers as optim
from mnist_dist.errors import RecipeError
from mnist_dist.recipe.changes import describe_changes, refuse_changes
from mnist_dist.recipe.file import bundled_recipes, find_recipe, note_measured, recipe_notes
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe

MODEL = "model: {name: lenet5}\n"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # a user's own model adds the folder


def load(text: str, *overrides: str) -> Recipe:
    Path("my.yaml").write_text(text, encoding="utf-8")
    return load_recipe("my.yaml", *overrides)


def read(text: str) -> object:
    """Returns what a scalar is read as where the schema sets no type: Identity takes any keyword."""
    return load(f"model: {{name: 'torch.nn:Identity', value: {text}}}\n").model.keywords["value"]


# --- YAML ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-2.5e+2", -250.0),
        ("12", 12),
        ("-3", -3),
        ("+3", 3),
        ("010", 10),
        ("0o10", "0o10"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-01-02", "2026-01-02"),
        ("no", "no"),
        ("none", "none"),
        ("'None'", "None"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("'true'", "true"),
        ("'3'", "3"),
        ("!!str 3", "3"),
        ("[1, 2.0, a]", [1, 2.0, "a"]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    assert read(text) == value
    assert type(read(text)) is type(value)


def test_none_of_python_is_null():
    recipe = load(MODEL + "clip_grad_norm: None\n", "optimizer={'lr': None, 'nesterov': True, 'momentum': 0.5}")
    assert (recipe.clip_grad_norm, recipe.optimizer.keywords) == (None, {"nesterov": True, "momentum": 0.5})
    assert load(MODEL + "data: {limit_test: 5}\n", "data.limit_test=None").data.limit_test is None
    assert reload(load(MODEL + "tracking: {wandb: {tags: ['None']}}\n")).tracking.wandb.tags == ["None"]


def test_no_is_text_where_text_is_expected():
    recipe = load(MODEL + "mixed_precision: no\nname: on\n")
    assert (recipe.mixed_precision, recipe.name) == ("no", "on")


def test_whole_number_is_accepted_where_a_number_is_expected():
    recipe = load(MODEL + "clip_grad_norm: 1\noptimizer: {lr: 1}\n")
    assert (recipe.clip_grad_norm, recipe.optimizer.lr) == (1.0, 1.0)
    assert isinstance(recipe.clip_grad_norm, float)


@pytest.mark.parametrize(
    ("text", "optimizer"),
    [
        ("optimizer: {<<: {lr: 0.3, momentum: 0.5}, lr: 0.2}", (0.2, {"momentum": 0.5})),
        ("optimizer: {lr: 0.2, <<: {lr: 0.3, momentum: 0.5}}", (0.2, {"momentum": 0.5})),
        ("optimizer: {<<: [{lr: 0.2}, {lr: 0.3, momentum: 0.5}]}", (0.2, {"momentum": 0.5})),
        ("optimizer:\n  <<: {<<: {momentum: 0.5}, lr: 0.2}", (0.2, {"momentum": 0.5})),
        ("<<: {optimizer: {lr: 0.2}}", (0.2, {})),
    ],
)
def test_merge_keys_add_what_a_section_lacks(text, optimizer):
    found = load(MODEL + text + "\n").optimizer
    assert (found.lr, found.keywords) == optimizer


def test_merge_keys_take_an_anchor_and_know_its_lines():
    text = MODEL + "schedule: &base\n  name: step\n  step_size: 2\noptimizer:\n  <<: *base\n  name: sgd\n"
    with pytest.raises(RecipeError) as found:
        load(text)
    assert [(each.key, each.where) for each in found.value.problems] == [("optimizer.step_size", "my.yaml:4")]


@pytest.mark.parametrize("text", ["<<: 3", "<<: [3]", "optimizer: &a {<<: *a}", "optimizer: &a {<<: [{<<: *a}]}"])
def test_merge_keys_of_what_is_no_other_section_are_refused(text, refused):
    assert [kind for _, kind in refused(lambda: load(MODEL + text + "\n"))] == ["syntax"]


def test_windows_line_ends_and_a_byte_order_mark_are_accepted():
    Path("my.yaml").write_bytes("\ufeffepochs: 3\r\nmodel:\r\n  name: lenet5\r\n".encode())
    assert load_recipe("my.yaml").epochs == 3


# --- precedence ---------------------------------------------------------------------------------------------------


def test_file_overrides_default_and_override_overrides_file():
    assert load(MODEL).epochs == Recipe.model_fields["epochs"].default
    assert load(MODEL + "epochs: 3\n").epochs == 3
    assert load(MODEL + "epochs: 3\n", "epochs=5").epochs == 5
    assert load(MODEL + "epochs: 3\n", "epochs=5", "epochs=7").epochs == 7


def test_override_keeps_the_rest_of_its_section():
    recipe = load(MODEL + "data: {dataset: synthetic, augment: {rotation: 5, shear: 2}}\n", "data.augment.shear=3")
    assert (recipe.data.dataset, recipe.data.augment.rotation, recipe.data.augment.shear) == ("synthetic", 5.0, 3.0)


@pytest.mark.parametrize("section", ["", "data:\n", "data: null\n", "data: {dataset: synthetic}\n"])
def test_override_creates_a_section_that_the_file_lacks(section):
    assert load(MODEL + section, "data.augment.rotation=5").data.augment.rotation == 5.0


@pytest.mark.parametrize("word", ["optimizer={lr: 0.01}", "optimizer={'lr': 0.01}", 'optimizer={"lr": 0.01}'])
def test_override_by_a_mapping_keeps_the_keys_that_it_does_not_name(word):
    optimizer = load(MODEL + "optimizer: {name: adam, lr: 0.1, betas: [0.8, 0.9]}\n", word).optimizer
    assert (optimizer.name, optimizer.lr, optimizer.keywords) == ("adam", 0.01, {"betas": [0.8, 0.9]})


def test_override_by_a_mapping_is_merged_at_every_depth():
    text = MODEL + "data: {dataset: synthetic, augment: {rotation: 5, shear: 2}}\n"
    data = load(text, "data={validation: 7, augment: {shear: 3}}").data
    assert (data.dataset, data.validation, data.augment.rotation, data.augment.shear) == ("synthetic", 7, 5, 3)


@pytest.mark.parametrize("given", ["", "name: sgd, "])
def test_override_by_a_mapping_with_the_same_name_keeps_the_keywords(given):
    optimizer = load(MODEL + f"optimizer: {{{given}momentum: 0.5}}\n", "optimizer={name: sgd, lr: 0.2}").optimizer
    assert (optimizer.lr, optimizer.keywords) == (0.2, {"momentum": 0.5})


def test_override_by_a_mapping_creates_a_section_that_the_file_lacks():
    assert load(MODEL, "schedule={'name': 'step', 'step_size': 2}").schedule.keywords == {"step_size": 2}


def test_override_can_be_a_complete_section():
    recipe = load(MODEL + "optimizer: {momentum: 0.5}\n", "optimizer={name: adam, lr: 1e-2, betas: [0.8, 0.9]}")
    assert recipe.optimizer.model_dump() == {"name": "adam", "lr": 0.01, "betas": [0.8, 0.9]}


@pytest.mark.parametrize(
    ("section", "text", "word"),
    [
        ("optimizer", "{name: adam, betas: [0.8, 0.9], eps: 1e-7}", "optimizer.name=adagrad"),
        ("schedule", "{name: step, step_size: 2}", "schedule.name=constant"),
        ("model", "{name: model_v1, dropout: 0.1}", "model.name=resnet18"),
    ],
)
def test_a_new_name_with_the_keywords_of_the_old_one_is_refused_with_a_word_that_is_accepted(section, text, word):
    file = f"{MODEL if section != 'model' else ''}{section}: {text}\n"
    with pytest.raises(RecipeError) as caught:
        load(file, word)
    [advice] = re.findall(rf'"({section}={{.*}})"', str(caught.value))
    assert getattr(load(file, advice), section).name == word.partition("=")[2]


def test_a_wrong_keyword_of_the_command_line_comes_without_that_advice():
    with pytest.raises(RecipeError) as caught:
        load(MODEL, "optimizer.name=sgd", "optimizer.momentun=1")
    assert "whole section" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("mixed_precision=no", "no"),
        ("mixed_precision=null", None),
        ("clip_grad_norm=1e-1", 0.1),
        ("deterministic=false", False),
        ("epochs= 12", 12),
        ("name=run=3", "run=3"),
        ("name='010'", "010"),
    ],
)
def test_override_is_typed_as_in_the_file(word, value):
    assert getattr(load(MODEL, word), word.partition("=")[0]) == value


def test_override_replaces_a_list():
    recipe = load(MODEL + "tracking: {wandb: {tags: [a, b]}}\n", "tracking.wandb.tags=[c]", "data.augment.scale=[1, 2]")
    assert recipe.tracking.wandb.tags == ["c"]
    assert recipe.data.augment.build().scale == (1.0, 2.0)


def test_null_removes_a_keyword():
    text = MODEL + "optimizer: {name: sgd, momentum: 0.9, nesterov: true}\n"
    assert load(text).optimizer.keywords == {"momentum": 0.9, "nesterov": True}
    recipe = load(text, "optimizer.name=adam", "optimizer.momentum=null", "optimizer.nesterov=")
    assert recipe.optimizer.keywords == {}


def test_name_is_the_file_name_unless_given():
    assert load(MODEL).name == "my"
    assert load(MODEL + "name: null\n").name == "my"
    assert load(MODEL + "name: other\n").name == "other"
    assert load(MODEL + "name: other\n", "name=third").name == "third"
    assert load(MODEL + "name: other\n", "name=null").name == "my"


# --- values that depend on others ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_default_learning_rate_of_the_optimizer_is_filled_in(name):
    assert load(MODEL, f"optimizer.name={name}").optimizer.lr == optim.default_lr(name)


def test_given_learning_rate_is_kept():
    assert load(MODEL, "optimizer.lr=0.5").optimizer.lr == 0.5


def test_onecycle_keeps_a_learning_rate_of_null():
    cycle = ["schedule.name=onecycle", "schedule.max_lr=0.1"]
    assert load(MODEL, *cycle).optimizer.lr is None
    assert load(MODEL, *cycle, "optimizer.lr=0.02").optimizer.lr == 0.02


def test_keywords_of_open_sections_are_kept():
    recipe = load("model: {name: ms_ran, width: 8, freeze: ['stem.*']}\nschedule: {name: cosine, T_max: 3}\n")
    assert recipe.model.keywords == {"width": 8}
    assert recipe.schedule.keywords == {"T_max": 3}


def test_model_that_cannot_be_built_without_memory_is_accepted():
    assert load("model: {name: torchvision/regnet_y_400mf}\n").model.name == "torchvision/regnet_y_400mf"


def test_signature_with_lists_tuples_and_choices_accepts_yaml_lists(monkeypatch, tmp_path):
    source = """\
from typing import Literal
from torch import nn
def net(*, widths: list[int], kernel: tuple[int, int] = (3, 3), kind: Literal["a", "b"] = "a", rate: float = 0.5):
    return nn.Identity()
"""
    (tmp_path / "listed.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = load("model: {name: 'listed:net', widths: [8, 16], kernel: [5, 5], kind: b, rate: 1}\n")
    assert recipe.model.keywords == {"widths": [8, 16], "kernel": [5, 5], "kind": "b", "rate": 1}


def test_loaded_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load(MODEL).epochs = 3


def test_recipe_knows_where_its_values_were_written():
    recipe = load(MODEL + "\nepochs: 3\ndata:\n  dataset: synthetic\n", "batch_size=64")
    keys = ("epochs", "data.dataset", "data.root", "batch_size", "seed")
    wheres = {key: recipe.problem(key, "", "range").where for key in keys}
    assert wheres == {
        "epochs": "my.yaml:3",
        "data.dataset": "my.yaml:5",
        "data.root": "my.yaml:4",
        "batch_size": "command line",
        "seed": "my.yaml",
    }


# --- writing ------------------------------------------------------------------------------------------------------


def reload(recipe: Recipe) -> Recipe:
    """Writes a recipe and loads the file."""
    Path("again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return load_recipe("again.yaml")


def test_written_recipe_loads_as_an_equal_recipe():
    recipe = load(
        "model: {name: ms_ran, width: 8, dropout: 0.25, freeze: ['stem.*']}\n"
        "optimizer: {name: adam, betas: [0.8, 0.99], eps: 1e-7}\n"
        "schedule: {name: step, step_size: 3, gamma: 0.5}\n"
        "data: {dataset: synthetic, augment: {scale: [0.9, 1.1], rotation: 7}}\n"
        "mixed_precision: no\n"
        "distill: {from: runs/teacher, temperature: 4}\n"
    )
    assert reload(recipe) == recipe
    assert "lr: 0.001" in recipe.to_yaml()
    assert "distill:\n  from:\n  - runs/teacher\n  weight: 0.5\n" in recipe.to_yaml()


names = st.from_regex(r"\w[^/\\\x00-\x1f]{0,20}", fullmatch=True)
texts = st.text(st.characters(codec="utf-8"), max_size=30)
rates = st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True)


@given(
    name=names | st.sampled_from(["no", "1e-3", "010", "null", "0o7", "1_000", "2026-01-02", "0x1F", "1:30"]),
    seed=st.integers(0, 2**63 - 1),
    epochs=st.integers(1, 10**9),
    smoothing=rates,
    clip=st.none() | st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    precision=st.sampled_from(["no", "bf16", "fp16", None]),
    tags=st.lists(texts, max_size=3),
    project=texts,
    momentum=st.none() | st.floats(0, 1),
    deterministic=st.booleans(),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_valid_values_are_written_and_read_without_change(
    name, seed, epochs, smoothing, clip, precision, tags, project, momentum, deterministic
):
    recipe = Recipe.model_validate(
        {
            "name": name,
            "seed": seed,
            "epochs": epochs,
            "label_smoothing": smoothing,
            "clip_grad_norm": clip,
            "mixed_precision": precision,
            "deterministic": deterministic,
            "model": {"name": "lenet5"},
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": momentum},
            "tracking": {"wandb": {"project": project, "tags": tags}},
        }
    )
    assert reload(recipe) == recipe


# --- bundled recipes ----------------------------------------------------------------------------------------------


def test_bundled_recipe_is_found_by_name_from_any_folder():
    plain = load_recipe("model_v3_onecycle")
    assert plain == load_recipe("model_v3_onecycle.yaml")
    assert plain == load_recipe(bundled_recipes()["model_v3_onecycle"])
    assert plain.name == "model_v3_onecycle"


def test_file_has_priority_over_a_bundled_recipe_of_the_same_name():
    Path("simple_cnn.yaml").write_text(MODEL, encoding="utf-8")
    assert load_recipe("simple_cnn.yaml").model.name == "lenet5"
    assert load_recipe("simple_cnn").model.name == "simple_cnn"


def test_folder_does_not_hide_a_bundled_recipe_of_the_same_name():
    Path("simple_cnn").mkdir()
    assert find_recipe("simple_cnn") == bundled_recipes()["simple_cnn"]


def test_documented_command():
    recipe, plain = (
        load_recipe("model_v3_onecycle.yaml", "epochs=1", "optimizer.lr=0.05"),
        load_recipe("model_v3_onecycle"),
    )
    assert (recipe.epochs, recipe.optimizer.lr) == (1, 0.05) != (plain.epochs, plain.optimizer.lr)
    assert describe_changes(recipe, plain) == ["epochs: 1 -> 15", f"optimizer.lr: 0.05 -> {plain.optimizer.lr}"]


@pytest.mark.parametrize("name", list(bundled_recipes()))
def test_written_bundled_recipe_loads_as_an_equal_recipe(name):
    recipe = load_recipe(name)
    assert reload(recipe) == recipe


def test_notes_are_lines_of_the_head_comment():
    Path("my.yaml").write_text(
        "# yaml-language-server: $schema=recipe.schema.json\n"
        "# Title\n# command:  train --recipe my.yaml\n# claim: > 99 %: fine\n# no note\nepochs: 1 # measured: 3\n",
        encoding="utf-8",
    )
    assert recipe_notes(Path("my.yaml")) == {"command": "train --recipe my.yaml", "claim": "> 99 %: fine"}


@pytest.mark.parametrize("name", ["debug", "plus/plus_25k"])
def test_measured_result_is_written_into_the_head_comment(name):
    text = bundled_recipes()[name].read_text(encoding="utf-8")
    path = Path("my.yaml")
    path.write_text(text, encoding="utf-8")
    note_measured(path, "99.0 %")
    assert recipe_notes(path)["measured"] == "99.0 %"
    changed = [
        pair for pair in zip(text.splitlines(), path.read_text().splitlines(), strict=True) if pair[0] != pair[1]
    ]
    assert [new for _, new in changed] == ["# measured: 99.0 %"]


# --- changes ------------------------------------------------------------------------------------------------------


def test_only_changes_of_the_result_are_described():
    old = load(MODEL)
    new = load(MODEL, "epochs=2", "checkpoint.keep=5", "tracking.plots=false", "data.root=elsewhere")
    assert describe_changes(old, new) == ["epochs: 1 -> 2"]


@pytest.mark.parametrize(
    ("override", "allowed", "named"),
    [
        ("tracking.plots=false", False, []),
        ("epochs=2", False, ["epochs: 1 -> 2", "--allow-recipe-change"]),
        ("epochs=2", True, []),
        ("model.name=simple_cnn", True, ["model.name: lenet5 -> simple_cnn", "model.init_from"]),
    ],
)
def test_changes_that_a_resume_refuses(override, allowed, named):
    refusal = refuse_changes(load(MODEL), load(MODEL, override), allowed)
    assert bool(refusal) == bool(named)
    assert not [words for words in named if words not in refusal]


# --- the message --------------------------------------------------------------------------------------------------


def test_one_message_has_all_problems_with_their_locations():
    with pytest.raises(RecipeError) as caught:
        load(MODEL + "epoch: 3\nbatch_size: 2.5\n", "optimizer.lr=-1")
    assert [(problem.where, problem.key, problem.kind) for problem in caught.value.problems] == [
        ("my.yaml:3", "batch_size", "type"),
        ("command line", "optimizer.lr", "range"),
        ("my.yaml:2", "epoch", "unknown"),
    ]
    heads = [line for line in str(caught.value).splitlines() if line.startswith("  ") and not line.startswith("   ")]
    assert heads == ["  my.yaml:3: batch_size", "  command line: optimizer.lr", "  my.yaml:2: epoch"]
