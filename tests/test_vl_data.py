"""Image tasks: accuracies worked by hand from the official rules, CIDEr-D and BLEU against pycocoevalcap, files written by hand."""
import json
import re

import numpy as np
import pytest

import data
from conftest import run
from data import IMAGE_TASKS, UserError
from t5 import Tokenizer

VQA, GQA, OKVQA, CAPTION, SNLIVE = (IMAGE_TASKS[name] for name in ("vqa", "gqa", "okvqa", "caption", "snlive"))


# ----------------------------------------------------------------------------------------------------- VQA accuracy

def spread(**counts):
    return [answer for answer, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize("answer, gold, expected", [
    # all ten the same: compared as they are, but for newlines, tabs and spaces at the ends
    ("yes", dict(yes=10), 1), ("Yes", dict(yes=10), 0), (" yes\n", dict(yes=10), 1), ("new\tyork", {"new york": 10}, 1),
    ("yes", {" yes": 5, "yes\n": 5}, 1), ("the cat", dict(cat=10), 0), ("2", dict(two=10), 0), ("don't", dict(dont=10), 0), ("3.", {"3": 10}, 0),
    # n of ten: 0, .3, .6, .9, 1
    ("Yes", dict(yes=9, no=1), 1), ("NO", dict(yes=9, no=1), .3), ("cat", dict(cat=2, dog=8), .6), ("cat", dict(cat=3, dog=7), .9),
    ("cat", dict(cat=4, dog=6), 1), ("bird", dict(cat=4, dog=6), 0), ("cat", {"cat": 1, "a cat": 1, "The Cat": 1, "dog": 7}, .9),
    # number words and articles
    ("2", dict(two=4, x=6), 1), ("none", {"0": 4, "x": 6}, 1), ("Zero", dict(none=4, x=6), 1), ("ten", {"10": 4, "x": 6}, 1),
    ("11", dict(eleven=4, x=6), 0),
    ("twenty one", {"twenty 1": 4, "x": 6}, 1), ("a an the cat", dict(cat=4, x=6), 1), ("the", {"": 4, "x": 6}, 1),
    ("another", dict(other=4, x=6), 0),
    # marks: a space for them, nothing where one stands beside a space, nothing at all where a comma stands between digits
    ("t-shirt", {"t shirt": 4, "x": 6}, 1), ("t-shirt", dict(tshirt=4, x=6), 0), ("t- shirt", {"t shirt": 4, "x": 6}, 1),
    ("hot-dog -bun", {"hotdog bun": 4, "x": 6}, 1),
    ("red,blue", {"red blue": 4, "x": 6}, 1), ("red,blue, green", {"redblue green": 4, "x": 6}, 1), ("red/blue", {"red blue": 4, "x": 6}, 1),
    ("2,000", {"2000": 4, "x": 6}, 1), ("1,000-2,000", {"10002000": 4, "x": 6}, 1), ("1000-2000", {"1000 2000": 4, "x": 6}, 1),
    ('"stop!"', dict(stop=4, x=6), 1), ("{[(why?)]}", dict(why=4, x=6), 1), ("a_b\\c=d+e>f<g@h`i;j", {"b c d e f g h i j": 4, "x": 6}, 1),
    ("b_c\\d=e+f>g<h@i`j;k", {"b c d e f g h i j k": 4, "x": 6}, 1),
    ("10:30", {"10 30": 4, "x": 6}, 0), ("10:30", {"10:30": 4, "x": 6}, 1), ("50%", {"50": 4, "x": 6}, 0), ("#1", {"1": 4, "x": 6}, 0),
    ("dogs'", dict(dogs=4, x=6), 0),
    # periods go unless a digit follows; a digit before them does not help; at most 32 go
    ("u.s.a.", dict(usa=4, x=6), 1), ("3.", {"3": 4, "x": 6}, 1), ("3.5", {"35": 4, "x": 6}, 0), (".5", {"5": 4, "x": 6}, 0),
    ("1.b", {"1b": 4, "x": 6}, 1),
    ("b" + 32 * ".", dict(b=4, x=6), 1), ("b" + 33 * ".", dict(b=4, x=6), 0),
    # contractions get their apostrophe, but not those with capitals in the official table nor those that are words; one is wrong there
    ("dont", {"don't": 4, "x": 6}, 1), ("Hes", {"he's": 4, "x": 6}, 1), ("couldnt've", {"couldn'tve": 4, "x": 6}, 1),
    ("ow's'at", {"'ow's'at": 4, "x": 6}, 1),
    ("yalld've", {"y'all'd've": 4, "x": 6}, 0), ("y'all'dve", {"yall'd've": 4, "x": 6}, 1), ("its", {"it's": 4, "x": 6}, 0),
    ("im", {"i'm": 4, "x": 6}, 0),
    ("well", {"we'll": 4, "x": 6}, 0), ("somebody'd", dict(somebodyd=4, x=6), 1), ("twas", {"'twas": 4, "x": 6}, 1),
    ("5 oclock", {"five o'clock": 4, "x": 6}, 1),
    # letters of other scripts
    ("CAFÉ", dict(café=4, x=6), 1), ("cafe", dict(café=4, x=6), 0), ("", dict(cat=4, x=6), 0),
])
def test_vqa_accuracy(answer, gold, expected):
    """Worked by hand from the official evaluator's rules."""
    assert data.vqa_accuracy(answer, spread(**gold)) == pytest.approx(expected)


def test_every_contraction():
    """The official table has 114 entries that can match a lower-case word and change it."""
    assert len(data.CONTRACTIONS) == 114 and data.normalise_answer("Shed've DONT mustve") == "she'd've don't must've"


@pytest.mark.parametrize("n, k, expected", [(0, 10, 0), (1, 10, .3), (2, 10, .6), (3, 10, .9), (4, 10, 1), (10, 10, 1), (2, 2, 1 / 3), (1, 2, 1 / 6),
                                            (3, 3, 2 / 3), (2, 3, 4 / 9), (1, 1, 1), (0, 1, 0)])
def test_leave_one_out(n, k, expected):
    """2 of 10: two annotators see 1 match among the others, eight see 2: (2 * 1/3 + 8 * 2/3) / 10 = .6. Not min(1, n / 3)."""
    assert data.leave_one_out(n, k) == pytest.approx(expected)


def test_vqa_scores():
    example = lambda kind, **counts: data.Example([], "", dict(answers=spread(**counts), kind=kind), "")
    examples = [example("yes/no", yes=10), example("yes/no", yes=9, no=1), example("other", red=7, blue=3)]
    assert data.score(VQA, ["yes", "no", "blue"], examples) == {k: pytest.approx(v) for k, v in
                                                               {"accuracy": (1 + .3 + .9) / 3, "yes/no": .65, "other": .9}.items()}
    assert data.score(VQA, ["4"], [example("number", four=5, five=5)]) == {"accuracy": 1, "number": 1}


# --------------------------------------------------------------------------------------------------------- captions

def random_captions(rng, images):
    words = "a the man dog cat on with red table sits runs of".split()
    sentence = lambda low=0: list(rng.choice(words, rng.integers(low, 14)))
    return [sentence() for _ in range(images)], [[sentence(1) for _ in range(rng.integers(1, 6))] for _ in range(images)]


def test_cider_and_bleu_equal_pycocoevalcap():
    """Sentences of no, one and few words, images with 1 to 5 references, and one image alone, whose CIDEr-D is 0."""
    cider = pytest.importorskip("pycocoevalcap.cider.cider", reason="pycocoevalcap is what is compared with").Cider()
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    rng = np.random.default_rng(0)
    for images in (1, 2, 3, 10, 60):
        for _ in range(5):
            hypotheses, references = random_captions(rng, images)
            hypotheses[-1] = references[-1][0]
            results = {i: [" ".join(h)] for i, h in enumerate(hypotheses)}
            gold = {i: [" ".join(r) for r in image] for i, image in enumerate(references)}
            assert data.cider(hypotheses, references) == pytest.approx(cider.compute_score(gold, results)[0], abs=1e-9)
            bleu = BleuScorer(n=4)
            for i in range(images):
                bleu += (results[i][0], gold[i])
            expected = bleu.compute_score(option="closest")[0][3]
            assert data.bleu4(hypotheses, references) == pytest.approx(expected, rel=1e-9)
    assert data.cider(*random_captions(rng, 1)) == 0


def test_perfect_captions():
    """Each caption its own only reference: all cosines and precisions are 1."""
    captions = [["a", "cat", "sits", "there"], ["two", "dogs", "run", "home", "now"]]
    assert data.cider(captions, [[c] for c in captions]) == pytest.approx(10) and data.bleu4(captions, [[c] for c in captions]) == pytest.approx(1)
    assert data.bleu4([[], []], [[c] for c in captions]) == 0


@pytest.mark.parametrize("text, words", [
    ("A man's dog, don't run!", "a man 's dog do n't run"), ("The T-shirt\u2014it\u2019s 2,000 miles", "the t-shirt it 's 2,000 miles"),
    ("Two dogs; one sits -- at 10:30 a.m.", "two dogs one sits at 10:30 a.m."), ('"Stop"/go', "stop go"),
    ("a cell phone,and a bag .", "a cell phone and a bag"),
    ("I cannot see B&W and/or 50% o'clock", "i can not see b&w and/or 50 % o'clock"), ("'quoted' dogs'", "quoted dogs"), ("Café", "café"),
    ("...", ""),
])
def test_tokenize_caption(text, words):
    assert data.tokenize_caption(text) == words.split()


def test_caption_scores():
    examples = [data.Example([], "", ["A cat sits there.", "Cat!"], "1"), data.Example([], "", ["Two dogs run home now."], "2")]
    result = data.score(CAPTION, ["a cat sits there", "two dogs run home now"], examples)
    assert list(result) == ["cider", "bleu4"] and result["bleu4"] == pytest.approx(1) and 5 < result["cider"] < 10


# ---------------------------------------------------------------------------------------------------- files by hand

def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def write_vqa(folder, subset, rows, prefix="v2_", answers=True):
    """rows: (question id, image id, question, answer type, list of answers)"""
    dump(folder / f"{prefix}OpenEnded_mscoco_{subset}_questions.json", {"data_type": "mscoco", "data_subtype": subset, "questions": [
        {"image_id": image, "question": text, "question_id": key} for key, image, text, *_ in rows]})
    answers and dump(folder / f"{prefix}mscoco_{subset}_annotations.json", {"data_subtype": subset, "annotations": [
        {"question_id": key, "image_id": image, "answer_type": kind, "question_type": "", "multiple_choice_answer": "",
         "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(given)]}
        for key, image, _, kind, given in reversed(rows)]})                    # the two files need not have one order


TRAIN = [(9000, 9, "What is this? ", "other", spread(cat=6, dog=3, bird=1)), (9001, 9, "Is it a café?", "yes/no", spread(yes=10)),
         (9002, 25, "", "other", ["", " "] + 8 * ["\u732b "]), (9003, 30, "Why?", "other", 10 * [""])]
VAL = [(42000, 42, "How many?", "number", spread(**{"2": 1, "3": 1})), (42001, 42, "Where?", "other", ["here"])]


@pytest.fixture
def vqa(tmp_path):
    write_vqa(tmp_path / "VQAv2", "train2014", TRAIN)
    write_vqa(tmp_path / "VQAv2", "val2014", VAL)
    return tmp_path


def test_vqa_files(vqa):
    splits = data.make_splits(VQA, vqa, "official")
    assert {k: [e.index for e in v] for k, v in splits.items()} == {"train": ["9000", "9001", "9002", "9003"], "validation": ["42000", "42001"]}
    first, second, third, fourth = splits["train"]
    assert first.source == "vqa: What is this?" and first.image == ("train2014", "9") and first.target == "cat"
    assert first.targets == (("cat", 1), ("dog", pytest.approx(.9)), ("bird", pytest.approx(.3)))
    assert first.gold == dict(answers=TRAIN[0][4], kind="other") and second.source == "vqa: Is it a café?" and second.image == first.image
    assert third.parts == ["vqa:", ""] and third.targets == (("\u732b", 1),) and third.gold["answers"][-1] == "\u732b "
    assert (fourth.target, fourth.targets) == ("", ())
    two, one = splits["validation"]
    assert two.image == ("val2014", "42") and two.target == "2" and two.targets == (("2", pytest.approx(1 / 6)), ("3", pytest.approx(1 / 6)))
    assert one.targets == (("here", 1),)


def karpathy(*images):
    """images: (subset, cocoid, split, captions)"""
    return {"images": [{"filepath": subset, "filename": f"COCO_{subset}_{key:012}.jpg", "cocoid": key, "split": split, "imgid": i,
                        "sentences": [{"raw": raw, "tokens": raw.split()} for raw in captions]} for i, (subset, key, split, captions) in enumerate(images)],
            "dataset": "coco"}


IMAGES = karpathy(("train2014", 9, "train", ["A cat.", " A café \n", " "]), ("val2014", 42, "restval", ["Two dogs."]), ("train2014", 25, "val", ["A dog."]),
                  ("val2014", 30, "test", ["Why.", "Why."]))


@pytest.mark.parametrize("place", ["VQAv2", "COCO", "vl/COCO", "."])
def test_karpathy_splits(vqa, place, capsys):
    """Both files are pooled, restval trains, no image is in two splits; without the file the official splits, with a note."""
    official = data.make_splits(VQA, vqa, "paper")
    assert "no dataset_coco.json" in capsys.readouterr().err and official == data.make_splits(VQA, vqa, "official")
    assert not capsys.readouterr().err
    path = dump(vqa / place / "dataset_coco.json", IMAGES)
    splits = data.make_splits(VQA, vqa, "paper")
    assert {k: [e.index for e in v] for k, v in splits.items()} == {"train": ["9000", "9001", "42000", "42001"], "validation": ["9002"], "test": ["9003"]}
    images = [{e.image for e in part} for part in splits.values()]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]
    assert not capsys.readouterr().err and data.make_splits(VQA, vqa, "official") == official
    dump(path, karpathy(("train2014", 9, "train", []), ("train2014", 25, "val", [])))
    with pytest.raises(UserError, match=re.escape(f"{path}: 3 of 6 questions of {vqa / 'VQAv2'} ask about an image that is not there: 30, 42")):
        data.make_splits(VQA, vqa, "paper")


def test_folders(vqa):
    """VQAv2/, vl/VQAv2/, or the very folder of the files; then dataset_coco.json may be in COCO beside it."""
    for data_dir in (vqa, vqa / "VQAv2"):
        assert len(data.make_splits(VQA, data_dir, "official")["train"]) == 4
    (vqa / "vl").mkdir()
    vqa = (vqa / "VQAv2").rename(vqa / "vl" / "VQAv2").parent
    for place in ("vl/COCO", "COCO"):
        path = dump(vqa.parent / place / "dataset_coco.json", IMAGES)
        for data_dir in (vqa.parent, vqa.parent / "vl", vqa.parent / "vl" / "VQAv2"):
            assert len(data.make_splits(VQA, data_dir)["test"]) == 1
        path.unlink()
    with pytest.raises(UserError, match="OKVQA: no such folder .nor vl/OKVQA below .*expected the official files of okvqa"):
        data.find_folder(OKVQA, vqa.parent)


def test_okvqa_files(tmp_path):
    for subset, rows in (("train2014", TRAIN), ("val2014", VAL)):
        write_vqa(tmp_path / "vl" / "OKVQA", subset, rows, prefix="")
    dump(tmp_path / "COCO" / "dataset_coco.json", IMAGES)
    splits = data.make_splits(OKVQA, tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {"train": 4, "validation": 2} and splits["train"][0].source == "okvqa: What is this?"


def test_unlabelled_vqa(vqa):
    """test2015 before test-dev2015, whose images are test2015's; the other tasks have none."""
    write_vqa(vqa / "VQAv2", "test-dev2015", [(1, 7, "What?")], answers=False)
    example, = data.read_unlabelled(VQA, vqa)
    assert (example.source, example.image, example.index, example.target, example.targets, example.gold) == ("vqa: What?", ("test2015", "7"), "1", "", (), None)
    write_vqa(vqa / "VQAv2", "test2015", [(1, 7, "What?"), (2, 7, "Who?")], answers=False)
    assert len(data.read_unlabelled(VQA, vqa)) == 2
    for task in (GQA, OKVQA, CAPTION, SNLIVE, data.TASKS["rte"]):
        with pytest.raises(UserError, match=f"task {task.name} has no test questions without answers"):
            data.read_unlabelled(task, vqa)


def gqa_row(answer="Yes ", **more):
    return {"question": "Is it red?", "imageId": "n123", "answer": answer, "fullAnswer": "Yes, it is.", "isBalanced": True, **more}


def test_gqa_files(tmp_path):
    for name in ("train", "val"):
        dump(tmp_path / "GQA" / f"{name}_balanced_questions.json", {"0201": gqa_row(), "02": gqa_row("no", imageId=7)})
    splits = data.make_splits(GQA, tmp_path)
    assert list(splits) == ["train", "validation"] and splits["train"] == [
        data.Example(["gqa:", "Is it red?"], "Yes", "Yes ", "0201", ("gqa", "n123")), data.Example(["gqa:", "Is it red?"], "no", "no", "02", ("gqa", "7"))]
    dump(tmp_path / "GQA" / "testdev_balanced_questions.json", {"5": gqa_row()})
    assert [e.index for e in data.make_splits(GQA, tmp_path)["test"]] == ["5"]
    dump(tmp_path / "GQA" / "testdev_balanced_questions.json", {})           # a split without rows is none: nothing could be scored
    assert list(data.make_splits(GQA, tmp_path)) == ["train", "validation"]
    assert data.score(GQA, [" yes", "noo"], splits["train"]) == {"accuracy": .5}


def official_captions(folder):
    for subset, keys in (("train2014", (9, 25)), ("val2014", (42,))):
        dump(folder / f"captions_{subset}.json", {"images": [{"id": key, "file_name": f"COCO_{subset}_{key:012}.jpg"} for key in keys], "annotations": [
            {"image_id": key, "id": 10 * key + i, "caption": f"Caption {i} of {key} \n"} for i in range(2) for key in keys]})


def test_caption_files(tmp_path):
    """An Example an image; Karpathy's splits where his file is, else, or if the official ones are asked for and there, those."""
    dump(tmp_path / "COCO" / "dataset_coco.json", IMAGES)
    splits = data.make_splits(CAPTION, tmp_path)
    assert {k: [e.image for e in v] for k, v in splits.items()} == {"train": [("train2014", "9"), ("val2014", "42")], "validation": [("train2014", "25")],
                                                                   "test": [("val2014", "30")]}
    assert splits["train"][0] == data.Example(["caption:"], "A cat.", ["A cat.", "A café"], "9", ("train2014", "9"), (("A cat.", 1), ("A café", 1)))
    assert data.make_splits(CAPTION, tmp_path, "official") == splits == data.make_splits(CAPTION, tmp_path / "COCO")
    official_captions(tmp_path / "COCO")
    assert data.make_splits(CAPTION, tmp_path) == splits
    official = data.make_splits(CAPTION, tmp_path, "official")
    (tmp_path / "COCO" / "dataset_coco.json").unlink()
    assert official == data.make_splits(CAPTION, tmp_path)
    assert {k: [(e.image, e.gold) for e in v] for k, v in official.items()} == {
        "train": [(("train2014", str(i)), [f"Caption 0 of {i}", f"Caption 1 of {i}"]) for i in (9, 25)],
        "validation": [(("val2014", "42"), ["Caption 0 of 42", "Caption 1 of 42"])]}


def snli_row(label="neutral", **more):
    return json.dumps({"gold_label": label, "sentence2": " A dog\u2019s bowl.", "sentence1": "Not used.", "pairID": "1.jpg#0r1n", **(more or {"Flickr30K_ID": "1"})})


def test_snlive_files(tmp_path):
    """Three spellings of the image's key, "-" left out, a last line without its end."""
    for name in ("train", "dev"):
        dump(tmp_path / "SNLI-VE" / f"snli_ve_{name}.jsonl", "\n".join([snli_row(), snli_row("-"), snli_row("entailment", Flickr30kID="2"), "",
                                                                        snli_row("contradiction", Flikr30kID="3.jpg")]))
    splits = data.make_splits(SNLIVE, tmp_path)
    assert list(splits) == ["train", "validation"] and [e.image for e in splits["train"]] == [("flickr30k", i) for i in "123"]
    assert splits["train"][0] == data.Example(["snlive hypothesis:", "A dog\u2019s bowl."], "neutral", "neutral", "1.jpg#0r1n", ("flickr30k", "1"))
    dump(tmp_path / "SNLI-VE" / "snli_ve_test.jsonl", snli_row())
    assert len(data.make_splits(SNLIVE, tmp_path)["test"]) == 1
    assert data.score(SNLIVE, ["neutral", "neutral", ""], splits["train"]) == {"accuracy": pytest.approx(1 / 3)}


def test_sources_without_a_field(vocabulary):
    """A prompt alone, or with an empty question, however little room there is."""
    tokenizer = Tokenizer(vocabulary)
    for parts in (["question"], ["question", ""]):
        ids = data.encode_source(parts, tokenizer.encode, 128)
        assert ids[-1] == 1 and tokenizer.decode(ids) == "question"
        assert data.encode_source(parts, tokenizer.encode, 1)[-1] == 1


def test_tasks():
    assert data.VL == ["vqa", "gqa", "caption"] and all(data.find_task(name) is task for name, task in IMAGE_TASKS.items())
    assert {name: (t.prompt, t.metrics, t.max_answer, t.beams) for name, t in IMAGE_TASKS.items()} == {
        "vqa": ("vqa:", ("accuracy",), 10, 1), "gqa": ("gqa:", ("accuracy",), 10, 1), "okvqa": ("okvqa:", ("accuracy",), 10, 1),
        "caption": ("caption:", ("cider",), 40, 5), "snlive": ("snlive hypothesis:", ("accuracy",), 8, 1)}


# --------------------------------------------------------------------------------------------- features and results

@pytest.mark.parametrize("task, expected", [
    (VQA, [{"question_id": 90, "answer": "two"}, {"question_id": "n7", "answer": "café"}]),
    (OKVQA, [{"question_id": 90, "answer": "two"}, {"question_id": "n7", "answer": "café"}]),
    (CAPTION, [{"image_id": 90, "caption": "two"}, {"image_id": "n7", "caption": "café"}]),
    (GQA, [{"questionId": "90", "prediction": "two"}, {"questionId": "n7", "prediction": "café"}]),
    (SNLIVE, [{"pairID": "90", "gold_label": "two"}, {"pairID": "n7", "gold_label": "café"}]),
])
def test_results(task, expected, tmp_path):
    data.write_results(tmp_path / task.results, task, ["two", "café"], [data.Example([], "", None, index) for index in ("90", "n7")])
    text = (tmp_path / task.results).read_text()
    assert ([json.loads(line) for line in text.splitlines()] if task is SNLIVE else json.loads(text)) == expected


# ---------------------------------------------------------------------------------------------------- user's mistakes

QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"


def question(**more):
    return {"image_id": 9, "question": "Why?", "question_id": 1, **more}


def annotation(**more):
    return {"question_id": 1, "image_id": 9, "answer_type": "other", "answers": [{"answer": "so"}], **more}


@pytest.mark.parametrize("name, content, message", [
    (QUESTIONS, None, "no such file"),
    (QUESTIONS, '{"questions": [{"image_id": 9, "quest', "not JSON: Unterminated string starting at: line 1 column"),
    (QUESTIONS, [], "the file holds [], expected a JSON object"),
    (QUESTIONS, {"data_subtype": "train2014"}, "questions holds None, expected a list"),
    (QUESTIONS, {"questions": [question()]}, "found data_subtype None, expected train2014"),
    (QUESTIONS, {"questions": [question(), {"question_id": 2, "question": "?"}]}, "questions[1]: found no image_id in {'question_id': 2, 'question': '?'}, expected image_id as a whole"),
    (QUESTIONS, {"questions": [question(question=5)]}, "questions[0]: found question '5', expected question as a string"),
    (QUESTIONS, {"questions": [question(question_id=True)]}, "questions[0]: found question_id 'True', expected question_id as a whole number or a string"),
    (QUESTIONS, {"questions": ["Why?"]}, "questions[0]: found no question_id in Why?, expected"),
    (QUESTIONS, {"questions": [question(), question(question_id="1")]}, "questions[1]: found question_id 1 a second time, expected it once"),
    (ANNOTATIONS, None, "no such file"), (ANNOTATIONS, '{"annotations": [', "not JSON"),
    (ANNOTATIONS, {"annotations": [annotation(), annotation()]}, "annotations[1]: found question_id 1 a second time"),
    (ANNOTATIONS, {"annotations": [annotation(answers="so")]}, "annotations[0]: found answers 'so', expected answers as a list"),
    (ANNOTATIONS, {"annotations": [annotation(answer_type=None)]}, "annotations[0]: found answer_type 'None', expected answer_type as a string"),
    (ANNOTATIONS, {"annotations": [annotation(answers=[])]}, 'question_id 1: found answers [], expected a list of at least one {"answer": "..."}'),
    (ANNOTATIONS, {"annotations": [annotation(answers=[{"answer": 3}])]}, "question_id 1: found answers [{'answer': 3}], expected a list"),
    (ANNOTATIONS, {"annotations": [annotation(answers=["so"])]}, "question_id 1: found answers ['so'], expected a list"),
    (ANNOTATIONS, {"annotations": []}, f"1 of 1 questions of {QUESTIONS} have no annotation: 1"),
    (ANNOTATIONS, {"annotations": [annotation(), *(annotation(question_id=i) for i in range(2, 9))]},
     f"7 of 8 annotations have no question in {QUESTIONS}: 2, 3, 4, 5, 6, ..."),
])
def test_wrong_vqa_files(name, content, message, tmp_path):
    write_vqa(tmp_path, "val2014", VAL)
    dump(tmp_path / QUESTIONS, {"data_subtype": "train2014", "questions": [question()]})
    dump(tmp_path / ANNOTATIONS, {"annotations": [annotation()]})
    assert len(data.make_splits(VQA, tmp_path, "official")["train"]) == 1
    dump(tmp_path / name, content)
    if content is None:
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / name}: {message}")):
        VQA.read(VQA, tmp_path, "official")


@pytest.mark.parametrize("task, name, content, message", [
    (VQA, "dataset_coco.json", karpathy(("train2014", 9, "dev", [])), "cocoid 9: found split 'dev', expected one of train, restval, val, test"),
    (VQA, "dataset_coco.json", {"images": [{"cocoid": 9}]}, "images[0]: found no split in {'cocoid': 9}, expected split as a string"),
    (CAPTION, "dataset_coco.json", {"images": [{"cocoid": 9, "split": "val", "filepath": "val2014"}]}, "images[0]: found no sentences in"),
    (CAPTION, "dataset_coco.json", karpathy(("train2014", 9, "train", ["A."]),
    ("val2014", 4, "val", [" "])), "image 4: found no captions, expected at least one"),
    (CAPTION, "dataset_coco.json", {"images": [{"cocoid": 9, "split": "val", "filepath": "v", "sentences": [{"tokens": []}]}]}, "cocoid 9: sentences[0]: found no raw"),
    (CAPTION, "captions_train2014.json", {"images": [{"id": 1}], "annotations": [{"id": 5, "image_id": 2, "caption": "A."}]},
     "annotation 5: found image_id 2, which is none of the file's images"),
    (CAPTION, "captions_train2014.json", {"images": [{"id": 1}], "annotations": []}, "image 1: found no captions"),
    (CAPTION, "captions_train2014.json", {"images": [{"id": 1}, {"id": 1}], "annotations": []}, "images[1]: found id 1 a second time"),
    (CAPTION, "captions_val2014.json", None, "no such file"),
    (GQA, "train_balanced_questions.json", {"7": gqa_row(answer=3)}, "question 7: found answer '3', expected answer as a string"),
    (GQA, "train_balanced_questions.json", {"7": "x"}, "question 7: found no question in x"),
    (GQA, "val_balanced_questions.json", None, "no such file"),
    (SNLIVE, "snli_ve_train.jsonl", snli_row() + "\n" + snli_row("maybe"), "line 2: found label 'maybe', expected one of entailment, neutral, contradiction"),
    (SNLIVE, "snli_ve_train.jsonl", snli_row()[:-5], "line 1: not JSON"), (SNLIVE, "snli_ve_train.jsonl", "[]", "line 1: found [], expected a JSON object"),
    (SNLIVE, "snli_ve_train.jsonl", snli_row(image=3), "line 1: found no Flickr30K_ID in"),
    (SNLIVE, "snli_ve_dev.jsonl", None, "no such file, expected the validation split"),
])
def test_other_wrong_files(task, name, content, message, vqa):
    """Beside a wrong file all others are right: what is complained about is the wrong one."""
    folder = vqa / task.folder
    if task is CAPTION:
        official_captions(folder)
    for file in ("train", "val"):
        dump(vqa / "GQA" / f"{file}_balanced_questions.json", {"5": gqa_row()})
    for file in ("train", "dev"):
        dump(vqa / "SNLI-VE" / f"snli_ve_{file}.jsonl", snli_row())
    assert data.make_splits(task, vqa)
    dump(folder / name, content)
    if content is None:
        (folder / name).unlink()
    with pytest.raises(UserError, match=re.escape(f"{folder / name}: {message}")):
        data.make_splits(task, vqa)


def test_empty_split(vqa):
    write_vqa(vqa / "VQAv2", "val2014", [])
    with pytest.raises(UserError, match="VQAv2: found examples: 4 of train, 0 of validation; expected at least 1 of each"):
        data.make_splits(VQA, vqa, "official")


def test_command_line(vqa):
    out, _ = run("data.py", "--task", "vqa", "--data-dir", vqa, "--split", "official")
    assert out.startswith("train 4, validation 2") and "[train2014/9] vqa: What is this?\n  -> cat\n" in out
    assert run("data.py", "--task", "vqa", "--data-dir", vqa, "--split", "official", "--download")[0] == out      # they are there already
    for task, place in (("snlive", "SNLI-VE"), ("imdb", "aclImdb")):
        error = run("data.py", "--task", task, "--data-dir", vqa, "--download", ok=False)[1]
        assert f"the files of {task} are not downloaded: put the official ones into {vqa / place}" in error
    assert "SNLI-VE: no such folder" in run("data.py", "--task", "snlive", "--data-dir", vqa, ok=False)[1]
    assert "the known ones are cola, sst2" in run("data.py", "--task", "vqa2", "--data-dir", vqa, ok=False)[1]
