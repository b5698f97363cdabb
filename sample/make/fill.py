"""Print what the small T5 puts into gaps and answers to questions that it has not trained on.

    python sample/make/fill.py --work DIR
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from pretrain import HELD_OUT, WINDOW, corrupt
from questions import Questions, vocabulary_words

SAMPLE = Path(__file__).resolve().parent.parent
sys.path.append(str(SAMPLE.parent))
from t5 import T5, Tokenizer  # noqa: E402

SORTS = ["kind", "word", "difference", "number", "reading", "mood", "pair"]


def generate(model, tokenizer, ids, max_new_tokens):
    output = model.generate(torch.tensor([ids]), max_new_tokens=max_new_tokens)
    return tokenizer.decode(output[0].tolist())


@torch.no_grad()
def try_gaps(model, tokenizer, paragraphs):
    """The loss in the gaps, and the share of tokens predicted right after the true ones."""
    rng = np.random.default_rng(0)
    losses = []
    right = []
    for paragraph in paragraphs:
        ids = tokenizer.encode(paragraph)[:WINDOW]
        if len(ids) < 24:
            continue
        source, target = corrupt(ids, rng, tokenizer.largest_id)
        logits, loss = model(torch.tensor([source]), None, torch.tensor([target]))
        losses.append(loss.item())
        predicted = logits[0].argmax(1)
        for token, guess in zip(target, predicted.tolist(), strict=True):
            # Neither sentinels nor eos count.
            if 1 < token < len(tokenizer.pieces):
                right.append(token == guess)

        if len(losses) <= 8:
            output = generate(model, tokenizer, source, 40)
            print(tokenizer.decode(source))
            print(f"  target: {tokenizer.decode(target)}\n  output: {output}\n")
    print(f"{len(losses)} paragraphs: loss {np.mean(losses):.3f}, right {np.mean(right):.3f}")


def try_questions(model, tokenizer, questions):
    """The share of a hundred answers of each sort that are right, word for word."""
    rng = random.Random(0)
    for sort in SORTS:
        right = 0
        for _ in range(100):
            question, answer = getattr(questions, sort)(rng)
            output = generate(model, tokenizer, tokenizer.encode(question), 24)
            right += output == answer
        print(f"{sort}: {right / 100:.2f}; the last: {question!r} -> {output!r} ({answer!r})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of text.py")
    parser.add_argument("--model", type=Path, default=SAMPLE / "mini-t5", help="the small T5")
    args = parser.parse_args()

    tokenizer = Tokenizer(args.model / "spiece.model")
    model = T5.from_pretrained(args.model)
    paragraphs = (args.work / "text.txt").read_text().splitlines()[:HELD_OUT]
    facts = json.loads((args.work / "wordnet.json").read_text())
    questions = Questions(facts, paragraphs, vocabulary_words(tokenizer.pieces))
    try_gaps(model, tokenizer, paragraphs)
    try_questions(model, tokenizer, questions)


if __name__ == "__main__":
    main()
