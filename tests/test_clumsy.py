"""What a clumsy user, a bad line or a strange machine does: nothing wrong is taken in silence, nothing of theirs is overwritten."""
import contextlib
import gzip
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import clip_features
import data
import train as train_module
from conftest import ROOT, execute, read_json, run
from data import UserError
from t5 import T5, T5Config, shard_names
from test_train import command
from test_vl_train import command as vl_command
from test_vl_train import vl, write_features  # noqa: F401 (a fixture)

STEPS = ["--steps", 4, "--eval-every", 2]


@pytest.fixture(scope="module")
def done(checkpoint, glue, tmp_path_factory):
    """A run of four steps."""
    out = tmp_path_factory.mktemp("done") / "run"
    run(*command(checkpoint, glue, out, *STEPS))
    return out


@pytest.fixture(scope="module")
def seen(checkpoint, vl, tmp_path_factory):  # noqa: F811
    """A run of four steps with images."""
    out = tmp_path_factory.mktemp("seen") / "run"
    run(*vl_command(checkpoint, vl, out, *STEPS))
    return out


def edit(path, **changes):
    path.write_text(json.dumps(read_json(path) | changes))


# ------------------------------------------------------------------------------------------------------- saved runs

@pytest.mark.parametrize("name, value", [
    *(("batch_size", value) for value in (0, -1, "8", 10**12)), *(("lr", value) for value in (float("nan"), -1.0, 1)), ("steps", -5), ("epochs", float("nan")),
    ("label_smoothing", 5.0), ("temperature", 0.0), ("prefix_length", -2), ("hyper_dim", 10**9), ("seed", -1), ("seed", 2**70), ("warmup_steps", -3),
    ("eval_every", -1), ("precision", "fp8"), ("schedule", "cosine"), ("vision", "eyes"), ("split", "other"), ("method", None), ("data_dir", 5), ("task", "rtf")])
def test_settings_that_no_command_line_would_have(name, value, done, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(read_json(done / "config.json") | {"settings": read_json(done / "config.json")["settings"] | {name: value}}))
    with pytest.raises(UserError, match="'rtf' is unknown" if name == "task" else f"config.json: settings: {name.replace('_', '-')}: found .*, expected"):
        train_module.read_run(tmp_path)


@pytest.mark.parametrize("changes, words", [(dict(tasks=["stsb"]), "tasks: found .'stsb'., expected rte"), (dict(tasks=None), "tasks: found None"),
                                            (dict(format=2.0), "format: found 2.0, expected 2"), (dict(format=True), "format: found True"), (dict(trained_parameters=0), "trained_parameters: found 0")])
def test_records_that_no_run_would_have(changes, words, done, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(read_json(done / "config.json") | changes))
    with pytest.raises(UserError, match=words):
        train_module.read_run(tmp_path)


def test_progress_that_no_run_would_have(done, tmp_path):
    """Refused before the log is touched."""
    out = shutil.copytree(done, tmp_path / "run")
    before, tensors = (out / "log.jsonl").read_bytes(), load_file(out / "last.safetensors")
    good = dict(step=4, evaluated=4, best_step=2, best=0.5, right=0, seen=0)
    for wrong in (dict(step=99), dict(step=-1), dict(evaluated=9), dict(right=3), dict(best=float("nan"))):
        save_file(tensors, out / "last.safetensors", {"hyperpelt": json.dumps(good | wrong)})
        assert "expected counts that fit a run of 4 steps" in run("train.py", "--out", out, "--resume", ok=False)[1]
    assert (out / "log.jsonl").read_bytes() == before


def test_another_backbone_tokenizer_or_data(done, checkpoint, glue, tmp_path):
    """One number in the middle of one tensor; a tokenizer whose ids are the same; an order of rows. All that differs is named at once."""
    other, changed = shutil.copytree(checkpoint, tmp_path / "t5"), shutil.copytree(glue, tmp_path / "glue")
    tensors = load_file(other / "model.safetensors")
    tensors["shared.weight"].view(-1)[-7] += 0.5
    save_file(tensors, other / "model.safetensors")
    (other / "spiece.model").write_bytes((checkpoint / "spiece.model").read_bytes() + b"\x4a\x00")          # an empty field that SentencePiece passes by
    header, *lines = (changed / "RTE" / "train.tsv").read_text().splitlines()
    (changed / "RTE" / "train.tsv").write_text("\n".join([header, *lines[::-1]]) + "\n")
    error = run("train.py", "--out", done, "--resume", "--model", other, "--data-dir", changed, ok=False)[1]
    assert all(f"another {what}: found" in error for what in ("backbone", "tokenizer", "data"))
    assert "another tokenizer" in run("train.py", "--out", done, "--ask", "a", "b", "--model", other, ok=False)[1]


def test_other_features_or_images(seen, vl, tmp_path):  # noqa: F811
    """The same .json beside other numbers, ids in another order, questions about other images."""
    def refused(what, folder=tmp_path / "vl"):
        assert f"another {what}" in run("train.py", "--out", seen, "--eval-only", "--data-dir", folder, "--features", folder / "features", ok=False)[1]
    folder = shutil.copytree(vl, tmp_path / "vl")
    array, about = folder / "features" / "val2014.npy", folder / "features" / "val2014.json"
    np.save(array, -np.load(array))
    refused("features")
    shutil.copy(vl / "features" / "val2014.npy", array)
    edit(about, ids=read_json(about)["ids"][::-1])
    refused("features")
    shutil.copy(vl / "features" / "val2014.json", about)
    path = folder / "VQAv2" / "v2_OpenEnded_mscoco_val2014_questions.json"
    edit(path, questions=[question | {"image_id": (question["image_id"] + 1) % 12} for question in read_json(path)["questions"]])
    refused("data")


def test_numbers_that_are_not_finite(seen, checkpoint, vl, tmp_path):  # noqa: F811
    folder = shutil.copytree(vl / "features", tmp_path / "features")
    array = np.load(folder / "train2014.npy")
    array[5, 2, 3] = np.inf
    np.save(folder / "train2014.npy", array)
    assert "train2014.npy: row 5 (from 0): found numbers that are not finite" in run(*vl_command(checkpoint, vl, tmp_path / "run", *STEPS, "--steps", 10, "--features", folder), ok=False)[1]
    other = shutil.copytree(checkpoint, tmp_path / "t5")
    tensors = load_file(other / "model.safetensors")
    tensors["shared.weight"][3, 3] = float("nan")
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors: tensor shared.weight holds numbers that are not finite"):
        T5.from_pretrained(other)


def test_nothing_of_the_user_is_overwritten(done, checkpoint, glue, tmp_path):
    before = (done / "last.safetensors").read_bytes()
    assert "last.safetensors: exists already; choose another --export" in run("train.py", "--out", done, "--export", done / "last.safetensors", ok=False)[1]
    assert (done / "last.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    assert "file: found a file, expected a folder" in run(*command(checkpoint, glue, tmp_path / "file"), ok=False)[1]
    assert "expected --init-from too" in run(*command(checkpoint, glue, tmp_path / "run", "--init-task", "rte"), ok=False)[1]


def test_tables_of_damaged_runs(done, tmp_path):
    out = shutil.copytree(done, tmp_path / "run")
    for metrics in ({"rte": None}, {"rte": [1]}, {"rte": {"test": [1]}}, {"rte": {"test": {"accuracy": "1"}}}):
        (out / "metrics.json").write_text(json.dumps({"average": {}} | metrics))
        with pytest.raises(UserError, match="metrics.json: rte: .*expected accuracy as numbers"):
            train_module.table([out])


def test_a_run_without_its_picture(done, tmp_path):
    """A row of the log that is none of ours, and a picture that cannot be written, do not fail an evaluation."""
    out = shutil.copytree(done, tmp_path / "run")
    (out / "curves.png").unlink(missing_ok=True)
    (out / "curves.png").mkdir()
    stdout, stderr = run("train.py", "--out", out, "--eval-only")
    assert "best step" in stdout and stderr.count("\n") == ("could not be drawn" in stderr)


# ---------------------------------------------------------------------------------------------- terminals and machines

def test_a_letter_that_the_terminal_does_not_know(checkpoint, glue, tmp_path):
    """Printed as an escape, after the whole training as before it; half of a pair of surrogates is no letter at all."""
    changed = shutil.copytree(glue, tmp_path / "glue")
    for name in ("train", "dev"):
        path = changed / "RTE" / f"{name}.tsv"
        path.write_text(path.read_text().replace("cat", "\u732b"))
    assert "\\u732b" in run(*command(checkpoint, changed, tmp_path / "run", *STEPS), PYTHONIOENCODING="ascii", PYTHONPATH="")[0]
    out = execute("-c", "import data, train; data.run(train.main)", "--out", tmp_path / "run", "--ask", "a \udce9", "b")
    assert out.returncode == 2 and "not UTF-8" in out.stderr and out.stderr.count("\n") == 1


def test_half_a_pair_of_surrogates(tmp_path, vocabulary, capsys):
    (tmp_path / "CB").mkdir()
    row = '{"premise": "the cat \\ud800 eats", "hypothesis": "a", "label": "neutral"}\n'
    for name in ("train", "val"):
        (tmp_path / "CB" / f"{name}.jsonl").write_text(row * 3)
    from t5 import Tokenizer
    examples = data.make_splits(data.TASKS["cb"], tmp_path)["train"]
    assert data.encode_examples(examples, Tokenizer(vocabulary).encode, 20)[0].source[-1] == 1
    assert "\\ud800" in run("data.py", "--task", "cb", "--data-dir", tmp_path)[0]


@pytest.mark.parametrize("shell, code, words", [
    ("{train} | true; exit ${{PIPESTATUS[0]}}", 141, "stopped: nobody reads the output"),            # the reader of a pipe goes
    ("{train} >&-", 0, ""),                                                                          # nobody listens from the start
    ("ulimit -v 4000000; {train} --prefix-length 100000 --embedding-dim 100000", 2, "error: memory is used up"),
    ("HF_ENDPOINT=/tmp {train} --model org/tiny", 2, "unknown url type"),
    ("env -u HOME {train} --model t5-bse", 2, "'t5-bse' is neither"),
])
def test_strange_shells(shell, code, words, checkpoint, glue, tmp_path):
    train = " ".join([sys.executable, *map(str, command(checkpoint, glue, tmp_path / "run", *STEPS))])
    ended = subprocess.run(["bash", "-c", shell.format(train=train)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == code and words in ended.stderr and "Traceback" not in ended.stderr, ended.stderr


def test_a_terminal_that_is_closed(checkpoint, glue, tmp_path):
    """SIGHUP saves and stops, as SIGTERM does; under nohup it does nothing."""
    for ignored in (False, True):
        out = tmp_path / f"run{ignored}"
        more = "import os, signal, train, data; old = train.learning_rate\n" + f"signal.signal(signal.SIGHUP, signal.SIG_{'IGN' if ignored else 'DFL'})\n" + (
            "def rate(step, *more):\n    if step == 2: os.kill(os.getpid(), signal.SIGHUP)\n    return old(step, *more)\ntrain.learning_rate = rate; data.run(train.main)")
        ended = execute("-c", more, *command(checkpoint, glue, out, *STEPS)[1:])
        assert ended.returncode == (0 if ignored else 129) and ("stopped at step 3" in ended.stderr) != ignored, ended.stderr


# ------------------------------------------------------------------------------------------------------------- files

@pytest.mark.parametrize("task, path, content, words", [
    ("rte", "RTE/train.tsv", "sentence1\tsentence1\tsentence2\tlabel\na\tb\tc\tentailment", "expected one named sentence1"),
    ("trec", "TREC/train_5500.label", "NUM:dist How far ?\nNUM:dist\n", "line 2: found 'NUM:dist', expected a label and a question"),
    ("imdb", "aclImdb/train/pos/0_9.txt", "Good.", "train/neg: found no .txt file"),
    ("cola", "CoLA/train.tsv", "x\t1\ta sentence", "expected one named 3"),
])
def test_wrong_text_files(task, path, content, words, tmp_path):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(content)
    with pytest.raises(UserError, match=words):
        data.read_split(data.TASKS[task], tmp_path, "train")


def test_a_list_of_ids_that_is_none(tmp_path):
    (tmp_path / "MRPC").mkdir()
    (tmp_path / "MRPC" / "msr_paraphrase_train.txt").write_text("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\ta\tb\n")
    for content, words in (("1\n", "mrpc_dev_ids.tsv: found columns 0; expected one named 1"), ("", "mrpc_dev_ids.tsv: found no rows"), ("1\t2\n3", "line 2: found 1 columns")):
        (tmp_path / "MRPC" / "mrpc_dev_ids.tsv").write_text(content)
        with pytest.raises(UserError, match=words):
            data.read_split(data.TASKS["mrpc"], tmp_path, "train")


def test_training_questions_in_the_place_of_others(vl, tmp_path):  # noqa: F811
    folder = shutil.copytree(vl / "VQAv2", tmp_path / "VQAv2")
    for kind in ("OpenEnded_mscoco_{}_questions", "mscoco_{}_annotations"):
        shutil.copy(folder / f"v2_{kind.format('train2014')}.json", folder / f"v2_{kind.format('val2014')}.json")
    with pytest.raises(UserError, match="val2014_questions.json: found data_subtype 'train2014', expected val2014"):
        data.make_splits(data.find_task("vqa"), tmp_path, "official")


@pytest.mark.parametrize("names", [{}, {"a": []}, {"a": 5}, {"a": ".."}, {"a": ""}, {"a": "../b.safetensors"}, {"a": "/b"}, {"a": "c", "d": {}}])
def test_wrong_indices(names, tmp_path):
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match="i.json: weight_map: found .*, expected tensor names -> files of this folder"):
        shard_names(tmp_path / "i.json")


def test_sizes_that_no_t5_has(checkpoint, tmp_path):
    for changes, words in ((dict(relative_attention_max_distance=16), "found 16, expected more than 16"), (dict(num_layers=10**7), "num_layers: found 10000000, expected int from 1 to 1000")):
        (tmp_path / "config.json").write_text(json.dumps(read_json(checkpoint / "config.json") | changes))
        with pytest.raises(UserError, match=words):
            T5Config.from_file(tmp_path / "config.json")


def test_an_exported_file_that_was_changed(done, checkpoint, tmp_path):
    run("train.py", "--out", done, "--export", tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "a.safetensors")
    name = "encoder.final_layer_norm.weight"
    for changes, about, words in (({name: tensors[name][:1].clone()}, metadata, r"has shape \[1\], expected \[32\]"), ({"x": tensors[name].clone()}, metadata, "not a file that --export wrote"),
                                  ({}, {"hyperpelt": "[" * 9999}, "not JSON"), ({}, {"hyperpelt": "5"}, "not a file that --export wrote"), ({}, {}, "not a file that --export wrote")):
        save_file(tensors | changes, tmp_path / "b.safetensors", about)
        with pytest.raises(UserError, match=words):
            train_module.load_exported(tmp_path / "b.safetensors", T5.from_pretrained(checkpoint))


def test_pictures_of_more_than_eight_bits(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "b.png", format="TIFF")
    _, names, read = clip_features.open_images(tmp_path)
    for number, words in ((0, "more than 8 bits a colour"), (1, "unknown format")):
        with pytest.raises(clip_features.Broken, match=f"{names[number]}: not a whole image .*{words}"):
            read(number)


def test_features_of_two_processes(tmp_path):
    """The file that one is writing is locked; a file that says another grid than it has is refused."""
    settings = {"grid": [2, 2], "width": 3}
    first = clip_features.Writer(tmp_path / "f.npy", settings, ["1"], ["1"])
    with pytest.raises(UserError, match="f.npy.part: another process is at work on it"):
        clip_features.Writer(tmp_path / "f.npy", settings, ["1"], ["1"])
    first.file.close()
    write_features(tmp_path, "g", [1, 2], cells=4, width=3, grid=[3, 3])
    about = read_json(tmp_path / "g.json") | {"width": 3}
    (tmp_path / "g.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"g.npy: found 4 cells of width 3; g.json says grid \[3, 3\], width 3"):
        clip_features.load_features(tmp_path / "g.npy")
    for wrong in (dict(rows=1, done=2), dict(rows=-1, done=-1), dict(rows="1", done=1), dict(rows=2, done=2), dict(skipped=None)):
        assert not first.fits(first.state | wrong), wrong


@pytest.mark.parametrize("content, limit, words", [(bytes(10**6), 10**9, "RTE/train.tsv has \\d+ bytes, 1000000 when unpacked"), (bytes(range(250)) * 4, 999, "more than 0 GB when unpacked")])
def test_zips_that_blow_up(content, limit, words, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_UNPACKED", limit)
    with zipfile.ZipFile(tmp_path / "RTE.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("RTE/train.tsv", content)
    with pytest.raises(UserError, match=f"RTE.zip: refused: {words}"):
        data.unpack(tmp_path / "RTE.zip", tmp_path / "RTE", ["train.tsv"])


def test_a_zip_whose_second_file_is_broken(tmp_path):
    """Nothing of it is put in place."""
    path = tmp_path / "RTE.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("RTE/train.tsv", "a" * 99)
        file.writestr("RTE/dev.tsv", "b" * 99)
    path.write_bytes(path.read_bytes().replace(b"b" * 99, b"c" * 99))
    with pytest.raises(UserError, match="RTE.zip: not a whole zip file .*CRC"):
        data.unpack(path, tmp_path / "RTE", ["train.tsv", "dev.tsv"])
    assert not (tmp_path / "RTE").exists()


# --------------------------------------------------------------------------------------------------------- downloads

class Server(http.server.BaseHTTPRequestHandler):
    """Answers what `answer` makes of (handler, where the wanted part begins): a list of (status, headers, body in pieces)."""
    answer = None

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        status, headers, pieces = Server.answer(int(re.search(r"\d+", self.headers["Range"])[0]))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sleep = time.sleep
    monkeypatch.setattr(data.time, "sleep", lambda seconds: sleep(0))
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


WHOLE = json.dumps({"a": list(range(200))}).encode()


@pytest.mark.parametrize("answer, words", [
    (lambda start: (200, {"Content-Length": 6}, [b"<html>"]), "not JSON"),                           # the login page of a network
    (lambda start: (200, {}, []), "not JSON"),
    (lambda start: (204, {}, []), "answers 204"),
    (lambda start: (200, {"Content-Encoding": "gzip"}, [gzip.compress(WHOLE)]), "encoding gzip"),
    (lambda start: (206, {"Content-Range": f"bytes 9-{len(WHOLE) - 1}/{len(WHOLE)}"}, [WHOLE[9:]]), "sends bytes 9-"),
    (lambda start: (206, {}, [WHOLE]), "sends None, asked for was all from byte 0 on"),
    (lambda start: (200, {"X-Linked-Size": 9}, [WHOLE]), "sends more than the 9 bytes"),
    (lambda start: (200, {"X-Linked-Size": 9999}, [WHOLE]), f"broken off at byte {len(WHOLE)} of 9999"),
    (lambda start: (200, {"Content-Length": len(WHOLE)}, [WHOLE[:40]]), "broken off at byte|IncompleteRead"),
])
def test_answers_that_are_not_the_file(answer, words, server, tmp_path):
    """Refused in one line that says what to do; nothing is left that would be taken for the file, and the next good answer is taken."""
    Server.answer = answer
    with pytest.raises(UserError, match=f"({words}).*; try again later, or fetch it by hand and put it at .*a.json"):
        data.download(f"{server}/a.json", tmp_path / "a.json", tries=2, check=data.read_json)
    assert not (tmp_path / "a.json").exists()
    Server.answer = lambda start: (206, {"Content-Range": f"bytes {start}-", "Content-Length": len(WHOLE) - start}, [WHOLE[start:]]) if start < len(WHOLE) else (416, {}, [])
    data.download(f"{server}/a.json", tmp_path / "a.json", check=data.read_json)
    assert (tmp_path / "a.json").read_bytes() == WHOLE


def test_cut_at_random_and_slow(server, tmp_path):
    """Byte by byte, and broken off at random places: what has come is kept, each time the rest is asked for."""
    rng, starts = np.random.default_rng(0), []

    def answer(start):
        starts.append(start)
        end = start + int(rng.integers(100, 400))
        return 206, {"Content-Range": f"bytes {start}-", "Content-Length": len(WHOLE) - start}, [WHOLE[i:i + 1] for i in range(start, min(end, len(WHOLE)))]

    Server.answer = answer
    assert data.download(f"{server}/a.json", tmp_path / "a.json", tries=20)
    assert (tmp_path / "a.json").read_bytes() == WHOLE and len(starts) > 2 and starts == sorted(starts) and all(a < b for a, b in zip(starts, starts[1:]))


@pytest.mark.parametrize("first, then", [("https://huggingface.co/a", "http://huggingface.co/b"), ("https://a.org/a", "https://b.org/b"), ("https://a.org/a", "https://huggingface.co.b.org/"),
                                         ("http://127.0.0.1:1/a", "file:///etc/passwd"), ("https://a.org/a", "ftp://a.org/b")])
def test_redirects_that_are_not_followed(first, then):
    with pytest.raises(UserError, match="redirected to .*, which is not trusted"):
        data.Redirects().redirect_request(urllib.request.Request(first), None, 302, "", {}, then)
    assert data.Redirects().redirect_request(urllib.request.Request("https://huggingface.co/a"), None, 302, "", {}, "https://cdn-lfs.hf.co/b")
