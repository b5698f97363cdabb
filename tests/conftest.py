"""Shared by the tests: tiny checkpoints with random weights in the public file format, a tiny vocabulary, real files if here."""
import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell's background jobs and their children ignore Ctrl-C, and tests send it

WORDS = ("a the cat dog bird fish man woman sees likes eats has big small red blue house tree and not is was it in on very rte "
         "sentence1: sentence2: entailment not_entailment stsb 0.0 1.0 2.0 3.0 4.0 5.0 question translate").split()


def make_checkpoint(folder, kind="v1.1", seed=0, std=0.15, **sizes):
    """Write a tiny random T5 by transformers as config.json + model.safetensors -> the transformers model (eval mode).

    transformers 4 makes a truly untied v1.1. All weights are drawn larger than its own initialisation, so that every
    part matters to the output.
    """
    transformers = pytest.importorskip("transformers", reason="transformers makes the checkpoints to compare with")
    more = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False) if kind == "v1.1" else dict(feed_forward_proj="relu")
    sizes = dict(d_model=32, d_kv=16, num_heads=3, d_ff=48, num_layers=3, num_decoder_layers=2, vocab_size=64) | sizes
    config = transformers.T5Config(**sizes, **more, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(seed)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0, 0.2) if "layer_norm" in name else parameter.normal_(0.0, std)
    model.save_pretrained(folder, safe_serialization=True)
    return model


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """A SentencePiece file with T5's special ids, trained on a few words."""
    import sentencepiece
    folder = tmp_path_factory.mktemp("vocabulary")
    rng = np.random.default_rng(0)
    (folder / "text").write_text("\n".join(" ".join(rng.choice(WORDS, 8)) for _ in range(500)))
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "text"), model_prefix=str(folder / "spiece"), vocab_size=76, hard_vocab_limit=False,
                                             pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    return folder / "spiece.model"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, vocabulary):
    """A whole tiny checkpoint folder, v1.1, with a tokenizer: what --model takes."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, vocab_size=256)
    (folder / "spiece.model").write_bytes(vocabulary.read_bytes())
    return folder


@pytest.fixture(scope="session")
def glue(tmp_path_factory):
    """Made-up RTE and STS-B files in the official format: 43 and 40 training rows, 20 validation rows, 6 without labels."""
    folder, rng = tmp_path_factory.mktemp("glue"), np.random.default_rng(1)
    sentence = lambda: " ".join(rng.choice(WORDS[:26], rng.integers(3, 12)))
    for task, header, last in (("RTE", "index\tsentence1\tsentence2\tlabel", lambda i: ["entailment", "not_entailment"][i % 2]),
                               ("STS-B", "index\tsentence1\tsentence2\tscore", lambda i: f"{rng.uniform(0, 5):.3f}")):
        (folder / task).mkdir()
        for name, count in (("train", 43 if task == "RTE" else 40), ("dev", 20), ("test", 6)):
            lines = [header if name != "test" else header.rsplit("\t", 1)[0]]
            lines += ["\t".join([str(i), sentence(), sentence()] + ([last(i)] if name != "test" else [])) for i in range(count)]
            (folder / task / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def shared_glue():
    if not (SHARED / "data" / "glue").is_dir():
        pytest.skip("needs the real GLUE files, which are no part of the project")
    return SHARED / "data"


@pytest.fixture(scope="session")
def flan(tmp_path_factory):
    """The folder of a real flan-t5-small: FLAN_T5_SMALL, or built by the tool beside the project."""
    if os.environ.get("FLAN_T5_SMALL"):
        return Path(os.environ["FLAN_T5_SMALL"])
    tool = SHARED / "tools" / "make_flan_t5_small.py"
    if not tool.exists():
        pytest.skip("needs a real flan-t5-small: set FLAN_T5_SMALL to its folder")
    folder = tmp_path_factory.mktemp("flan")
    subprocess.run([sys.executable, tool, folder], check=True)
    return folder


@functools.lru_cache
def forks(root):
    """tests/forks.py at work, on the code of a folder."""
    process = subprocess.Popen([sys.executable, Path(__file__).parent / "forks.py"], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    atexit.register(process.kill)
    return process


def execute(*arguments, cwd=ROOT, seconds=300, file_size=0, **environment):
    """Run a command of the project in a process of its own -> CompletedProcess; forked off one that has PyTorch loaded where that can be.

    It is killed after so many seconds (no command of a test takes 300: it hangs), and writes no file larger than file_size bytes (0: any).
    """
    arguments, environment = list(map(str, arguments)), {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if not hasattr(os, "fork") or "PYTHONPATH" in environment or not (Path(cwd) / "hyperpelt.py").exists():
        return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        process = forks(cwd)
        print(json.dumps(dict(argv=arguments, cwd=str(cwd), env=environment, seconds=seconds, file_size=file_size, **{file.name: str(file) for file in files})), file=process.stdin, flush=True)
        return subprocess.CompletedProcess(arguments, int(process.stdout.readline()), *(file.read_text() for file in files))


def run(*arguments, ok=True, cwd=ROOT, **environment):
    """execute(...) -> (stdout, stderr). A failure must be one line and exit code 2."""
    done = execute(*arguments, cwd=cwd, **environment)
    if ok:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stdout, done.stderr


def read_json(path):
    return json.loads(Path(path).read_text())
