"""Executes launch/lessons/notebook.ipynb. `python -m tests.lessons.notebook` rewrites its outputs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from tests.lessons.lesson import FOLDER, ROOT, masked

NOTEBOOK = FOLDER / "notebook.ipynb"
REMOVED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "FORCE_COLOR", "ACCELERATE_MIXED_PRECISION", "WANDB_MODE")
SECONDS = 300
"""Longest time of a cell."""


def execute(folder: Path) -> Any:
    """Returns the notebook with the outputs of all its cells, executed in a folder.

    Raises:
        CellExecutionError: a cell raised an error.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kept = {name: value for name, value in os.environ.items() if name not in REMOVED}
    variables = {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / ".ipython")}
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=kept | variables)
    return notebook


def printed(notebook: Any, folder: Path) -> list[str]:
    """Returns the masked text that each code cell printed, without the launcher's line, which names PyTorch's build."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    texts = (masked("".join(each.get("text", "") for each in cell.outputs), folder) for cell in cells)
    return ["".join(line for line in text.splitlines(True) if not line.startswith("Launching")) for text in texts]


def pictures(notebook: Any) -> int:
    """Returns the number of pictures among the outputs."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return sum("image/png" in output.get("data", {}) for output in outputs)


def main() -> None:
    """Executes the notebook and writes it."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(Path(folder).resolve())
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = masked(output.text, Path(folder))
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
