"""Shared by all tests: paths, tiny checkpoints with random weights, and the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "sample"
SHARED = ROOT.parent / "shared"
SPIECE = SAMPLE / "mini-t5" / "spiece.model"

sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

# num_heads * d_kv differs from d_model, and the two stacks have different numbers of layers.
SIZES = dict(d_model=32, d_kv=16, d_ff=48, num_layers=3, num_heads=3, num_decoder_layers=2)
VARIANTS = {
    "v1.0": dict(feed_forward_proj="relu", tie_word_embeddings=True),
    "v1.1": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}


def make_checkpoint(folder, variant="v1.1", seed=0, std=0.15, **sizes):
    """Write a tiny random T5 in the public file format -> the model of transformers, in eval mode.

    The weights are larger than those of a fresh model, so that every part matters to the output.
    """
    transformers = pytest.importorskip("transformers")
    settings = {"vocab_size": 64, **SIZES, **VARIANTS[variant], **sizes}
    config = transformers.T5Config(**settings, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    # transformers 5 ties the head of every T5. The head of v1.1 is its own.
    if variant == "v1.1":
        model.lm_head = torch.nn.Linear(config.d_model, config.vocab_size, bias=False)

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, spread = (1.0, 0.2) if "layer_norm" in name else (0.0, std)
            parameter.normal_(mean, spread, generator=generator)

    folder.mkdir(parents=True, exist_ok=True)
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    tensors = {name: t.clone() for name, t in model.state_dict().items() if name not in copies}
    if variant == "v1.0":
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", **settings}))
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a tiny random v1.1 (the variant of Flan) and the sample's tokenizer."""
    folder = tmp_path_factory.mktemp("v1.1")
    make_checkpoint(folder, "v1.1", vocab_size=5120)
    shutil.copy(SPIECE, folder)
    return folder


@pytest.fixture(scope="session")
def tied_checkpoint(tmp_path_factory):
    """A folder with a tiny random v1.0 and the sample's tokenizer."""
    folder = tmp_path_factory.mktemp("v1.0")
    make_checkpoint(folder, "v1.0", vocab_size=5120)
    shutil.copy(SPIECE, folder)
    return folder


def run_cli(*arguments, cwd=ROOT, **environment):
    """Run `python ARGUMENTS` in a process of its own -> CompletedProcess with text output."""
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
