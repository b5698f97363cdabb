"""Does everything work at true size? Run the programs on stand-ins for the public files (Linux).

    python tests/stress/true_size.py write DIR    # 4 GB: T5-base, GLUE, VQAv2, GQA, COCO, CLIP
    python tests/stress/true_size.py glue DIR     # or vl, clip, counts, activations, processes

The stand-ins have the formats and sizes of the public files and random content: weights are noise,
texts are pieces of another text. Features are 49 x 2048 for 2,000 images. What the models say means
nothing; time, memory and whether the programs do their work are what is looked at.
"""

import argparse
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import clip_features
import data
import t5
import train
from hyperpelt import HyperPELT, HyperPELTConfig, count

ROOT = Path(__file__).resolve().parent.parent.parent
# Rows of the official files, and about so many words per text, in the order of the task's fields.
GLUE_SIZES = {
    "cola": (8551, 1043, [8]),
    "sst2": (67349, 872, [9]),
    "mrpc": (3668, 408, [19, 19]),
    "qqp": (363846, 40430, [11, 11]),
    "stsb": (5749, 1500, [11, 11]),
    "mnli": (392702, 9815, [10, 20]),
    "qnli": (104743, 5463, [10, 27]),
    "rte": (2490, 277, [45, 9]),
}
# For training and validation: questions of VQAv2, of GQA's balanced files, and our images.
VQA_SIZES = (443757, 214354)
GQA_SIZES = (943000, 132062)
IMAGES = (1400, 600)
ANSWERS = ["yes", "no", "2", "1", "white", "3", "red", "blue", "tennis", "on the table"]


# ---- stand-ins -----------------------------------------------------------------------------------


class Texts:
    """Pieces of a text, about so many words long."""

    def __init__(self, path):
        self.words = path.read_text().split()
        self.rng = np.random.default_rng(0)

    def draw(self, mean, count):
        lengths = self.rng.poisson(mean - 1, count) + 1
        starts = self.rng.integers(len(self.words) - 4 * mean, size=count)
        return [
            " ".join(self.words[start : start + length])
            for start, length in zip(starts, lengths, strict=True)
        ]


def write_t5(folder, config, tokenizer):
    """A T5 of noise in the public format. Its weights have the deviations of a fresh T5."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tensors = {}
    for name, tensor in t5.T5(config).state_dict().items():
        value = torch.ones_like(tensor) if "norm" in name else tensor
        if name == "shared.weight":
            value = tensor.normal_()
        tensors[t5.public_name(name)] = value.contiguous()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**vars(config), "model_type": "t5"}))
    shutil.copy(tokenizer, folder / "spiece.model")


def write_glue(folder, texts):
    for name, (train_rows, validation_rows, lengths) in GLUE_SIZES.items():
        task = data.TASKS[name]
        (folder / task.folder).mkdir(parents=True, exist_ok=True)
        labels = [*task.labels] or [str(score / 10) for score in range(51)]
        for split, file in task.files.items():
            rows = train_rows if split == "train" else validation_rows
            columns = [texts.draw(mean, rows) for mean in lengths]
            columns.append(texts.rng.choice(labels, rows))
            lines = ["\t".join(cells) for cells in zip(*columns, strict=True)]
            if name == "cola":
                # Its file has no header: source, label, original mark, sentence.
                cells = zip(columns[1], columns[0], strict=True)
                lines = [f"gj04\t{label}\t\t{sentence}" for label, sentence in cells]
            else:
                lines.insert(0, "\t".join([*task.fields.values(), task.column]))
            (folder / task.folder / file).write_text("\n".join(lines) + "\n")


def write_vl(folder, texts):
    """VQAv2, GQA and COCO captions, and the features of their images."""
    for task in ("VQAv2", "GQA", "COCO", "features"):
        (folder / task).mkdir(parents=True, exist_ok=True)
    for part, rows, images in zip(("train", "val"), VQA_SIZES, IMAGES, strict=True):
        write_features(folder / "features" / f"{part}2014", images)
        questions, annotations = [], []
        for i, text in enumerate(texts.draw(6, rows)):
            row = {"image_id": i % images, "question_id": i}
            questions.append(row | {"question": f"{text}?"})
            answers = [
                {"answer": str(answer), "answer_confidence": "yes", "answer_id": j + 1}
                for j, answer in enumerate(texts.rng.choice(ANSWERS[:4], 10))
            ]
            annotations.append(
                row
                | {
                    "question_type": "what",
                    "answer_type": "other",
                    "multiple_choice_answer": "yes",
                    "answers": answers,
                }
            )
        name = f"mscoco_{part}2014"
        write_json(
            folder / "VQAv2" / f"v2_OpenEnded_{name}_questions.json",
            {"info": {}, "questions": questions},
        )
        write_json(
            folder / "VQAv2" / f"v2_{name}_annotations.json",
            {"info": {}, "annotations": annotations},
        )
        captions = [
            {"image_id": i // 5, "id": i, "caption": text}
            for i, text in enumerate(texts.draw(10, 5 * images))
        ]
        write_json(folder / "COCO" / f"captions_{part}2014.json", {"annotations": captions})

    write_features(folder / "features" / "gqa", sum(IMAGES))
    # What GQA says of a question besides its text takes 1 kB in its files.
    filler = [{"operation": "select", "dependencies": [], "argument": "x" * 40}] * 10
    for file, rows in zip(("train", "val"), GQA_SIZES, strict=True):
        questions = {
            str(i): {
                "semantic": filler,
                "imageId": str(i % sum(IMAGES)),
                "question": f"{text}?",
                "answer": ANSWERS[i % 10],
            }
            for i, text in enumerate(texts.draw(8, rows))
        }
        write_json(folder / "GQA" / f"{file}_balanced_questions.json", questions)


def write_json(path, content):
    path.write_text(json.dumps(content))


def write_features(path, images):
    rng = np.random.default_rng(0)
    features = np.lib.format.open_memmap(f"{path}.npy", "w+", np.float16, (images, 49, 2048))
    for row in features:
        row[:] = np.maximum(rng.standard_normal(row.shape, np.float32), 0)
    write_json(
        Path(f"{path}.json"),
        {"ids": list(range(images)), "kind": "noise", "weights": "0", "preprocessing": {}},
    )


def write_clip(folder):
    """RN101 and ViT-B/32 of noise, and 200 photographs of noise (Pillow)."""
    from PIL import Image

    torch.manual_seed(0)
    resnet = clip_features.ModifiedResNet(64, (3, 4, 23, 3), 7)
    for name, encoder in (("RN101", resnet), ("ViT-B-32", clip_features.VisionTransformer())):
        (folder / name).mkdir(parents=True, exist_ok=True)
        tensors = {
            encoder.name_prefix + key: torch.randn_like(value) / value[0].numel() ** 0.5
            if value.dim() > 1
            else value.float().nan_to_num(0, 0, 0).clamp(-1, 1)
            for key, value in encoder.state_dict().items()
        }
        if name == "RN101":
            # Its attention pool tells the side of the images, and is not read otherwise.
            tensors["visual.attnpool.positional_embedding"] = torch.zeros(50, 2048)
        save_file(tensors, folder / name / "model.safetensors")
        write_json(folder / name / "config.json", {"vision_config": {}})
    (folder / "images").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(200):
        pixels = rng.integers(256, size=(480, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.jpg")


def write(folder, args):
    texts = Texts(args.text)
    write_t5(folder / "t5-base", t5.T5Config(), args.tokenizer)
    write_glue(folder / "glue", texts)
    write_vl(folder / "vl", texts)
    write_clip(folder / "clip")


# ---- a run that is watched -----------------------------------------------------------------------


def memory(key, file="status"):
    """VmHWM, the largest memory of this process so far, or another entry, in GiB."""
    status = Path("/proc/self", file).read_text()
    return int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 2**20


def watch(report, args):
    """Run train.py in this process. Write to a file when each step began and the memory then, and
    the share of matrix products in the fourth step."""
    steps, learning_rate, profiler = [], train.learning_rate, torch.profiler.profile()

    def note(settings, step, total):
        if step == int(os.environ.get("STOP_AT", -1)):
            sys.exit()
        steps.append([step, time.time() - args.start, memory("VmHWM")])
        if len(steps) == 4:
            profiler.start()
        if len(steps) == 5:
            profiler.stop()
        return learning_rate(settings, step, total)

    train.learning_rate = note
    train.LOG_EVERY = 1
    if server := os.environ.get("HF_ENDPOINT"):
        # The tasks' official files come from the same server.
        for task in data.TASKS.values():
            task.urls = {name: f"{server}/{Path(url).name}" for name, url in task.urls.items()}
    sys.argv = ["train.py", *args.more]
    try:
        data.run(train.main)
    finally:
        share = None
        if len(steps) >= 5:
            rows = profiler.key_averages()
            products = [
                row.self_cpu_time_total
                for row in rows
                if re.search("mm|convolution|linear$", row.key)
            ]
            share = sum(products) / sum(row.self_cpu_time_total for row in rows)
        write_json(
            Path(f"{report}-{train.RANK}"),
            {
                "steps": steps,
                "seconds": time.time() - args.start,
                "peak": memory("VmHWM"),
                "pss": memory("Pss", "smaps_rollup"),
                "products": share,
            },
        )


def call(program, *arguments, launcher=(), **environment):
    """Run a program of the repository, print its command and output, fail if it does."""
    command = [sys.executable, *launcher, str(program), *map(str, arguments)]
    print(f"\n$ {' '.join(command[1:])}", flush=True)
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **environment})


def measure(folder, *arguments, processes=1, **environment):
    """Run train.py with arguments and print what `watch` found in each process."""
    launcher = (
        ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--")
        if processes > 1
        else ()
    )
    call(
        Path(__file__),
        "watch",
        folder / "report",
        "--start",
        time.time(),
        "--",
        *arguments,
        launcher=launcher,
        **environment,
    )
    for rank in range(processes):
        found = json.loads((folder / f"report-{rank}").read_text())
        if len(found["steps"]) > 1:
            times = [seconds for _, seconds, _ in found["steps"]]
            print(
                f"the first step ended after {times[1]:.1f} s with a peak of"
                f" {found['steps'][1][2]:.2f} GiB; a step takes"
                f" {np.median(np.diff(times)):.2f} s (median)"
            )
        if found["products"]:
            print(f"matrix products: {found['products']:.0%} of the time of a step")
        print(
            f"peak {found['peak']:.2f} GiB (shared parts divided: {found['pss']:.2f} GiB at the"
            f" end), in all {found['seconds']:.0f} s",
            flush=True,
        )


def tasks_of(folder, kind):
    """The options of a run on all GLUE tasks or all with images."""
    options = [
        "--task",
        kind,
        "--model",
        folder / "t5-base",
        "--data-dir",
        folder / kind,
        "--features",
        folder / "vl" / "features",
        "--run",
        folder / "runs" / kind,
        "--max-eval-examples",
        8,
    ]
    return options + ["--protocol", "official"] * (kind == "vl")


def train_and_use(folder, args):
    """Train, stop, resume, evaluate, predict, export."""
    kind = args.what
    run = folder / "runs" / kind
    shutil.rmtree(run, ignore_errors=True)
    options = tasks_of(folder, kind)
    # It stops where it is half done. The second command does the rest.
    length = [
        "--max-steps",
        args.steps,
        "--batch-size",
        args.batch_size,
        "--warmup-steps",
        10,
        "--eval-every",
        args.steps // 2,
        *args.more,
    ]
    measure(folder, *options, *length, STOP_AT=str(args.steps // 2))
    measure(folder, *options, "--resume")
    measure(folder, *options, "--eval-only")
    measure(folder, *options, "--predict", "validation")
    measure(folder, *options, "--export", folder / "exported")


# ---- several processes ---------------------------------------------------------------------------


class SlowServer(http.server.SimpleHTTPRequestHandler):
    """Serves the T5 as the hub does and zips of GLUE, with 20 MB/s per connection."""

    fetched = []

    def do_GET(self):
        SlowServer.fetched.append(Path(self.path).name)
        super().do_GET()

    def translate_path(self, path):
        return f"{self.directory}/{Path(path).name}"

    def copyfile(self, source, outputfile):
        while chunk := source.read(2**20):
            outputfile.write(chunk)
            time.sleep(0.05)

    def log_message(self, *arguments):
        pass


def serve(folder):
    """Serve the stand-ins -> the server's address."""
    served = folder / "served"
    if not served.exists():
        shutil.copytree(folder / "t5-base", served)
        for name in GLUE_SIZES:
            task = data.TASKS[name]
            zipped = Path(*task.urls.values()).name if len(task.urls) == 1 else "MRPC.zip"
            with zipfile.ZipFile(served / zipped, "w", zipfile.ZIP_DEFLATED) as archive:
                files = folder / "glue" / task.folder
                for file in task.files.values():
                    archive.write(files / file, f"{task.folder}/{file}")
                for file in task.submission.values():
                    # Only that it is there matters.
                    archive.write(files / task.files["validation"], f"{task.folder}/{file}")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SlowServer, directory=str(served))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def compare_processes(folder, args):
    """One process and two, without dropout, must log the same losses. Two begin with a download."""
    plain = folder / "t5-base-without-dropout"
    shutil.copytree(folder / "t5-base", plain, dirs_exist_ok=True)
    config = json.loads((plain / "config.json").read_text()) | {"dropout_rate": 0.0}
    write_json(plain / "config.json", config)
    shutil.rmtree(folder / "served", ignore_errors=True)
    shutil.rmtree(folder / "fresh", ignore_errors=True)
    address = serve(folder)
    shutil.copy(plain / "config.json", folder / "served")

    for kind in ("glue", "vl"):
        losses = []
        for processes in (1, 2):
            run = folder / "runs" / f"{kind}-{processes}"
            shutil.rmtree(run, ignore_errors=True)
            options = [
                *tasks_of(folder, kind),
                "--model",
                plain,
                "--run",
                run,
                "--max-steps",
                10,
                "--batch-size",
                args.batch_size,
                "--eval-every",
                10,
                *args.more,
            ]
            environment = {"OMP_NUM_THREADS": "1"}
            if kind == "glue":
                # MRPC is not in a zip.
                names = ",".join(name for name in GLUE_SIZES if name != "mrpc")
                options += ["--task", names]
                if processes == 2:
                    options += ["--model", "t5-base", "--data-dir", folder / "fresh", "--download"]
                    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(folder / "fresh/hub")}
            measure(folder, *options, processes=processes, **environment)
            rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            losses.append([row["loss"] for row in rows if "loss" in row])
        print(f"{kind}: losses of one process and of two: {losses}")
        # Rounding differs, and grows from step to step.
        np.testing.assert_allclose(*np.array(losses)[:, :3], rtol=1e-5)
    assert len(SlowServer.fetched) == len(set(SlowServer.fetched)), SlowServer.fetched
    print(f"{len(SlowServer.fetched)} files were downloaded, each of them once")


# ---- the rest ------------------------------------------------------------------------------------


def extract(folder, args):
    """Features of 200 images by both kinds of CLIP."""
    for name in ("RN101", "ViT-B-32"):
        out = folder / "clip" / f"{name}.npy"
        out.unlink(missing_ok=True)
        out.with_suffix(".json").unlink(missing_ok=True)
        start = time.time()
        call(
            "clip_features.py",
            "--model",
            folder / "clip" / name,
            "--images",
            folder / "clip" / "images",
            "--out",
            out,
        )
        seconds = time.time() - start
        print(f"{name}: {np.load(out).shape}, {seconds:.0f} s, {200 / seconds:.1f} images/s")


def counts(folder, args):
    """hyperpelt.py counts without weights; a loaded model is counted here."""
    call("hyperpelt.py", "--model", folder / "t5-base")
    for method in ("hyperpelt", "hyperprefix", "adapter", "full"):
        model = HyperPELT(
            t5.T5.from_pretrained(folder / "t5-base"),
            [f"task {i}" for i in range(8)],
            HyperPELTConfig(method),
        )
        print(f"{method}, loaded: {count(model.trained().values()):,} trained")


def activations(folder, args):
    """What fits where: parameters of T5-base and T5-3B, and the bfloat16 activations of training,
    measured on two layers of each stack, for source texts of 128 tokens and targets of 8."""
    t5_3b = {"d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_heads": 32, "num_layers": 24}
    for name, sizes in (("T5-base", {}), ("T5-3B", t5_3b)):
        config = t5.T5Config(**sizes)
        with torch.device("meta"):
            model = HyperPELT(t5.T5(config), ["a"], HyperPELTConfig())
        print(
            f"{name}: {count(model.t5.parameters()) * 2 / 2**30:.2f} GiB of bfloat16 weights,"
            f" {count(model.trained().values()) * 16 / 2**30:.2f} GiB for what is trained, its"
            " gradients and AdamW's moments"
        )
        for recompute in (False, True):
            kept = [activation_bytes(sizes, recompute, batch) for batch in (4, 8)]
            per_token = (kept[1] - kept[0]) / (4 * 128) / 2
            all_layers = config.num_layers * per_token * 128 * 64 / 2**30
            print(
                f"  recompute={recompute}: {per_token:,.0f} bytes per source token and pair of"
                f" layers: {all_layers:.1f} GiB for 128 texts of 64 tokens",
                flush=True,
            )


def activation_bytes(sizes, recompute, batch):
    """-> bytes that a forward pass keeps for the backward pass, without parameters."""
    model = t5.T5(t5.T5Config(**sizes | {"num_layers": 2, "vocab_size": 1000}))
    model.encoder.recompute = model.decoder.recompute = recompute
    model = HyperPELT(model, ["a"], HyperPELTConfig(), torch.bfloat16).train()
    kept = {}

    def note(tensor):
        # The tensor is held, so that no other one gets its address.
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    input_ids = torch.randint(2, 1000, (batch, 128))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids, None, input_ids[:, :8], "a")
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(size for size, _ in kept.values())


COMMANDS = {
    "write": write,
    "glue": train_and_use,
    "vl": train_and_use,
    "clip": extract,
    "counts": counts,
    "activations": activations,
    "processes": compare_processes,
    # What the others run in a process of its own.
    "watch": watch,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--text", type=Path, default=ROOT / "sample/glue/RTE/train.tsv")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "sample/mini-t5/spiece.model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--start", type=float, help=argparse.SUPPRESS)
    # What comes after -- is for train.py.
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:end])
    args.more = arguments[end + 1 :]
    COMMANDS[args.what](args.folder.resolve(), args)


if __name__ == "__main__":
    main()
