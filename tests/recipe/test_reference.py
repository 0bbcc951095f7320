"""The reference of recipe keys: `--explain`, the JSON Schema for editors, and the Markdown tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mnist_dist.errors import RecipeError
from mnist_dist.recipe.file import bundled_recipes, configs_folder, read_recipe
from mnist_dist.recipe.keys import NAMES, all_keys, first_sentence, keys_of, keywords, range_text, type_text
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.reference import (
    MARKS,
    SCHEMA_FILE,
    WIDTH,
    explain,
    json_schema,
    markdown_reference,
    schema_text,
    torch_version,
    write_reference,
)
from mnist_dist.recipe.schema import Recipe, Section
from mnist_dist.train import main

CONFIGS = configs_folder()
assert CONFIGS is not None
SECTIONS = [key for key in all_keys().values() if key.section]
VALUES = [key for key in all_keys().values() if not key.section]


def written_with_this_torch() -> bool:
    """Returns whether configs/recipe.schema.json was written with this version of torch, which defines optimizers."""
    comment = json.loads((CONFIGS / SCHEMA_FILE).read_text(encoding="utf-8"))["$comment"]
    return f"torch {torch_version()};" in comment


# --- the schema's docstrings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", all_keys().values(), ids=lambda key: key.name)
def test_every_key_has_a_meaning(key):
    assert len(key.meaning) > 3 and key.meaning.endswith(".")


@pytest.mark.parametrize("key", VALUES, ids=lambda key: key.name)
def test_a_key_that_takes_null_explains_null(key):
    types = type_text(key.values).split(" or ")
    assert ("null" in types) == ("Null" in key.meaning)


@pytest.mark.parametrize("section", [Recipe, *(key.section for key in SECTIONS)], ids=lambda section: section.__name__)
def test_every_section_has_its_own_docstring(section):
    assert section.__doc__ and section.__doc__ != Section.__doc__


# --- explain ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", VALUES, ids=lambda key: key.name)
def test_a_key_is_explained(key):
    text = explain(key.name)
    lines = text.splitlines()
    assert lines[0] == key.name
    facts = dict(line.split(":", 1) for line in lines[1 : lines.index("")] if re.match(r"  \w+:", line))
    assert facts["  type"].strip() == type_text(key.values)
    assert facts["  default"].strip() == key.default_text()
    assert ("  range" in facts) == bool(range_text(key.values))
    assert key.meaning in " ".join(text.split())
    assert max(map(len, lines)) <= WIDTH


@pytest.mark.parametrize(
    ("key", "type", "default", "range"),
    [
        ("batch_size", "int", "128", "≥ 1"),
        ("micro_batch_size", "int or str or null", "null", "≥ 1, auto"),
        ("compile", "bool or str", "false", "default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs"),
        ("name", "str or null", "null", ""),
        ("label_smoothing", "float", "0.0", "≥ 0 and < 1"),
        ("data.augment.scale", "[float, float] or null", "null", "each > 0"),
        ("distill.from", "str or list of str or null", "null", ""),
        ("tracking.wandb.tags", "list of str", "[]", ""),
        ("mixed_precision", "str or null", "null", "no, bf16, fp16"),
    ],
)
def test_type_default_and_range_of_a_key(key, type, default, range):
    found = all_keys()[key]
    assert (type_text(found.values), found.default_text(), range_text(found.values)) == (type, default, range)


def test_only_the_model_is_required():
    assert [key.name for key in VALUES if key.required] == ["model.name"]


@pytest.mark.parametrize("key", SECTIONS, ids=lambda key: key.name)
def test_a_section_lists_its_keys(key):
    text = explain(key.name)
    assert text.startswith(f"{key.name}: ")
    for inner in keys_of(key.section, f"{key.name}."):
        assert re.search(rf"^  {re.escape(inner.name)} ", text, flags=re.MULTILINE)
        assert first_sentence(inner.meaning)[:40] in text
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize("section", NAMES)
def test_an_open_section_lists_the_keywords_of_each_name(section):
    words = explain(section).replace(",", "").split()
    for name in NAMES[section]:
        assert {name, *(keyword.name for keyword in keywords(section, name))} <= set(words)


@pytest.mark.parametrize(
    ("key", "rows"),
    [
        ("schedule.step_size", [["step", "int", "required"]]),
        ("schedule.interval", [["cosine", "str", "default", "epoch"], ["linear", "str", "default", "epoch"]]),
        ("optimizer.nesterov", [["sgd", "bool", "default", "false"]]),
        ("optimizer.betas", [["adam", "[float,", "float]", "default", "[0.9,", "0.999]"]]),
        ("model.width", [["ms_ran", "int", "default", "32"], ["mnistnet", "int", "default", "32"]]),
    ],
)
def test_a_keyword_lists_the_names_that_take_it(key, rows):
    lines = [line.split() for line in explain(key).splitlines()]
    assert lines[0] == [key]
    assert not [row for row in rows if row not in [line[: len(row)] for line in lines]]


@pytest.mark.parametrize(
    ("key", "suggested"),
    [
        ("epoch", "'epochs'"),
        ("lr", "'optimizer.lr'"),
        ("data.augment.rotatoin", "'data.augment.rotation'"),
        ("optimizer.momentun", "'optimizer.momentum'"),
        ("step_size", "'schedule.step_size'"),
        ("optimzer", "'optimizer'"),
        ("zzz", "name, seed"),
        ("", "name, seed"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(key, suggested, refused):
    assert refused(lambda: explain(key)) == [(key, "unknown")]
    with pytest.raises(RecipeError, match=re.escape(suggested)):
        explain(key)


def test_train_explains_a_key_without_a_recipe(capsys):
    assert main(["--explain", "optimizer.lr"]) == 0
    assert capsys.readouterr().out == explain("optimizer.lr") + "\n"


def test_train_refuses_to_explain_an_unknown_key(refused):
    assert refused(lambda: main(["--explain", "optimizer.rate"])) == [("optimizer.rate", "unknown")]


# --- JSON Schema --------------------------------------------------------------------------------------------------


def test_the_schema_file_is_current():
    """`python -m mnist_dist.recipe.reference` rewrites it."""
    schema, written = json_schema(), json.loads((CONFIGS / SCHEMA_FILE).read_text(encoding="utf-8"))
    if written_with_this_torch():
        assert (CONFIGS / SCHEMA_FILE).read_text(encoding="utf-8") == schema_text()
    for each in (schema, written):  # other versions of torch have other optimizers
        del each["$comment"], each["properties"]["optimizer"]
    assert schema == written


def test_every_section_but_the_open_ones_refuses_other_keys():
    for key in SECTIONS:
        schema = json_schema()
        for part in key.name.split("."):
            schema = schema["properties"][part]
        assert (schema.get("additionalProperties") is False) == (key.name not in NAMES)
    assert json_schema()["additionalProperties"] is False


@pytest.fixture(scope="session")
def errors_of():
    """Returns the dotted locations at which the JSON Schema refuses the values of a recipe."""
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    validator = jsonschema.Draft202012Validator(json_schema())
    return lambda values: {".".join(map(str, error.absolute_path)) for error in validator.iter_errors(values)}


@pytest.mark.parametrize("name", bundled_recipes())
def test_the_schema_accepts_a_shipped_recipe(errors_of, name):
    assert errors_of(read_recipe(bundled_recipes()[name])[0]) == set()


@pytest.mark.parametrize("name", bundled_recipes())
def test_the_schema_accepts_a_resolved_recipe(errors_of, name):
    assert errors_of(json.loads(json.dumps(load_recipe(name).model_dump()))) == set()


MODEL = {"name": "lenet5"}


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"name": "torchvision/resnet18", "anything": 3}},
        {"model": {"name": "my.nets:Net", "width": 3}},
        {"model": MODEL, "name": None, "logical_shards": 8, "micro_batch_size": "auto", "compile": True},
        {"model": MODEL, "optimizer": {"momentum": 0.9, "nesterov": None}},
        {"model": MODEL, "optimizer": {"name": "adam", "betas": [0.9, 0.99]}},
        {"model": MODEL, "data": {"augment": {"scale": [0.9, 1.1]}}, "distill": {"from": "runs/a"}},
    ],
)
def test_the_schema_accepts_valid_values(errors_of, values):
    assert errors_of(values) == set()


@pytest.mark.parametrize(
    ("values", "location"),
    [
        ({}, ""),
        ({"model": {}}, "model"),
        ({"model": MODEL, "epoch": 3}, ""),
        ({"model": MODEL, "epochs": 0}, "epochs"),
        ({"model": MODEL, "epochs": "3"}, "epochs"),
        ({"model": MODEL, "mixed_precision": "fp61"}, "mixed_precision"),
        ({"model": MODEL, "logical_shards": 3}, "logical_shards"),
        ({"model": MODEL, "data": None}, "data"),
        ({"model": MODEL, "data": {"augment": {"rotation": 400}}}, "data.augment.rotation"),
        ({"model": MODEL, "data": {"augment": {"rotaton": 4}}}, "data.augment"),
        ({"model": {"name": "lenet"}}, "model.name"),
        ({"model": {"name": "ms_ran", "widht": 8}}, "model"),
        ({"model": {"name": "ms_ran", "width": 2.5}}, "model.width"),
        ({"model": MODEL, "optimizer": {"momentun": 0.9}}, "optimizer"),
        ({"model": MODEL, "optimizer": {"name": "adam", "momentum": 0.9}}, "optimizer"),
        ({"model": MODEL, "schedule": {"name": "step"}}, "schedule"),
        ({"model": MODEL, "schedule": {"name": "cosine", "interval": "stpe"}}, "schedule.interval"),
    ],
)
def test_the_schema_refuses_what_the_program_refuses(errors_of, values, location, tmp_path):
    assert errors_of(values) == {location}
    (tmp_path / "my.yaml").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "my.yaml")


@pytest.mark.parametrize("name", bundled_recipes())
def test_the_first_line_of_a_recipe_names_the_schema(name):
    path = bundled_recipes()[name]
    first = path.read_text(encoding="utf-8").splitlines()[0]
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert named and (path.parent / named[1]).resolve() == (CONFIGS / SCHEMA_FILE).resolve()


# --- Markdown -----------------------------------------------------------------------------------------------------


def test_the_tables_have_every_key_once():
    cells = re.findall(r"^\| `([\w.]+)` \|", markdown_reference(), flags=re.MULTILINE)
    assert sorted(cells) == sorted(key.name for key in VALUES)


def test_the_table_in_the_page_is_current():
    """`python -m mnist_dist.recipe.reference` rewrites it."""
    page = CONFIGS / "README.md"
    if not page.is_file() or MARKS[0] not in page.read_text(encoding="utf-8"):
        pytest.skip("configs/README.md has no marks for the table of keys")
    table = page.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0].strip()
    expected = markdown_reference()
    if not written_with_this_torch():  # other versions of torch have other optimizers
        table, expected = (re.sub(r"(?m)^\| `optimizer.name`.*$", "", text) for text in (table, expected))
    assert table == expected


def test_files_are_written_between_the_marks(tmp_path: Path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n", encoding="utf-8")
    assert write_reference(tmp_path) == [tmp_path / SCHEMA_FILE, page]
    assert (tmp_path / SCHEMA_FILE).read_text(encoding="utf-8") == schema_text()
    assert page.read_text(encoding="utf-8") == f"before\n{MARKS[0]}\n{markdown_reference()}\n{MARKS[1]}\nafter\n"


def test_a_page_without_marks_is_not_changed(tmp_path: Path):
    page = tmp_path / "README.md"
    page.write_text("no marks\n", encoding="utf-8")
    assert write_reference(tmp_path) == [tmp_path / SCHEMA_FILE]
    assert page.read_text(encoding="utf-8") == "no marks\n"
