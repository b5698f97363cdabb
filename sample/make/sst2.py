"""Write glue/SST-2/train.tsv and dev.tsv: opinions on films, positive (1) or negative (0).

    python sample/make/sst2.py

A denial turns a word round. Of two opinions one counts: that after "but", not that after
"although" or "even if".
"""

import argparse
import random
from pathlib import Path

from words import ASPECTS, BAD, GOOD

SAMPLE = Path(__file__).resolve().parent.parent
ASSERTIONS = [
    *("is {}", "is truly {}", "is quite {}", "feels {}", "manages to be {}"),
    "is nothing but {}",
]
NEGATIONS = [
    *("is not {}", "is never {}", "is hardly {}", "is far from {}", "is anything but {}"),
    "fails to be {}",
]
TWO_OPINIONS = [
    *("{weak} , but {strong}", "although {weak} , {strong}"),
    *("{strong} , although {weak}", "{strong} , even if {weak}"),
]
ENDINGS = [" .", " !", " in the end .", " , as ever ."]


def opinion(rng, aspect, positive):
    denied = rng.random() < 0.5
    word = rng.choice(GOOD if positive != denied else BAD)
    form = rng.choice(NEGATIONS if denied else ASSERTIONS)
    return f"the {aspect} {form.format(word)}"


def sentence(rng, positive):
    one, two = rng.sample(ASPECTS, 2)
    text = opinion(rng, one, positive)
    if rng.random() < 0.6:
        # The opinion that does not count mostly says the contrary.
        weak_is_positive = not positive
        if rng.random() < 0.3:
            weak_is_positive = rng.random() < 0.5
        weak = opinion(rng, two, weak_is_positive)
        text = rng.choice(TWO_OPINIONS).format(strong=text, weak=weak)
    return text + rng.choice(ENDINGS)


def make_sentences(count):
    """(sentence, label) without repetition, half of each label."""
    rng = random.Random("SST-2 0")
    sentences = []
    seen = set()
    while len(sentences) < count:
        positive = len(sentences) % 2 == 0
        text = sentence(rng, positive)
        if text not in seen:
            seen.add(text)
            sentences.append((text, int(positive)))
    rng.shuffle(sentences)
    return sentences


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=SAMPLE, help="folder that holds glue/")
    args = parser.parse_args()

    sentences = make_sentences(4400)
    folder = args.out / "glue" / "SST-2"
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", sentences[:4000]), ("dev", sentences[4000:])):
        lines = ["sentence\tlabel"]
        for text, label in part:
            lines.append(f"{text}\t{label}")
        (folder / f"{name}.tsv").write_bytes("\n".join([*lines, ""]).encode())


if __name__ == "__main__":
    main()
