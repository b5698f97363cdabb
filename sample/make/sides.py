"""Left or right: questions about scenes with at most one thing in each half.

    python sample/make/sides.py --out DIR       # writes DIR/one/vqa and DIR/two/vqa

In `one`, a scene has one thing. In `two`, the training scenes have one or two things, those of
validation have two. To answer, no two places must be compared, as for the questions of places.py.
"""

import argparse
import itertools
from pathlib import Path

import scenes
from scenes import SIDE, sample_scene

# Image ids that neither the sample nor places.py has.
FIRST_ID = 4000
# How many things the scenes of each set may have: those of training, those of validation.
SETS = {"one": ((1,), (1,)), "two": ((1, 2), (2,))}
SCENES = {"train2014": 3000, "val2014": 250}
# No centre of a thing is nearer to the middle than this, in pixels.
MARGIN = 5


def side_of(thing):
    return "left" if thing.x < SIDE / 2 else "right"


def has_sides(things):
    clear = all(abs(thing.x - SIDE / 2) >= MARGIN for thing in things)
    return clear and len({side_of(thing) for thing in things}) == len(things)


def find_scenes(first_id, counts):
    """The ids, from `first_id` on, of all scenes whose number of things is one of `counts`."""
    for image_id in itertools.count(first_id):
        things, _ = sample_scene(image_id)
        if len(things) in counts and has_sides(things):
            yield image_id


def choose(things, used, rng):
    """On which side each thing is, and if there are two, what is on each side."""
    rows = []
    for thing in things:
        side = side_of(thing)
        rows.append(("where is the", f"where is the {thing.color} thing?", side))
        if len(things) == 2:
            rows.append(("what color is on the", f"what color is on the {side}?", thing.color))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the two sets")
    args = parser.parse_args()
    for name, counts in SETS.items():
        folder = args.out / name / "vqa"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        ids = [FIRST_ID]
        for subset, things in zip(SCENES, counts, strict=True):
            ids = list(itertools.islice(find_scenes(ids[-1] + 1, things), SCENES[subset]))
            scenes.write_subset(folder, subset, ids, choose)


if __name__ == "__main__":
    main()
