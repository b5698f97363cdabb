"""Mutated and truncated real files into every reader: each is read, or refused in one line. No other exception, no hang, no memory blow-up.

    python tests/fuzz.py --cases 10000 --seed 0          # needs tests/requirements.txt (transformers makes the tiny T5 and CLIP)
"""
import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import numpy as np
import torch

import clip_features
import data
import train
from data import UserError
from hyperpelt import HyperPELT, HyperPELTConfig
from t5 import T5, Tokenizer

SAMPLE = train.SAMPLE
SECONDS, MEGABYTES = 20, 500        # of one case, at most; more memory than the whole process has at the start
NUMBERS = [b"-1", b"0", b"1e999", b"NaN", b"99999999999999999999", b"null", b'""', b"[]", b"{}", b"true", b'"\\ud800"', b"\xff\xfe", b"\x00"]


def mutate(content, rng):
    """Bytes -> bytes that differ in one to three places."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, size = rng.randrange(len(content) + 1), rng.choice((1, 2, 8, 50, 1000))
        if rng.random() < 0.4:                                   # headers are at the start
            at = min(at, rng.randrange(400))
        how = rng.randrange(8)
        if how == 0:
            del content[at:]
        elif how == 1:
            del content[at:at + size]
        elif how == 2 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif how == 3:
            content[at:at + size] = rng.randbytes(min(size, 50))
        elif how == 4:
            content[at:at] = content[at:at + size]
        elif how == 5:
            content[at:at] = rng.choice(NUMBERS)
        elif how == 6:                                           # another number, or another string, in a text
            digits = [i for i in range(at, min(at + 2000, len(content))) if 48 <= content[i] < 58]
            if digits:
                content[digits[0]:digits[0] + 1] = rng.choice(NUMBERS)
        else:
            other = rng.randrange(len(content) + 1)
            content[at:at + size] = content[other:other + size]
    return bytes(content)


def make_readers(folder):
    """-> {name: (file that is mutated, function that reads it)}; all the other files that a reader wants are whole."""
    from test_clip_features import make_vit                      # tiny public CLIP, by transformers
    from conftest import make_checkpoint
    glue = [(name, SAMPLE / "glue" / name) for name in ("RTE", "SST-2")]
    readers, read = {}, lambda task: lambda path: data.read_examples(data.TASKS[task], path)
    for (name, source), task in zip(glue, ("rte", "sst2")):
        shutil.copytree(source, folder / "glue" / name)
        lines = (source / "dev.tsv").read_text().splitlines(True)[:60]
        (folder / "glue" / name / "dev.tsv").write_text("".join(lines))
        readers[f"{name} tsv"] = folder / "glue" / name / "dev.tsv", read(task)
    made = {"cola": ("cola.tsv", "gj04\t1\t*\tThe cat sees.\ngj04\t0\t\tCat the sees.\n" * 9),
            "stsb": ("stsb.tsv", "index\tsentence1\tsentence2\tscore\n" + "".join(f"{i}\tA cat.\tA dog.\t{i % 6 * 0.9:.3f}\n" for i in range(20))),
            "cb": ("cb.jsonl", "".join(json.dumps(dict(premise="It rains.", hypothesis="It is wet.", label="neutral", idx=i)) + "\n" for i in range(20))),
            "boolq": ("boolq.jsonl", "".join(json.dumps(dict(passage="It rains.", question="is it wet", label=bool(i % 2), idx=i)) + "\n" for i in range(20))),
            "trec": ("trec.label", "NUM:dist How far is it from Denver to Aspen ?\nHUM:ind Who wrote it ?\n" * 9)}
    for task, (name, text) in made.items():
        (folder / name).write_text(text)
        readers[name] = folder / name, read(task)
    for label in ("pos", "neg"):
        (folder / "imdb" / label).mkdir(parents=True)
        (folder / "imdb" / label / "0_9.txt").write_text("A film.\nGood or bad?\n" * 9)
    readers["imdb"] = folder / "imdb" / "pos" / "0_9.txt", lambda path: data.read_examples(data.TASKS["imdb"], path.parent.parent)
    with zipfile.ZipFile(folder / "RTE.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.write(folder / "glue" / "RTE" / "dev.tsv", "RTE/dev.tsv")
    readers["zip"] = folder / "RTE.zip", lambda path: data.unpack(path, folder / "unpacked" / "RTE", ["train.tsv", "dev.tsv"])

    pairs = {"train2014": (0, 20), "val2014": (20, 40)}
    for where, name in (("VQAv2", "v2_"), ("OKVQA", "")):
        (folder / "vl" / where).mkdir(parents=True)
        for part, (a, b) in pairs.items():
            (folder / "vl" / where / f"{name}OpenEnded_mscoco_{part}_questions.json").write_text(json.dumps(dict(
                data_subtype=part, questions=[dict(question_id=i, image_id=i % 20, question="Why?") for i in range(a, b)])))
            (folder / "vl" / where / f"{name}mscoco_{part}_annotations.json").write_text(json.dumps(dict(annotations=[
                dict(question_id=i, image_id=i % 20, answer_type="other", answers=[dict(answer="so", answer_confidence="yes", answer_id=k) for k in range(10)]) for i in range(a, b)])))
    (folder / "vl" / "GQA").mkdir()
    (folder / "vl" / "SNLI-VE").mkdir()
    (folder / "vl" / "COCO").mkdir()
    for part in ("train", "val"):
        (folder / "vl" / "GQA" / f"{part}_balanced_questions.json").write_text(json.dumps({str(i): dict(imageId="9", question="Why?", answer="so") for i in range(20)}))
    for part in ("train", "dev"):
        (folder / "vl" / "SNLI-VE" / f"snli_ve_{part}.jsonl").write_text("".join(json.dumps(dict(
            Flickr30K_ID="9", gold_label="neutral", sentence2="A cat.", pairID=f"{i}")) + "\n" for i in range(20)))
    (folder / "vl" / "COCO" / "dataset_coco.json").write_text(json.dumps(dict(images=[dict(
        cocoid=i, split=split, filepath="val2014", sentences=[dict(raw="A cat.")] * 5) for i, split in enumerate(["train", "restval", "val", "test"] * 5)])))
    for task, where in (("vqa", "VQAv2"), ("okvqa", "OKVQA"), ("gqa", "GQA"), ("snlive", "SNLI-VE"), ("caption", "COCO")):
        data.make_splits(data.IMAGE_TASKS[task], folder / "vl")  # without a mutation all is well
        for path in sorted((folder / "vl" / where).iterdir()):
            readers[f"{task} {path.name}"] = path, lambda path, task=task: data.make_splits(data.IMAGE_TASKS[task], folder / "vl")

    make_checkpoint(folder / "t5", vocab_size=200)
    make_checkpoint(folder / "shards", vocab_size=200).save_pretrained(folder / "shards", max_shard_size="20KB")
    (folder / "shards" / "model.safetensors").unlink(missing_ok=True)
    for name in ("config.json", "model.safetensors"):
        readers[f"t5 {name}"] = folder / "t5" / name, lambda path: T5.from_pretrained(path.parent)
    readers["t5 index"] = folder / "shards" / "model.safetensors.index.json", lambda path: T5.from_pretrained(path.parent)
    readers["t5 shard"] = sorted((folder / "shards").glob("*.safetensors"))[0], lambda path: T5.from_pretrained(path.parent)
    shutil.copy(SAMPLE / "mini-t5" / "spiece.model", folder / "t5")
    readers["spiece.model"] = folder / "t5" / "spiece.model", lambda path: Tokenizer(path).encode("A cat sees the dog.")
    make_vit(folder / "vit")
    for name in ("config.json", "model.safetensors"):
        readers[f"clip {name}"] = folder / "vit" / name, lambda path: clip_features.load_encoder(path.parent)

    (folder / "features").mkdir()
    for name in ("val2014.npy", "val2014.json"):
        shutil.copy(SAMPLE / "vqa" / "features" / name, folder / "features")
        readers[f"features {name}"] = folder / "features" / name, lambda path: clip_features.load_features(path.with_suffix(".npy"))
        shutil.copy(SAMPLE / "vqa" / "images" / name, folder)
        readers[f"pixels {name}"] = folder / name, lambda path: clip_features.open_images(path.with_suffix(".npy"))[2](0)
    from PIL import Image
    (folder / "images").mkdir()
    for end in ("jpg", "png"):
        Image.fromarray(np.load(SAMPLE / "vqa" / "images" / "val2014.npy", mmap_mode="r")[0]).save(folder / "images" / f"{end}.{end}")
        readers[f"image {end}"] = folder / "images" / f"{end}.{end}", open_image

    sizes = HyperPELTConfig(prefix_length=2, embedding_dim=3, hyper_dim=4, projector_dim=3, bottleneck=2)
    model = HyperPELT(T5.from_pretrained(folder / "t5"), ["rte"], sizes)
    (folder / "run").mkdir()
    train.save_tensors(folder / "run" / "best.safetensors", model.trained(), dict(step=3))
    readers["best.safetensors"] = folder / "run" / "best.safetensors", lambda path: train.load_best(path, model)
    optimiser = torch.optim.AdamW(model.trained().values(), fused=True)
    train.save_last(folder / "run" / "last.safetensors", model, optimiser, dict(step=3, evaluated=0, best_step=0, best=0.0, right=0, seen=0))
    readers["last.safetensors"] = folder / "run" / "last.safetensors", lambda path: train.load_last(path, model, optimiser, 99)
    (folder / "run" / "config.json").write_text(json.dumps(dict(
        format=train.FORMAT, settings={name.replace("-", "_"): default for name, _, default, _ in train.OPTIONS}, fingerprints=dict(backbone="a"), hyperpelt={},
        image_sets={}, tasks=["rte"], trained_parameters=3, backbone_parameters=3), indent=1))
    (folder / "run" / "metrics.json").write_text(json.dumps(dict(rte=dict(validation=dict(accuracy=0.5)), average={}), indent=1))
    (folder / "run" / "log.jsonl").write_text("".join(json.dumps(dict(step=i, loss=0.5, accuracy=0.1)) + "\n" for i in range(9)))
    readers["config.json"] = folder / "run" / "config.json", lambda path: train.complete_settings(dict(out=str(path.parent), resume=True)) and train.read_run(path.parent)
    readers["metrics.json"] = folder / "run" / "metrics.json", lambda path: train.table([path.parent])
    readers["table's config.json"] = folder / "run" / "config.json", lambda path: train.table([path.parent])
    readers["log.jsonl"] = folder / "run" / "log.jsonl", lambda path: train.read_log(path, 5)
    t5 = T5.from_pretrained(folder / "t5")
    train.save_tensors(folder / "exported", train.pack_sites(model.generate_sites("rte")), dict(task="rte", method="hyperpelt", backbone=train.backbone_mark(t5)))
    readers["exported"] = folder / "exported", lambda path: train.load_exported(path, t5)
    return readers


def open_image(path):
    """One picture among good ones: Broken names it, as the command then does."""
    ids, names, read = clip_features.open_images(path.parent)
    try:
        clip_features.preprocess(read(names.index(path.name)), 24)
    except clip_features.Broken as error:
        raise UserError(error) from None


def command_line(rng):
    """A made-up command line -> None. The texts of options are put together at random."""
    words = ["--" + name for name, *_ in train.OPTIONS] + ["--resume", "--eval-only", "--ask", "--export", "--table", "--seeds", "--predict", "--download", "--", "-x"]
    values = ["rte", "vqa", "", "0", "-1", "1e9", "nan", "inf", "1.5", "5", "true", "rte,rte", "rte,,", ",", "glue", "../..", "\x00", "é" * 300, "x" * 5000, "/dev/null", "/", "linear"]
    sys.argv = ["train.py", "--out", "/nonexistent/run"]
    for _ in range(rng.randrange(1, 6)):
        sys.argv += [rng.choice(words)] + [rng.choice(values) for _ in range(rng.choice((0, 1, 1, 1, 2)))]
    settings = train.parse_arguments()
    if "table" in settings:
        return train.table(settings["table"])
    settings = train.complete_settings(settings)
    train.find_tasks(settings.task)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts, failures = Counter(), []

    def hang(*_):
        raise TimeoutError(f"still at work after {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    with tempfile.TemporaryDirectory() as folder:
        readers = make_readers(Path(folder))
        for path, read in readers.values():
            read(path)                                           # whole, each is read
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kept = {path: path.read_bytes() for path, _ in readers.values()}
        for case in range(args.cases):
            rng = random.Random(f"{args.seed} {case}")
            name = [*readers, "command line"][case % (len(readers) + 1)]
            path, read = readers.get(name, (None, None))
            signal.alarm(SECONDS)
            try:
                if path is None:
                    command_line(rng)
                else:
                    path.write_bytes(mutate(kept[path], rng))
                    read(path)
                counts["read"] += 1
            except (UserError, *[OSError] * (path is None)) as error:      # as data.run has it: an OSError of a file that --out, ... names
                counts["refused in one line"] += 1
                if not str(error).strip():
                    failures.append((case, name, "an empty message"))
            except Exception:
                failures.append((case, name, traceback.format_exc(limit=-3)))
            finally:
                signal.alarm(0)
                if path is not None:
                    path.write_bytes(kept[path])
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 2**10
            if grown > MEGABYTES:
                failures.append((case, name, f"{grown:.0f} MB more than at the start"))
                peak += grown * 2**10
    for case, name, what in failures[:20]:
        print(f"case {case}, {name}: {what}")
    print(f"{args.cases} cases of {len(readers) + 1} readers, seed {args.seed}: {', '.join(f'{count} {what}' for what, count in counts.items())}, {len(failures)} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
