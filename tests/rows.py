"""Compares the code of each row of configs/results.jsonl with the present code: `python -m tests.rows`.

Each recipe trains its first steps with the code of the commit that made its row, and with the present code: the same
images and seed, batches of 32, in fp32, on one thread. The losses are compared. `--markdown configs/README.md` writes
the table between its marks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

from mnist_dist.recipe.loading import load_recipe
from mnist_dist.run.text_output import markdown_table, replace_between_marks

ROOT = Path(__file__).resolve().parents[1]

MARKS = ("<!-- rows: made by tests.rows -->", "<!-- end of rows -->")

STEPS = 20
WORDS = [f"max_steps={STEPS}", "log_every=1", "batch_size=32", "data.limit_test=500", "mixed_precision=no"]
WORDS += ["tracking.wandb.mode=disabled"]


def commits() -> dict[tuple[str, str], None]:
    """Returns each recipe and commit of the results, in their order. A row of an ensemble has no recipe."""
    rows = map(json.loads, (ROOT / "configs" / "results.jsonl").read_text(encoding="utf-8").splitlines())
    recipes = [row for row in rows if " " not in row["recipe"] and row["git_commit"]]
    return {(row["recipe"], row["git_commit"][:7]): None for row in recipes}


def check_out(commit: str, folder: Path) -> Path:
    """Writes the files of a commit into a new folder below `folder`, unless it exists; returns it."""
    code = folder / commit
    if not code.exists():
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=BytesIO(archive)) as files:
            files.extractall(code, filter="data")
    return code


def train(code: Path, recipe: str, run_dir: Path, *words: str) -> dict[tuple[int, str], float]:
    """Trains a recipe with the program in a folder; returns the loss of each step, and that of the test images."""
    command = [sys.executable, "-m", "mnist_dist.train", "--recipe", recipe, "--run-dir", str(run_dir), *WORDS, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(code)}
    done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{recipe} at {code.name}: {done.stdout}{done.stderr}")
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    keys = ("train/loss", "eval/loss")
    return {(line["step"], key): line[key] for line in lines for key in keys if key in line}


def compare(recipe: str, commit: str, folder: Path) -> float:
    """Returns the largest relative difference of the losses of a recipe's first steps at a commit and now."""
    code, resolved = check_out(commit, folder), load_recipe(recipe)
    words, runs = [f"data.root={ROOT / 'data'}"], folder / "runs" / f"{recipe}-{commit}"
    if resolved.data.dataset == "cifar10":
        words = ["data.dataset=folder", f"data.root={ROOT / 'data' / 'cifar10-jpeg'}"]
    if resolved.distill.teachers:
        train(code, "lenet5", runs / "teacher", *words)
        words += [f"distill.from=[{runs / 'teacher'}]"]
    with ThreadPoolExecutor(2) as pool:
        before, now = pool.map(
            lambda program, run: train(program, recipe, runs / run, *words), (code, ROOT), ("before", "now")
        )
    if list(before) != list(now) or len(now) != STEPS + 1:
        raise RuntimeError(f"{recipe} at {commit}: {list(before)} and {list(now)}")
    return max(abs(now[place] - before[place]) / before[place] for place in now)


def to_markdown(found: dict[tuple[str, str], float]) -> str:
    """Returns the table: commits and recipes with the largest relative difference of the losses of a commit."""
    rows = [("commit", "recipes", "largest relative difference")]
    for commit in dict.fromkeys(commit for _, commit in found):
        differences = {recipe: value for (recipe, each), value in found.items() if each == commit}
        largest = max(differences.values())
        recipes = ", ".join(f"`{recipe}`" for recipe in differences)
        rows.append((commit, recipes, f"{largest:.0e}" if largest else "none"))
    return markdown_table(rows)


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser("python -m tests.rows", description=__doc__)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="default: every recipe of the results")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table between the marks of this file")
    arguments = parser.parse_args(argv)
    if arguments.recipes and arguments.markdown:
        parser.error("--markdown replaces the whole table; give it without the names of recipes")
    found: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe, commit in commits():
            if not arguments.recipes or recipe in arguments.recipes:
                found[recipe, commit] = compare(recipe, commit, Path(folder))
                print(f"{recipe} at {commit}: {found[recipe, commit]:.1e}", flush=True)
    if arguments.markdown:
        replace_between_marks(arguments.markdown, to_markdown(found), MARKS)


if __name__ == "__main__":
    main()
