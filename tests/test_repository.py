"""The house rules that a reader relies on."""

import argparse
import ast
import re

import pytest
from conftest import ROOT

import evaluate
import presets
import train

README = (ROOT / "README.md").read_text()
PARSERS = {"train.py": train.get_args_parser(), "evaluate.py": evaluate.get_args_parser()}
ALLOWED_IMPORTS = {
    "train": {"evaluate", "presets", "coco_eval", "coco_utils", "utils", "pictures", "ssd"},
    "evaluate": {"presets", "coco_eval", "coco_utils", "utils", "pictures", "shapes", "ssd"},
    "presets": {"transforms"},
    "coco_eval": {"coco_utils"},
    **{room: set() for room in ("transforms", "coco_utils", "utils", "pictures", "shapes", "ssd")},
}


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")} - {"--help"}


def test_readme_and_parsers_name_the_same_flags():
    section = README.split("## Flags")[1].split("\n## ")[0]
    documented = set(re.findall(r"`(--[a-z][a-z-]*)", section))
    assert documented == set().union(*(flags_of(parser) for parser in PARSERS.values()))


@pytest.mark.parametrize("script", PARSERS)
def test_every_flag_is_read(script):
    code = "".join((ROOT / name).read_text() for name in ("train.py", "evaluate.py"))
    read = {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}
    read |= (
        {"train_images", "train_annotations", "val_images", "val_annotations"} if "getattr(args, f" in code else set()
    )
    assert {action.dest for action in PARSERS[script]._actions} - {"help"} <= read


def test_recipes_set_flags_that_exist():
    known = {action.dest for action in PARSERS["train.py"]._actions} | {"tuned_for_batch"}
    for name, values in presets.RECIPES.items():
        assert values.keys() <= known
        args = train.parse_args(["--recipe", name])
        assert all(getattr(args, flag) == value for flag, value in values.items() if flag != "tuned_for_batch")


def test_flags_override_the_recipe():
    args = train.parse_args(["--recipe", "demo", "--epochs", "2", "--lr", "0.5"])
    assert (args.epochs, args.lr, args.model) == (2, 0.5, "ssd300_resnet18")


def test_defaults_are_the_published_recipe():
    args = train.parse_args([])
    assert (args.model, args.epochs, args.lr, args.batch_size) == ("ssd300_vgg16", 120, 0.002, 4)
    assert (args.momentum, args.weight_decay, args.lr_steps, args.lr_gamma) == (0.9, 0.0005, [80, 110], 0.1)
    assert (args.data_augmentation, args.weights_backbone, args.dataset) == ("ssd", None, "coco")


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
