"""train.py on a few examples. Most runs take place in this process, which saves the imports."""

import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SAMPLE, run_cli
from safetensors.torch import load_file, save_file

import data
import train
from t5 import T5

SIZES = ["prefix_length=5", "embedding_dim=12", "hyper_dim=6", "bottleneck=4"]
OPTIONS = [
    "--max-steps",
    12,
    "--eval-every",
    4,
    "--batch-size",
    8,
    "--lr",
    0.02,
    "--warmup-steps",
    0,
    "--dtype",
    "float32",
    "--set",
    *SIZES,
]
SHORT = ["--max-steps", 2, "--eval-every", 2]
ANSWERS = ["cat", "dog", "bird", "fish"]


# ---- data and runs -------------------------------------------------------------------------------


def write_images(folder, subset, count, **about):
    """Features as clip_features.py writes them. Image i shows answer i % 4."""
    folder.mkdir(exist_ok=True)
    features = np.random.default_rng(count).normal(0, 0.1, (count, 5, 6))
    features += 2 * np.eye(4, 6)[np.arange(count) % 4][:, None]
    np.save(folder / f"{subset}.npy", features.astype(np.float16))
    content = {"ids": [*range(count)], "kind": "", "weights": "0", "preprocessing": {}, **about}
    (folder / f"{subset}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The first 41 training examples of the sample's rte and sst2, made-up ones of stsb and vqa."""
    folder = tmp_path_factory.mktemp("data")
    # The bundled T5 has no dropout. With it, a resumed run needs the same random numbers.
    model = shutil.copytree(SAMPLE / "mini-t5", folder / "t5")
    config = read(model / "config.json") | {"dropout_rate": 0.1}
    (model / "config.json").write_text(json.dumps(config))
    for name in ("RTE", "SST-2", "STS-B", "VQAv2"):
        (folder / name).mkdir()
    for file, count in (("train.tsv", 42), ("dev.tsv", 17)):
        for task in ("RTE", "SST-2"):
            lines = (SAMPLE / "glue" / task / file).read_text().splitlines()
            (folder / task / file).write_text("\n".join(lines[:count]))
        lines = [f"a dog eats\t{'a cat ' * (i % 3)}\t{i % 6}" for i in range(count)]
        (folder / "STS-B" / file).write_text("\n".join(["sentence1\tsentence2\tscore", *lines]))
    for task in ("RTE", "STS-B"):
        (folder / task / "test.tsv").write_text("index\tsentence1\tsentence2\n7\ta\tb\n9\tc\td")
    for subset, count in (("train2014", 17), ("val2014", 8)):
        write_images(folder / "features", subset, count)
        questions = [
            {"image_id": i, "question_id": 10 * i, "question": "what"} for i in range(count)
        ]
        annotations = [
            {
                "question_id": 10 * i,
                "answer_type": "other",
                "answers": [{"answer": ANSWERS[i % 4]}] * 10,
            }
            for i in range(count)
        ]
        path = folder / "VQAv2" / f"v2_OpenEnded_mscoco_{subset}_questions.json"
        path.write_text(json.dumps({"questions": questions}))
        path = folder / "VQAv2" / f"v2_mscoco_{subset}_annotations.json"
        path.write_text(json.dumps({"annotations": annotations}))
    return folder


def command(folder, task, run, *more):
    protocol = "official" if "vqa" in task else "paper"
    return [
        "--task",
        task,
        "--data-dir",
        folder,
        "--features",
        folder / "features",
        "--model",
        folder / "t5",
        "--protocol",
        protocol,
        "--run",
        run,
        *OPTIONS,
        *more,
    ]


def call(*arguments):
    """Run the main function of train.py in this process -> what it prints."""
    arguments = ["train.py", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", arguments),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        train.main()
    return printed.getvalue()


def end_of(*arguments):
    """-> exit code and standard error of a command that does not succeed."""
    with contextlib.redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit) as end:
        data.run(lambda: call(*arguments))
    return end.value.code, errors.getvalue()


def refusal(*arguments):
    """-> the one line in which a command ends, with exit code 2."""
    code, errors = end_of(*arguments)
    assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    return errors


def load(run):
    """A trained run -> train.Run with the weights of its best checkpoint, in eval mode."""
    loaded = train.load_run(train.read_settings(["--run", str(run), "--eval-only"]))
    train.load_best(loaded)
    loaded.model.eval()
    return loaded


@pytest.fixture(scope="module")
def text(folder, tmp_path_factory):
    """A run on two text tasks, made by the command line."""
    run = tmp_path_factory.mktemp("text") / "run"
    done = run_cli("train.py", *command(folder, "rte,stsb", run))
    assert done.returncode == 0, done.stderr
    (run / "printed").write_text(done.stdout + done.stderr)
    return run


@pytest.fixture(scope="module")
def image(folder, tmp_path_factory):
    """A run on a task with images and one without."""
    run = tmp_path_factory.mktemp("image") / "run"
    call(*command(folder, "vqa,rte", run))
    return run


def read(path):
    return json.loads(path.read_text())


def read_log(run, key):
    """-> (step, value) of each row of log.jsonl that has a key."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row[key]) for row in rows if key in row]


def last_weights(run):
    return torch.load(run / "last.pt", weights_only=True)["trained"]


def assert_same(run, expected):
    for name in ("best.safetensors", "metrics.json"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    for key in ("loss", "task", "validation"):
        assert read_log(run, key) == read_log(expected, key)
    last = last_weights(expected)
    assert all(torch.equal(tensor, last[name]) for name, tensor in last_weights(run).items())


def test_a_run_and_its_folder(text):
    assert (text / "curves.png").read_bytes().startswith(b"\x89PNG")
    means, metrics = dict(read_log(text, "validation mean")), read(text / "metrics.json")
    assert list(means) == [4, 8, 12]
    assert metrics["mean"]["validation"] == max(means.values())
    assert read_log(text, "lr") == [(10, pytest.approx(0.02 * 3 / 12))]
    # Checkpoints hold nothing that is frozen.
    best, printed = load_file(text / "best.safetensors"), (text / "printed").read_text()
    assert all("norm" in name for name in best if name.startswith("t5."))
    count = sum(tensor.numel() for tensor in best.values())
    assert read(text / "config.json")["trained_parameters"] == count
    assert f"{count:,} trained parameters" in printed
    # A progress bar would return the carriage.
    assert "\r" not in printed


def test_without_options_the_sample_is_trained(tmp_path, monkeypatch):
    """Here on two examples of each split."""
    monkeypatch.chdir(tmp_path)
    splits = data.make_splits(data.TASKS["rte"], SAMPLE)
    few = {split: examples[:2] for split, examples in splits.items()}
    monkeypatch.setattr(data, "make_splits", lambda task, folder, protocol: few)
    assert "mini-t5 (7.1 M parameters), data in sample\nrte: train 2" in call()
    assert (tmp_path / "runs" / "rte-hyperpelt" / "metrics.json").exists()


# ---- interruptions -------------------------------------------------------------------------------


def kill(*values):
    # Nothing in train.py catches this exception, so it leaves behind what a signal would.
    raise SystemExit


def fill_disk(*values):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def diverge(parameters):
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, math.nan)


# A function, the number of the call before which something happens, what, exit code, message.
INTERRUPTIONS = [
    ("train.learning_rate", 4, kill, None, ""),
    ("train.generate_outputs", 2, kill, None, ""),
    ("data.write_file", 2, fill_disk, 2, "^error: .*No space left on device.*\n$"),
    ("train.sum_gradients", 2, diverge, 2, "^error: .*step 8: .*gradient.* diverged.*--lr\n$"),
    # The second file that is renamed is best.safetensors.
    ("os.replace", 2, kill, None, ""),
    # Two kills in one evaluation: the second one finds a log that was cut off.
    ("train.generate_outputs", 1, kill, None, ""),
    ("train.generate_outputs", 1, kill, None, ""),
]


def strike(original, number, event):
    """-> the function with something that happens before one of its calls."""
    calls = []

    def struck(*values):
        calls.append(values)
        if len(calls) == number:
            event(*values)
        return original(*values)

    return struck


@pytest.mark.parametrize(
    "kind, task, interruptions",
    [("text", "rte,stsb", INTERRUPTIONS), ("image", "vqa,rte", INTERRUPTIONS[:2])],
)
def test_interruptions_change_nothing(kind, task, interruptions, folder, request, tmp_path):
    arguments = command(folder, task, tmp_path / "run")
    for target, number, event, code, message in interruptions:
        module, name = target.split(".")
        original = getattr(sys.modules[module], name)
        with mock.patch(target, strike(original, number, event)):
            found, errors = end_of(*arguments)
        assert found == code and re.search(message, errors), target
        arguments = ["--run", tmp_path / "run", "--resume"]
    assert "resumed at step" in call(*arguments)
    assert_same(tmp_path / "run", request.getfixturevalue(kind))


def test_an_interrupt_during_the_imports_shows_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 2)\n" * 2)
    done = run_cli("train.py", PYTHONPATH=str(tmp_path))
    assert done.returncode == -signal.SIGINT and done.stderr == ""


# ---- what may not be overwritten or mixed up -----------------------------------------------------


def test_without_resume_a_left_over_checkpoint_is_not_used(text, folder, tmp_path):
    run = shutil.copytree(text, tmp_path / "run")
    (run / "config.json").unlink()
    assert "resumed" not in call(*command(folder, "rte,stsb", run, *SHORT))
    assert read(run / "config.json")["settings"]["max_steps"] == 2


def test_a_finished_run_stays_as_it_is_wherever_it_lies(text, folder, tmp_path):
    assert "holds a run already; --resume" in refusal(*command(folder, "rte", text))
    run = shutil.copytree(text, tmp_path / "run")
    model = shutil.copytree(folder / "t5", tmp_path / "model")
    moved = shutil.copytree(folder, tmp_path / "data")
    (run / "metrics.json").unlink()
    call("--run", run, "--eval-only", "--model", model, "--data-dir", moved)
    assert_same(run, text)
    assert "resumed at step 12 of 12" in call("--run", run, "--resume")
    assert_same(run, text)


def test_other_data_features_or_backbone_are_refused(text, image, folder, checkpoint, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "data")
    np.save(moved / "features" / "val2014.npy", -np.load(moved / "features" / "val2014.npy"))
    header, first, *rows = (moved / "RTE" / "dev.tsv").read_text().splitlines()
    (moved / "RTE" / "dev.tsv").write_text("\n".join([header, *rows, first]))
    error = refusal("--run", text, "--eval-only", "--data-dir", moved)
    assert re.search(r"examples was \w{16}, is \w{16}", error) and "backbone" not in error
    for more in (["--resume"], ["--ask", "a", "b"]):
        error = refusal("--run", text, *more, "--model", checkpoint)
        assert re.search(r"backbone was \w{16}, is \w{16}", error) and "tokenizer" not in error
    for more in (["--resume"], ["--predict", "validation"]):
        error = refusal("--run", image, *more, "--features", moved / "features")
        assert re.search(r"features was \w{16}, is \w{16}", error)
    arguments = command(moved, "vqa", tmp_path / "run")
    write_images(moved / "features", "val2014", 8, weights="9")
    assert "val2014.npy: found features of {'kind': '', 'weights': '9'" in refusal(*arguments)
    write_images(moved / "features", "val2014", 6)
    assert "2 images have no features, such as val2014:6, val2014:7" in refusal(*arguments)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit_architecture(path):
    """Exercises change defaults of HyperPELTConfig. A run knows those that it was made with."""
    path.write_text(path.read_text().replace('"decoder cross-attention"', '"encoder FFN"'))


@pytest.mark.parametrize(
    "name, damage, more, words",
    [
        ("best.safetensors", cut, "--eval-only", ""),
        ("best.safetensors", lambda path: save_file({}, path), "--eval-only", "missing"),
        ("best.safetensors", os.remove, "--eval-only", "No such file"),
        ("last.pt", cut, "--resume", ""),
        ("last.pt", lambda path: path.write_bytes(b"text"), "--resume", ""),
        ("config.json", cut, "--resume", "not JSON"),
        ("config.json", edit_architecture, "--resume", "this is another run: prefix_blocks was ["),
        ("config.json", edit_architecture, "--export", "this is another run: prefix_blocks was ["),
    ],
)
def test_damaged_files_are_named_in_one_line(name, damage, more, words, text, tmp_path):
    run = shutil.copytree(text, tmp_path / "run")
    damage(run / name)
    error = refusal("--run", run, more, *["exported"] * (more == "--export"))
    assert f"{run / name}: " in error and words in error


@pytest.mark.parametrize(
    "kind, more, words",
    [
        ("text", ["--resume", "--lr", 0.5, "--seed", 3], "lr was 0.02, is 0.5; seed was 0, is 3"),
        ("text", ["--eval-only", "--protocol", "official"], "protocol was paper, is official"),
        ("text", ["--ask", "a", "b", "--set", *SIZES[:3]], "bottleneck was 4, is 24"),
        ("text", ["--ask", "a dog"], "--ask: rte takes sentence1; sentence2; found ['a dog']"),
        ("image", ["--ask", "what", "is", "it"], "vqa takes question; image, as SET:ID"),
        ("image", ["--ask", "what", "val2014:99"], "no features, such as"),
        ("image", ["--ask", "what", "nowhere:5"], "nowhere"),
        ("image", ["--ask", "what", "5"], "SET:ID"),
        ("image", ["--predict", "test"], "--predict test: vqa has train, validation"),
        ("new", ["--task", "rtf"], "task 'rtf' is unknown; the known ones are cola"),
        ("new", ["--data-dir", "/nowhere"], "/nowhere/RTE/train.tsv: [Errno 2] No such file"),
        ("new", ["--model", "/nowhere"], "/nowhere"),
        ("new", ["--set", "prefix=3"], "--set prefix=3"),
        ("new", ["--set", "bottleneck=-1"], "--method, --set: Trying to create tensor with neg"),
        ("new", ["--label-smoothing", "1"], "found 1.0, expected a number from 0, below 1"),
        ("new", ["--lr", "nan"], "--lr: found nan, expected a number from 0, below"),
        ("new", ["--run", SAMPLE / "mini-t5", "--eval-only"], "mini-t5/config.json: not"),
        ("new", ["--table", SAMPLE / "mini-t5"], "not the config.json of a run"),
        ("new", ["--set", "prefix_length=many"], "--set prefix_length=many: invalid literal"),
        ("new", ["--set", "sharing=all"], "sharing: found 'all', expected one of default, shared"),
        ("new", ["--eval-only"], "config.json: [Errno 2] No such file"),
        ("new", ["--task", "vqa", "--method", "norms"], "lets no image in"),
        ("new", ["--task", "vqa", "--set", "prefix_length=7"], "found 5 grid cells, expected 7"),
        ("new", ["--task", "vqa", "--features", "/nowhere"], "/nowhere/train2014.npy: [Errno 2]"),
        ("new", ["--task", "sst2", "--init-from", "TEXT"], "--init-task: found '', expected"),
        ("new", ["--init-from", "TEXT", "--method", "mam"], "method was hyperpelt, is mam"),
        ("new", ["--table", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_end_in_one_line(kind, more, words, text, image, folder, tmp_path):
    arguments = {
        "new": command(folder, "rte", tmp_path, "--protocol", "official"),
        "text": ["--run", text],
        "image": ["--run", image],
    }
    more = [text if argument == "TEXT" else argument for argument in more]
    assert words in refusal(*arguments[kind], *more)


# ---- batches -------------------------------------------------------------------------------------


def batches_of(splits, steps=10, temperature=2.0, seed=0):
    """{task: training examples} -> Batches."""
    settings = {"batch_size": 8, "max_steps": steps, "epochs": 1, "seed": seed}
    args = SimpleNamespace(**settings, task_temperature=temperature)
    examples = {name: {"train": examples} for name, examples in splits.items()}
    return train.Batches(SimpleNamespace(args=args, tasks=examples, splits=examples))


def examples_of(texts):
    return [data.Example((text,), "b", None, "") for text in texts]


def texts_of(batches, step):
    return [example.source for example in batches(step)[1]]


def test_tasks_are_drawn_by_the_documented_formula():
    """p ~ n^(1/T), with the training sizes of GLUE that the paper's protocol leaves."""
    counts = [8551, 66349, 3668, 362846, 5749, 391702, 103743, 2490]
    examples = examples_of(["x"]) * max(counts)
    splits = {str(i): examples[:count] for i, count in enumerate(counts)}
    roots = np.sqrt(counts) / np.sqrt(counts).sum()
    for temperature, expected in (
        (10, [0.109, 0.134, 0.100, 0.158, 0.105, 0.159, 0.140, 0.096]),
        (2, roots),
    ):
        turns = batches_of(splits, 100_000, temperature=temperature).task_of_step
        assert np.bincount(turns) / 100_000 == pytest.approx(np.array(expected), abs=0.006)


def test_an_epoch_holds_each_example_once_and_batches_hold_similar_lengths():
    texts = ["a" * length for length in range(1, 204)]
    batches = batches_of({"rte": examples_of(texts)}, steps=52)
    epochs = [[texts_of(batches, step) for step in range(start, start + 26)] for start in (0, 26)]
    for epoch in epochs:
        assert sorted(sum(epoch, []), key=len) == texts
        assert sorted(map(len, epoch)) == [3] + [8] * 25
        spreads = [len(max(rows)) - len(min(rows)) for rows in epoch]
        # A batch of eight from all 203 lengths would spread over about 158.
        assert np.mean(spreads) < 30
    assert epochs[0] != epochs[1] and batches_of({"rte": examples_of(texts)}, 0).steps == 26


def test_a_batch_is_a_function_of_seed_and_step_and_holds_one_task():
    splits = {letter: examples_of(letter * i for i in range(1, 40)) for letter in "ab"}
    first, again, other = (batches_of(splits, 30, seed=seed) for seed in (0, 0, 1))
    backwards = [again(step) for step in reversed(range(30))]
    assert [first(step) for step in range(30)] == backwards[::-1]
    assert [other(step) for step in range(30)] != backwards[::-1]
    for step in range(30):
        assert set("".join(texts_of(first, step))) == {first(step)[0]}


def test_targets_are_drawn_by_their_weights():
    example = data.Example(("x",), "a", None, "", None, (("a", 0.9), ("b", 0.3), ("c", 0.3)))
    batches = batches_of({"vqa": [example] * 8}, steps=500)
    targets = sum((batches(step)[2] for step in range(500)), [])
    shares = [targets.count(letter) / len(targets) for letter in "abc"]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.03)


def test_padding():
    """Inputs by 0, to a multiple of 8 if there are more than 64 columns; labels by -100. Tokens are
    letters, and every text ends with 1."""
    run = SimpleNamespace(args=SimpleNamespace(max_source_length=999))
    run.encode = lambda text: [*map(ord, text), 1]
    input_ids, features = train.make_inputs(run, examples_of(["x", "x" * 66]))
    assert input_ids.tolist() == [[120, 1] + [0] * 70, [120] * 66 + [1] + [0] * 5]
    assert train.make_labels(run, ["b", "yz"]).tolist() == [[98, 1, -100], [121, 122, 1]]
    assert features is None


# ---- training ------------------------------------------------------------------------------------


def test_the_learning_rate():
    """Twelve steps, four of them warm-up."""
    args = SimpleNamespace(lr=8.0, warmup_steps=4, schedule="linear")
    rates = [train.learning_rate(args, step, 12) for step in range(12)]
    assert rates == pytest.approx([2, 4, 6, 8, 8, 7, 6, 5, 4, 3, 2, 1])
    args.schedule = "constant"
    assert train.learning_rate(args, 11, 12) == 8


def test_the_layer_norms_have_a_rate_of_their_own(folder, tmp_path):
    """The first step of Adam moves each number by its learning rate, whatever the gradient is."""
    one_step = ["--max-steps", 1, "--eval-every", 1, "--norm-rate", 3]
    for lr in (0, 0.01):
        call(*command(folder, "rte", tmp_path / str(lr), *one_step, "--lr", lr))
    before, after = (load_file(tmp_path / lr / "best.safetensors") for lr in ("0", "0.01"))
    for name, tensor in after.items():
        if name.startswith("t5.") or "to_value" in name:
            moved = (tensor - before[name]).abs().max().item()
            assert moved == pytest.approx(0.03 if name.startswith("t5.") else 0.01, rel=1e-2)


def test_the_best_checkpoint_has_the_best_mean_over_all_metrics(folder, tmp_path, monkeypatch):
    """The mean over tasks would choose the first one. Of equal means, the earlier one counts."""
    values = iter([0.9, 0.1, 0.5, 0.4, 0.5, 0.4])
    monkeypatch.setattr(
        data, "score", lambda task, *_: dict.fromkeys(task.metrics, next(values, 0.0))
    )
    write = mock.Mock(wraps=data.write_file)
    monkeypatch.setattr(data, "write_file", write)
    call(*command(folder, "rte,stsb", tmp_path))
    steps, means = zip(*read_log(tmp_path, "validation mean"), strict=True)
    assert steps == (4, 8, 12) and means == pytest.approx([1.1 / 3, 1.3 / 3, 1.3 / 3])
    names = [one.args[0].name for one in write.mock_calls]
    checkpoints = [name for name in names if name in ("last.pt", "best.safetensors")]
    # The first one is saved before the first step.
    assert checkpoints == ["last.pt"] + ["last.pt", "best.safetensors"] * 2 + ["last.pt"]


@pytest.mark.parametrize(
    "more, has, lacks",
    [
        (
            ["--vision", "prefix"],
            "visual_hypernetworks.to_key.weight",
            "visual_hypernetworks.scale",
        ),
        (
            ["--vision", "adapter"],
            "visual_hypernetworks.scale",
            "visual_hypernetworks.to_key.weight",
        ),
        (["--vision", "tokens", "--method", "mam"], "learned.scale", "visual_embedding.weight"),
        (["--vision", "tokens", "--method", "full"], "t5.shared.weight", "learned.scale"),
        (["--vision", "shuffled"], "visual_hypernetworks.scale", "image_tokens.weight"),
        (["--dtype", "bfloat16"], "visual_hypernetworks.scale", "image_tokens.weight"),
    ],
)
def test_other_ways_to_train(more, has, lacks, image, folder, tmp_path):
    """Trained tensors are always float32. Of shuffled images, none has its own features."""
    call(*command(folder, "vqa", tmp_path / "run", *SHORT, *more))
    trained = load_file(tmp_path / "run" / "best.safetensors")
    assert has in trained and lacks not in trained
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    found, own = (
        {name: (features.filename, row) for name, (features, row) in load(run).images.items()}
        for run in (tmp_path / "run", image)
    )
    assert {found[name] == own[name] for name in own} == {"shuffled" not in more}
    assert sorted(found.values()) == sorted(own.values())


@pytest.mark.parametrize(
    "processes, more", [(2, []), (1, ["--accumulate", 3]), (2, ["--accumulate", 2, "--recompute"])]
)
def test_a_batch_in_parts_does_what_a_whole_one_does(processes, more, folder, tmp_path):
    """Without dropout. The last batch of an epoch has one example, so some parts have none."""
    model = shutil.copytree(SAMPLE / "mini-t5", tmp_path / "model")
    config = read(model / "config.json") | {"dropout_rate": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    whole = call(*command(folder, "vqa,rte", tmp_path / "whole", "--model", model))
    done = run_cli(
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        "--",
        "train.py",
        *command(folder, "vqa,rte", tmp_path / "parts", "--model", model, *more),
    )
    assert done.returncode == 0, done.stderr
    # The metrics and outputs that a run prints.
    assert whole.split("task ")[1].split(str(tmp_path))[0] in done.stdout
    losses = [read_log(tmp_path / name, "loss")[0] for name in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    last = last_weights(tmp_path / "parts")
    for name, tensor in last_weights(tmp_path / "whole").items():
        assert (tensor - last[name]).abs().mean() < 1e-3, name


def test_recomputed_activations_give_the_same_run(image, folder, tmp_path):
    """With dropout, whose random numbers are drawn again."""
    call(*command(folder, "vqa,rte", tmp_path, "--recompute"))
    assert_same(tmp_path, image)


# ---- using a trained run -------------------------------------------------------------------------


def test_transfer(text, folder, tmp_path):
    """A new task starts with another one's embedding, a known one with its own."""
    call(
        *command(
            folder,
            "sst2,rte",
            tmp_path / "run",
            *SHORT,
            "--lr",
            0,
            "--init-from",
            text,
            "--init-task",
            "stsb",
        )
    )
    after, expected = (load_file(run / "best.safetensors") for run in (tmp_path / "run", text))
    expected["task.sst2"] = expected.pop("task.stsb")
    assert after.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.items())


def test_exported_weights_do_what_the_run_does(text, folder, checkpoint, tmp_path):
    call("--run", text, "--export", tmp_path)
    run, path = load(text), tmp_path / "stsb.safetensors"
    assert not any("hypernetworks" in name or "task" in name for name in load_file(path))
    t5 = T5.from_pretrained(folder / "t5")
    sites = train.load_exported(path, t5)
    input_ids, _ = train.make_inputs(run, run.splits["stsb"]["validation"][:3])
    labels = train.make_labels(run, ["1.0", "2.4", "5.0"])
    with torch.no_grad():
        expected, _ = run.model(input_ids, input_ids != 0, labels, "stsb")
        logits, _ = t5(input_ids, input_ids != 0, labels, sites=sites)
    assert torch.allclose(logits, expected, atol=1e-4)
    with pytest.raises(data.UserError, match="stsb.safetensors: was exported for another T5"):
        train.load_exported(path, T5.from_pretrained(checkpoint))


def test_an_image_task_is_not_exported(image, tmp_path):
    run, out = shutil.copytree(image, tmp_path / "run"), tmp_path / "out"
    printed = call("--run", run, "--export", out)
    assert "vqa: left out, because its weights depend on the image" in printed
    assert [path.name for path in out.iterdir()] == ["rte.safetensors"]
    printed = call("--run", run, "--export", tmp_path / "both", "--predict", "validation")
    assert "validation-VQAv2.json: " in printed and (tmp_path / "both/rte.safetensors").exists()


def test_asking_gives_an_output_and_probabilities(text):
    run = load(text)
    pair = run.splits["rte"]["validation"][0].parts[1::2]
    source, output, *lines = call("--run", text, "--ask", "rte", *pair).splitlines()[-4:]
    assert source == "rte sentence1: {} sentence2: {}".format(*pair)
    shown = {line.split()[0]: float(line.split()[1]) for line in lines}
    # One word after the other, one token after the other.
    ids, products = torch.tensor([run.tokenizer.encode(source)]), {}
    weights = run.model.inject(run.model.generate_weights("rte"))
    longest = len(run.tokenizer.encode("not_entailment"))
    generated = run.model.t5.generate(ids, max_new_tokens=longest, **weights)[0]
    assert output == run.tokenizer.decode(generated)
    for word in ("entailment", "not_entailment"):
        labels = torch.tensor([run.tokenizer.encode(word)])
        with torch.no_grad():
            logits, _ = run.model(ids, ids != 0, labels, "rte")
        products[word] = F.softmax(logits[0], 1).gather(1, labels.T).prod().item()
    assert shown == pytest.approx(products, abs=1e-4)


def test_the_tour_walks_through_a_run(text):
    done = run_cli("sample/tour.py", text)
    assert done.returncode == 0, done.stderr
    assert all(f"eq. ({number})" in done.stdout for number in range(1, 6))
    # The attention's share on the prefix is a probability.
    shares = done.stdout.split("eq. (3)")[1].split("eq. (4)")[0]
    numbers = [float(word) for word in shares.split() if word.replace(".", "").isdigit()]
    assert len(numbers) > 5 and all(0 <= number <= 1 for number in numbers), shares


def test_predictions(text, image):
    for split, name in (
        ("validation", "RTE-validation"),
        ("test", "RTE-test"),
        ("submission", "RTE"),
    ):
        call("--run", text, "--predict", split)
        header, *rows = (text / f"{name}.tsv").read_text().splitlines()
        assert header == "index\tprediction" and len(rows) == (2 if split == "submission" else 8)
        assert {row.split("\t")[1] for row in rows} <= {"entailment", "not_entailment"}
    call("--run", image, "--predict", "validation")
    outputs = {row["question_id"]: row["answer"] for row in read(image / "validation-VQAv2.json")}
    right = [answer == ANSWERS[index // 10 % 4] for index, answer in outputs.items()]
    accuracy = read(image / "metrics.json")["metrics"]["vqa"]["validation"]["accuracy"]
    assert accuracy == pytest.approx(np.mean(right))
    asked = call("--run", image, "--ask", "what", "val2014:5").splitlines()
    assert asked[-2:] == ["vqa: what", outputs[50]]


def test_several_seeds_and_their_table(folder, tmp_path):
    arguments = command(
        folder, "rte", tmp_path, *SHORT, "--num-seeds", 2, "--max-train-examples", 30
    )
    printed = call(*arguments)
    weights = [(tmp_path / f"seed-{seed}" / "best.safetensors").read_bytes() for seed in (0, 1)]
    assert weights[0] != weights[1]
    # Only what is missing is trained again.
    shutil.rmtree(tmp_path / "seed-1")
    again = call(*arguments, "--resume")
    assert "resumed at step 2 of 2" in again
    assert (tmp_path / "seed-1" / "best.safetensors").read_bytes() == weights[1]
    assert again.splitlines()[-3:] == printed.splitlines()[-3:]


def test_a_table_by_hand(text, tmp_path):
    """A row for each folder: the mean over its seeds, which may differ in nothing else."""
    values = {"four/seed-0": 0.6, "four/seed-1": 0.8, "five": 0.7}
    for seed, (folder, value) in enumerate(values.items()):
        record = read(text / "config.json")
        record["settings"]["seed"] = seed
        result = {"metrics": {"rte": {"test": {"accuracy": value}}}, "mean": {"test": value}}
        os.makedirs(tmp_path / folder)
        (tmp_path / folder / "config.json").write_text(json.dumps(record))
        (tmp_path / folder / "metrics.json").write_text(json.dumps(result))
    folders = [str(tmp_path / name) for name in ("four", "five")]
    head, _, *rows = [
        line.strip("| ").split(" | ") for line in call("--table", *folders).splitlines()
    ]
    shown = f"70.00 ± {100 * statistics.stdev([0.6, 0.8]):.2f} (2 runs)"
    assert head == ["run", "rte accuracy, test", "mean, test"]
    assert rows == [[folders[0], shown, shown], [folders[1], "70.00", "70.00"]]
    record["config"]["bottleneck"] = 5
    (tmp_path / "four" / "seed-1" / "config.json").write_text(json.dumps(record))
    assert "seed-1: is no other seed of the same run: bottleneck was 4, is 5" in refusal(
        "--table", folders[0]
    )
