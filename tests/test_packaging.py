"""setup.cfg lists every package, data file and requirement that `pip install` must install."""

from __future__ import annotations

import configparser
from pathlib import Path

ROOT = Path(__file__).parents[1]


def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_every_package_is_listed():
    listed = set(settings()["options"]["packages"].split())
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "mnist_dist").rglob("__init__.py")}
    assert listed == {".".join(folder.parts) for folder in folders} | {"mnist_dist.configs"}


def test_every_file_that_is_not_a_module_is_listed():
    data = settings()["options.package_data"]
    for file in (ROOT / "mnist_dist").rglob("*.*"):
        if file.is_file() and file.suffix not in (".py", ".pyc"):
            package = ".".join(file.parent.relative_to(ROOT).parts)
            assert any(file.match(pattern) for pattern in data[package].split()), file


def test_every_requirement_has_a_lowest_version():
    """CI installs exactly these versions and imports every module."""
    requirements = settings()["options"]["install_requires"].split()
    assert len(requirements) >= 10
    assert all(requirement.count(">=") == 1 for requirement in requirements)
