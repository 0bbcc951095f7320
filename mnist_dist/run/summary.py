"""The trackers of a run, and what a run writes when it ends: summary.json, pictures, W&B artifacts, status."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from mnist_dist.data import Batches, Dataset, Images, Loader, describe_shape
from mnist_dist.data.images import SHAPE
from mnist_dist.data.store import PLACES
from mnist_dist.distributed.collectives import count_nodes, wait_for_all_ranks
from mnist_dist.distributed.devices import device_name
from mnist_dist.distributed.launcher import launch_settings
from mnist_dist.distributed.signals import AGREE_SECONDS, PREEMPTED, Interrupts
from mnist_dist.engine.evaluation import Evaluation, Interrupted
from mnist_dist.engine.files import write_atomically
from mnist_dist.models import count_parameters
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.components import Progress, TrainingComponents
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.reader import load_run
from mnist_dist.run.trackers import other_trackers, project_name, wandb_settings
from mnist_dist.run.world_history import note_start, read_history, sizes
from mnist_dist.tracking import (
    ConsoleTracker,
    JSONLTracker,
    OtherTracker,
    WandbTracker,
    find_tracker,
    resolve_mode,
)

# --- trackers -----------------------------------------------------------------------------------------------------


def open_trackers(
    recipe: Recipe,
    components: TrainingComponents,
    dataset: Dataset,
    folder: RunFolder,
    checkpoint: dict[str, Any],
    *,
    quiet: bool = False,
) -> ConsoleTracker | None:
    """Starts the trackers on rank 0, prints the run's header and continues world.jsonl.

    Collective: call on every rank.

    Args:
        recipe: the resolved recipe.
        components: the run's components; their accelerator gets the trackers.
        dataset: the data of the run.
        folder: the run folder.
        checkpoint: the state that the run resumes from, where its metrics and W&B run continue; empty for a new run.
        quiet: print nothing.

    Returns:
        The console; None on the other ranks.
    """
    nodes = count_nodes(components.accelerator.state)
    if not components.accelerator.is_main_process:
        return None
    split = "validation" if dataset.has_validation else "test"
    meter, steps = components.meter, components.total_steps
    console = ConsoleTracker(steps, recipe.epochs, split, folder.console, quiet=quiet, steps=lambda: meter.steps_made)
    project = project_name(recipe)
    mode, reason = resolve_mode(recipe.tracking.wandb.mode)
    console.header(_header(recipe, components, dataset) | {"wandb": reason, "run folder": str(folder.path)})
    if checkpoint:
        console.message(f"resumed from the checkpoint at step {checkpoint['progress']['step']:,}")
    step = checkpoint["progress"]["step"] if checkpoint else 0
    history = note_start(folder, step, components.accelerator.num_processes, nodes)
    if len(history) > 1:
        world = sizes(history[-2:])
        console.message(f"world: {world} {'process' if world == '1' else 'processes'}, {history[-1]['cause']}")
    trackers: list[Any] = [console, JSONLTracker(folder.metrics, checkpoint.get("metrics_bytes", 0))]
    if mode != "disabled":
        init: dict[str, Any] = wandb_settings(recipe) | {"mode": mode}
        if checkpoint.get("wandb_id"):
            init |= {"id": checkpoint["wandb_id"], "resume": "allow"}
        files = {"directory": folder.path, "recipe": folder.recipe}
        trackers.append(WandbTracker(project, **files, notify=console.message, gauges=components.meter.gauges, **init))
    trackers += other_trackers(recipe, folder, console.message)
    components.accelerator.log_with = trackers
    components.accelerator.init_trackers(project, config=recipe.model_dump())
    if tracker := find_tracker(components.accelerator, WandbTracker):
        tracker.summarize({"world_history": history})
    return console


def show_notes(console: ConsoleTracker | None, components: TrainingComponents, notes: Sequence[str]) -> None:
    """Prints notes on how the run was set up, and makes the CUDA-graph runner print to the same console.

    Args:
        console: the console of rank 0; None on the other ranks, which print nothing.
        components: the run's components, which have notes of their own.
        notes: other notes, printed first.
    """
    if console is None:
        return
    for note in [*notes, *components.notes]:
        console.message(note)
    if components.captured:
        components.captured.notify = console.message


def close_trackers(components: TrainingComponents) -> None:
    """Finishes all trackers; the console last, because it shows what the others could not finish."""
    for tracker in reversed(components.accelerator.trackers):
        tracker.finish()


def _close(components: TrainingComponents) -> None:
    """Finishes the trackers and waits for every rank.

    Does not call Accelerate's `end_training`, which also ends the process group: this process may train again.
    """
    close_trackers(components)
    wait_for_all_ranks()


def _header(recipe: Recipe, components: TrainingComponents, dataset: Dataset) -> dict[str, str]:
    """Returns the facts of the run that the console prints first, by name."""
    accelerator, held_out = components.accelerator, f"{len(dataset.test):,} test"
    if dataset.has_validation:
        held_out = f"{len(dataset.held_out):,} validation, {held_out}"
    shape, classes = dataset.train.shape, len(dataset.train.classes)
    place = PLACES[components.images_place]
    form = "" if shape == SHAPE else f" of {describe_shape(shape)} in {classes} classes"
    processes = "1 process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
    launch, steps = launch_settings(), components.batches.steps_per_epoch
    settings = ", ".join(f"{key} {value}" for key, value in launch.items() if key != "launcher")
    header = {
        "recipe": recipe.name,
        "model": f"{recipe.model.name}, {count_parameters(components.module):,} parameters",
        "data": f"{recipe.data.dataset}, {len(dataset.train):,} training, {held_out} images{form}, {place}",
        "length": f"{recipe.epochs} epochs of {steps} steps, global batch {recipe.batch_size}",
        "world": f"{processes} on {device_name(accelerator.device)}, precision {accelerator.mixed_precision}",
        "launcher": f"{launch['launcher']}{f' ({settings})' if settings else ''}",
    }
    if recipe.tracking.also:
        header["trackers"] = ", ".join(recipe.tracking.also)
    if recipe.logical_shards:
        header["shards"] = f"{recipe.logical_shards} logical shards: the same bytes at every number of processes"
    return header


# --- the end of a run ---------------------------------------------------------------------------------------------


def stop_run(
    folder: RunFolder, components: TrainingComponents, progress: Progress, console: ConsoleTracker | None
) -> dict[str, Any]:
    """Marks a run that has saved and stopped as preempted and closes the trackers. Collective: call on every rank.

    Returns:
        The status and the step, instead of a summary.
    """
    if console:
        step = f"{progress.step:,}"
        console.message(f"stop requested; checkpoint saved at step {step}. Rerun the same command to resume.")
        folder.set_status("preempted")
    for tracker in components.accelerator.trackers:
        if isinstance(tracker, WandbTracker):
            tracker.preempt(PREEMPTED)
        elif isinstance(tracker, OtherTracker):
            tracker.end("KILLED")
    _close(components)
    return {"status": "preempted", "step": progress.step}


def finish_run(
    folder: RunFolder,
    recipe: Recipe,
    components: TrainingComponents,
    progress: Progress,
    dataset: Dataset,
    console: ConsoleTracker | None,
    facts: dict[str, Any],
    interrupts: Interrupts,
) -> dict[str, Any]:
    """Evaluates the test images, writes the results and closes the trackers. Collective: call on every rank.

    Sets the status to "done" at the very end. Before that, a signal stops the run as it does in the training loop; the
    same command then resumes from the checkpoint of the last step and repeats this function.

    Args:
        folder: the run folder; rank 0 writes into it.
        recipe: the resolved recipe.
        components: the run's components after the last step.
        progress: the run's progress after the last step.
        dataset: the data of the run.
        console: the console of rank 0; None on the other ranks.
        facts: more values for the summary: durations, versions, commit.
        interrupts: the stop requests.

    Returns:
        The values of summary.json; what `stop_run` returns if a signal stopped the run.
    """
    interrupts.set_interval(AGREE_SECONDS)  # there are few batches of test images: exchange requests at each of them
    # Without a validation part this repeats the last evaluation, for its probabilities. With one, the test images are
    # used here for the first time.
    images = components.place(dataset.test)
    try:
        test = components.evaluate(images, recipe.eval_batch_size, interrupts.stop_requested)
    except Interrupted:
        return stop_run(folder, components, progress, console)
    summary = summarize(recipe, components, progress, test if dataset.has_validation else None) | facts
    summary["world_history"] = read_history(folder)
    finished = True
    if console:
        finished = _write_results(folder, recipe, components, dataset, test, summary, console, interrupts)
    if not broadcast_object_list([finished])[0]:
        return stop_run(folder, components, progress, console)
    close_trackers(components)  # W&B uploads; a process that is killed before it sets the status repeats the upload
    if console:
        folder.set_status("done")
    wait_for_all_ranks()
    return summary


def summarize(
    recipe: Recipe, components: TrainingComponents, progress: Progress, test: Evaluation | None
) -> dict[str, Any]:
    """Returns the values of summary.json. Collective: call on every rank.

    Args:
        recipe: the resolved recipe.
        components: the run's components after the last step.
        progress: the run's progress after the last step.
        test: the evaluation of the test images if the run evaluated a validation part, else None.
    """
    full_epochs, rest = divmod(progress.step, components.batches.steps_per_epoch)
    images = full_epochs * components.batches.num_samples + rest * recipe.batch_size
    wandb, own_seconds = find_tracker(components.accelerator, WandbTracker), components.meter.own_seconds
    summary = {
        "recipe": recipe.name,
        "model": recipe.model.name,
        "parameters": count_parameters(components.module),
        "seed": recipe.seed,
        "world_size": components.accelerator.num_processes,
        "nodes": count_nodes(components.accelerator.state),
        "device": device_name(components.accelerator.device),
        "mixed_precision": components.accelerator.mixed_precision,
        "epochs": round(progress.step / components.batches.steps_per_epoch, 6),
        "steps": progress.step,
        "images_per_second": round(images / components.meter.train_seconds, 1),
        **components.meter.per_process(),
        # A process that resumed after the last step has made no step.
        "wandb_share": round(wandb.log_seconds / own_seconds, 6) if wandb and own_seconds else 0.0,
        "skipped_steps": components.update.skipped,
        "launch": launch_settings(),
        "train.last.loss": progress.last["train/epoch_loss"],
        "train.last.accuracy": progress.last["train/epoch_accuracy"],
        "eval.split": "validation" if test else "test",
        "eval.last.accuracy": progress.last["eval/accuracy"],
        "eval.last.loss": progress.last["eval/loss"],
        "eval.best.accuracy": progress.best_accuracy,
        "eval.best.epoch": progress.best_epoch,
    }
    return summary | ({"test.accuracy": test.accuracy, "test.loss": test.loss} if test else {})


def _write_results(
    folder: RunFolder,
    recipe: Recipe,
    components: TrainingComponents,
    dataset: Dataset,
    test: Evaluation,
    summary: dict[str, Any],
    console: ConsoleTracker,
    interrupts: Interrupts,
) -> bool:
    """Writes summary.json, W&B artifacts and pictures of a finished run. Call on rank 0.

    Returns False as soon as a signal requests a stop.
    """
    write_atomically(folder.summary, json.dumps(summary, indent=2) + "\n")
    if interrupts.requested_here:
        return False
    if wandb := find_tracker(components.accelerator, WandbTracker):
        wandb.summarize(summary)
        data, step = dataset.test, summary["steps"]
        wandb.log_most_wrong(data.images, data.labels, test.probabilities, data.classes, step=step)
        for which in ("best", "last"):
            run = load_run(folder.path, which)
            about = run.about | {"accuracy": summary[f"eval.{which}.accuracy"], "split": summary["eval.split"]}
            wandb.log_weights([folder.recipe, folder.path / f"{which}.safetensors"], which, about)
    if recipe.tracking.plots:
        for draw in _pictures(folder, recipe.name, components.batches, dataset, test, summary["eval.split"]):
            if interrupts.requested_here:
                return False
            draw()
    if interrupts.requested_here:
        return False
    best = f"best {summary['eval.best.accuracy']:.2f} % at epoch {summary['eval.best.epoch']:.4g}"
    last = f"{summary['eval.split']} accuracy {summary['eval.last.accuracy']:.2f} % at the last epoch"
    console.message(f"done in {summary['train_seconds']:.1f} s: {last}, {best}")
    return True


def _pictures(
    folder: RunFolder, title: str, batches: Batches, dataset: Dataset, test: Evaluation, eval_name: str
) -> list[Callable[[], object]]:
    """Returns a function for each picture of a run, which draws it into the folder plots/."""
    from mnist_dist.plots import confusion, curves, images  # here, because importing matplotlib takes time

    metrics, data = load_run(folder.path).metrics, dataset.test
    # Bright figures on a dark ground are drawn as ink on paper.
    inverted = load_run(folder.path, "last").geometry.ground == "dark"
    predictions = images.Predictions.read(data.images, data.labels, test.probabilities, data.classes, inverted=inverted)
    originals, warped = _augmented_samples(batches, dataset.train)

    def picture(plot: Callable[..., object], *content: object, name: str, **settings: object) -> Callable[[], object]:
        return partial(plot, *content, folder.plots / name, title=title, **settings)

    return [
        picture(curves.plot_training_history, metrics, name="training_history.png", eval_name=eval_name),
        picture(curves.plot_per_batch_loss, metrics, name="per_batch_loss.png"),
        picture(images.plot_predictions, predictions, name="predictions.png"),
        picture(images.plot_misclassified, predictions, name="misclassified.png"),
        picture(confusion.plot_confusion_matrix, test.confusion, name="confusion_matrix.png", classes=data.classes),
        picture(images.plot_augmented_samples, originals, warped, name="augmented_samples.png", inverted=inverted),
    ]


def _augmented_samples(batches: Batches, data: Images, count: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the first images of epoch 0, original and augmented as the first step uses them.

    Returns:
        Two tensors (count, channels, height, width): uint8, and float32 if there is augmentation.
    """
    batch = Loader(data, lambda size: range(min(size, count))).load(batches, batches.plan(0), 0)
    return batch.images, batches.augmented(batch)
