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
        r"eq. \(1\): I is what comes out without the ReLU",
    ),
    2: (
        "keys = self.to_key(hyper) ",
        "keys = self.to_value(hyper) ",
        r"eq. \(2\): P_k differs first at \[0, 0, 0, 0, 0\]: found .*, expected .*; \d+ of 480",
    ),
    3: (
        "torch.cat([*values, v], 2)",
        "torch.cat([v, *values], 2)",
        r"eq. \(3\): V' is what comes out with the prefix after the text",
    ),
    4: (
        "down = self.to_down(mean).unflatten(2, self.down_shape)",
        "down = self.to_down(mean)",
        r"eq. \(4\): W_down has shape \[10, 2, 30\], expected \[10, 2, 10, 3\]",
    ),
    5: (
        "hidden = F.relu(torch.baddbmm(down_bias, x, down))",
        "hidden = torch.baddbmm(down_bias, x, down)",
        r"eq. \(5\): A\(u\) is what comes out without the ReLU",
    ),
    6: (
        "scale * up_bias, hidden, scale * up)",
        "up_bias, hidden, scale * up)",
        r"eq. \(6\): lambda A\(u\) is what comes out with lambda on W_up alone",
    ),
}
# More mistakes: equation, right line, mistake, what is said of it.
MORE = [
    (1, "self.norm(self.to_hyper(hidden))", "self.to_hyper(hidden)", "I is .* without the norm"),
    (2, "return keys.reshape(shape).transpose(2, 3),", "return keys.reshape(shape),", "has shape"),
    (2, "shape = (*hyper.shape[:2], *self.head_shape)", "shape = (10, 2, 4, 2, 3), 0", "TypeError"),
    (3, "torch.cat([*keys, k], 2), ", "torch.cat([keys[0], k], 2), ", "with the first part alone"),
    (
        2,
        "return keys.reshape(shape).transpose(2, 3),",
        "return keys.reshape(*shape[:2], shape[3], shape[2], shape[4]),",
        "heads and positions mixed",
    ),
    (
        3,
        "torch.cat([*keys, k], 2), ",
        "torch.cat([*keys[::-1], k], 2), ",
        "K' .* second part before",
    ),
    (3, "torch.cat([*keys, k], 2), ", "torch.cat([*keys, k], 1), ", r"line \d+ of .* to Runtime"),
    (3, "torch.cat([*values, v], 2) ", "None ", "V' is a NoneType, expected a tensor"),
    (4, "mean = hyper.mean(2)", "mean = hyper[:, :, 0]", "W_down .* of the first position"),
    (4, "return down, down_bias, up, up_bias, ", "return down, up, ", "what it returns leads to"),
    (5, "sum(terms[1:], start=terms[0])", "terms[0]", r"A\(u\) .* with the first part alone"),
    (5, "x = u.reshape(len(down), -1, u.size(2))", "x = u", r"line \d+ of .* leads to Runtime"),
    (6, "scale * up_bias, hidden, scale * up)", "up_bias, hidden, up)", "without lambda"),
]


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


@pytest.mark.parametrize("number, right, wrong, message", MORE)
def test_typical_mistakes_are_explained(number, right, wrong, message, tmp_path):
    whole = (ROOT / "hyperpelt.py").read_text()
    assert whole.count(right) == 1
    (tmp_path / "hyperpelt.py").write_text(whole.replace(right, wrong))
    assert re.search(message, call(tmp_path, "check", number))


def test_a_mistake_is_one_line(build, tmp_path):
    done = run_cli(SCRIPT, "--folder", build, "check", 3)
    assert done.returncode == 1 and done.stderr == "eq. (3) is yours to write\n"
    assert call(build, "answer", "zeros", 0.5) == "eq. (3) is yours to write"
    assert "blank writes it" in call(tmp_path / "none", "check", 3)


@pytest.mark.parametrize(
    "question, right, wrong",
    [
        ("count", 4290905, 4290904),
        ("task", 37632, 903744),
        ("crossing", 5, 4),
        ("vector", 7719257, 4290905),
        ("zeros", 0.5, 0),
        ("count", "4,290,905", "nan"),
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
