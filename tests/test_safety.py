"""No run lost: kills at random moments, full disks, folders that cannot be written, two processes, other versions; files made to harm.

KILLS=50 python -m pytest tests/test_safety.py -k killed     # as many kills as the README speaks of; the suite has a few
"""
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from safetensors import safe_open

import clip_features
import data
import train as train_module
from conftest import ROOT, execute, read_json, run
from data import UserError
from t5 import T5
from test_train import TINY, command, log_of

# A run that saves often: every second step of forty.
OFTEN = [*TINY, "--steps", 40, "--eval-every", 2, "--lr", 0.02, "--batch-size", 8, "--precision", "fp32"]
FILES = "best.safetensors", "last.safetensors", "metrics.json"


@pytest.fixture(scope="module")
def whole(checkpoint, glue, tmp_path_factory):
    """A run that nothing disturbs -> its folder, the seconds that it took."""
    out, begin = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    run(*command(checkpoint, glue, out, *OFTEN))
    return out, time.monotonic() - begin


def same(out, whole):
    """The files, byte for byte, and the log but for its times."""
    for name in FILES:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    kept = lambda out: [{k: v for k, v in row.items() if k not in ("examples_per_s", "peak_memory_mb")} for row in log_of(out)]
    assert kept(out) == kept(whole)


def test_killed_at_random_moments(whole, checkpoint, glue, tmp_path):
    """Killed (SIGKILL) again and again, at any moment from its first to its last: each time both checkpoints are whole, or not there yet,
    and in the end the run is the one that was never killed."""
    rng, kills, runs = np.random.default_rng(0), 0, 0
    while kills < int(os.environ.get("KILLS", 4)):
        out, runs = tmp_path / f"run{runs}", runs + 1
        done = None
        while done is None or done.returncode:
            begun = (out / "config.json").exists()
            arguments = ("train.py", "--out", out, "--resume") if begun else command(checkpoint, glue, out, *OFTEN)
            done = execute(*arguments, seconds=rng.uniform(0, 1.2 * whole[1]))
            assert done.returncode in (0, -9), done.stderr
            kills += done.returncode == -9
            for name in FILES[:2]:
                if (out / name).exists():
                    with safe_open(out / name, framework="pt") as file:
                        assert all(file.get_tensor(key).isfinite().all() for key in file.keys())
        same(out, whole[0])
    print(f"{kills} kills of {runs} runs")


def test_a_full_disk(whole, checkpoint, glue, tmp_path):
    """No file can grow beyond so many bytes: each kind of save fails in one line that names the file; with room again the run goes on."""
    for name in ("config.json", "last.safetensors"):
        limit, out = (whole[0] / name).stat().st_size - 1, tmp_path / name
        done = execute(*command(checkpoint, glue, out, *OFTEN), file_size=limit)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"error: {out}/{name}: cannot be written: File too large; ") and not list(out.glob("*.tmp"))
        run(*(("train.py", "--out", out, "--resume") if (out / "config.json").exists() else command(checkpoint, glue, out, *OFTEN)))
        same(out, whole[0])


@pytest.mark.parametrize("fails, name", [(1, "config.json"), (2, "last.safetensors"), (3, "best.safetensors"), (4, "last.safetensors"), (9, None), (0, "metrics.json")])
def test_a_disk_that_fails(fails, name, whole, checkpoint, glue, tmp_path):
    """The first write of a file fails, the second, ..., the last: one line that names the file; then the run goes on as if nothing had been."""
    out = tmp_path / "run"
    done = execute("-c", "import os, train, data; old, count = os.fsync, [0]\n"
                   "def fsync(file):\n"
                   "    count[0] += 1\n"
                   f"    if count[0] == {fails} or {fails} == 0 and 'metrics' in os.readlink(f'/proc/self/fd/{{file}}'): raise OSError(28, 'No space left on device')\n"
                   "    old(file)\n"
                   "os.fsync = fsync; data.run(train.main)", *command(checkpoint, glue, out, *OFTEN)[1:])
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    failed = re.match(rf"error: {re.escape(str(out))}/(\w+\.\w+): cannot be written: No space left on device; ", done.stderr)[1]
    assert failed == (name or failed) and not list(out.glob("*.tmp"))
    run(*(("train.py", "--out", out, "--resume") if (out / "config.json").exists() else command(checkpoint, glue, out, *OFTEN)))
    same(out, whole[0])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, to which nothing can be written")
def test_a_log_that_cannot_be_written(whole, checkpoint, glue, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").symlink_to("/dev/full")
    assert "log.jsonl: cannot be written: No space left on device; go on with: " in run(*command(checkpoint, glue, out, *OFTEN), ok=False)[1]
    (out / "log.jsonl").unlink()
    run("train.py", "--out", out, "--resume")
    same(out, whole[0])


def test_a_folder_that_cannot_be_written(checkpoint, glue, tmp_path):
    """A file where the folder should be; and a folder without the right to write (which root has everywhere)."""
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file" in run(*command(checkpoint, glue, tmp_path / "file" / "run", *OFTEN), ok=False)[1]
    (tmp_path / "locked").mkdir(mode=0o555)
    if not os.access(tmp_path / "locked", os.W_OK):
        assert f"{tmp_path}/locked/config.json: cannot be written: Permission denied" in run(*command(checkpoint, glue, tmp_path / "locked", *OFTEN), ok=False)[1]


def test_two_processes_on_one_run(whole, checkpoint, glue, tmp_path):
    """While one trains, another cannot; it may read. When the first has gone, however, the folder is free."""
    out = tmp_path / "run"
    first = subprocess.Popen([sys.executable, *map(str, command(checkpoint, glue, out, *OFTEN[:-6], "--steps", 100000, "--batch-size", 8, "--eval-every", 2))], cwd=ROOT,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 60
        while not (out / "best.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "another process is at work on it" in run("train.py", "--out", out, "--resume", ok=False)[1]
        assert "rte sentence1:" in run("train.py", "--out", out, "--ask", "the cat", "a dog")[0]
    finally:
        first.kill()
        first.wait()
    done = execute("train.py", "--out", out, "--resume", seconds=4)
    assert done.returncode == -9 and "another process" not in done.stderr    # it was at work until it was killed


def test_another_format(whole, tmp_path):
    """A run of another version of the program: refused, whatever is wanted of it, and left as it is."""
    out = shutil.copytree(whole[0], tmp_path / "run")
    config = read_json(out / "config.json")
    (out / "config.json").write_text(json.dumps({**config, "format": 1}))
    for what in (["--resume"], ["--eval-only"], ["--ask", "the cat", "a dog"]):
        assert "config.json: format: found 1, expected 2: another version" in run("train.py", "--out", out, *what, ok=False)[1]
    for name in FILES:
        assert (out / name).read_bytes() == (whole[0] / name).read_bytes()


def test_each_difference_of_a_resumed_run_is_named(whole):
    error = run("train.py", "--out", whole[0], "--resume", "--lr", 0.3, "--seed", 9, "--split", "official", ok=False)[1]
    assert all(words in error for words in ("--lr was 0.02, is 0.3", "--seed was 0, is 9", "--split was paper, is official"))


@pytest.mark.parametrize("what, broken", [
    ("gradient", "old = torch.nn.utils.clip_grad_norm_\ndef f(p, n):\n    p[0].grad.view(-1)[0] = float('nan')\n    return old(p, n)\ntorch.nn.utils.clip_grad_norm_ = f"),
    ("loss", "old = train.HyperPELT.forward\ndef f(*a, **k):\n    logits, loss = old(*a, **k)\n    return logits, loss * float('inf')\ntrain.HyperPELT.forward = f")])
def test_not_a_number(what, broken, whole, checkpoint, glue, tmp_path):
    """A gradient or a loss that is no number stops the run before the weights see it."""
    out = tmp_path / "run"
    done = execute("-c", "import os, torch, train, data\n" + broken + "\ndata.run(train.main)", *command(checkpoint, glue, out, *OFTEN)[1:])
    assert done.returncode == 2 and re.match(r"error: step 1, task rte, training rows (\d+, ){5}... \(from 0\): loss \S+, gradient norm (nan|inf)", done.stderr) and done.stderr.count("\n") == 1
    with safe_open(out / "last.safetensors", framework="pt") as file:
        assert all(file.get_tensor(key).isfinite().all() for key in file.keys())


# ----------------------------------------------------------------------------------------------- files made to do harm

def write_header(path, header, length=None, tail=b""):
    """A safetensors file with this header, of which it says that it is so long."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + tail)


def tensor(shape, start, end, kind="F32"):
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("header, length, tail", [
    ({"a": tensor([1], 0, 4)}, 10**10, b"\0" * 4),                           # a header of 10 GB
    ({"a": tensor([1], 0, 4)}, 2**63, b"\0" * 4),
    ({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, None, b"\0" * 12),   # overlapping
    ({"a": tensor([2], 0, 8), "b": tensor([2], 12, 20)}, None, b"\0" * 20),  # a hole
    ({"a": tensor([2**40, 2**40], 0, 8)}, None, b"\0" * 8),                  # a shape that overflows
    ({"a": tensor([2], 0, 2**40)}, None, b"\0" * 8),                         # beyond the end
    ({"a": tensor([2], 8, 0)}, None, b"\0" * 8),                             # end before start
    ({"a": tensor([2], 0, 8, "PICKLE")}, None, b"\0" * 8),
    ([1, 2], None, b""),
])
def test_hostile_safetensors(header, length, tail, checkpoint, whole, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "t5")
    write_header(folder / "model.safetensors", header, length, tail)
    with pytest.raises(UserError, match="model.safetensors: not a whole safetensors file"):
        T5.from_pretrained(folder)
    with pytest.raises(UserError, match="model.safetensors: not a whole safetensors file"):
        train_module.load_tensors(folder / "model.safetensors", {}, {})


@pytest.mark.parametrize("name, mode, content", [
    ("../RTE/train.tsv", 0, b"x"), ("/RTE/train.tsv", 0, b"x"), ("RTE/../../train.tsv", 0, b"x"),
    ("RTE/train.tsv", 0o120777 << 16, b"/etc/passwd"),                       # a link
    ("RTE/train.tsv", 0, None),                                              # 30 MB of zeros in 30 KB
])
def test_hostile_zips(name, mode, content, tmp_path):
    with zipfile.ZipFile(tmp_path / "RTE.zip", "w", zipfile.ZIP_DEFLATED) as file:
        entry = zipfile.ZipInfo(name)
        entry.external_attr, entry.compress_type = mode, zipfile.ZIP_DEFLATED
        if content is None:
            with file.open(entry, "w", force_zip64=True) as member:
                for _ in range(30):
                    member.write(bytes(10**6))
        else:
            file.writestr(entry, content)
    with pytest.raises(UserError, match="RTE.zip: refused"):
        data.unpack(tmp_path / "RTE.zip", tmp_path / "data" / "RTE", ["train.tsv"])
    assert not (tmp_path / "data").exists()


def test_a_zip_that_lies_about_its_size(tmp_path):
    """The list of contents says 10 bytes, a thousand times a thousand come out: no more than it says is ever unpacked."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("RTE/train.tsv", bytes(10**6))
    raw = content.getvalue().replace(struct.pack("<I", 10**6), struct.pack("<I", 10))
    (tmp_path / "RTE.zip").write_bytes(raw)
    with pytest.raises(UserError, match="RTE.zip: not a whole zip file"):
        data.unpack(tmp_path / "RTE.zip", tmp_path / "RTE", ["train.tsv"])
    assert not (tmp_path / "RTE" / "train.tsv").exists()


def test_hostile_arrays(tmp_path):
    """Pickled objects are never loaded: this one would write a file."""
    class Harm:
        def __reduce__(self):
            return open, (str(tmp_path / "harmed"), "w")
    np.save(tmp_path / "a.npy", np.array([Harm()], dtype=object), allow_pickle=True)
    (tmp_path / "a.json").write_text(json.dumps(dict(ids=["1"])))
    with pytest.raises(UserError, match="a.npy: not a whole .npy file of numbers"):
        clip_features.load_features(tmp_path / "a.npy")
    with pytest.raises(UserError, match="a.npy: not a whole .npy file of numbers"):
        clip_features.open_images(tmp_path / "a.npy")
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + b"{'descr': '<f2', 'fortran_order': False, 'shape': (1000000, 1000000, 1000000), }".ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(header)
    with pytest.raises(UserError, match="a.npy"):
        clip_features.load_features(tmp_path / "a.npy")
    assert not (tmp_path / "harmed").exists()


def test_fuzz():
    """A few hundred of tests/fuzz.py's ten thousand mutated files."""
    pytest.importorskip("transformers", reason="transformers makes the tiny T5 and CLIP")
    pytest.importorskip("PIL", reason="Pillow makes the pictures")
    done = execute(ROOT / "tests" / "fuzz.py", "--cases", 450, "--seed", 7)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) refused in one line", done.stdout)[1]) > 200 and ", 0 failures" in done.stdout
