"""What the pages say about the code: commands, names, equations."""
import importlib
import operator
import re

import pytest
from conftest import ROOT, run_cli

PROGRAMS = ["train", "clip_features", "hyperpelt"]
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "sample/README.md")}
PLACES = sorted(set(re.findall(r"`(\w+)\.py:([\w.]+)`", "\n".join(PAGES.values()))))


@pytest.mark.parametrize("program", PROGRAMS)
def test_commands_use_options_that_exist(program):
    done = run_cli(f"{program}.py", "--help", COLUMNS="200")
    known = set(re.findall(r"(?<!\S)--[a-z-]+", done.stdout))
    for page, text in PAGES.items():
        for command in re.findall(rf"python {program}\.py[^`\n#]*", text):
            options = re.findall(r"(?<!\S)--[a-z-]+", command)
            assert set(options) <= known, (page, command)


def test_the_help_of_train_has_groups_and_a_line_for_each_option():
    train = importlib.import_module("train")
    text = run_cli("train.py", "--help", COLUMNS="200").stdout.split("\nexamples:")[0]
    lines = [line for line in text.splitlines()[1:] if line]
    options = [action.option_strings[-1] for action in train.make_parser()._actions]
    shown = [line.strip().removeprefix("-h, ").split()[0] for line in lines if line[0] == " "]
    assert shown == options
    groups = [line for line in lines if line[0] != " "]
    assert groups == ["options:", "model and data:", "method:", "training:", "runs:"]


@pytest.mark.parametrize("module, name", PLACES)
def test_the_map_names_what_exists(module, name):
    operator.attrgetter(name)(importlib.import_module(module))


def test_the_map_covers_every_equation():
    section = PAGES["README.md"].split("## From the paper to the code")[1].split("\n## ")[0]
    numbers = {int(number) for number in re.findall(r"\((\d+)\)", section)}
    assert numbers >= set(range(1, 12)) and len(PLACES) > 10


@pytest.mark.parametrize("number", range(1, 12))
def test_an_equation_is_marked_where_it_is_computed(number):
    mark = re.compile(rf"# eq\. (\(\d+\), )*\({number}\)")
    marked = [path.name for path in ROOT.glob("*.py") if mark.search(path.read_text())]
    assert marked == ["hyperpelt.py"]
