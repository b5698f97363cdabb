"""The README's map from the paper to the code: what it names exists, and holds the mark of the equation that it is said to hold."""
import ast
import re

from conftest import ROOT


def source_of(file, name):
    """The text of a function, method or module-level name, "Class.method"."""
    text = (ROOT / file).read_text()
    nodes, found = ast.parse(text).body, None
    for part in name.split("."):
        named = lambda node: getattr(node, "name", None) == part or isinstance(node, ast.Assign) and any(getattr(t, "id", "") == part for t in node.targets)
        found = next((node for node in nodes if named(node)), None)
        assert found is not None, f"{file} has no {name}"
        nodes = getattr(found, "body", [])
    return "\n".join(text.splitlines()[found.lineno - 1:found.end_lineno])    # with the comments


def test_map_from_the_paper_to_the_code():
    section = (ROOT / "README.md").read_text().split("## From the paper to the code")[1].split("\n## ")[0]
    rows = [line.split("|")[1:4] for line in section.splitlines() if line.startswith("| ")][1:]
    marked = set()
    for paper, places, _ in rows:
        places = [source_of(*place) for place in re.findall(r"`(\w+\.py):([\w.]+)`", places)]
        assert places, paper
        for number in map(int, re.findall(r"eq\. \((\d+)\)", paper)):
            marked.add(number)
            assert any(re.search(rf"#[^\n]*eq\.[^\n]*\({number}\)", source) for source in places), (paper, number)
    listed = re.findall(r"^    \((\d+)\)", (ROOT / "hyperpelt.py").read_text().split('"""')[1], re.M)
    assert marked == set(map(int, listed))                       # every equation of the list is on the map


def test_every_command_of_the_readme_is_known():
    """Options in the README's command lines are options of the program that they are given to."""
    text = (ROOT / "README.md").read_text()
    for line in re.findall(r"^ {4}(.*\.py .*)$", text, re.M):
        program = re.search(r"(\w+)\.py", line)[1]
        folder = ROOT if (ROOT / f"{program}.py").exists() else ROOT / "tests" if (ROOT / "tests" / f"{program}.py").exists() else ROOT / "sample"
        source = (folder / f"{program}.py").read_text() + (ROOT / "train.py").read_text() * (program == "train")
        for option in re.findall(r" --([a-z-]+)", line.split("#")[0].split(f"{program}.py", 1)[1].replace(" --help", "")):
            assert re.search(rf'"(--)?{option}"', source), (option, line)
