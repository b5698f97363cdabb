"""Write vqa/: 800 drawn scenes as arrays, and twelve questions on each in the format of VQAv2.

    python sample/make/scenes.py

A scene holds coloured shapes that do not touch, on 56 x 56 pixels. Every scene has a seed: image k
of the sample is drawn from [SEED, k]. clip.py learns from other seeds, and so from other scenes.
"""

import argparse
import itertools
import json
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

SAMPLE = Path(__file__).resolve().parent.parent
SEED = 20230710
# The image ids of each subset. VQAv2 names its subsets after COCO's.
IMAGES = {"train2014": range(700), "val2014": range(700, 800)}
QUESTIONS_PER_IMAGE = 12

SIDE = 56
SHAPES = ["circle", "square", "triangle", "cross"]
SIZES = ["small", "large"]
COLORS = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (235, 215, 40),
    "purple": (140, 50, 170),
    "orange": (245, 140, 30),
}
# The least distance of two centres, across or down, in pixels.
GAP = 17
# Nothing is said about left or right (above or below) where centres are nearer than this.
MARGIN = 9
# Half the side of the square that a thing is drawn in; the square has a centre pixel besides.
REACH = 9


class Thing(NamedTuple):
    """x and y are the pixel of the centre, counted from the left and from the top."""

    size: str
    color: str
    shape: str
    x: int
    y: int


def pick(rng, values):
    return values[rng.integers(len(values))]


# ---- scenes --------------------------------------------------------------------------------------


def make_scene(rng):
    """A list of 1 to 4 Things, no two of them less than GAP apart."""
    count = pick(rng, (1, 2, 2, 3, 3, 3, 4, 4, 4))
    places = []
    while len(places) < count:
        places = []
        for x, y in rng.integers(REACH, SIDE - REACH, (30, 2)).tolist():
            free = all(max(abs(x - a), abs(y - b)) >= GAP for a, b in places)
            if free and len(places) < count:
                places.append((x, y))

    # A scene has few kinds of things, so that there is something to count.
    shapes = rng.permutation(SHAPES)[: 1 + rng.integers(4)].tolist()
    colors = rng.permutation(list(COLORS))[: 2 + rng.integers(5)].tolist()
    things = []
    for x, y in places:
        things.append(Thing(pick(rng, SIZES), pick(rng, colors), pick(rng, shapes), x, y))
    return things


@lru_cache(None)
def coverage(shape, radius):
    """The share of each pixel that a shape covers, found by 4 x 4 points: float [19, 19, 1]."""
    width = 2 * REACH + 1
    line = (np.arange(width * 4) + 0.5) / 4 - width / 2
    x = line[None]
    y = line[:, None]
    far = np.maximum(abs(x), abs(y))
    near = np.minimum(abs(x), abs(y))
    if shape == "circle":
        inside = x * x + y * y < radius * radius
    elif shape == "square":
        inside = far < 0.88 * radius
    elif shape == "cross":
        inside = (far < radius) & (near < 0.34 * radius)
    else:
        inside = (y < 0.8 * radius) & (abs(x) < 0.55 * (y + radius))
    return inside.reshape(width, 4, width, 4, 1).mean((1, 3))


def draw_scene(things, rng):
    """uint8 [56, 56, 3]. Shades, radii and noise are random."""
    image = np.full((SIDE, SIDE, 3), 225.0) + rng.integers(0, 16, 3)
    for thing in things:
        radius = pick(rng, (4.5, 5.0, 5.5))
        if thing.size == "large":
            radius += 2.5
        color = np.array(COLORS[thing.color]) + rng.integers(-12, 13, 3)
        rows = slice(thing.y - REACH, thing.y + REACH + 1)
        columns = slice(thing.x - REACH, thing.x + REACH + 1)
        area = image[rows, columns]  # [19, 19, 3]
        area += coverage(thing.shape, radius) * (color - area)
    image += rng.integers(-5, 6, image.shape)
    return image.round().clip(0, 255).astype(np.uint8)


def sample_scene(image_id):
    """The Things and the pixels of an image of the sample.

    It shows one or two things of different colours. The small T5 learns what they are, not which
    of the two a question means (RESULTS.md, What an image gives).
    """
    rng = np.random.default_rng([SEED, image_id])
    while True:
        things = make_scene(rng)
        colors = {thing.color for thing in things}
        if len(colors) == len(things) <= 2:
            return things, draw_scene(things, rng)


# ---- questions -----------------------------------------------------------------------------------


def names_of(things, i, without=""):
    """The descriptions that fit thing i and no other, such as "red circle" or "small thing".

    They leave out the attribute `without`, because the question asks for it.
    """
    names = []
    for keys in (
        ("color", "shape"),
        ("color",),
        ("shape",),
        ("size", "shape"),
        ("size", "color"),
        ("size",),
    ):
        values = [getattr(things[i], key) for key in keys]
        alike = [t for t in things if [getattr(t, key) for key in keys] == values]
        if without not in keys and len(alike) == 1:
            names.append(" ".join(values if "shape" in keys else [*values, "thing"]))
    return names


def ask_attributes(things, key):
    rows = []
    for i, thing in enumerate(things):
        for name in names_of(things, i, without=key):
            rows.append((f"what {key} is the", f"what {key} is the {name}?", getattr(thing, key)))
    return rows


def ask_counts(things):
    plurals = {"": "things"}
    for shape in SHAPES:
        plurals[shape] = "crosses" if shape == "cross" else f"{shape}s"
    for color in COLORS:
        plurals[color] = f"{color} things"
    rows = []
    for key, words in plurals.items():
        count = sum(key == "" or key in thing for thing in things)
        rows.append(("how many", f"how many {words} are there?", str(count)))
    return rows


def ask_existence(things):
    rows = []
    for color, shape in itertools.product(COLORS, SHAPES):
        exists = any((t.color, t.shape) == (color, shape) for t in things)
        answer = "yes" if exists else "no"
        rows.append(("is there a", f"is there a {color} {shape}?", answer))
    return rows


def ask_relations(things, axis, less, greater):
    """Whether one thing is `less` or `greater` than another on the axis "x" or "y"."""
    rows = []
    for i, j in itertools.permutations(range(len(things)), 2):
        distance = getattr(things[i], axis) - getattr(things[j], axis)
        one = names_of(things, i)
        two = names_of(things, j)
        if abs(distance) < MARGIN or not one or not two:
            continue
        for words, is_true in ((less, distance < 0), (greater, distance > 0)):
            answer = "yes" if is_true else "no"
            rows.append(("is the", f"is the {one[0]} {words} the {two[0]}?", answer))
    return rows


def ask(things):
    """Everything that can be asked without doubt about the answer.

    Returns {kind: [(question type, question, answer)]}.
    """
    return {
        "shape": ask_attributes(things, "shape"),
        "color": ask_attributes(things, "color"),
        "size": ask_attributes(things, "size"),
        "count": ask_counts(things),
        "exist": ask_existence(things),
        "across": ask_relations(things, "x", "left of", "right of"),
        "down": ask_relations(things, "y", "above", "below"),
    }


def choose(things, used, rng):
    """Twelve of the questions, one of each kind as far as there are.

    `used` counts the answers to each question and to each kind so far. The rarest answer is
    preferred, so that in the end all answers to a question are about equally frequent.
    """
    asked = ask(things)
    # An image gets one question on a relation, because they are the hardest sort.
    relations = [kind for kind in ("across", "down") if asked[kind]]
    relation = pick(rng, relations or ["exist"])
    left_out = {"across", "down"} - {relation}
    kinds = [kind for kind in asked if asked[kind] and kind not in left_out]
    repeated = [kind for kind in ("shape", "color", "count", "exist") if kind in kinds]

    chosen = []
    while len(chosen) < QUESTIONS_PER_IMAGE:
        kind = kinds[len(chosen)] if len(chosen) < len(kinds) else pick(rng, repeated)
        options = []
        for row in asked[kind]:
            if row not in chosen:
                _, question, answer = row
                frequency = (used[question, answer], used[kind, answer], rng.random())
                options.append((frequency, row))
        if options:
            _, best = min(options)
            _, question, answer = best
            used.update([(question, answer), (kind, answer)])
            chosen.append(best)
    return chosen


# ---- the files -----------------------------------------------------------------------------------


def answer_type(answer):
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer.isdigit() else "other"


def annotation(image_id, question_id, kind, answer):
    """An entry of VQAv2's annotations. All ten people give the same answer."""
    answers = []
    for i in range(1, 11):
        answers.append({"answer": answer, "answer_confidence": "yes", "answer_id": i})
    return {
        "question_type": kind,
        "multiple_choice_answer": answer,
        "answers": answers,
        "image_id": image_id,
        "answer_type": answer_type(answer),
        "question_id": question_id,
    }


def write_json(path, content):
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def write_subset(folder, subset, ids, choose=choose):
    images = []
    questions = []
    annotations = []
    used = Counter()
    for image_id in ids:
        things, pixels = sample_scene(image_id)
        images.append(pixels)
        rows = choose(things, used, np.random.default_rng([SEED, image_id, 1]))
        for number, (kind, question, answer) in enumerate(rows):
            key = 1000 * image_id + number
            questions.append({"image_id": image_id, "question": question, "question_id": key})
            annotations.append(annotation(image_id, key, kind, answer))

    np.save(folder / "images" / f"{subset}.npy", np.stack(images))
    write_json(folder / "images" / f"{subset}.json", list(ids))
    common = {
        "info": {
            "description": "Questions about drawn shapes, in VQAv2's file format",
            "version": "1",
            "year": 2023,
        },
        "data_type": "mscoco",
        "license": {"name": "as the project", "url": ""},
        "data_subtype": subset,
    }
    path = folder / f"v2_OpenEnded_mscoco_{subset}_questions.json"
    write_json(path, common | {"task_type": "Open-Ended", "questions": questions})
    path = folder / f"v2_mscoco_{subset}_annotations.json"
    write_json(path, common | {"annotations": annotations})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=SAMPLE, help="folder that holds vqa/")
    args = parser.parse_args()

    folder = args.out / "vqa"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for subset, ids in IMAGES.items():
        write_subset(folder, subset, ids)


if __name__ == "__main__":
    main()
