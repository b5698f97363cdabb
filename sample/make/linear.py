"""Print what a linear classifier makes of the text tasks without reading (needs scikit-learn).

    python sample/make/linear.py

It sees bags of features: which words there are, or how many words the two texts share.
"""

import re
from pathlib import Path

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

SAMPLE = Path(__file__).resolve().parent.parent


def read_examples(folder, name):
    """The texts of each example, and the labels."""
    lines = (SAMPLE / "glue" / folder / f"{name}.tsv").read_text().splitlines()
    columns = lines[0].split("\t")
    texts = []
    labels = []
    for line in lines[1:]:
        fields = dict(zip(columns, line.split("\t"), strict=True))
        labels.append(fields.pop("label"))
        fields.pop("index", None)
        texts.append(list(fields.values()))
    return texts, labels


def words(text):
    return re.findall(r"[\w']+", text.lower())


def last_text(texts):
    """The words of the hypothesis, or of the only sentence."""
    return words(texts[-1])


def both_texts(texts):
    premise, hypothesis = texts
    return [f"1 {word}" for word in words(premise)] + [f"2 {word}" for word in words(hypothesis)]


def changes(texts):
    """The words that both texts have, those that are new, and those that are dropped."""
    premise, hypothesis = (set(words(text)) for text in texts)
    return premise & hypothesis, hypothesis - premise, premise - hypothesis


def how_many(texts):
    shared, new, dropped = changes(texts)
    return [f"{len(shared)} shared", f"{len(new)} new", f"{len(dropped)} dropped"]


def which(texts):
    _, new, dropped = changes(texts)
    return [f"new {word}" for word in new] + [f"dropped {word}" for word in dropped]


VIEWS = [
    ("RTE", "the words of the hypothesis", last_text),
    ("RTE", "the words of both texts", both_texts),
    ("RTE", "how many words are shared, new, dropped", how_many),
    ("RTE", "which words are new, which are dropped", which),
    ("SST-2", "the words of the sentence", last_text),
]


def accuracy(folder, view):
    """Accuracy on the development examples of a classifier that sees view(texts)."""
    texts, labels = read_examples(folder, "train")
    counts = CountVectorizer(analyzer=view)
    model = LogisticRegression(max_iter=2000, C=0.3).fit(counts.fit_transform(texts), labels)
    texts, labels = read_examples(folder, "dev")
    return model.score(counts.transform(texts), labels)


def main():
    for folder, name, view in VIEWS:
        print(f"{folder}, {name}: {accuracy(folder, view):.3f}")


if __name__ == "__main__":
    main()
