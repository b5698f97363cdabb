"""sample/exercises.py: what it leaves out, what it accepts, and what it says of mistakes."""

import importlib.util
import re

import pytest
from conftest import ROOT, run_cli

SCRIPT = "sample/exercises.py"
spec = importlib.util.spec_from_file_location("exercises", ROOT / SCRIPT)
exercises = importlib.util.module_from_spec(spec)
spec.loader.exec_module(exercises)
# The right line of hyperpelt.py, a mistake that students make, and what is said of it.
MISTAKES = {
    1: (
        "hidden = F.relu(self.from_z(z) + of_site)",
        "hidden = self.from_z(z) + of_site",
        r"eq. \(1\): I differs first at \[0, 0, 0, 0\]: found .*, expected",
    ),
    2: ("keys = self.to_key(hyper) ", "keys = self.to_value(hyper) ", r"eq. \(2\): P_k differs"),
    3: ("torch.cat([*values, v], 2)", "torch.cat([v, *values], 2)", r"eq. \(3\): V' differs"),
    4: (
        "down = self.to_down(mean).unflatten(2, self.down_shape)",
        "down = self.to_down(mean)",
        r"eq. \(4\): W_down has shape \[10, 2, 30\], expected \[10, 2, 10, 3\]",
    ),
    5: (
        "hidden = F.relu(torch.baddbmm(down_bias, x, down))",
        "hidden = torch.baddbmm(down_bias, x, down)",
        r"eq. \(5\): A\(u\) differs",
    ),
    6: (
        "scale * up_bias, hidden, scale * up)",
        "up_bias, hidden, scale * up)",
        r"eq. \(6\): lambda A\(u\) differs",
    ),
}


def call(folder, *arguments):
    """-> the line that sample/exercises.py ends with, where it finds a mistake."""
    try:
        exercises.main(["--folder", str(folder), *map(str, arguments)])
    except SystemExit as end:
        return end.code
    return ""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exercises") / "build"
    assert run_cli(SCRIPT, "--folder", folder, "blank").returncode == 0
    assert {path.name for path in folder.iterdir()} == set(exercises.FILES)
    return folder


@pytest.mark.parametrize("number", MISTAKES)
def test_an_equation_is_blank_then_wrong_then_right(number, build, tmp_path):
    right, wrong, message = MISTAKES[number]
    whole = (ROOT / "hyperpelt.py").read_text()
    assert whole.count(right) == 1 and right not in (build / "hyperpelt.py").read_text()
    assert call(build, "check", number) == f"eq. ({min(number, 5)}) is yours to write"
    (tmp_path / "hyperpelt.py").write_text(whole.replace(right, wrong))
    assert re.fullmatch(message + ".*", call(tmp_path, "check", number))
    (tmp_path / "hyperpelt.py").write_text(whole)
    assert not call(tmp_path, "check", number)


def test_a_mistake_is_one_line(build):
    done = run_cli(SCRIPT, "--folder", build, "check", 3)
    assert done.returncode == 1 and done.stderr == "eq. (3) is yours to write\n"


@pytest.mark.parametrize(
    "question, right, wrong",
    [
        ("count", 4290905, 4290904),
        ("task", 37632, 903744),
        ("crossing", 5, 4),
        ("vector", 7719257, 4290905),
        ("zeros", 0.5, 0),
    ],
)
def test_predictions(question, right, wrong, tmp_path):
    assert not call(tmp_path / "none", "answer", question, right)
    assert "not what the code computes" in call(tmp_path / "none", "answer", question, wrong)


def test_without_the_block_embedding_sites_are_the_same(tmp_path):
    """Two layers in each stack: two sites each in the encoder, so one pair, and three in the
    decoder, so three pairs. An unmodified program fails the check."""
    whole = (ROOT / "hyperpelt.py").read_text()
    without = whole.replace("(from_layer + from_block)", "from_layer")
    for source, found in ((whole, 0), (without, 8)):
        (tmp_path / "hyperpelt.py").write_text(source)
        assert not call(tmp_path, "answer", "same", found)
        assert call(tmp_path, "answer", "same", 8 - found)
