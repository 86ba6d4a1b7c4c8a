"""The house rules that a reader relies on."""

import argparse
import ast
import re

import pytest
from conftest import ROOT

import evaluate
import presets
import train
from benchmarks.family import family_table

README = (ROOT / "README.md").read_text()
PARSERS = {"train.py": train.get_args_parser(), "evaluate.py": evaluate.get_args_parser()}
ALLOWED_IMPORTS = {
    "train": {"evaluate", "validation", "check_data", "checkpoints", "flags", "presets", "pictures", "shared_files"}
    | {"training_state", "divergence", "execution", "interruption", "failures", "loading", "optimization", "run_log"}
    | {"coco_annotations", "coco_utils", "utils", "ssd"},
    "validation": {"evaluate", "reports", "training_state", "run_log", "coco_annotations", "coco_eval", "utils"},
    "evaluate": {"flags", "own_images", "presets", "reports", "coco_annotations", "coco_eval", "coco_utils"}
    | {"execution", "failures", "loading", "utils", "ssd"},
    "checkpoints": {"training_state", "coco_annotations", "coco_utils", "utils", "ssd"},
    "check_data": {"flags", "coco_annotations", "coco_utils", "loading", "run_log", "utils"},
    "own_images": {"reports", "coco_annotations", "coco_utils", "pictures"},
    "reports": {"coco_annotations", "coco_eval", "coco_utils", "pictures", "plots"},
    "flags": {"coco_annotations", "execution", "presets", "shapes", "utils", "ssd"},
    "training_state": {"utils", "ssd"},
    "divergence": {"utils", "ssd"},
    "interruption": {"failures", "utils"},
    **{room: {"utils"} for room in ("failures", "run_log")},
    "presets": {"transforms", "photometric"},
    "photometric": {"transforms"},
    "coco_eval": {"coco_annotations"},
    "coco_utils": {"coco_annotations", "shared_files"},
    **{room: set() for room in ("transforms", "coco_annotations", "shared_files", "loading", "optimization", "utils")},
    **{room: set() for room in ("execution", "pictures", "plots", "shapes", "ssd")},
}


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")} - {"--help"}


def documented_flags(heading: str) -> set[str]:
    """Flags in the table under a line of the README's section on flags."""
    section = README.split("## Flags")[1].split("\n## ")[0]
    table = section.split(f"\n{heading}:\n\n")[1].split("\n\n")[0]
    return set(re.findall(r"`(--[a-z][a-z-]*)", "\n".join(row.split("|")[1] for row in table.splitlines())))


def test_readme_and_parsers_name_the_same_flags():
    flags = {script: flags_of(parser) for script, parser in PARSERS.items()}
    shared = documented_flags("Both scripts")
    assert shared | documented_flags("`train.py`") == flags["train.py"]
    assert shared | documented_flags("`evaluate.py`") == flags["evaluate.py"]


@pytest.mark.parametrize(
    ("script", "readers"),
    [
        ("train.py", "train evaluate flags validation checkpoints check_data optimization"),
        ("evaluate.py", "evaluate flags"),
    ],
)
def test_every_flag_is_read(script, readers):
    read = set()
    for name in readers.split():
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args", "arguments"):
                read.add(node.attr)
            elif isinstance(node, ast.Call) and ast.unparse(node).startswith("getattr(args, f'{split}_"):
                read |= {f"{split}_{node.args[1].values[1].value.lstrip('_')}" for split in ("train", "val")}
    assert {action.dest for action in PARSERS[script]._actions} - {"help", "recipe"} <= read


def test_readme_says_what_each_file_knows():
    table = README.split("## What is where")[1].split("\n\n")[1]
    assert set(re.findall(r"`(\w+\.py)`", table)) == {path.name for path in ROOT.glob("*.py")} | {"test_scripts.py"}


def test_readme_has_the_family_as_its_script_prints_it():
    assert "\n\n" + "\n".join(family_table()) + "\n\n" in README


def test_readme_has_the_recipes_and_their_published_map():
    table = README.split("| `--recipe` | published mAP |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ([\d.]*) ?\|", table, re.MULTILINE)
    published = {name: recipe.published_ap for name, recipe in presets.RECIPES.items()}
    assert {name: float(ap) if ap else None for name, ap in rows} == published


def test_recipes_set_flags_that_exist():
    known = {action.dest for action in PARSERS["train.py"]._actions} | {"tuned_for_batch"}
    for name, recipe in presets.RECIPES.items():
        assert recipe.values.keys() <= known
        args = train.parse_args(["--recipe", name])
        assert all(getattr(args, flag) == value for flag, value in recipe.values.items() if flag != "tuned_for_batch")


def test_flags_override_the_recipe():
    args = train.parse_args(["--recipe", "demo", "--epochs", "2", "--lr", "0.5"])
    assert (args.epochs, args.lr, args.model) == (2, 0.5, "ssd300_resnet18")


def test_defaults_are_the_published_recipe():
    args = train.parse_args([])
    assert (args.model, args.epochs, args.lr, args.batch_size) == ("ssd300_vgg16", 120, 0.002, 4)
    assert (args.momentum, args.weight_decay, args.lr_steps, args.lr_gamma) == (0.9, 0.0005, [80, 110], 0.1)
    assert (args.data_augmentation, args.weights_backbone, args.dataset) == ("ssd", "default", "coco")


@pytest.mark.parametrize("room", ALLOWED_IMPORTS)
def test_imports_go_one_way(room):
    files = (ROOT / "ssd").glob("*.py") if room == "ssd" else [ROOT / f"{room}.py"]
    for file in files:
        imported = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
        assert imported & ALLOWED_IMPORTS.keys() <= ALLOWED_IMPORTS[room], file.name
        if room == "ssd":
            assert "numpy" not in imported
