"""What a run logs to Weights & Biases, read from the offline `.wandb` file by W&B's own reader."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
import yaml
from PIL import Image

from mnist_dist import load_recipe, load_run, train
from mnist_dist.distributed.signals import PREEMPTED
from mnist_dist.recipe.schema import Recipe
from mnist_dist.tracking import WandbTracker, resolve_mode, server_url, wandb_mode
from mnist_dist.tracking import wandb as weights_and_biases
from tests import processes
from tests.colour import train_on_colour

ROOT = Path(__file__).parents[2]
WORDS = ["data.dataset=synthetic", "data.limit_train=200", "data.limit_test=100", "batch_size=50", "log_every=2"]
WORDS += ["epochs=2", "tracking.wandb.mode=offline", "tracking.plots=false"]


def tiny(*words: str) -> Recipe:
    return load_recipe("lenet5", *WORDS, *words)


class Logged:
    """One offline run as W&B will receive it."""

    def __init__(self, folder: Path):
        assert shutil.which("wandb"), "the command comes with the package"
        done = subprocess.run(
            ["wandb", "leet", "inspect", "--json", folder], capture_output=True, text=True, check=True
        )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        self.records = [(each["type"], each[each["type"]]) for each in lines]
        self.files = folder / "files"

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [record for each, record in self.records if each == kind]

    @property
    def run(self) -> dict[str, Any]:
        return self.all("run")[0]

    @property
    def history(self) -> list[dict[str, Any]]:
        return [record["item"] for record in self.all("history")]

    @property
    def summary(self) -> dict[str, Any]:
        return self._merged("summary")

    @property
    def config(self) -> dict[str, Any]:
        return self._merged("config")

    def _merged(self, kind: str) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for record in self.all(kind):
            merged |= record["update"]
        return merged

    def artifacts(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.all("artifact") if record["type"] == kind]


def offline_runs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*"))


def local(artifact: dict[str, Any]) -> dict[str, Path]:
    """Returns name -> file of what will be uploaded."""
    return {entry["path"]: Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wandb") / "run"
    train(tiny("tracking.wandb.histograms=true", "seed=3", "optimizer.lr=0.003"), os.path.relpath(folder))
    return folder


@pytest.fixture(scope="module")
def logged(run_dir) -> Logged:
    [folder] = offline_runs(run_dir)
    return Logged(folder)


def test_seeds_of_a_recipe_share_a_group(logged):
    assert (logged.run["display_name"], logged.run["run_group"], logged.run["job_type"]) == (
        "lenet5-seed3",
        "lenet5",
        "train",
    )


def test_group_job_type_and_tags_are_those_of_the_recipe(tmp_path):
    words = ["epochs=1", "tracking.wandb.group=mine", "tracking.wandb.job_type=sweep", "tracking.wandb.tags=[a]"]
    train(tiny(*words), tmp_path / "run")
    [folder] = offline_runs(tmp_path / "run")
    logged = Logged(folder)
    assert (logged.run["run_group"], logged.run["job_type"], logged.run["tags"]) == ("mine", "sweep", ["a"])
    assert not [key for item in logged.history for key in item if key.startswith(("weights/", "gradients/"))]


def test_the_resolved_recipe_is_logged_as_config_and_as_file(logged, run_dir):
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    assert logged.config["optimizer"]["lr"] == recipe["optimizer"]["lr"] == 0.003
    assert {key: logged.config[key] for key in ("seed", "epochs", "batch_size", "mixed_precision")} == {
        **{"seed": 3, "epochs": 2, "batch_size": 50},
        "mixed_precision": "no",
    }
    saved = [entry["path"] for record in logged.all("files") for entry in record["files"]]
    assert "recipe.yaml" in saved
    assert not (logged.files / "recipe.yaml").is_symlink()
    assert (logged.files / "recipe.yaml").read_bytes() == (run_dir / "recipe.yaml").read_bytes()


def test_every_line_of_metrics_is_logged_with_figures_of_the_machine(logged, run_dir):
    lines = load_run(run_dir).metrics
    plain = [item for item in logged.history if "train/loss" in item or "eval/loss" in item]
    assert len(plain) == len(lines)
    for item, line in zip(plain, lines, strict=True):
        assert {key: item[key] for key in line} == pytest.approx(line)
        if "train/loss" in line:
            assert 10 < item["train/memory_mb"] < 1e6
            assert item["process/0/images_per_second"] == pytest.approx(line["train/images_per_second"], abs=0.01)
            assert "train/memory_mb" not in line, "for W&B only"


def test_the_summary_holds_the_best_values(logged, run_dir):
    summary = load_run(run_dir).summary
    assert (
        logged.summary["eval/accuracy"]["max"] == summary["eval.best.accuracy"] == logged.summary["eval.best.accuracy"]
    )
    assert logged.summary["eval/loss"]["min"] == min(line["eval/loss"] for line in evaluations(run_dir))
    assert logged.summary["test/most_wrong.nrows"] == 32


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in load_run(run_dir).metrics if "eval/loss" in line]


def test_each_evaluation_logs_its_confusion_matrix_and_the_accuracy_of_each_class(logged, run_dir):
    shown = [item for item in logged.history if "eval/confusion_table._type" in item]
    assert [item["step"] for item in shown] == [line["step"] for line in evaluations(run_dir)] == [4, 8]
    for item, line in zip(shown, evaluations(run_dir), strict=True):
        table = json.loads((logged.files / item["eval/confusion_table.path"]).read_text())
        assert table["columns"] == ["Actual", "Predicted", "nPredictions"] and len(table["data"]) == 100
        images, hits = Counter(), Counter()
        for truth, prediction, count in table["data"]:
            images[truth] += count
            hits[truth] += count * (truth == prediction)
        assert (images.total(), hits.total()) == (100, line["eval/accuracy"])
        accuracies = {key.rpartition("/")[2]: item[key] for key in item if key.startswith("eval/class/")}
        assert accuracies == pytest.approx({name: 100 * hits[name] / images[name] for name in images if images[name]})
    assert logged.config["_wandb.visualize.eval/confusion"]["panel_config"]["panelDefId"] == "wandb/confusion_matrix/v1"


def test_histograms_of_weights_and_gradients_if_the_recipe_requests_them(logged):
    names = [name for name, _ in load_net()]
    [*_, last] = [item for item in logged.history if "eval/confusion_table._type" in item]
    for section in ("weights", "gradients"):
        for name in names:
            assert len(last[f"{section}/{name}.values"]) + 1 == len(last[f"{section}/{name}.bins"])
    sizes = {name: parameter.numel() for name, parameter in load_net()}
    assert {name: sum(last[f"weights/{name}.values"]) for name in names} == sizes


def load_net() -> list[tuple[str, torch.nn.Parameter]]:
    from mnist_dist import build_model

    return list(build_model("lenet5").named_parameters())


def test_the_32_most_wrong_images_are_logged_with_their_pictures(logged, run_dir):
    [artifact] = [each for each in logged.artifacts("run_table") if "most_wrong" in each["name"]]
    files = local(artifact)
    table = json.loads(files["test/most_wrong.table.json"].read_text())
    columns, rows = table["columns"], table["data"]
    assert columns == ["index", "picture", "truth", "prediction", "confidence", "probability of the truth"]
    assert len(rows) == 32 == len({row[0] for row in rows})
    assert [row[5] for row in rows] == sorted(row[5] for row in rows)
    assert all(files[row[1]["path"]].read_bytes().startswith(b"\x89PNG") for row in rows)
    wrong = [row for row in rows if row[2] != row[3]]
    assert len(wrong) == min(32, round(100 - load_run(run_dir).summary["eval.last.accuracy"]))
    assert all(row[5] <= row[4] <= 1 for row in rows)


def test_images_in_colour_are_logged_in_colour(tmp_path, colour_data):
    train_on_colour(tmp_path / "run", "tracking.wandb.mode=offline", "epochs=1")
    [folder] = offline_runs(tmp_path / "run")
    [artifact] = [each for each in Logged(folder).artifacts("run_table") if "most_wrong" in each["name"]]
    files = local(artifact)
    rows = json.loads(files["test/most_wrong.table.json"].read_text())["data"]
    assert {row[2] for row in rows} <= set(colour_data.test.classes)
    for row in rows:
        shown = np.asarray(Image.open(files[row[1]["path"]]))
        assert np.array_equal(shown, colour_data.test.images[row[0]].movedim(0, -1).numpy())


def test_a_confusion_chart_of_many_classes_keeps_the_mistakes():
    confusion = torch.zeros(300, 300, dtype=torch.int64)
    confusion[torch.arange(300), torch.arange(300)] = 5
    confusion[7, 9] = 2
    chart = weights_and_biases._confusion_chart(confusion, tuple(f"kind {number}" for number in range(300)))
    rows = chart.table.data
    assert len(rows) == 301 and ["kind 7", "kind 9", 2] in rows
    small = weights_and_biases._confusion_chart(confusion[:3, :3], ("a", "b", "c")).table.data
    assert len(small) == 9, "empty cells too"


def test_the_artifact_rebuilds_the_network_under_both_aliases(logged, run_dir, tmp_path):
    artifacts = {alias: each for each in logged.artifacts("model") for alias in each["aliases"]}
    assert {each["name"] for each in artifacts.values()} == {f"model-{logged.run['run_id']}"}
    for alias in ("best", "last"):
        about = json.loads(artifacts[alias]["metadata"])
        assert (about["model"], about["keywords"], about["classes"]) == ("lenet5", {}, [str(n) for n in range(10)])
        assert about["accuracy"] == load_run(run_dir).summary[f"eval.{alias}.accuracy"]
        assert 0 < about["mean"][0] < 1 and 0 < about["std"][0] < 1
        assert about["shape"] == [1, 28, 28]
        downloaded = tmp_path / alias
        downloaded.mkdir()
        for name, file in local(artifacts[alias]).items():
            shutil.copy(file, downloaded / name)
        ours, theirs = load_run(run_dir, alias).model.state_dict(), load_run(downloaded, alias).model.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_data_for_the_upload_is_in_the_run_folder(logged, run_dir):
    waiting = [file for each in logged.all("artifact") for file in local(each).values()]
    assert waiting and all(file.is_relative_to(run_dir) and file.is_file() for file in waiting)


def test_the_package_alone_is_saved_as_code(logged):
    [artifact] = logged.artifacts("code")
    package = ROOT / "mnist_dist"
    assert set(local(artifact)) == {path.relative_to(package).as_posix() for path in package.rglob("*.py")}


def test_the_git_diff_is_saved_for_any_run_folder(accelerator, tmp_path, monkeypatch):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    (package / "net.py").write_text("width = 1\n")
    git = ["git", "-C", package.parent, "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    (package / "net.py").write_text("width = 2\n")
    monkeypatch.setattr(weights_and_biases, "PACKAGE", package)
    run_dir = tmp_path / "elsewhere"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text("name: x\n")
    notes: list[str] = []
    tracker = WandbTracker("p", directory=run_dir, recipe=run_dir / "recipe.yaml", notify=notes.append, mode="offline")
    tracker.start()
    tracker.finish()
    [folder] = offline_runs(run_dir)
    assert "+width = 2" in (folder / "files" / "diff.patch").read_text() and not notes
    [artifact] = Logged(folder).artifacts("code")
    assert set(local(artifact)) == {"net.py"}


def test_a_resumed_run_continues_its_w_and_b_run(tmp_path, monkeypatch):
    answers = iter([False] * 6)
    with monkeypatch.context() as patch:
        patch.setattr("mnist_dist.distributed.signals.Interrupts.stop_requested", lambda *_: next(answers, True))
        assert train(tiny(), tmp_path / "run")["status"] == "preempted"
    train(tiny(), tmp_path / "run")
    first, second = map(Logged, offline_runs(tmp_path / "run"))
    assert first.run["run_id"] == second.run["run_id"]
    assert len({each["name"] for each in second.artifacts("model")}) == 1
    steps = [[item["step"] for item in each.history if "train/loss" in item] for each in (first, second)]
    assert steps[0] and steps[1] and [*steps[0], *steps[1]] == [2, 4, 6, 8]
    for each in (first, second):  # the step is a metric: W&B refuses to repeat its own step
        assert {record["step_metric"] for record in each.all("metric")} == {"step"}
        assert [item["_step"] for item in each.history] == list(range(len(each.history)))


def test_a_private_server_is_found_as_wandb_login_stored_it(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", "~/config")
    assert (server_url(), resolve_mode("auto")[0]) == (wandb.Settings().base_url, "offline")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "settings").write_text("[default]\nbase_url = http://localhost:8080\n")
    (tmp_path / "logins").write_text("machine localhost:8080\n  login user\n  password key\n")
    monkeypatch.setenv("NETRC", "~/logins")
    assert (server_url(), resolve_mode("auto")[0]) == ("http://localhost:8080", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9090")
    assert (server_url(), resolve_mode("auto")[0]) == ("http://localhost:9090", "offline")
    (tmp_path / "config" / "settings").write_text("no section\n")
    monkeypatch.delenv("WANDB_BASE_URL")
    assert server_url() == wandb.Settings().base_url


def test_a_failed_run_sends_an_alert_and_is_failed_in_w_and_b(tmp_path, monkeypatch):
    monkeypatch.setattr("mnist_dist.train.fit", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny(), tmp_path / "run")
    [folder] = offline_runs(tmp_path / "run")
    logged = Logged(folder)
    [alert] = logged.all("alert")
    assert (alert["title"], alert["level"]) == ("lenet5 failed", "ERROR")
    assert alert["text"] == "ZeroDivisionError: division by zero"
    assert logged.all("exit")[0]["exit_code"] == 1
    assert wandb.run is None, "the next training in this process must be another W&B run"


def test_a_stopped_run_is_preempted_in_w_and_b(tmp_path, monkeypatch):
    monkeypatch.setattr("mnist_dist.train.fit", lambda *arguments: False)
    assert train(tiny(), tmp_path / "run")["status"] == "preempted"
    [folder] = offline_runs(tmp_path / "run")
    logged = Logged(folder)
    assert logged.all("preempting") and logged.all("exit")[0]["exit_code"] == PREEMPTED
    assert wandb.run is None


@pytest.mark.parametrize("name", ["init", "plot_table", "Artifact.add_file", "Image"])
def test_an_error_of_wandb_is_reported_and_the_training_continues(name, tmp_path, monkeypatch):
    def broken(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"wandb.{name}", broken)
    assert train(tiny("epochs=1"), tmp_path / "run")["steps"] == 4
    lines = (tmp_path / "run" / "console.log").read_text().splitlines()
    reports = [line for line in lines if "wandb" in line and "No space left" in line]
    assert len(reports) == 1
    assert wandb.run is None, "the next training in this process must be another W&B run"


def test_an_error_at_the_end_is_reported_and_the_run_is_done(tmp_path, monkeypatch):
    def broken(*arguments: Any, **keywords: Any) -> None:
        raise ConnectionResetError("Connection lost")

    with monkeypatch.context() as patch:
        patch.setattr("wandb.sdk.wandb_run.Run.finish", broken)
        assert train(tiny("epochs=1"), tmp_path / "run")["steps"] == 4
    wandb.finish()
    lines = (tmp_path / "run" / "console.log").read_text().splitlines()
    assert len([line for line in lines if "wandb" in line and "Connection lost" in line]) == 1
    assert (tmp_path / "run" / "STATUS").read_text() == "done\n"


# --- the dashboard ------------------------------------------------------------------------------------------------


def dashboard() -> Any:
    spec = importlib.util.spec_from_file_location("dashboard", ROOT / "launch" / "dashboard.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_dashboard_shows_what_a_run_logs(logged):
    pytest.importorskip("wandb_workspaces", reason="the dashboard is optional: pip install -e '.[dashboard]'")
    view = dashboard().build("me", "mnist_dist")._to_model().spec.model_dump(by_alias=True)
    panels = [panel for section in view["section"]["panelBankConfig"]["sections"] for panel in section["panels"]]
    keys = {key for item in logged.history for key in item}
    shown = {metric for panel in panels for metric in panel["config"].get("metrics") or []}
    assert shown and shown <= keys
    text = json.dumps(view, default=str)
    for key in ("eval/confusion_table", "test/most_wrong"):
        assert key in text and f"{key}._type" in keys
    for pattern in ("eval/class/", "process/"):
        assert pattern in text and any(key.startswith(pattern) for key in keys)


def test_the_dashboard_reports_in_one_line_what_is_missing(capfd, monkeypatch):
    pytest.importorskip("wandb_workspaces", reason="the dashboard is optional: pip install -e '.[dashboard]'")
    module = dashboard()
    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.save", lambda self: wandb.Api())
    monkeypatch.setattr(wandb, "Api", lambda: (_ for _ in ()).throw(wandb.errors.UsageError("No API key\nmore")))
    assert module.main(["--entity", "me"]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert "No API key" in line
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert module.main(["--entity", "me"]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert "pip install" in line


# --- the user's environment ---------------------------------------------------------------------------------------


def test_variables_of_wandb_count_where_the_recipe_is_silent(monkeypatch):
    from mnist_dist.run.trackers import wandb_settings

    given = {"NAME": "mine", "RUN_GROUP": "g", "TAGS": "a, b", "ENTITY": "team", "JOB_TYPE": "trial"}
    for name, value in given.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    expected = {"name": "mine", "group": "g", "tags": ["a", "b"], "entity": "team", "job_type": "trial"}
    assert wandb_settings(tiny()) == expected
    words = [f"tracking.wandb.{word}" for word in ("group=h", "tags=[c]", "entity=me", "job_type=sweep")]
    assert wandb_settings(tiny(*words)) == {
        "name": "mine",
        "group": "h",
        "tags": ["c"],
        "entity": "me",
        "job_type": "sweep",
    }


@pytest.mark.parametrize("mode", ["Online", "OFFLINE", "Disabled"])
def test_the_mode_of_the_environment_may_be_in_capitals(mode, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert resolve_mode("auto")[0] == mode.lower()


def test_a_run_starts_with_a_mode_in_capitals(tmp_path):
    # In a process of its own: wandb reads its variables once.
    words = [*WORDS, "epochs=1", "tracking.wandb.mode=auto"]
    command = [sys.executable, "-m", "mnist_dist.train", "--recipe", "lenet5", "--run-dir", tmp_path / "run", *words]
    done = processes.run(command, env=os.environ | {"WANDB_MODE": "Offline"}, check=True)
    assert "could not" not in done.stdout
    assert len(offline_runs(tmp_path / "run")) == 1


def test_the_settings_of_the_trainer_yield_to_variables_of_wandb(tmp_path):
    # In a process of its own: wandb reads its variables once.
    given = {
        "NOTES": "first try",
        "RUN_ID": "chosen",
        "SAVE_CODE": "false",
        "DIR": str(tmp_path),
        "FINISH_TIMEOUT": "9",
    }
    words = [*WORDS, "epochs=1"]
    command = [sys.executable, "-m", "mnist_dist.train", "--recipe", "lenet5", "--run-dir", tmp_path / "run", *words]
    variables = {f"WANDB_{name}": value for name, value in given.items()}
    done = processes.run(command, env=os.environ | variables, check=True)
    assert "could not" not in done.stdout and not offline_runs(tmp_path / "run")
    [folder] = offline_runs(tmp_path)
    logged = Logged(folder)
    assert (logged.run["run_id"], logged.run["notes"], logged.artifacts("code")) == ("chosen", "first try", [])


def test_a_variable_of_wandb_replaces_a_setting(tmp_path, monkeypatch):
    def settings() -> dict[str, Any]:
        tracker = WandbTracker("p", directory=tmp_path, recipe=tmp_path / "recipe.yaml", notify=print)
        return tracker.init_kwargs["settings"].model_dump(exclude_unset=True)

    assert settings()["finish_timeout"] == weights_and_biases.SETTINGS["finish_timeout"]
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "9")
    assert "finish_timeout" not in settings() and "init_timeout" in settings()


def test_an_error_of_a_variable_names_it():
    with pytest.raises(ValueError) as error:
        wandb.Settings(init_timeout="soon")  # type: ignore[arg-type]
    assert weights_and_biases._first_line(error.value).startswith("init_timeout: ")
    assert weights_and_biases._first_line(OSError("one\ntwo")) == "one"


@pytest.mark.parametrize(("value", "mode"), [("true", "disabled"), ("1", "disabled"), ("false", "offline")])
def test_the_variable_that_disables_wandb_is_known(value, mode, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb_mode, "_has_credentials", lambda: False)
    monkeypatch.setenv("WANDB_DISABLED", value)
    assert resolve_mode("auto")[0] == mode


def without_home(home: Path | None) -> dict[str, str]:
    """The environment of a process whose home folder is `home`, or unknown if None."""
    hidden = ("HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
    return {name: value for name, value in os.environ.items() if name not in hidden} | (
        {"HOME": str(home)} if home else {}
    )


@pytest.mark.parametrize("known", [True, False])
def test_stderr_is_quiet_where_the_home_folder_cannot_be_written(known, tmp_path):
    (tmp_path / "file").touch()
    command = [
        sys.executable,
        "-m",
        "mnist_dist.train",
        "--recipe",
        "lenet5",
        "--run-dir",
        tmp_path / "run",
        *WORDS,
        "epochs=1",
    ]
    done = processes.run(command, env=without_home(tmp_path / "file" if known else None))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert len(offline_runs(tmp_path / "run")) == 1


def test_matplotlib_is_quiet_where_the_home_folder_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-c", "import mnist_dist.plots.curves"]
    done = subprocess.run(command, env=without_home(tmp_path / "file"), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_a_run_of_the_user_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "from_environment")
    own = wandb.init(mode="offline", dir=str(tmp_path), project="own")
    try:
        train(tiny("epochs=1"), tmp_path / "run")
        assert wandb.run is own
        own.log({"still": "open"})
    finally:
        own.finish()
    [folder] = offline_runs(tmp_path / "run")
    assert Logged(folder).run["project"] == "from_environment"


@pytest.mark.parametrize("server", [None, "https://wandb.example.org", "http://localhost:8080"])
def test_the_key_that_wandb_login_writes_is_found(server, tmp_path, monkeypatch):
    from wandb.sdk.lib.wbauth import write_netrc_auth

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "logins"))
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    assert resolve_mode("auto")[0] == "offline"
    write_netrc_auth(host=server or wandb.Settings().base_url, api_key="0123456789" * 4)
    assert resolve_mode("auto")[0] == "online"
