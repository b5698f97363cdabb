"""Print the table of files of sample/README.md: sizes in bytes and the start of each sha256.

    python sample/make/files.py
"""

import hashlib
from pathlib import Path

SAMPLE = Path(__file__).resolve().parent.parent


# These change with every experiment.
RESULTS = ("results.tsv", "ladder.png")


def data_files(folder):
    """Every file that is neither a page nor code nor a result."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in RESULTS]
    return sorted(path for path in files if path.suffix not in (".md", ".py", ".pyc"))


def table_line(path, folder):
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:16]
    return f"| `{path.relative_to(folder).as_posix()}` | {len(content):,} | {digest} |"


def table(folder):
    files = data_files(folder)
    total = sum(path.stat().st_size for path in files)
    lines = ["| file | bytes | sha256 (start) |", "|---|---|---|"]
    lines += [table_line(path, folder) for path in files]
    return "\n".join([*lines, f"| together | {total:,} | |"])


def main():
    print(table(SAMPLE))


if __name__ == "__main__":
    main()
