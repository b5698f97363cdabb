"""Damage files and read them: each is read, or refused with a message of one line.

    python tests/stress/fuzz.py --cases 10000 --seed 0

Another exception, or no end within 20 seconds, is reported with the number of the case.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import clip_features
import data
import train
from t5 import T5, T5Config, Tokenizer, public_name

# What our own files and data sets may raise, and what public models and features may raise.
OURS = (data.UserError, OSError)
PUBLIC = (ValueError, OSError, data.UserError)
# What damage puts into a file.
VALUES = [b"-1", b"1e999", b"NaN", b"9" * 20, b"null", b'""', b"[]", b"{}", b"true", b"\xff", b"\0"]
SNLIVE = '{"pairID": 1, "Flickr30K_ID": 2, "gold_label": "neutral", "sentence2": "A cat."}'
ANNOTATION = '{"question_id": 1, "answer_type": "other", "answers": [{"answer": "so"}]}'
IMAGE = '{"cocoid": 1, "split": "%s", "filepath": "val2014", "sentences": [{"raw": "A cat."}]}'
KARPATHY = ", ".join(IMAGE % split for split in ("train", "restval", "val", "test"))
# Files, the parts of a data set that have one, and their text: the middle comes twenty times.
TEXTS = [
    ("RTE/{}.tsv", "train dev", "sentence1\tsentence2\tlabel\n", "It is.\tIs it.\tentailment", ""),
    ("STS-B/{}.tsv", "train dev", "sentence1\tsentence2\tscore\n", "It is.\tIs it.\t3.667", ""),
    ("QQP/{}.tsv", "train dev", "question1\tquestion2\tis_duplicate\n", "Why?\tHow?\t1", ""),
    ("BoolQ/{}.jsonl", "train val", "", '{"passage": "So.", "question": "so", "label": true}', ""),
    ("SNLI-VE/snli_ve_{}.jsonl", "train dev test", "", SNLIVE, ""),
    ("TREC/{}.label", "train_5500 TREC_10", "", "NUM:dist How far is it ?", ""),
    ("aclImdb/{}/0_9.txt", "train/pos train/neg test/pos test/neg", "", "A good film.", ""),
    (
        "GQA/{}_balanced_questions.json",
        "train val",
        "{",
        '"1": {"imageId": "2", "question": "Why?", "answer": "so"}',
        "}",
    ),
    (
        "VQAv2/v2_OpenEnded_mscoco_{}_questions.json",
        "train2014 val2014",
        '{"questions": [',
        '{"question_id": 1, "image_id": 1, "question": "Why?"}',
        "]}",
    ),
    (
        "VQAv2/v2_mscoco_{}_annotations.json",
        "train2014 val2014",
        '{"annotations": [',
        ANNOTATION,
        "]}",
    ),
    ("COCO/dataset_coco.json", "all", '{"images": [', KARPATHY, "]}"),
]


def write_tasks(folder):
    """Write the official files in TEXTS -> [(path, function that reads it, exceptions)]."""
    for name, parts, before, middle, after in TEXTS:
        separator = ", " if after else "\n"
        for part in parts.split():
            path = folder / name.format(part)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(before + separator.join([middle] * 20) + after)
    readers = []
    for task in data.TASKS.values():
        read = partial(data.make_splits, task, folder, "official")
        readers += [(file, read, OURS) for file in (folder / task.folder).rglob("*.*")]
    return readers


def write_models(folder):
    """Write a tiny T5 as one file, as a shard and as an old file, and copy a CLIP -> readers."""
    config = T5Config(8, 4, 8, 1, 2, vocab_size=5120)
    tensors = {public_name(name): t for name, t in T5(config).state_dict().items()}
    for kind in ("whole", "shard", "old"):
        (folder / kind).mkdir(parents=True)
        (folder / kind / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    save_file(tensors, folder / "whole" / "model.safetensors")
    save_file(tensors, folder / "shard" / "1.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "1.safetensors")}
    (folder / "shard" / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(tensors, folder / "old" / "pytorch_model.bin")
    shutil.copytree(train.SAMPLE / "mini-clip", folder / "clip")
    readers = []
    for file in folder.glob("*/*.*"):
        is_clip = file.parent.name == "clip"
        load = clip_features.load_encoder if is_clip else T5.from_pretrained
        readers.append((file, partial(load, file.parent), PUBLIC))
    return readers


def write_run(folder, model, data_dir):
    """Train a run and export it; copy a tokenizer and features -> readers."""
    shutil.copytree(
        train.SAMPLE / "mini-t5",
        model,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.json", "*.safetensors"),
    )
    shutil.copytree(train.SAMPLE / "vqa" / "features", folder / "features")
    common = ["--model", str(model), "--data-dir", str(data_dir), "--run", str(folder / "run")]
    train.run_once(train.read_settings([*common, "--max-steps", "2"]))
    run = train.load_run(train.read_settings([*common, "--export", str(folder)]))
    train.export(run)
    optimiser = torch.optim.AdamW(run.model.trained().values(), fused=True)
    t5 = T5.from_pretrained(model)
    spiece, features = model / "spiece.model", folder / "features" / "val2014.npy"
    exported = folder / "rte.safetensors"
    return [
        (spiece, lambda: Tokenizer(spiece).encode("A cat sees the dog."), PUBLIC),
        (features, partial(clip_features.load_features, features), PUBLIC),
        (features.with_suffix(".json"), partial(clip_features.load_features, features), PUBLIC),
        (
            run.folder / "config.json",
            partial(data.read_json_file, run.folder / "config.json"),
            OURS,
        ),
        (run.folder / "last.pt", partial(train.load_last, run, optimiser), OURS),
        (run.folder / "best.safetensors", partial(train.load_best, run), OURS),
        (exported, partial(train.load_exported, exported, t5), OURS),
    ]


def damage(content, rng):
    """Bytes -> bytes that differ in one to three places, more often near the start."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        start = rng.randrange(min(len(content), rng.choice([600, 10**9])) + 1)
        end = start + rng.choice([1, 2, 8, 50, 1000])
        changes = [b"", rng.randbytes(1), rng.choice(VALUES), 2 * content[start:end]]
        content[start:end] = rng.choice(changes)
        if rng.random() < 0.1:
            del content[start:]
    return bytes(content)


def try_reader(read, allowed):
    """-> "read", "refused", or what went wrong."""
    signal.alarm(20)
    try:
        read()
        return "read"
    except allowed as error:
        return "refused" if len(str(error).splitlines()) == 1 else f"message {str(error)!r}"
    except (Exception, KeyboardInterrupt) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {place.filename}:{place.lineno}: {error}"
    finally:
        signal.alarm(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10000, help="damaged files")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    args = parser.parse_args()
    # An alarm raises KeyboardInterrupt, which no reader catches.
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    counts = Counter()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        readers = write_tasks(folder / "data") + write_models(folder / "models")
        with contextlib.redirect_stdout(io.StringIO()):
            readers += write_run(folder, folder / "models" / "whole", folder / "data")
        for case in range(args.cases):
            path, read, allowed = readers[case % len(readers)]
            content = path.read_bytes()
            path.write_bytes(damage(content, random.Random(f"{args.seed} {case}")))
            outcome = try_reader(read, allowed)
            path.write_bytes(content)
            is_allowed = outcome in ("read", "refused")
            counts[outcome if is_allowed else "failed"] += 1
            if not is_allowed:
                print(f"case {case}, {path.relative_to(folder)}: {outcome}", flush=True)
    print(f"{args.cases} cases, {len(readers)} files, seed {args.seed}: {dict(counts)}")
    sys.exit(counts["failed"] > 0)


if __name__ == "__main__":
    main()
