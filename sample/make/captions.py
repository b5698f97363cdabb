"""Captions of scenes, and batches of scenes with captions, for clip.py. Imported.

Every scene comes with a twin that has a single difference, so that the encoder has to tell them
apart.
"""

import itertools
from bisect import bisect
from collections import Counter

import numpy as np
import torch
from scenes import COLORS, MARGIN, SHAPES, SIDE, SIZES, draw_scene, make_scene, pick

PATCH = 8
# Cells across the image, and all of them.
GRID = SIDE // PATCH
CELLS = GRID**2
# The pixels at which the second and the last third of the image begin, for what is said of it.
THIRDS = [21, 35]
FUNCTION_WORDS = "a and things left right of above below top middle bottom center 1 2 3 4".split()
VOCABULARY = ["<pad>", "<start>", *FUNCTION_WORDS, *SIZES, *COLORS, *SHAPES]
WORD_IDS = {word: i for i, word in enumerate(VOCABULARY)}


def where(thing):
    """In which ninth of the image a thing is."""
    row = bisect(THIRDS, thing.y)
    column = bisect(THIRDS, thing.x)
    return f"{('top', 'middle', 'bottom')[row]} {('left', 'center', 'right')[column]}"


def relate(one, two, across):
    """Where one thing is of another, as in "left of a blue square".

    It says left or right if `across`, above or below if not, and the other way round where the two
    are too near for that.
    """
    dx = one.x - two.x
    dy = one.y - two.y
    if across:
        across = abs(dx) >= MARGIN
    else:
        across = abs(dy) < MARGIN
    if across:
        side = "right of" if dx > 0 else "left of"
    else:
        side = "below" if dy > 0 else "above"
    return f"{side} a {two.color} {two.shape}"


def phrase(things, i, rng):
    """Thing i in words, half the time with a relation to another one."""
    thing = things[i]
    text = f"a {thing.size} {thing.color} {thing.shape} {where(thing)}"
    if len(things) > 1 and rng.random() < 0.5:
        other = things[(i + 1 + rng.integers(len(things) - 1)) % len(things)]
        across = rng.random() < 0.5
        text += " " + relate(thing, other, across)
    return text


def caption(things, rng):
    """A scene in words: its things, how many there are, or how they stand to each other."""
    things = [things[i] for i in rng.permutation(len(things))]
    kind = rng.random()

    if kind < 0.2 or (len(things) == 1 and kind >= 0.7):
        key = pick(rng, ("shape", "color"))
        counts = Counter(getattr(thing, key) for thing in things)
        numbers = [f"{count} {value}" for value, count in sorted(counts.items())]
        return f"{len(things)} things " + " and ".join(numbers)

    if kind < 0.7:
        with_size = rng.random() < 0.5
        with_place = rng.random() < 0.5
        texts = []
        for thing in things:
            words = ["a", thing.color, thing.shape]
            if with_size:
                words.insert(1, thing.size)
            if with_place:
                words.append(where(thing))
            texts.append(" ".join(words))
        return " and ".join(texts)

    links = []
    for one, two in itertools.pairwise(things):
        links.append(relate(one, two, rng.random() < 0.5))
    return f"a {things[0].color} {things[0].shape} " + " and ".join(links)


def exchange(things, i, j, keys):
    """The scene with attributes of two things exchanged."""
    new = list(things)
    for key in keys:
        new[i] = new[i]._replace(**{key: getattr(things[j], key)})
        new[j] = new[j]._replace(**{key: getattr(things[i], key)})
    return new


def twin(things, rng):
    """The scene with one difference: mirrored, two things exchanged, or one thing changed."""
    change = pick(rng, ("mirror", "attribute", "places", "new"))
    i, j = rng.permutation(max(2, len(things)))[:2] % len(things)
    if change == "mirror":
        axis = pick(rng, ("x", "y"))
        return [thing._replace(**{axis: SIDE - 1 - getattr(thing, axis)}) for thing in things]
    if change == "attribute":
        return exchange(things, i, j, [pick(rng, ("size", "color", "shape"))])
    if change == "places":
        return exchange(things, i, j, ["x", "y"])

    key, values = pick(rng, (("size", SIZES), ("color", list(COLORS)), ("shape", SHAPES)))
    others = [value for value in values if value != getattr(things[i], key)]
    new = list(things)
    new[i] = things[i]._replace(**{key: pick(rng, others)})
    return new


def scene_and_twin(rng):
    """Two scenes and their captions, made alike. The captions differ in all but rare cases."""
    things = make_scene(rng)
    for _ in range(9):
        seed = rng.integers(2**31)
        scenes = [things, twin(things, rng)]
        captions = [caption(scene, np.random.default_rng(seed)) for scene in scenes]
        if captions[0] != captions[1]:
            break
    return scenes, captions


def encode(texts):
    """Texts -> int64 [texts, T]: <start>, the words, padding."""
    rows = [[WORD_IDS[word] for word in f"<start> {text}".split()] for text in texts]
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def make_batch(seed, pairs):
    """Scenes and their twins, image 2i+1 being the twin of image 2i.

    Returns pixels [B, 3, 56, 56] as uint8, captions [B, T], and for each of the P things in them a
    phrase [P, T] and the number [P] of the cell with its centre among all B * 49 cells.
    """
    pixels = []
    captions = []
    phrases = []
    cells = []
    for pair in range(pairs):
        rng = np.random.default_rng([*seed, pair])
        pair_scenes, pair_captions = scene_and_twin(rng)
        captions += pair_captions
        for things in pair_scenes:
            for i in rng.permutation(len(things)):
                row = things[i].y // PATCH
                column = things[i].x // PATCH
                first_cell = len(pixels) * CELLS
                cells.append(first_cell + row * GRID + column)
                phrases.append(phrase(things, i, rng))
            pixels.append(draw_scene(things, rng))
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return images, encode(captions), encode(phrases), torch.tensor(cells)
