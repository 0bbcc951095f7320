"""Saves a W&B workspace with panels for the metrics of these runs: `python launch/dashboard.py --entity me`.

Needs wandb-workspaces (`pip install -e ".[dashboard]"`) and credentials (`wandb login`). W&B prints the page's address.
"""

import argparse
import sys
from typing import Any

PANELS = {
    "Accuracy and loss": ["eval/accuracy", "eval/loss", "train/loss", "train/accuracy"],
    "Optimization": ["train/lr", "train/grad_norm"],
    "Speed": ["train/images_per_second", "train/memory_mb"],
}


def build(entity: str, project: str) -> Any:
    """Returns the workspace without sending it. Runs are grouped by seeds of a recipe and trials of a sweep, as logged.

    Raises:
        ImportError: wandb-workspaces is not installed.
    """
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def lines(title: str, **metrics: Any) -> wr.LinePlot:
        return wr.LinePlot(title=title, x="step", title_x="step", **metrics)

    sections = [
        ws.Section(name=name, panels=[lines(metric, y=[metric]) for metric in metrics], is_open=True)
        for name, metrics in PANELS.items()
    ]
    for title, key in (("images/s", "images_per_second"), ("% of the time spent waiting", "waiting_percent")):
        sections[-1].panels.append(lines(f"{title} of each process", metric_regex=rf"process/\d+/{key}"))
    columns = {"Actual": "Actual", "Predicted": "Predicted", "nPredictions": "nPredictions"}
    confusion = wr.CustomChart(
        query={"summaryTable": {"tableKey": "eval/confusion_table"}},
        chart_name="wandb/confusion_matrix/v1",
        chart_fields=columns,
        chart_strings={"title": "confusions"},
    )
    classes = lines("accuracy of each class", metric_regex=r"eval/class/.*")
    wrong = wr.WeavePanelSummaryTable(table_name="test/most_wrong")
    sections.append(ws.Section(name="Mistakes", panels=[classes, confusion, wrong], is_open=True))
    return ws.Workspace(
        entity=entity,
        project=project,
        name="mnist_dist",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="step"),
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group")]),
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit code: 0 saved, 2 a package, credentials or the network is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entity", required=True, help="your W&B user or team")
    parser.add_argument("--project", default="mnist_dist", help="default: mnist_dist, as in the recipes")
    arguments = parser.parse_args(argv)
    try:
        workspace = build(arguments.entity, arguments.project)
    except ImportError:
        print('dashboard: wandb-workspaces is missing: pip install -e ".[dashboard]"', file=sys.stderr)
        return 2
    try:
        workspace.save()
    except Exception as error:  # missing credentials, an unknown entity and a missing network have no common base class
        reason = str(error).partition("\n")[0]
        print(f"dashboard: W&B did not save the workspace ({reason}); is `wandb login` done?", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
