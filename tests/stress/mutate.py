"""Do the tests see a mistake? Put one into a copy of the repository, run the tests, report (Linux).

    python tests/stress/mutate.py traps                         # the edits in traps.txt
    python tests/stress/mutate.py random --count 100 --seed 0   # one token, drawn at random

The tests of the mistaken file come first, then all others, up to the first failure.
"""

import argparse
import ast
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

STRESS = Path(__file__).resolve().parent
ROOT = STRESS.parent.parent
FILES = ["t5.py", "hyperpelt.py", "data.py", "clip_features.py", "train.py"]
SECONDS = "600"
# Lines that begin so hold an option with its help, an error message, or no logic at all.
SKIPPED = ("@", "import ", "from ", "raise ", "add(", "parser.add_argument(")
PAIRS = "+ -, * /, < <=, > >=, == !=, | &, and or, True False, min max, any all, break continue"
SWAPS = {"//": "*", "**": "*", "%": "*", "@": "*", "not": "", "in": "not in", "is": "is not"}
for pair in PAIRS.split(", "):
    one, other = pair.split()
    SWAPS |= {one: other, other: one}


# ---- mistakes: (name, file, the file's new text) -------------------------------------------------


def read_traps():
    """Read traps.txt. Exits with a list of the old texts that are not found exactly once."""
    mistakes, problems = [], []
    for entry in (STRESS / "traps.txt").read_text().split("\n\n"):
        title, place, *edit = entry.strip("\n").split("\n")
        old = "\n".join(line[2:] for line in edit if line.startswith("-"))
        new = "\n".join(line[2:] for line in edit if line.startswith("+"))
        file = place.removeprefix("@ ")
        text = (ROOT / file).read_text()
        if text.count(old) != 1:
            problems.append(f"{title}: {file} has {text.count(old)} times:\n{old}")
        mistakes.append((title.replace("#", "trap"), file, text.replace(old, new)))
    if problems:
        sys.exit("\n".join(problems))
    return mistakes


def swaps(file):
    """Yield (file, token, what can stand in its place)."""
    text = io.StringIO((ROOT / file).read_text())
    for token in tokenize.generate_tokens(text.readline):
        if token.line.lstrip().startswith(SKIPPED):
            continue
        if token.string in SWAPS:
            yield file, token, SWAPS[token.string]
        elif token.type == tokenize.NUMBER:
            value = ast.literal_eval(token.string)
            yield file, token, repr(value + 1 if isinstance(value, int) else 2 * value or 1.0)


def draw_mistakes(count, seed):
    """Draw so many swaps from all five files. What is left must be valid Python."""
    places = [place for file in FILES for place in swaps(file)]
    random.Random(seed).shuffle(places)
    mistakes = []
    for file, token, new in places:
        lines = (ROOT / file).read_text().split("\n")
        number, column = token.start
        line = lines[number - 1]
        lines[number - 1] = line[:column] + new + line[token.end[1] :]
        try:
            ast.parse("\n".join(lines))
        except SyntaxError:
            continue
        name = f"{file}:{number}: {token.string} -> {new or 'nothing'}: {line.strip()}"
        mistakes.append((name, file, "\n".join(lines)))
        if len(mistakes) == count:
            break
    return mistakes


# ---- tests ---------------------------------------------------------------------------------------


def first_failure(folder, file):
    """Run the tests in a copy of the repository -> the name of the first that fails, or ""."""
    first = folder / "tests" / f"test_{file}"
    others = sorted(set(first.parent.glob("test_*.py")) - {first})
    for tests in ([first], others):
        # `timeout` also kills the processes that a test has started.
        command = [
            "timeout",
            "-s",
            "KILL",
            SECONDS,
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--tb=no",
            "-p",
            "no:cacheprovider",
            *tests,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            if line.startswith(("FAILED", "ERROR")):
                return line.split(" - ")[0]
        if done.returncode:
            return f"exit code {done.returncode}"
    return ""


def judge(mistake, copies):
    """Put a mistake into a free copy and run the tests -> whether one of them failed."""
    name, file, changed = mistake
    folder = copies.get()
    (folder / file).write_text(changed)
    seen = first_failure(folder, file)
    shutil.copy(ROOT / file, folder / file)
    copies.put(folder)
    print(f"{name}\n    {seen or 'NOT SEEN'}", flush=True)
    return bool(seen)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=["traps", "random"])
    parser.add_argument("--count", type=int, default=100, help="random mistakes")
    parser.add_argument("--seed", type=int, default=0, help="of the random mistakes")
    parser.add_argument("--jobs", type=int, default=1, help="copies that are tested at once")
    parser.add_argument("--only", default="", help="mistakes whose name contains this text")
    parser.add_argument("--skip-check", action="store_true", help="do not test unbroken code first")
    args = parser.parse_args()
    mistakes = read_traps() if args.kind == "traps" else draw_mistakes(args.count, args.seed)
    mistakes = [mistake for mistake in mistakes if args.only in mistake[0]]

    with tempfile.TemporaryDirectory() as parent:
        # Some tests read the real data beside the repository.
        Path(parent, "shared").symlink_to(ROOT.parent / "shared")
        copies = Queue()
        for job in range(args.jobs):
            ignored = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache")
            copies.put(Path(shutil.copytree(ROOT, Path(parent, f"copy-{job}"), ignore=ignored)))
        if not args.skip_check and (failed := first_failure(copies.queue[0], "train.py")):
            sys.exit(f"a test fails without any mistake: {failed}")
        with ThreadPoolExecutor(args.jobs) as pool:
            seen = list(pool.map(judge, mistakes, [copies] * len(mistakes)))

    print(f"\n{sum(seen)} of {len(mistakes)} mistakes were seen; not seen:")
    print("\n".join(name for (name, *_), ok in zip(mistakes, seen, strict=True) if not ok))


if __name__ == "__main__":
    main()
