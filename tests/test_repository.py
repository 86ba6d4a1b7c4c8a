"""The house rules that a reader relies on."""

import argparse
import ast
import graphlib
import importlib
import re
from pathlib import Path

import pytest

import evaluate
import presets
import ssd
import train
from benchmarks.family import family_table
from tests.conftest import ROOT

README, *DOCS = PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {"train.py": train.get_args_parser(), "evaluate.py": evaluate.get_args_parser()}
WINGS = ("ssd", "coco", "engine", "view")
ALLOWED_IMPORTS = {
    **{place: set() for place in ("ssd", "transforms", "utils")},
    "coco": {"utils"},
    "coco_utils": {"coco"},
    "view": {"coco_utils", "coco", "ssd"},
    "engine": {"view", "coco_utils", "coco", "ssd", "utils"},
    "presets": {"transforms"},
    "evaluate": {"presets", "engine", "view", "coco_utils", "coco", "ssd", "utils"},
    "train": {"evaluate", "presets", "engine", "view", "coco_utils", "coco", "ssd", "utils"},
}
# which of them know argparse; ssd/files.py, because torchvision's checkpoints hold a Namespace
KNOW_FLAGS = {"train.py", "evaluate.py", "presets.py", "engine/flags.py", "engine/evaluation_flags.py", "ssd/files.py"}


def files_of(place: str) -> list[Path]:
    """A script, or the rooms of a wing."""
    return sorted((ROOT / place).glob("*.py")) if place in WINGS else [ROOT / f"{place}.py"]


def imports_of(file: Path, relative: bool = False) -> set[tuple[str, str]]:
    """Module and name of what a file imports, from anywhere or from its own wing."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import) and not relative:
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and bool(node.level) == relative:
            found |= {(node.module or "", alias.name) for alias in node.names}
    return found


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """In the order of the help."""
    actions = [action for group in parser._action_groups for action in group._group_actions]
    return [flag for action in actions for flag in action.option_strings if flag.startswith("--") and flag != "--help"]


def documented_flags(heading: str) -> list[str]:
    """Flags in the table under a heading of docs/flags.md."""
    table = (ROOT / "docs/flags.md").read_text().split(f"\n## {heading}\n\n")[1].split("\n\n")[0]
    return re.findall(r"`(--[a-z][a-z-]*)", "\n".join(row.split("|")[1] for row in table.splitlines()))


def test_docs_and_help_name_the_same_flags_in_the_same_order():
    flags = {script: flags_of(parser) for script, parser in PARSERS.items()}
    shared = documented_flags("Both scripts")
    assert shared == sorted(shared, key=flags["train.py"].index)
    for script, all_flags in flags.items():
        own = documented_flags(f"`{script}`")
        assert own == sorted(own, key=all_flags.index)
        assert sorted(shared + own) == sorted(all_flags)


def test_docs_list_the_values_of_flags():
    rows = re.findall(r"^\| `--([a-z-]+) \[?\{([\w,-]+)\}", (ROOT / "docs/flags.md").read_text(), re.MULTILINE)
    listed = {flag.replace("-", "_"): values.split(",") for flag, values in rows}
    assert len(listed) > 8
    for parser in PARSERS.values():
        for action in parser._actions:
            if action.dest in listed:
                assert listed[action.dest] == list(action.choices), action.dest


@pytest.mark.parametrize("script", PARSERS)
def test_every_flag_is_read(script):
    """As an attribute in the scripts and where flags are defined, or as an item below them."""
    read = set()
    for file in [ROOT / script, *([ROOT / "evaluate.py"] if script == "train.py" else []), *files_of("engine")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "arguments"):
                read.add(node.attr)
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("flags", "settings"):
                read.add(ast.unparse(node.slice).strip("'"))
            elif isinstance(node, ast.Call) and ast.unparse(node).startswith("getattr(args, f'{name}_"):
                read |= {f"{split}_{node.args[1].values[1].value.lstrip('_')}" for split in ("train", "val")}
    assert {action.dest for action in PARSERS[script]._actions} - {"help"} <= read


def test_flags_end_at_the_scripts():
    files = [file for place in ALLOWED_IMPORTS for file in files_of(place)]
    know_flags = {file.relative_to(ROOT).as_posix() for file in files if ("argparse", "") in imports_of(file)}
    assert know_flags == KNOW_FLAGS


@pytest.mark.parametrize("place", ALLOWED_IMPORTS)
def test_imports_go_one_way(place):
    for file in files_of(place):
        imported = {module.partition(".")[0] for module, _ in imports_of(file)}
        assert imported & ALLOWED_IMPORTS.keys() <= ALLOWED_IMPORTS[place], file.name
        if place == "ssd":
            assert "numpy" not in imported


def test_the_rules_name_every_script_and_wing():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    wings = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert scripts | wings == ALLOWED_IMPORTS.keys()
    assert wings == set(WINGS)
    where = README.read_text().split("## What is where")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([\w/.]+)`", where, re.MULTILINE)) == {
        *(f"{script}.py" for script in scripts),
        *(f"{wing}/" for wing in (*WINGS, "tests", "benchmarks")),
    }


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_has_a_front_door_and_no_circles(wing):
    rooms = {file.name for file in files_of(wing)} - {"__init__.py"}
    assert set(re.findall(r"^(\w+\.py)  +\S", importlib.import_module(wing).__doc__, re.MULTILINE)) == rooms
    graph = {}
    for file in files_of(wing):
        names = {module or name for module, name in imports_of(file, relative=True)}
        graph[file.stem] = {name.partition(".")[0] for name in names}
    graphlib.TopologicalSorter(graph).prepare()  # raises an error if there is one


@pytest.mark.parametrize("wing", ["ssd", "coco"])
def test_others_enter_by_the_front_door(wing):
    """They use what it offers, so that its rooms may be rearranged."""
    offered = set(importlib.import_module(wing).__all__)
    for place in ALLOWED_IMPORTS.keys() - {wing}:
        for file in files_of(place):
            imported = {(module, name) for module, name in imports_of(file) if module.partition(".")[0] == wing}
            assert {module for module, _ in imported} <= {wing}, file.name
            used = re.findall(rf"(?<![\w.]){wing}\.([A-Za-z]\w*)\b(?!/)", code_of(file))
            assert {name for _, name in imported if name} | set(used) <= offered, file.name


def code_of(file: Path) -> str:
    """Without comments, docstrings and other texts."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


def test_scripts_and_readme_stay_short():
    assert all(len((ROOT / script).read_text().splitlines()) < 300 for script in PARSERS)
    assert len(README.read_text().splitlines()) <= 150


def anchors_of(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("https://"):
            target, _, anchor = link.partition("#")
            target = (page.parent / target).resolve() if target else page
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target), link


def test_the_readme_leads_to_every_page():
    assert {f"docs/{page.name}" for page in DOCS} <= set(re.findall(r"\]\((docs/\w+\.md)", README.read_text()))


def test_pictures_are_small_and_shown():
    pictures = list((ROOT / "docs").glob("*.png"))
    shown = "\n".join(page.read_text() for page in PAGES)
    assert {picture.name for picture in pictures} == set(re.findall(r"\]\((?:docs/)?(\w+\.png)\)", shown))
    assert all(picture.stat().st_size < 100_000 for picture in pictures)


def test_docs_have_the_family_as_its_script_prints_it():
    assert "\n\n" + "\n".join(family_table()) + "\n\n" in (ROOT / "docs/models.md").read_text()


def test_the_example_of_the_docs_detects_on_a_photograph(data_path, tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/models.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    model = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=2)
    model.head.classification_head.module_list[0].bias.data[1::2] = 9  # sure that an object is everywhere
    categories = [{"label": 1, "id": 7, "name": "dog"}]
    ssd.save_file({"model": model.state_dict(), "args": {}, "categories": categories}, tmp_path / "out/best.pth")
    (tmp_path / "photograph.jpg").write_bytes(next((data_path / "val2017").iterdir()).read_bytes())
    exec(example.replace("ssd300_vgg16", "ssd300_resnet18"), {})
    assert re.match(r"dog [01]\.\d\d \[\d+, \d+, \d+, \d+\]\n", capsys.readouterr().out)


def test_docs_have_the_recipes_and_their_published_map():
    table = (ROOT / "docs/recipes.md").read_text().split("| `--recipe` | published mAP |")[1].split("\n\n")[0]
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
    assert (args.epochs, args.lr, args.model) == (2, 0.5, "ssd300_light")


def test_defaults_are_the_published_recipe():
    args = train.parse_args([])
    assert (args.model, args.epochs, args.lr, args.batch_size) == ("ssd300_vgg16", 120, 0.002, 4)
    assert (args.momentum, args.weight_decay, args.lr_steps, args.lr_gamma) == (0.9, 0.0005, [80, 110], 0.1)
    assert (args.data_augmentation, args.weights_backbone, args.dataset) == ("ssd", "default", "coco")


@pytest.mark.parametrize("script", PARSERS)
def test_the_help_is_in_the_order_in_which_a_user_thinks(script):
    text = PARSERS[script].format_help()
    groups = [
        title for title in re.findall(r"^([a-z][a-z ]+):$", text, re.MULTILINE) if title not in ("usage", "options")
    ]
    expected = ["what to evaluate", "data", "model", "training", "speed", "log and checkpoints", "rarely needed"]
    assert groups == [title for title in expected if title in groups]
    assert "ssd512_vgg11_bn" not in text  # nor the names of the other models
