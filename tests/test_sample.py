"""The bundled sample: its files, its labels, its small models, and the scripts that make them."""

import json
import random
import re
import sys

import numpy as np
import pytest
import torch
from conftest import SAMPLE, run_cli
from clip_features import load_features
from t5 import T5, Tokenizer

sys.path.append(str(SAMPLE / "make"))
import clip
import files
import linear
import pretrain
import questions
import scenes

PAGE = (SAMPLE / "README.md").read_text()
SPELLED = "zero one two three four five six seven eight nine".split()


@pytest.mark.parametrize("script", ["rte", "sst2", "scenes", "drawing"])
def test_a_script_writes_the_bundled_bytes(script, tmp_path):
    assert run_cli(SAMPLE / "make" / f"{script}.py", "--out", tmp_path).returncode == 0
    written = files.data_files(tmp_path)
    assert written
    for path in written:
        assert path.read_bytes() == (SAMPLE / path.relative_to(tmp_path)).read_bytes()


def test_the_page_lists_every_file_with_size_and_hash():
    assert files.table(SAMPLE) in PAGE


@pytest.mark.parametrize("folder, name, view", linear.VIEWS)
def test_a_bag_of_words_does_not_solve_a_task(folder, name, view):
    accuracy = linear.accuracy(folder, view)
    assert accuracy < 0.7 and f"{accuracy:.3f}" in PAGE


def test_labels_of_numbers_follow_from_the_texts():
    texts, labels = linear.read_examples("RTE", "train")
    for (premise, hypothesis), label in zip(texts, labels, strict=True):
        match = re.search("(at least|at most|exactly) (.*?) ", hypothesis.lower())
        if match:
            limit = SPELLED.index(match[2])
            numbers = [SPELLED.index(w) for w in premise.lower().split() if w in SPELLED]
            # The number of the subject comes first, that of the object last.
            number = numbers[0 if match.start() == 0 else -1]
            follows = {
                "at least": number >= limit,
                "at most": number <= limit,
                "exactly": number == limit,
            }
            assert (label == "entailment") == follows[match[1]]


def fitting(things, description):
    """The things that a description such as "red circles" fits."""
    values = [*scenes.SIZES, *scenes.COLORS, *scenes.SHAPES]
    keys = {value for value in values if value in description}
    return [thing for thing in things if keys <= set(thing)]


def true_answer(things, question):
    match = re.fullmatch("how many (.*) are there", question)
    if match:
        return str(len(fitting(things, match[1])))
    match = re.fullmatch("is there a (.*)", question)
    if match:
        return "yes" if fitting(things, match[1]) else "no"
    match = re.fullmatch("what (.*) is the (.*)", question)
    if match:
        (thing,) = fitting(things, match[2])
        return getattr(thing, match[1])
    match = re.fullmatch("is the (.*) (left of|right of|above|below) the (.*)", question)
    (one,) = fitting(things, match[1])
    (two,) = fitting(things, match[3])
    holds = {
        "left of": one.x < two.x,
        "right of": one.x > two.x,
        "above": one.y < two.y,
        "below": one.y > two.y,
    }
    return "yes" if holds[match[2]] else "no"


def read_json(name):
    return json.loads((SAMPLE / name).read_text())


def test_answers_are_true_of_the_scenes():
    annotations = read_json("vqa/v2_mscoco_val2014_annotations.json")
    asked = read_json("vqa/v2_OpenEnded_mscoco_val2014_questions.json")
    pairs = zip(asked["questions"], annotations["annotations"], strict=True)
    for question, annotation in pairs:
        things, _ = scenes.sample_scene(question["image_id"])
        answer = true_answer(things, question["question"].rstrip("?"))
        assert answer == annotation["multiple_choice_answer"]


def test_features_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPVisionModel.from_pretrained(SAMPLE / "mini-clip").float()
    features, _, _ = load_features(SAMPLE / "vqa/features/val2014.npy")
    images = torch.from_numpy(np.load(SAMPLE / "vqa/images/val2014.npy"))
    pixels = (images.permute(0, 3, 1, 2) / 255 - clip.MEAN) / clip.STD
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
    cells = output.hidden_states[-1][:, 1:]
    np.testing.assert_allclose(features, cells, rtol=2e-3, atol=5e-3)


def test_span_corruption_loses_nothing():
    ids = list(range(100, 228))
    source, target = pretrain.corrupt(ids, np.random.default_rng(0), 5099)
    # 15 % of 128 tokens are 19, which make 6 gaps of about 3 tokens.
    sentinels = list(range(5094, 5100))
    assert sorted(source + target) == sorted(ids + 2 * sentinels + [1, 1])
    assert len(target) == 19 + 6 + 1


def test_the_magnitudes_of_the_public_t5_leave_the_function_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = T5(pretrain.CONFIG).bfloat16().float()
    pretrain.export(model, tmp_path)
    tokenizer = (SAMPLE / "mini-t5/spiece.model").read_bytes()
    (tmp_path / "spiece.model").write_bytes(tokenizer)
    ids = torch.arange(3, 40)[None]
    expected, _ = model(ids, None, ids)
    found, _ = T5.from_pretrained(tmp_path)(ids, None, ids)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_no_question_of_pretraining_is_a_sentence_of_the_sample():
    pieces = Tokenizer(SAMPLE / "mini-t5/spiece.model").pieces
    facts = {"kinds": [["robin", ["bird"]]], "synonyms": ["ab"], "opposites": ["ab"]}
    words = questions.vocabulary_words(pieces)
    asker = questions.Questions(facts, ["He was saying nothing."], words)
    texts, _ = linear.read_examples("RTE", "train")
    sample = {text.lower() for pair in texts for text in pair}
    rng = random.Random(0)
    for _ in range(2000):
        question, _ = asker.one(rng)
        for part in re.split("[.?:]", question.lower()):
            assert f"{part.strip()}." not in sample
