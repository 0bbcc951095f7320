"""Defines the options of all commands, and how a command starts. Does not import torch: `--help` is fast."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

from mnist_dist.distributed.world_size_option import parse_world_size
from mnist_dist.engine.files import expand_path as path
from mnist_dist.errors import Problem, RecipeError, run_command

# --- starting a command -------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises its errors as `RecipeError`, so that only rank 0 prints them."""

    def __init__(self, command: str):
        description, add_arguments, examples = COMMANDS[command]
        epilog, style = f"examples:\n{examples}", argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"mnist-dist {command}", description=description, epilog=epilog, formatter_class=style)
        add_arguments(self)

    def _get_value(self, action: argparse.Action, arg_string: str):  # argparse hides what is wrong with a path
        return path(arg_string) if action.type is path else super()._get_value(action, arg_string)

    def error(self, message: str):  # argparse declares NoReturn
        before_key = "argument |unrecognized arguments: |the following arguments are required: |(?=--)"
        key = (re.match(rf"(?:{before_key})([^\s,:]+)", message) or ["", ""])[1]
        raise RecipeError([Problem("command line", key, f"{message}; see {self.prog} --help", "usage")])


def parser_of(command: str) -> Parser:
    """Returns the parser of a command, a key of `COMMANDS`."""
    return Parser(command)


def parse(command: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the arguments of a command. Options and positional arguments may be mixed.

    Args:
        argv: without the program's name; None for `sys.argv[1:]`.

    Raises:
        RecipeError: an argument is unknown, missing or of the wrong type.
        SystemExit: `--help` was given and has been printed.
    """
    return parser_of(command).parse_intermixed_args(argv)


def answer_early(command: str) -> None:
    """Handles `--help` and a wrong argument before the import of torch, which takes two seconds.

    The module of a command calls this function above its imports if the module is run as the program.
    """

    def check() -> int:
        parse(command)
        return 0

    if code := run_command(check):
        sys.exit(code)


# --- arguments shared by several commands -------------------------------------------------------------------------


def _add_overrides(parser: Parser, help: str = "overrides of recipe keys, e.g. optimizer.lr=0.05") -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=help)


def _add_run(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")


def _add_code(parser: Parser, what: str = "a run's network", source: str = "run") -> None:
    code = f"import {what} from this module; only if you trust the {source} and the module; repeatable"
    parser.add_argument("--allow-code", metavar="MODULE", action="append", default=[], help=code)


def _add_weights(parser: Parser) -> None:
    parser.add_argument("--weights", choices=["last", "best"], default="last", help="last (default) or best weights")
    _add_code(parser)


def _add_data(parser: Parser) -> None:
    parser.add_argument("--data", metavar="NAME", help="another data set with the same classes, e.g. qmnist")


def _add_json(parser: Parser, content: str) -> None:
    parser.add_argument("--json", type=path, metavar="FILE", help=f"also write {content} to FILE")


# --- the commands -------------------------------------------------------------------------------------------------


def _train(parser: Parser) -> None:
    parser.add_argument("--recipe", metavar="NAME", help="a path, or the name of a bundled recipe")
    folder = "a new folder, or the folder of a run to resume (default: runs/<recipe>/<date-time>)"
    parser.add_argument("--run-dir", type=path, metavar="DIR", help=folder)
    resume = "auto (default): resume the run in --run-dir; never: refuse a used folder; PATH: new run from a checkpoint"
    parser.add_argument("--resume", metavar="auto|never|PATH", default="auto", help=resume)
    parser.add_argument("--world-size", type=parse_world_size, metavar="N|MIN:MAX", help="allowed numbers of processes")
    parser.add_argument("--allow-recipe-change", action="store_true", help="resume although the recipe has changed")
    parser.add_argument("--print-recipe", action="store_true", help="print the resolved recipe and exit")
    parser.add_argument("--list-recipes", action="store_true", help="print the bundled recipes and exit")
    parser.add_argument("--explain", metavar="KEY", help="print type, default, range and meaning of a key and exit")
    _add_code(parser)
    _add_overrides(parser)


def _evaluate(parser: Parser) -> None:
    _add_run(parser)
    _add_weights(parser)
    split = "images to use (default: test); all: also the training images, e.g. of new images of your own"
    parser.add_argument("--split", choices=["test", "validation", "all"], default="test", help=split)
    parser.add_argument("--tta", choices=["flip"], help="also evaluate the mean prediction for image and mirror image")
    _add_data(parser)
    _add_json(parser, "the report")
    _add_overrides(parser, "recipe keys, e.g. data.root=/data")


def _predict(parser: Parser) -> None:
    _add_run(parser)
    parser.add_argument("pictures", nargs="+", type=path, metavar="IMAGE|FOLDER", help="image files, or folders")
    _add_weights(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of lines")


def _explain(parser: Parser) -> None:
    _add_run(parser)
    parser.add_argument("picture", type=path, metavar="IMAGE", help="an image file")
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="layers to draw (default: up to 6 convolutions)")
    parser.add_argument("--output", type=path, metavar="FILE", help="PNG (default: a new RUN/plots/explain_IMAGE.png)")
    _add_weights(parser)


def _ensemble(parser: Parser) -> None:
    parser.add_argument("words", nargs="+", metavar="RUN|key=value", help="run folders; recipe keys, e.g. data.root=…")
    _add_weights(parser)
    _add_data(parser)
    _add_json(parser, "the report")
    keep = "append the ensemble's summary to this file of JSON lines; not with --data, --weights or key=value"
    parser.add_argument("--keep", type=path, metavar="FILE", help=keep)


def _sweep(parser: Parser) -> None:
    parser.add_argument("sweep", metavar="RECIPE|SWEEP.YAML", help="a recipe, or a W&B sweep file (grid or random)")
    _add_overrides(parser, "recipe keys; key=a,b,c tries each of these values")
    parser.add_argument("--count", type=int, metavar="N", help="at most N trials (default: the file's run_cap, or all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of a random search (default: 0)")
    _add_code(parser, "the network or data set that the file names", "file")
    folder = "folder of the search (default: runs/sweeps/<name>); the same command resumes an interrupted search"
    parser.add_argument("--run-dir", type=path, metavar="DIR", help=folder)


def _benchmark(parser: Parser) -> None:
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--recipe", metavar="NAME", help="a path, or the name of a bundled recipe")
    group.add_argument("--time-to-accuracy", metavar="NAME", help="time training up to an accuracy, and a reference")
    group.add_argument("--operations", nargs="*", metavar="NAME", help="count a step's kernels; no NAME: all recipes")
    group.add_argument("--floors", type=path, nargs="+", metavar="FILE", help="check --json files against lower limits")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="interleaved rounds (default: 7)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="steps or calls per round (default: 50)")
    parser.add_argument("--seeds", type=int, default=30, metavar="N", help="seeds of --time-to-accuracy (default: 30)")
    parser.add_argument("--note", action="store_true", help="write the result into the recipe's head comment")
    parser.add_argument("--sweep", metavar="KEY=a,b,c", help="measure with each of these values of a recipe key")
    parser.add_argument("--plot", type=path, metavar="FILE", help="picture of the sweep (default: sweep.png)")
    parser.add_argument("--inference", action="store_true", help="time inference instead of training")
    parser.add_argument("--whole-epochs", action="store_true", help="time epochs with evaluation and checkpoints")
    parser.add_argument("--batches", default="1,32,256,1024", metavar="N,…", help="images a call (%(default)s)")
    _add_json(parser, "the figures")
    parser.add_argument("--markdown", type=path, metavar="FILE", help="also append the table to FILE")
    _add_overrides(parser)


def _profile(parser: Parser) -> None:
    parser.add_argument("--recipe", required=True, metavar="NAME", help="a path, or the name of a bundled recipe")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="profiled steps (default: 20)")
    folder = "the files go to DIR/profile; DIR may be a run folder (default: runs/<recipe>/<date-time>)"
    parser.add_argument("--run-dir", type=path, metavar="DIR", help=folder)
    parser.add_argument("--world-size", type=int, metavar="N", help="stop if the number of processes is not N")
    _add_code(parser)
    _add_overrides(parser)


def _compare(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="run folders, folders of them, --keep files")
    parser.add_argument("--html", type=path, metavar="FILE", help="where to write the page (default: compare.html)")
    parser.add_argument("--no-html", action="store_true", help="write no page")
    parser.add_argument("--live", action="store_true", help="serve the page on this machine and follow running runs")
    parser.add_argument("--port", type=int, metavar="N", default=8765, help="port of --live (default: 8765; 0: any)")
    parser.add_argument("--keep", type=path, metavar="FILE", help="append the summaries to this file of JSON lines")
    parser.add_argument("--markdown", type=path, metavar="FILE", help="rewrite the marked tables of a Markdown file")
    parser.add_argument("--recipes", action="store_true", help="write the figures into the recipes' head comments")


def _doctor(parser: Parser) -> None:
    folder = "the folder whose file system is checked (default: ./runs); the check leaves no file"
    parser.add_argument("--run-dir", type=path, default="runs", metavar="DIR", help=folder)
    parser.add_argument("--world-size", type=int, metavar="N", help="expected number of processes")
    _add_json(parser, "the table")
    parser.add_argument("--compare", type=path, metavar="FILE", help="also name what became slower since a --json FILE")
    parser.add_argument("--write-reference", action="store_true", help="write new reference losses instead of checking")


EXPORT_ENDINGS = {"torch": ".pt2", "onnx": ".onnx", "onnx-int8": "-int8.onnx", "page": ".html"}
"""Export format -> ending of the file's name."""


def _export(parser: Parser) -> None:
    _add_run(parser)
    formats = "torch: a torch.export archive; onnx, onnx-int8: ONNX files; page: one HTML file to try the network in"
    parser.add_argument("--format", required=True, choices=list(EXPORT_ENDINGS), help=formats)
    _add_weights(parser)
    parser.add_argument("--output", type=path, metavar="FILE", help="a file (default: RUN/export/<weights>.<ending>)")
    runtime = "for the format page: npm's archive of onnxruntime-web (default: the npm client fetches it once)"
    parser.add_argument("--onnxruntime-web", type=path, metavar="FILE.tgz", help=runtime)
    _add_overrides(parser, "recipe keys, e.g. data.root=/data")


COMMANDS: dict[str, tuple[str, Callable[[Parser], None], str]] = {
    "train": (
        "Train a recipe and write a run folder.",
        _train,
        """\
  accelerate launch -m mnist_dist.train --recipe quickstart.yaml
  accelerate launch -m mnist_dist.train --recipe model_v3_onecycle epochs=1 optimizer.lr=0.05 data.root=/data
  mnist-dist train --recipe my_recipes/wide.yaml mixed_precision=bf16
  mnist-dist train --recipe ms_ran --print-recipe
  mnist-dist train --explain optimizer.lr

exit code: 0 done, 1 failed, 2 bad input, 75 stopped by a signal after a checkpoint (run the same command again)
""",
    ),
    "evaluate": (
        "Evaluate the network of a run folder: accuracy, loss, classes, calibration.",
        _evaluate,
        """\
  mnist-dist evaluate runs/simple_cnn/20260101-120000
  mnist-dist evaluate runs/mine --weights best --json report.json
  mnist-dist evaluate runs/mine --data fashion_mnist data.root=/data
""",
    ),
    "predict": (
        "Classify pictures.",
        _predict,
        """\
  mnist-dist predict runs/simple_cnn/20260101-120000 photo.jpg
  mnist-dist predict runs/mine scans/ --json > classes.json
""",
    ),
    "explain": (
        "Draw which pixels and feature maps lead to a prediction.",
        _explain,
        """\
  mnist-dist explain runs/simple_cnn/20260101-120000 photo.jpg
  mnist-dist explain runs/mine photo.jpg --layers stem.0 inception --output why.png
""",
    ),
    "ensemble": (
        "Evaluate the mean of several networks' probabilities.",
        _ensemble,
        """\
  mnist-dist ensemble runs/reproduce/simple_cnn-seed*
  mnist-dist ensemble runs/a runs/b --data qmnist data.root=/data --json report.json
  mnist-dist ensemble runs/a runs/b runs/c --keep configs/results.jsonl
""",
    ),
    "sweep": (
        "Search hyperparameters; each trial is a run folder.",
        _sweep,
        """\
  mnist-dist sweep lenet5 optimizer.lr=0.001,0.003,0.01 batch_size=64,128 epochs=2
  mnist-dist sweep launch/sweep.yaml --count 6
  mnist-dist sweep launch/sweep.yaml --run-dir runs/sweeps/mine      # run it again to resume the search
""",
    ),
    "benchmark": (
        "Measure training and inference speed, compared with other training loops.",
        _benchmark,
        """\
  accelerate launch -m mnist_dist.benchmark --recipe model_v1_onecycle
  mnist-dist benchmark --recipe simple_cnn --sweep batch_size=32,128,512 --plot sweep.png
  mnist-dist benchmark --recipe ms_ran --inference --batches 1,256
  mnist-dist benchmark --time-to-accuracy configs/speed/mnist_99.yaml --seeds 30
  mnist-dist benchmark --operations lenet5 resnet18 ema_decay=0.99
""",
    ),
    "profile": (
        "Measure where the time of a training step goes, on each rank.",
        _profile,
        """\
  accelerate launch -m mnist_dist.profile --recipe simple_cnn
  mnist-dist profile --recipe ms_ran --steps 50 --run-dir runs/mine mixed_precision=bf16
""",
    ),
    "compare": (
        "Print a table of runs and write one HTML page with their curves.",
        _compare,
        """\
  mnist-dist compare runs
  mnist-dist compare runs/simple_cnn runs/mine --html mine.html
  mnist-dist compare runs --live
  mnist-dist compare runs/reproduce/* --keep configs/results.jsonl
  mnist-dist compare configs/results.jsonl --markdown configs/README.md --recipes
""",
    ),
    "doctor": (
        "Check whether this machine or cluster is fit to train.",
        _doctor,
        """\
  mnist-dist doctor
  accelerate launch -m mnist_dist.doctor --run-dir /shared/runs --world-size 16 --json before.json
  torchrun --nproc_per_node 8 -m mnist_dist.doctor --compare before.json

exit code: 0 fit to train (slow ranks and warnings are named), 1 not fit or slower than before, 2 bad command line
""",
    ),
    "export": (
        "Export the network of a run folder to one self-contained file.",
        _export,
        """\
  mnist-dist export runs/simple_cnn/20260101-120000 --format onnx
  mnist-dist export runs/mine --format onnx-int8 --weights best --output mine.onnx
  mnist-dist export runs/mine --format page data.root=/data
""",
    ),
}
"""Command -> description, function that adds its arguments, examples."""
