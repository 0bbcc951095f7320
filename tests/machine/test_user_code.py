"""Code of the user's own is imported as `package.module:Name`; other ways to write it are explained."""

import sys

import pytest

from mnist_dist.machine.user_code import as_dotted, import_user_module
from mnist_dist.models.registry import find_builder


@pytest.mark.parametrize(
    ("written", "dotted"),
    [
        ("my.nets:Net", "my.nets:Net"),
        ("nets.py:Net", "nets:Net"),
        ("./my/nets.py:Net", "my.nets:Net"),
        ("my/nets:Net", "my.nets:Net"),
        ("../my/nets.py", "my.nets:MyNet"),
    ],
)
def test_a_path_to_a_file_is_rewritten(written, dotted):
    assert as_dotted(written) == dotted


def test_a_module_of_the_current_folder_is_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "of_this_folder.py").write_text("value = 3\n")
    module, name = import_user_module("of_this_folder:value")
    assert getattr(module, name) == 3


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ("nowhere.nets:Net", "run the command in the folder"),
        ("sub/nets.py:Net", "write a module, not a file: sub.nets:Net"),
    ],
)
def test_a_module_that_cannot_be_imported_comes_with_advice(written, advice):
    with pytest.raises(ImportError, match=advice):
        import_user_module(written)


def test_the_errors_of_the_users_own_module_are_shown(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ends_python.py").write_text("raise SystemExit('no licence')\n")
    with pytest.raises(ImportError, match="no licence"):
        import_user_module("ends_python:Net")


@pytest.mark.parametrize(("written", "own"), [("nets.Net", "nets:Net"), ("my/nets.py", "my.nets:MyNet")])
def test_a_class_written_in_another_way_is_named_as_it_should_be(written, own):
    with pytest.raises(ValueError, match=f"your own class as {own}$"):
        find_builder(written)
