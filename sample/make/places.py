"""Left of, right of, above, below: a probe of the small CLIP, and more questions to train on.

    python sample/make/places.py               # the probe; needs scikit-learn
    python sample/make/places.py --out DIR     # vqa/ with more of these questions, on other scenes

The probe is a linear classifier that sees one of the 49 features and tells the colour of the thing
in its cell, if there is one. The two things of a scene have different colours. So the answer
follows from where the two colours are.
"""

import argparse
from pathlib import Path

import numpy as np
import scenes
from scenes import COLORS, IMAGES, SAMPLE, ask, sample_scene

GRID = 7
CELL = scenes.SIDE // GRID
# Image ids that the sample does not have.
MORE_IMAGES = {"train2014": range(1000, 3500), "val2014": range(3500, 3600)}
CENTRES = (np.arange(GRID) + 0.5) * CELL


def color_of_cells(things):
    """The colour of the thing whose centre is in or beside each cell, or "none": array [49]."""
    labels = np.full((GRID, GRID), "none", dtype=object)
    for thing in things:
        rows = abs(CENTRES - thing.y) < CELL / 2 + 1
        columns = abs(CENTRES - thing.x) < CELL / 2 + 1
        labels[np.ix_(rows, columns)] = thing.color
    return labels.ravel()


def read_features(subset):
    """The things of each scene of the sample, and the features of its cells [49, V]."""
    features = np.load(SAMPLE / "vqa" / "features" / f"{subset}.npy").astype(np.float32)
    things = [sample_scene(image_id)[0] for image_id in IMAGES[subset]]
    return things, features


def fit():
    from sklearn.linear_model import LogisticRegression

    all_things, features = read_features("train2014")
    labels = np.concatenate([color_of_cells(things) for things in all_things])
    return LogisticRegression(max_iter=300).fit(features.reshape(len(labels), -1), labels)


def find_places(probe, features):
    """Features [49, V] -> {colour: (x, y)}, means over the cells, weighted by probability."""
    probabilities = probe.predict_proba(features)  # [49, colours and none]
    weights = dict(zip(probe.classes_, probabilities.T, strict=True))
    x = np.tile(CENTRES, GRID)
    y = np.repeat(CENTRES, GRID)
    return {
        color: (x @ weights[color], y @ weights[color]) / weights[color].sum() for color in COLORS
    }


def answer(question, things, places):
    """`things` tell only which colour a name such as "small thing" has."""
    for words, axis, sign in (
        (" left of the ", 0, -1),
        (" right of the ", 0, 1),
        (" above the ", 1, -1),
        (" below the ", 1, 1),
    ):
        if words in question:
            names = question.removeprefix("is the ").rstrip("?").split(words)
            one, two = (places[color_named(things, name)][axis] for name in names)
            return "yes" if sign * (one - two) > 0 else "no"
    raise ValueError(question)


def color_named(things, name):
    names = {thing.color: scenes.names_of(things, i) for i, thing in enumerate(things)}
    return next(color for color, own in names.items() if name in own)


def try_probe():
    probe = fit()
    right = {"across": [], "down": []}
    for things, features in zip(*read_features("val2014"), strict=True):
        places = find_places(probe, features)
        asked = ask(things)
        for axis, values in right.items():
            for _, question, expected in asked[axis]:
                values.append(answer(question, things, places) == expected)
    for axis, values in right.items():
        print(f"{axis}: {np.mean(values):.3f} of {len(values)} questions")


def choose(things, used, rng):
    """Four questions about places, as far as there are, and four that the sample would ask."""
    asked = ask(things)
    rows = asked["across"] + asked["down"]
    places = [rows[i] for i in rng.permutation(len(rows))[:4]]
    others = [row for row in scenes.choose(things, used, rng) if row not in rows]
    return places + others[:4]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder that will hold vqa/")
    args = parser.parse_args()
    if not args.out:
        return try_probe()
    folder = args.out / "vqa"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for subset, ids in MORE_IMAGES.items():
        scenes.write_subset(folder, subset, ids, choose)


if __name__ == "__main__":
    main()
