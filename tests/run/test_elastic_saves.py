"""When an elastic run saves a checkpoint."""

from __future__ import annotations

from mnist_dist import load_recipe, train
from mnist_dist.engine.checkpoint import list_checkpoints
from mnist_dist.run import checkpointing
from mnist_dist.run.elastic_saves import ElasticSaves


def due(saves: ElasticSaves, steps: range, seconds_per_step: float) -> list[int]:
    return [step for step in steps if saves.are_due(step, seconds_per_step)]


def test_a_lost_machine_costs_at_most_the_seconds_of_the_recipe():
    saves = ElasticSaves(10.0)
    for seconds_per_step in (0.003, 0.5, 3.0, 10.0, 60.0):
        first = due(saves, range(1, 4000), seconds_per_step)[0]
        # The step in which the machine is lost counts, too.
        assert first == 1 or first * seconds_per_step <= 10.0
        assert (first + 1) * seconds_per_step > 10.0


def test_before_the_duration_of_a_step_is_known_the_number_of_steps_doubles():
    assert due(ElasticSaves(10.0), range(70), 0.0) == [1, 2, 4, 8, 16, 32, 64]


def test_a_save_that_takes_long_is_made_less_often():
    saves = ElasticSaves(10.0)
    saves.note(3.0)
    assert due(saves, range(1, 60), 1.0)[0] == 30
    saves.note(0.01)
    assert due(saves, range(1, 60), 1.0)[0] == 10


def test_without_seconds_nothing_is_due():
    assert not due(ElasticSaves(None), range(100), 0.0) and not due(ElasticSaves(None), range(1000), 1.0)


def test_only_a_run_that_torchrun_restarts_saves_more_often(tmp_path, monkeypatch):
    """Without the automatic checkpoints the run saves after its last step only."""
    saved: list[int] = []
    save = checkpointing.Checkpointer.save

    def note(self, *arguments, **keywords):
        saved.append(self._progress.step)
        save(self, *arguments, **keywords)

    monkeypatch.setattr(checkpointing.Checkpointer, "save", note)
    recipe = load_recipe("debug", "tracking.plots=false", "max_steps=4", "epochs=4", "log_every=100", "eval_every=4")
    train(recipe, tmp_path / "plain")
    assert saved == [4]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    train(recipe, tmp_path / "elastic")
    assert saved == [4, 1, 2, 4]
    assert [path.name for path in list_checkpoints(tmp_path / "elastic" / "checkpoints")] == ["step-2", "step-4"]
