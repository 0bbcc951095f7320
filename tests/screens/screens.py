"""The table of screens: to add one, add a line to `SCREENS` and run `python -m tests.screens`."""

from __future__ import annotations

from mnist_dist.cli import COMMANDS

GOOD = "model:\n  name: lenet5\ndata:\n  dataset: synthetic\n"
MNIST = "model: {name: lenet5}\n"
NETS = """\
from torch import nn

class Broken(nn.Module):
    def __init__(self):
        raise RuntimeError("out of ideas")

class Shapeless(nn.Module):
    def forward(self, images):
        return images.flatten(1)
"""

FILES: dict[str, str] = {
    "my.yaml": GOOD,
    "mnist.yaml": MNIST,
    "typo.yaml": "model: {name: lenet5}\ndata: {dataset: synthetic, augment: {rotaton: 3}}\n",
    "bracket.yaml": "model:\n  name: [a\nepochs: 1\n",
    "tab.yaml": "model:\n\tname: lenet5\n",
    "twice.yaml": "epochs: 1\nmodel: {name: lenet5}\nepochs: 3\n",
    "list.yaml": "- model\n- data\n",
    "no_model.yaml": "epochs: 3\n",
    "my_nets.py": NETS,
    "full/notes.txt": "",
    "other/recipe.yaml": "name: my\nepochs: 3\n" + GOOD,
    "damaged/MNIST/raw/train-images-idx3-ubyte.gz": "<html>Not found</html>",
    "damaged/MNIST/raw/train-labels-idx1-ubyte.gz": "<html>Not found</html>",
    "damaged/MNIST/raw/t10k-images-idx3-ubyte.gz": "<html>Not found</html>",
    "damaged/MNIST/raw/t10k-labels-idx1-ubyte.gz": "<html>Not found</html>",
    "sweep.yaml": "program: x\nmethod: grid\nmetric: {name: eval/accuracy, goal: maximize}\nparamters: {}\n",
}
"""The files of the folder in which the commands run. It has no MNIST files and no network."""

SCREENS: dict[str, str] = {
    # help
    "commands": "",
    **{f"help_{command}": f"{command} --help" for command in COMMANDS},
    "recipes": "train --list-recipes",
    "explain_key": "train --explain optimizer.lr",
    "explain_choices": "train --explain engine.capture",
    "explain_section": "train --explain data",
    "explain_open_section": "train --explain schedule",
    "explain_keyword": "train --explain schedule.interval",
    "print_recipe": "train --recipe my.yaml optimizer.name=adam --print-recipe",
    # the command line
    "unknown_command": "tran --recipe debug",
    "unknown_option": "train --recipe debug --epochs 3",
    "option_of_wrong_type": "train --recipe debug --world-size many",
    "missing_argument": "export runs/mine",
    "explain_unknown_key": "train --explain lr",
    "no_recipe": "train",
    "missing_recipe": "train --recipe simple_cn",
    "override_without_value": "train --recipe my.yaml epochs",
    # the recipe's file
    "yaml_bracket": "train --recipe bracket.yaml",
    "yaml_tab": "train --recipe tab.yaml",
    "yaml_key_twice": "train --recipe twice.yaml",
    "yaml_not_a_recipe": "train --recipe list.yaml",
    "no_model": "train --recipe no_model.yaml",
    # keys and values
    "unknown_key": "train --recipe my.yaml epoch=3",
    "unknown_key_in_file": "train --recipe typo.yaml",
    "wrong_type": "train --recipe my.yaml batch_size=2.5",
    "wrong_type_of_two": "train --recipe my.yaml micro_batch_size=big",
    "section_expected": "train --recipe my.yaml optimizer=adam",
    "out_of_range": "train --recipe my.yaml data.augment.rotation=400 optimizer.lr=0",
    "several_problems": "train --recipe ms_ran batch_size=2.5 optimizer.momentun=0.8 data.augment.rotation=400",
    "unknown_choice": "train --recipe my.yaml mixed_precision=fp61",
    "unknown_schedule": "train --recipe my.yaml schedule.name=onecylce",
    "unknown_data_set": "train --recipe my.yaml data.dataset=fashion-mnist",
    "missing_keyword": "train --recipe my.yaml schedule.name=onecycle",
    "value_refused_by_pytorch": "train --recipe my.yaml optimizer.momentum=-1",
    "conflict_of_sizes": "train --recipe my.yaml micro_batch_size=256",
    "conflict_of_momentum": "train --recipe my.yaml optimizer.name=adagrad 'schedule={name: onecycle, max_lr: 0.1}'",
    "conflict_of_optimizer": "train --recipe my.yaml optimizer.nesterov=true",
    "precision_needs_gpu": "train --recipe my.yaml mixed_precision=fp16",
    # the model
    "unknown_model": "train --recipe my.yaml model.name=lenet",
    "unknown_model_keyword": "train --recipe my.yaml model.name=ms_ran model.widht=8",
    "model_value": "train --recipe my.yaml model.name=ms_ran model.dropout=1.5",
    "model_not_importable": "train --recipe my.yaml model.name=nowhere.nets:Net",
    "model_not_built": "train --recipe my.yaml model.name=my_nets:Broken",
    "model_of_wrong_shape": "train --recipe my.yaml model.name=my_nets:Shapeless",
    "freeze_without_match": "train --recipe my.yaml model.freeze=[fetures.*]",
    "teacher_missing": "train --recipe my.yaml distill.from=runs/teacher",
    # data, world and folder
    "missing_mnist": "train --recipe mnist.yaml",
    "damaged_mnist": "train --recipe mnist.yaml data.root=damaged",
    "validation_too_large": "train --recipe my.yaml data.validation=4096",
    "wrong_world_size": "train --recipe my.yaml --world-size 4",
    "run_dir_not_empty": "train --recipe my.yaml --run-dir full",
    "run_dir_of_other_recipe": "train --recipe my.yaml --run-dir other",
    "run_dir_is_a_file": "train --recipe my.yaml --run-dir my.yaml",
    "resume_without_checkpoint": "train --recipe my.yaml --resume full",
    # other commands
    "evaluate_missing_run": "evaluate runs/none",
    "evaluate_unfinished_run": "evaluate other",
    "predict_missing_run": "predict runs/none photo.png",
    "explain_missing_run": "explain runs/none photo.png",
    "ensemble_missing_run": "ensemble runs/none runs/other",
    "compare_missing_run": "compare runs/none",
    "export_missing_run": "export runs/none --format onnx",
    "sweep_missing_recipe": "sweep lenet optimizer.lr=0.1,0.2",
    "sweep_unknown_key": "sweep sweep.yaml",
    "sweep_unknown_value": "sweep my.yaml optimizer.momentun=0.1,0.2",
}
"""Name -> arguments of `mnist-dist`, as in a shell."""
