"""Write what the small T5 learns from: DIR/text.txt and DIR/wordnet.json.

    python sample/make/text.py --work DIR

The script fetches two Debian packages with apt-get: wordnet-base (WordNet 3.0, under its own
licence) and r-cran-janeaustenr (Jane Austen's novels, in the public domain). text.txt has a
paragraph a line: the novels, and WordNet's definitions with their examples, mixed. wordnet.json
has nouns with the words above them, synonyms and opposites.
"""

import argparse
import json
import random
import re
import struct
import subprocess
import zlib
from pathlib import Path

from words import NOUNS

NOVELS = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
WORDNET = "usr/share/wordnet"
PLAIN = re.compile("[a-z]+( [a-z]+)?$")


def fetch(package, folder):
    subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True)
    archive = next(folder.glob(f"{package}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)


# ---- novels --------------------------------------------------------------------------------------


def find_strings(block):
    """The strings of R objects: bytes 00 09, four bytes of length, and the text."""
    strings = []
    start = 0
    while (start := block.find(b"\x00\x09", start)) >= 0:
        header = block[start + 2 : start + 6]
        length = struct.unpack(">I", header)[0] if len(header) == 4 else 2**31
        text = block[start + 6 : start + 6 + length]
        is_text = length < 200 and len(text) == length and all(byte > 31 for byte in text)
        if is_text:
            strings.append(text.decode("utf-8", "replace"))
        start += 6 + length if is_text else 1
    return strings


def read_novels(path):
    """The paragraphs of an R data base, a file of zlib streams, each after its length."""
    raw = path.read_bytes()
    lines = []
    start = 0
    while start + 4 < len(raw):
        stream = zlib.decompressobj()
        strings = find_strings(stream.decompress(raw[start + 4 :]))
        start = len(raw) - len(stream.unused_data)
        # The small objects hold names, the large ones a novel each.
        if len(strings) > 1000:
            lines += strings

    # Underscores and [brackets] are marks of the editors.
    text = re.sub(r"_|\[\w+\]", "", "\n".join(lines))
    paragraphs = re.split(r"\n\s*\n|\n(?=CHAPTER|Chapter)", text)
    paragraphs = [" ".join(paragraph.split()) for paragraph in paragraphs]
    return [text for text in paragraphs if len(text) > 60 and not text.isupper()]


# ---- WordNet -------------------------------------------------------------------------------------
# A synset is a set of words with one meaning, known by a part of speech and an offset. The formats
# are those of WordNet's manual pages wndb(5) and cntlist(5).


def read_synsets(folder):
    """Returns {(part, offset): (words, pointers)} and the entries "words: gloss".

    A pointer is (sign, part, offset). "@" leads to the synset above, "!" to an opposite.
    """
    synsets = {}
    entries = []
    for file, part in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
        for line in (folder / f"data.{file}").read_text(errors="replace").splitlines():
            if line.startswith(" "):
                continue
            facts, gloss = line.split(" | ", 1)
            facts = facts.split()
            end = 4 + 2 * int(facts[3], 16)
            words = [re.sub(r"\(\w+\)", "", word).replace("_", " ") for word in facts[4:end:2]]

            pointers = []
            for start in range(end + 1, end + 1 + 4 * int(facts[end]), 4):
                sign, offset, target = facts[start : start + 3]
                if sign in ("@", "!"):
                    pointers.append((sign, target, offset))
            synsets[part, facts[0]] = words, pointers
            entries.append(f"{', '.join(words[:3])}: {gloss.strip()}")
    return synsets, entries


def read_counts(folder):
    """{word: how often WordNet's texts have it}."""
    counts = {}
    for line in (folder / "cntlist.rev").read_text().splitlines():
        key, _, count = line.split()
        word = key.split("%")[0].replace("_", " ")
        counts[word] = counts.get(word, 0) + int(count)
    return counts


def find_kinds(folder, synsets, counts):
    """[noun, words above it] of the nouns that occur, in their most frequent sense."""
    kinds = []
    for line in (folder / "index.noun").read_text().splitlines():
        fields = line.split()
        word = fields[0].replace("_", " ")
        known = counts.get(word, 0) > 0 or word in NOUNS
        if line.startswith(" ") or not PLAIN.match(word) or not known:
            continue

        above = []
        synset = "n", fields[6 + int(fields[3])]
        while len(above) < 8:
            higher = [pointer[1:] for pointer in synsets[synset][1] if pointer[0] == "@"]
            if not higher:
                break
            synset = higher[0]
            above.append(synsets[synset][0][0].lower())
        # The last two words are as wide as "entity".
        if len(above) >= 3:
            kinds.append([word, above[:-2]])
    return kinds


def find_pairs(synsets, counts):
    """Pairs of synonyms and pairs of opposites, of words that occur more than once."""
    synonyms = []
    opposites = []
    for words, pointers in synsets.values():
        words = [word.lower() for word in words]
        words = [word for word in words if PLAIN.match(word) and counts.get(word, 0) > 1]
        synonyms += [[words[0], other] for other in words[1:3]]
        for sign, part, offset in pointers:
            # Satellite adjectives (s) have no opposites of their own.
            if words and sign == "!" and (part, offset) in synsets:
                other = synsets[part, offset][0][0].lower()
                if PLAIN.match(other):
                    opposites.append([words[0], other])
    return synonyms, opposites


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for the texts")
    args = parser.parse_args()

    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / WORDNET).exists():
        fetch("wordnet-base", work)
    if not (work / NOVELS).exists():
        fetch("r-cran-janeaustenr", work)

    folder = work / WORDNET
    synsets, entries = read_synsets(folder)
    counts = read_counts(folder)
    synonyms, opposites = find_pairs(synsets, counts)
    kinds = find_kinds(folder, synsets, counts)
    facts = {"kinds": kinds, "synonyms": synonyms, "opposites": opposites}
    (work / "wordnet.json").write_text(json.dumps(facts))

    paragraphs = read_novels(work / NOVELS) + entries
    random.Random(0).shuffle(paragraphs)
    (work / "text.txt").write_text("\n".join(paragraphs) + "\n")
    print(f"{len(paragraphs):,} paragraphs, {len(kinds):,} nouns")


if __name__ == "__main__":
    main()
