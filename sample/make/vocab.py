"""Write mini-t5/spiece.model: 5,000 SentencePiece pieces.

    python sample/make/vocab.py --work DIR

They are learned from DIR/text.txt (text.py writes it), from the words of the sample's lists, and
from the words that T5's text formats put around them.
"""

import argparse
import random
from pathlib import Path

import sentencepiece
from words import (
    ANTONYMS,
    ASPECTS,
    BAD,
    COLOURS,
    DEEDS,
    GOOD,
    HANDLING,
    NOUNS,
    NUMBERS,
    SYNONYMS,
    past,
    plural,
)

SAMPLE = Path(__file__).resolve().parent.parent
PIECES = 5000
# The names and label words of the text tasks, and the names of fields.
FORMATS = """cola unacceptable acceptable sst2 negative positive mrpc not_equivalent equivalent
    qqp not_duplicate duplicate stsb  mnli entailment neutral contradiction
    qnli entailment not_entailment rte entailment not_entailment wnli not_entailment entailment
    cb entailment contradiction neutral boolq False True imdb negative positive
    paws not_equivalent equivalent trec abbreviation entity description human location number
    sentence: sentence1: sentence2: question: answer: premise: hypothesis:
    vqa: yes no circle square triangle star"""


def listed_words():
    """Every word of the sample's lists, as often as it is listed."""
    words = []
    for noun in NOUNS:
        words += [noun, plural(noun)]
    words += [past(verb) for verb in DEEDS + HANDLING]
    words += NUMBERS + ASPECTS + GOOD + BAD + COLOURS
    for pair in SYNONYMS + ANTONYMS:
        words += pair
    return words


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder with text.txt")
    parser.add_argument("--out", type=Path, default=SAMPLE, help="folder that holds mini-t5/")
    args = parser.parse_args()

    lines = (args.work / "text.txt").read_text().splitlines()
    words = listed_words()
    rng = random.Random(0)
    for _ in range(12000):
        lines.append(" ".join(rng.sample(words, 12)))
    lines += [" ".join(FORMATS.split())] * 300

    folder = args.out / "mini-t5"
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "spiece"),
        vocab_size=PIECES,
        model_type="unigram",
        character_coverage=0.9998,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        minloglevel=1,
        num_threads=2,
    )
    (folder / "spiece.vocab").unlink()


if __name__ == "__main__":
    main()
