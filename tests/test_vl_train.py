"""The command line on tasks with images, at tiny size: made-up questions in VQAv2's format about made-up features."""
import argparse
import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import train as train_module
from conftest import execute, read_json, run
from test_train import TINY, log_of

ANSWERS = ["cat", "dog", "bird", "fish"]


def write_features(folder, image_set, images, cells=5, width=6, seed=0, **meta):
    """A feature file as clip_features.py writes it: image i shows answer i % 4, as a direction in all its cells."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    features = rng.normal(0, 0.1, (len(images), cells, width)) + 2 * np.eye(4, width)[np.array(images) % 4][:, None]
    np.save(folder / f"{image_set}.npy", features.astype(np.float16))
    about = dict(ids=[str(i) for i in images], kind="made up", weights="0", preprocessing={}, sha256=f"{image_set} {seed}") | meta
    (folder / f"{image_set}.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def vl(tmp_path_factory):
    """48 training and 24 validation questions with ten answers each, two questions an image, and 3 without answers."""
    folder = tmp_path_factory.mktemp("vl")
    (folder / "VQAv2").mkdir()
    for subset, count in (("train2014", 24), ("val2014", 12), ("test2015", 3)):
        questions = [dict(image_id=i, question=text, question_id=10 * i + k) for i in range(count)
                     for k, text in enumerate(["is it a man", "a big house"][:1 if subset == "test2015" else 2])]
        (folder / "VQAv2" / f"v2_OpenEnded_mscoco_{subset}_questions.json").write_text(json.dumps(dict(data_subtype=subset, questions=questions)))
        notes = [dict(image_id=q["image_id"], question_id=q["question_id"], answer_type="other", multiple_choice_answer="",
                      answers=[dict(answer=ANSWERS[q["image_id"] % 4], answer_id=k) for k in range(10)]) for q in questions]
        (folder / "VQAv2" / f"v2_mscoco_{subset}_annotations.json").write_text(json.dumps(dict(annotations=notes)))
        write_features(folder / "features", subset, range(count))
    return folder


def command(checkpoint, vl, out, *more, task="vqa"):
    return ["train.py", "--task", task, "--model", checkpoint, "--data-dir", vl, "--features", vl / "features", "--out", out, "--split", "official", *TINY, *more]


RUN = ["--steps", 100, "--eval-every", 50, "--lr", 0.02, "--warmup-steps", 4]


@pytest.fixture(scope="module")
def finished(checkpoint, vl, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    run(*command(checkpoint, vl, out, *RUN))
    return out


def test_answers_come_from_the_image(finished, checkpoint, vl, tmp_path):
    """Both questions are the same for all images: only the image tells the answer, and shuffled images tell nothing."""
    metrics = read_json(finished / "metrics.json")["vqa"]["validation"]
    assert metrics["accuracy"] > 0.9 and metrics["other"] == metrics["accuracy"] and "number" not in metrics
    run(*command(checkpoint, vl, tmp_path / "shuffled", *RUN, "--vision", "shuffled"))
    assert read_json(tmp_path / "shuffled" / "metrics.json")["vqa"]["validation"]["accuracy"] < 0.6
    config = read_json(finished / "config.json")
    assert config["hyperpelt"]["visual_width"] == 6 and len(config["fingerprints"]["features"]) == 16


@pytest.mark.parametrize("vision,has,lacks", [("prefix", "visual_prefix_hypernetwork", "visual_adapter"), ("tokens", "image_tokens", "visual"),
                                              ("adapter", "visual_adapter_hypernetwork", "visual_prefix")])
def test_ways_of_vision(vision, has, lacks, checkpoint, vl, tmp_path):
    """Each runs, saves what it trains, and answers from its best checkpoint as it did while training."""
    out = tmp_path / "run"
    run(*command(checkpoint, vl, out, "--steps", 8, *(["--image-tokens"] if vision == "tokens" else ["--vision", vision])))
    names = load_file(out / "best.safetensors")
    assert any(name.startswith(has) for name in names) and not any(lacks in name for name in names)
    before = read_json(out / "metrics.json")
    run("train.py", "--out", out, "--eval-only")
    assert read_json(out / "metrics.json") == before


def run_killed_at(step, arguments):
    """Run a command that dies as soon as it has saved at a step."""
    killer = ("import os, sys, train, data; old = train.save_last\n"
              "def save(path, model, optimiser, progress):\n"
              "    old(path, model, optimiser, progress)\n"
              f"    if progress['step'] == {step}: os._exit(9)\n"
              "train.save_last = save; data.run(train.main)")
    assert execute("-c", killer, *arguments[1:]).returncode == 9


def test_resume_and_predict(finished, checkpoint, vl, tmp_path):
    """Stopped at step 50, the run ends as the one that was not; the results file is the official one."""
    out = tmp_path / "run"
    run_killed_at(50, command(checkpoint, vl, out, *RUN))
    run("train.py", "--out", out, "--resume")
    for name in ("best.safetensors", "last.safetensors", "metrics.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    for split, count in (("validation", 24), ("submission", 3)):
        run("train.py", "--out", out, "--predict", split)
        results = read_json(out / f"{split}-VQAv2.json")
        assert len(results) == count and all(type(r["question_id"]) is int and set(r) == {"question_id", "answer"} for r in results)
    other = shutil.copytree(vl / "features", tmp_path / "features")
    write_features(other, "test2015", range(3), weights="9")
    assert "weights 9" in run("train.py", "--out", out, "--predict", "submission", "--features", other, ok=False)[1]
    right = [r["answer"] == ANSWERS[r["question_id"] // 10 % 4] for r in read_json(out / "validation-VQAv2.json")]
    assert np.isclose(np.mean(right), read_json(out / "metrics.json")["vqa"]["validation"]["accuracy"])


def test_text_and_images_in_one_run(checkpoint, vl, glue, tmp_path):
    """--task rte,vqa: batches of either kind, of which the visual hypernetworks learn by one; resumed exactly all the same."""
    both = shutil.copytree(vl, tmp_path / "both")
    shutil.copytree(glue / "RTE", both / "RTE")
    arguments = lambda name: command(checkpoint, both, tmp_path / name, "--steps", 40, "--eval-every", 20, "--split", "paper", task="rte,vqa")
    run(*arguments("run"))
    run_killed_at(20, arguments("killed"))
    run("train.py", "--out", tmp_path / "killed", "--resume")
    for name in ("best.safetensors", "last.safetensors", "metrics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert set(metrics) == {"best_step", "rte", "vqa", "average", "majority"}
    assert set(metrics["rte"]) == {"validation", "test"} and set(metrics["vqa"]) == set(metrics["average"]) == {"validation"}     # no mean of one task's test
    last = load_file(tmp_path / "run" / "last.safetensors")
    assert last["step.hyper_embedding.task"] == 40 and 5 < last["step.hyper_embedding.visual.weight"] < 35


def test_other_tasks_with_images(checkpoint, tmp_path):
    """Captions (by beam search), GQA and SNLI-VE from their official files to a results file, all in one model; OK-VQA is read as VQAv2 is."""
    for name in ("COCO", "GQA", "SNLI-VE"):
        (tmp_path / name).mkdir()
    for split, subset, count in (("train", "train2014", 12), ("val", "val2014", 6), ("dev", "", 6)):
        write_features(tmp_path / "features", subset or "gqa", range(count if subset else 20))
        if subset:
            captions = dict(images=[dict(id=i) for i in range(count)],
                            annotations=[dict(id=2 * i + k, image_id=i, caption=f"a {ANSWERS[i % 4]} {word}") for i in range(count) for k, word in enumerate(["red", "big"])])
            (tmp_path / "COCO" / f"captions_{subset}.json").write_text(json.dumps(captions))
            questions = {f"0{i}": dict(question="is it a man", imageId=str(i), answer=ANSWERS[i % 4]) for i in range(count)}
            (tmp_path / "GQA" / f"{split}_balanced_questions.json").write_text(json.dumps(questions))
        if split != "val":
            lines = [dict(gold_label=["entailment", "neutral", "contradiction", "-"][i % 4], sentence2="a cat eats", Flickr30K_ID=str(i), pairID=f"{i}#0") for i in range(count)]
            (tmp_path / "SNLI-VE" / f"snli_ve_{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_features(tmp_path / "features", "flickr30k", range(20))
    out = tmp_path / "run"
    run(*command(checkpoint, tmp_path, out, "--steps", 30, "--eval-every", 15, task="caption,gqa,snlive"))
    metrics = read_json(out / "metrics.json")
    assert set(metrics["caption"]["validation"]) == {"cider", "bleu4"} and set(metrics["snlive"]["validation"]) == {"accuracy"}
    best = max((row for row in log_of(out) if "mean" in row), key=lambda row: row["mean"])
    counted = [best["validation"][task]["validation"][name] for task, name in (("caption", "cider"), ("gqa", "accuracy"), ("snlive", "accuracy"))]
    assert np.isclose(best["mean"], np.mean(counted)) and metrics["best_step"] == best["step"]         # BLEU-4 does not count
    run("train.py", "--out", out, "--predict", "validation")
    assert [row["image_id"] for row in read_json(out / "validation-COCO.json")] == list(range(6))
    assert [row["questionId"] for row in read_json(out / "validation-GQA.json")] == [f"0{i}" for i in range(6)]
    assert [json.loads(line)["pairID"] for line in (out / "validation-SNLI-VE.jsonl").read_text().splitlines()] == ["0#0", "1#0", "2#0", "4#0", "5#0"]
    assert "caption has no test questions" in run("train.py", "--out", out, "--predict", "submission", ok=False)[1]


def test_one_of_several_answers_is_drawn():
    """In proportion to the shares, by seed and step: a resumed run draws the same."""
    rows = data.encode_examples([data.Example(["vqa:", "x"], "a", None, str(i), None, (("a", 0.9), ("b", 0.3), ("c", 0.3))) for i in range(8)],
                                lambda text: [ord(c) for c in text] + [1], 20)
    class Settings:
        batch_size, steps, epochs, temperature, seed = 8, 500, 0.0, 2.0, 0
    _, batch = train_module.make_batches({"vqa": {"train": rows}}, Settings)
    drawn = torch.cat([batch(step).labels[:, 0] for step in range(500)])
    counts = [(drawn == ord(c)).float().mean().item() for c in "abc"]
    assert np.allclose(counts, [0.6, 0.2, 0.2], atol=0.03)
    again = train_module.make_batches({"vqa": {"train": rows}}, Settings)[1]
    assert all(torch.equal(batch(step).labels, again(step).labels) for step in (3, 77)) and not torch.equal(batch(3).labels, batch(4).labels)


def test_images_of_rows(tmp_path):
    """Each example gets the features of its own image of its own set; examples without features are counted and named."""
    write_features(tmp_path, "train2014", [7, 9])
    write_features(tmp_path, "val2014", [9])
    settings = argparse.Namespace(features=str(tmp_path), vision="both", prefix_length=5, seed=0)

    def places(*images):
        splits = {"vqa": {"train": [data.Example(["vqa:", "x"], "a", None, "", image) for image in images]}}
        rows = {"vqa": {"train": data.encode_examples(splits["vqa"]["train"], lambda text: [5, 1], 20)}}
        width, mark = train_module.load_images(settings, splits, rows)
        assert width == 6 and list(mark) == ["features"]
        return train_module.gather_images(rows["vqa"]["train"])

    stored = {name: np.load(tmp_path / f"{name}.npy") for name in ("train2014", "val2014")}
    found = places(("train2014", "9"), ("val2014", "9"), ("train2014", "7"))
    assert np.array_equal(found.numpy(), np.stack([stored["train2014"][1], stored["val2014"][0], stored["train2014"][0]]))
    with pytest.raises(data.UserError, match=re.escape(f"2 of 3 examples of vqa train have no features in {tmp_path}: val2014/7, train2014/8") + "$"):
        places(("train2014", "9"), ("val2014", "7"), ("train2014", "8"))
    with pytest.raises(data.UserError, match="20 of 20 .*: val2014/20, val2014/21, val2014/22, val2014/23, val2014/24, ...$"):
        places(*(("val2014", str(20 + i // 2)) for i in range(20)))


def test_mistakes(finished, checkpoint, vl, tmp_path):
    """Each in one line, exit code 2, and with the place."""
    base = lambda *more: run(*command(checkpoint, vl, tmp_path / "none", *more), ok=False)[1]
    assert "--features: found nothing" in base("--features", "")
    assert "train2014.npy: no such file" in base("--features", tmp_path)
    assert "found 5 grid cells" in base("--prefix-length", 7)
    assert "lets no image in" in base("--method", "norms")
    other = tmp_path / "features"
    for change, message in ((dict(width=7), "[5, 7]"), (dict(weights="9"), "weights 9"), (dict(ids=["1", "2"]), "ids for 12 rows")):
        shutil.copytree(vl / "features", other, dirs_exist_ok=True)
        write_features(other, "val2014", range(12), **change)
        assert message in base("--features", other)
    write_features(other, "val2014", range(9))
    assert "6 of 24 examples of vqa validation have no features" in base("--features", other) and "val2014/9" in base("--features", other)
    content = (vl / "features" / "val2014.npy").read_bytes()
    shutil.copytree(vl / "features", other, dirs_exist_ok=True)
    (other / "val2014.npy").write_bytes(content[:-30])
    assert "val2014.npy: not a whole .npy file" in base("--features", other)
    shutil.copytree(vl / "features", other, dirs_exist_ok=True)
    write_features(other, "val2014", range(12), seed=1)
    out = shutil.copytree(finished, tmp_path / "run")
    assert "another features" in run("train.py", "--out", out, "--resume", "--features", other, ok=False)[1]
