"""The image side of the bundled sample: scenes, questions, small CLIP, features."""
import json
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from clip_features import load_encoder, load_features, normalise
from test_sample import SAMPLE, make

VQA = SAMPLE / "vqa"
pytestmark = pytest.mark.skipif(not (SAMPLE / "mini-clip").is_dir(), reason="sample/mini-clip and sample/vqa are not bundled yet: sample/make.py scenes, clip and features make them")
SUBSETS = {"train2014": (700, 8400), "val2014": (100, 1200)}


def load(name):
    return json.loads((VQA / name).read_text())


def rows(subset):
    """-> [(image id, question type, question, answer)]"""
    questions, annotations = load(f"v2_OpenEnded_mscoco_{subset}_questions.json"), load(f"v2_mscoco_{subset}_annotations.json")
    return [(q["image_id"], a["question_type"], q["question"], a["multiple_choice_answer"]) for q, a in zip(questions["questions"], annotations["annotations"])]


@pytest.mark.parametrize("subset", SUBSETS)
def test_files_are_vqav2s(subset):
    """The fields of VQAv2's official files, ten answers each, questions and annotations about the same images."""
    questions, annotations = load(f"v2_OpenEnded_mscoco_{subset}_questions.json"), load(f"v2_mscoco_{subset}_annotations.json")
    assert {"info", "task_type", "data_type", "license", "data_subtype", "questions"} == set(questions) and questions["data_subtype"] == subset
    assert {"info", "data_type", "license", "data_subtype", "annotations"} == set(annotations)
    assert len(questions["questions"]) == len(annotations["annotations"]) == SUBSETS[subset][1]
    for q, a in zip(questions["questions"], annotations["annotations"]):
        assert set(q) == {"image_id", "question", "question_id"} and (q["image_id"], q["question_id"]) == (a["image_id"], a["question_id"])
        assert set(a) == {"question_type", "multiple_choice_answer", "answers", "image_id", "answer_type", "question_id"}
        assert [x["answer_id"] for x in a["answers"]] == list(range(1, 11)) and a["question_type"] in " ".join(q["question"].split())
        assert set(a["answers"][0]) == {"answer", "answer_confidence", "answer_id"} and a["answer_type"] in ("yes/no", "number", "other")


def test_splits_share_no_image_and_images_are_drawn_from_their_seed():
    ids = {subset: json.loads((VQA / "images" / f"{subset}.json").read_text()) for subset in SUBSETS}
    assert not set(ids["train2014"]) & set(ids["val2014"])
    for subset, (count, _) in SUBSETS.items():
        pixels = np.load(VQA / "images" / f"{subset}.npy", allow_pickle=False)
        assert pixels.shape == (count, 56, 56, 3) and pixels.dtype == np.uint8 and len(ids[subset]) == count
        for row in (0, count // 2, count - 1):
            assert np.array_equal(make.sample_scene(ids[subset][row])[1], pixels[row])
    assert {image for image, *_ in rows("val2014")} == set(ids["val2014"])


def truth(things, question):
    """The answer worked out anew from the words of the question and the scene's things."""
    words = question.rstrip("?").replace("crosses", "cross").split()

    def fitting(description):
        keys = [w.removesuffix("s") if w != "cross" else w for w in description if w not in ("thing", "things")]
        return [t for t in things if all(key in (t.size, t.color, t.shape) for key in keys)]
    if words[:2] == ["how", "many"]:
        return str(len(fitting(words[2:-2])))
    if words[:3] == ["is", "there", "a"]:
        return "yes" if fitting(words[3:]) else "no"
    if words[0] == "what":
        one, = fitting(words[4:])
        return {"shape": one.shape, "color": one.color, "size": one.size}[words[1]]
    i = next(i for i, w in enumerate(words) if w in ("left", "right", "above", "below"))
    (one,), (two,) = fitting(words[2:i]), fitting(words[words.index("the", i) + 1:])
    return "yes" if {"left": one.x < two.x, "right": one.x > two.x, "above": one.y < two.y, "below": one.y > two.y}[words[i]] else "no"


def test_answers_are_true_of_the_scenes():
    for subset in SUBSETS:
        scenes = {}
        for image, _, question, answer in rows(subset):
            things = scenes.setdefault(image, make.sample_scene(image)[0])
            assert truth(things, question) == answer, (image, question, things)


def test_the_question_alone_says_little(capsys):
    """The most frequent training answer to the same question (else to questions of its type): under one half of the validation questions."""
    asked, kinds = defaultdict(Counter), defaultdict(Counter)
    for _, kind, question, answer in rows("train2014"):
        asked[question][answer] += 1
        kinds[kind][answer] += 1
    right = [(asked.get(question) or kinds[kind]).most_common(1)[0][1] for _, kind, question, _ in rows("val2014")]
    guesses = [max((asked.get(question) or kinds[kind]).items(), key=lambda pair: (pair[1], pair[0]))[0] == answer for _, kind, question, answer in rows("val2014")]
    assert len(right) == 1200 and np.mean(guesses) < 0.5
    assert np.mean(guesses) == pytest.approx(make.prior([row[1:] for row in rows("train2014")], [row[1:] for row in rows("val2014")]))


def test_mini_clip_is_a_clip():
    """transformers loads the same files and has the same hidden states."""
    transformers = pytest.importorskip("transformers")
    folder = SAMPLE / "mini-clip"
    assert (folder / "model.safetensors").stat().st_size < 2.5e6
    theirs = transformers.CLIPVisionModelWithProjection.from_pretrained(folder).float().eval()
    ours = load_encoder(folder)
    ours = ours[0] if isinstance(ours, tuple) else ours
    pixels = normalise(torch.from_numpy(np.load(VQA / "images/val2014.npy", allow_pickle=False)[:4]).permute(0, 3, 1, 2))
    with torch.no_grad():
        expected = theirs.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        torch.testing.assert_close(ours(pixels), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("subset", SUBSETS)
def test_features_are_the_encoders(subset):
    """The bundled features are what transformers' encoder makes of the bundled pixels, to float16's rounding."""
    transformers = pytest.importorskip("transformers")
    features, places, _ = load_features(VQA / "features" / f"{subset}.npy")
    assert features.shape[1] == 49 and len(places) == len(features) == SUBSETS[subset][0]
    theirs = transformers.CLIPVisionModelWithProjection.from_pretrained(SAMPLE / "mini-clip").float().eval()
    pixels = np.load(VQA / "images" / f"{subset}.npy", allow_pickle=False)
    ids = json.loads((VQA / "images" / f"{subset}.json").read_text())
    for row in (0, 17, len(ids) - 1):
        x = normalise(torch.from_numpy(pixels[row:row + 1]).permute(0, 3, 1, 2))
        with torch.no_grad():
            expected = theirs.vision_model(pixel_values=x, output_hidden_states=True).hidden_states[-1][0, 1:]
        torch.testing.assert_close(torch.from_numpy(np.array(features[places[str(ids[row])]])).float(), expected, rtol=2e-3, atol=5e-3)
