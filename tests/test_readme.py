"""What the pages say about the code: commands, names, equations."""

import importlib
import operator
import re

import pytest
from conftest import ROOT, run_cli

PROGRAMS = ["train", "clip_features", "hyperpelt"]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in (".", "sample", "tests")
    for path in (ROOT / folder).glob("*.md")
}
PLACES = sorted(set(re.findall(r"`(\w+)\.py:([\w.]+)`", "\n".join(PAGES.values()))))


@pytest.mark.parametrize("program", PROGRAMS)
def test_commands_use_options_that_exist(program):
    done = run_cli(f"{program}.py", "--help", COLUMNS="200")
    known = set(re.findall(r"(?<!\S)--[a-z-]+", done.stdout))
    for page, text in PAGES.items():
        for command in re.findall(rf"python {program}\.py[^`\n#]*", text.replace("\\\n", "")):
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
    section = PAGES["README.md"].split("## Paper and code")[1].split("\n## ")[0]
    numbers = {int(number) for number in re.findall(r"\((\d+)\)", section)}
    assert numbers >= set(range(1, 12)) and len(PLACES) > 10


@pytest.mark.parametrize("number", range(1, 12))
def test_an_equation_is_marked_where_it_is_computed(number):
    mark = re.compile(rf"# eq\. (\(\d+\), )*\({number}\)")
    marked = [path.name for path in ROOT.glob("*.py") if mark.search(path.read_text())]
    assert marked == ["hyperpelt.py"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    """Links to other sites are not followed."""
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        name, _, heading = target.partition("#")
        if target.startswith("http"):
            continue
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert heading in anchors, target


def test_the_worked_example():
    """README: two tasks through eq. (1) to (3), one head of width 1, any query."""
    import torch

    from hyperpelt import Prefix

    shared, text = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 4.0])
    outputs = []
    for z in ([1.0, 1.0], [0.0, 3.0]):
        hyper = torch.relu(torch.tensor(z) + shared)
        prefix = [(hyper @ torch.tensor(w)).reshape(1, 1, 1, 1) for w in ([0.0, 0.0], [1.0, -1.0])]
        k, v = Prefix([prefix])(*text.reshape(2, 1, 1, 1, 1))
        outputs.append(((3 * k).softmax(2) * v).sum().item())
    assert outputs == [2.5, 1.0]
    assert "= 2.5 " in PAGES["README.md"] and "0.5 * -2 + 0.5 * 4 = 1\n" in PAGES["README.md"]


@pytest.mark.parametrize("page", ["sample/RESULTS.md", "sample/EARLIER.md", "tests/README.md"])
def test_a_section_with_numbers_in_a_table_names_a_command(page):
    """Tables between <!-- NAME --> and <!-- end --> come from results.tsv: test_experiments.py."""
    for section in PAGES[page].split("\n## ")[1:]:
        if re.search(r"^\|.*\d", section, re.MULTILINE):
            assert re.search(r"python \S+\.py|<!-- \w", section), section.splitlines()[0]
