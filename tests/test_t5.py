"""t5.py against transformers, sentencepiece, the equations, and a small hub on loopback.

test_hyperpelt.py holds the tests of the two seams, and of the cache with a prefix.
"""

import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from conftest import SIZES, SPIECE, make_checkpoint
from safetensors.torch import load_file, save_file

import t5
from t5 import T5, T5Config, Tokenizer


def make_inputs(seed=0, vocabulary=64, source=11, target=6):
    """Four examples: random ids, the mask of their padding, labels with -100 at their ends."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (4, source), generator=generator)
    labels = torch.randint(3, vocabulary, (4, target), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(1, 4):
        mask[i, source - 2 * i :] = 0
        labels[i, target - i :] = -100
    return ids * mask, mask, labels


@pytest.fixture(params=["v1.0", "v1.1"])
def models(request, tmp_path):
    """The model of transformers and ours, with the same weights."""
    return make_checkpoint(tmp_path, request.param), T5.from_pretrained(tmp_path)


@pytest.fixture
def model(checkpoint):
    return T5.from_pretrained(checkpoint)


# ---- parity with transformers --------------------------------------------------------------------


@pytest.mark.parametrize("source, target", [(11, 6), (150, 140)])
def test_every_layer_equals_transformers(models, source, target):
    """The long inputs reach the last bucket of positions, which begins at distance 128."""
    theirs, ours = models
    ids, mask, labels = make_inputs(source=source, target=target)
    # transformers lists all blocks but the last, then the output of the last norm.
    encoder, decoder = ours.encoder, ours.decoder
    outputs = []
    for module in [*encoder.blocks[:-1], encoder, *decoder.blocks[:-1], decoder]:
        module.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        expected = theirs(
            input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True
        )
        logits, loss = ours(ids, mask, labels)
    states = [*expected.encoder_hidden_states[1:], *expected.decoder_hidden_states[1:]]
    for i, (output, state) in enumerate(zip(outputs, states, strict=True)):
        real = mask.bool() if i < 3 else torch.ones_like(labels).bool()
        assert torch.allclose(output[real], state[real], rtol=1e-4, atol=1e-4), f"layer {i}"
    assert torch.allclose(logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert torch.allclose(loss, expected.loss, rtol=1e-5)


def until_eos(ids, length):
    """Pad to a length, and replace what follows the first eos by pad."""
    ids = F.pad(ids, (0, length - ids.size(1)))
    is_eos = (ids == 1).long()
    return ids * (is_eos.cumsum(1) - is_eos == 0)


@pytest.mark.parametrize("variant", ["v1.0", "v1.1"])
@pytest.mark.parametrize("beams", [1, 4])
def test_generation_equals_transformers(variant, beams, tmp_path):
    ends = set()
    for seed in range(12):
        theirs = make_checkpoint(
            tmp_path, variant, seed, std=0.3, vocab_size=8, num_layers=1, num_decoder_layers=1
        )
        ids, mask, _ = make_inputs(seed, vocabulary=8)
        expected = theirs.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=9,
            num_beams=beams,
            do_sample=False,
            early_stopping=False,
        )
        found = T5.from_pretrained(tmp_path).generate(ids, None, 9, beams)
        assert torch.equal(until_eos(found, 9), until_eos(expected[:, 1:], 9))
        assert torch.equal(found, until_eos(found, found.size(1)))
        ends |= {row.index(1) if 1 in row else None for row in found.tolist()}
    # Some outputs ended early, some late and some never.
    assert len(ends) > 2 and None in ends


def test_dropout_is_where_transformers_has_it(models, monkeypatch):
    """Each dropout halves its input, so that a missing or additional one changes the logits."""
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, *_: x / 2 if training else x)
    monkeypatch.setattr(t5.Dropout, "forward", torch.nn.Dropout.forward)
    theirs, ours = models
    theirs.set_attn_implementation("eager")
    ids, mask, labels = make_inputs()
    expected = theirs.train()(input_ids=ids, attention_mask=mask, labels=labels).logits
    assert torch.allclose(ours.train()(ids, mask, labels)[0], expected, atol=1e-4)


class Elsewhere(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda"))


def test_attention_of_other_devices_equals_the_written_out_one(model):
    attention = model.decoder.blocks[1].self_attention
    u = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(0))
    mask = model.decoder.position_bias(7, 0)
    expected = attention(u, u, mask, {}, {})
    found = attention(u.as_subclass(Elsewhere), u, mask, {}, {})
    assert torch.allclose(found, expected, atol=1e-5)
    dropped = attention.train()(u.as_subclass(Elsewhere), u, mask, {}, {})
    assert not torch.allclose(dropped, expected, atol=1e-3)


# ---- inputs, loss, dtype -------------------------------------------------------------------------


def test_front_stands_before_the_text(model):
    ids, mask, labels = make_inputs()
    front = model.shared(ids[:, :2])
    expected, _ = model(ids, mask, labels)
    found, _ = model(ids[:, 2:], mask[:, 2:], labels, front=front)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(model.generate(ids[:, 2:], front=front), model.generate(ids, mask))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_labels_that_count(smoothing, model):
    ids, mask, labels = make_inputs()
    logits, loss = model(ids, mask, labels, label_smoothing=smoothing)
    log_p = logits.double().log_softmax(2)[labels != -100]
    exact = -log_p[torch.arange(len(log_p)), labels[labels != -100]]
    expected = ((1 - smoothing) * exact - smoothing * log_p.mean(1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_bfloat16_activations_train_float32_norms(model):
    expected, loss = model(*make_inputs())
    model.dtype = torch.bfloat16
    logits, rounded_loss = model(*make_inputs())
    assert logits.dtype == torch.bfloat16 and rounded_loss.dtype == torch.float32
    assert (logits - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert rounded_loss.item() == pytest.approx(loss.item(), rel=0.02)
    rounded_loss.backward()
    assert model.encoder.norm.weight.grad.dtype == torch.float32
    # The mean square is taken in float32: in bfloat16, a sum of 4,096 ones would stop at 256.
    norm = t5.RMSNorm(4096, 1e-6)
    assert norm(torch.ones(1, 4096, dtype=torch.bfloat16)).unique().tolist() == [1.0]


def test_recomputed_activations_are_not_kept(model):
    """The gradients stay the same to the last bit, because dropout is drawn again alike."""
    input_ids, mask, _ = make_inputs()
    encoder = model.encoder.train()
    sizes, gradients = {}, {}
    for encoder.recompute in (False, True):
        sizes[encoder.recompute] = kept = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor.numel()) or tensor, lambda t: t
        ):
            memory, _ = model.encode(input_ids, mask)
        memory.square().sum().backward()
        gradients[encoder.recompute] = [p.grad.clone() for p in encoder.parameters()]
        model.zero_grad()
    assert sum(sizes[True]) < sum(sizes[False]) / 4
    for before, after in zip(gradients[False], gradients[True], strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_has_its_rate_scale_and_seed(rate):
    dropout = t5.Dropout(rate)
    x = torch.full((1001, 999), 2.0)
    torch.manual_seed(3)
    y = dropout(x)
    dropped = (y == 0).double().flatten()
    assert dropped.mean().item() == pytest.approx(rate, abs=2e-3)
    assert y[y > 0].unique().tolist() == pytest.approx([2 / (1 - rate)])
    # The elements that share a draw are independent.
    for shift in (1, 2, 3, 4):
        assert abs(torch.corrcoef(torch.stack([dropped[shift:], dropped[:-shift]]))[0, 1]) < 5e-3
    torch.manual_seed(3)
    assert torch.equal(dropout(x), y) and not torch.equal(dropout(x), y)
    assert dropout.eval()(x) is x


# ---- tokenizer -----------------------------------------------------------------------------------

PIECES = sentencepiece.SentencePieceProcessor(model_file=str(SPIECE))
PLAIN = ["The dog sees the cat.", "two spaces, 3.14", "", "two  spaces, \t ünïcode 東京"]
SENTINELS = [
    "A <extra_id_0> in the <extra_id_99> end",
    "<extra_id_5> of <extra_id_12> the cat.",
    "<extra_id_0> <extra_id_8> <extra_id_99>",
]


def test_the_tokenizer_equals_sentencepiece_and_transformers():
    transformers = pytest.importorskip("transformers")
    vocabulary = [(PIECES.id_to_piece(i), PIECES.get_score(i)) for i in range(len(PIECES))]
    vocabulary += [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    theirs = transformers.T5Tokenizer(vocab=vocabulary)
    ours = Tokenizer(SPIECE)
    for text in PLAIN:
        ids = PIECES.encode(text)
        assert ours.encode(text) == [*ids, 1]
        assert ours.decode([0, *ids, 1, 0, 0]) == PIECES.decode(ids).strip()
    for text in [*PLAIN[:3], *SENTINELS]:
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(torch.tensor(ours.encode(text))) == text
    # The sample has 5,000 pieces. The last ids of the embedding stand for nothing.
    assert ours.largest_id == 5099 and ours.decode([5100, 5119]) == ""


def test_files_that_are_no_tokenizer(tmp_path):
    path = tmp_path / "spiece.model"
    with pytest.raises(FileNotFoundError, match="spiece.model"):
        Tokenizer(path)
    for content, message in ((b"", "ids 0 to 2"), (b"no model", "not a SentencePiece model$")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"spiece.model: {message}"):
            Tokenizer(path)
    # Without further options, the library itself gives other special ids.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat and a dog"] * 50),
        model_prefix=str(path.with_suffix("")),
        vocab_size=16,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="spiece.model: .*<unk>"):
        Tokenizer(path)


# ---- config and weights --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, config",
    [
        (222_903_552, T5Config()),
        (2_851_598_336, T5Config(1024, 128, 16384, 24, 32)),
        (
            76_961_152,
            T5Config(
                512, 64, 1024, 8, 6, feed_forward_proj="gated-gelu", tie_word_embeddings=False
            ),
        ),
    ],
)
def test_public_sizes(count, config):
    """The numbers of parameters of the published t5-base, t5-3b and flan-t5-small."""
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in T5(config).parameters()) == count


def test_config_files(tmp_path):
    path = tmp_path / "config.json"
    sizes = dict(d_model=32, d_kv=16, d_ff=48, num_layers=3, num_heads=4)
    path.write_text(json.dumps({**sizes, "n_positions": 512}))
    assert T5Config.from_file(path) == T5Config(**sizes, num_decoder_layers=3)
    for text, message in (
        ('{"d_model": 8, "feed_forward_proj": "gated-silu"}', "feed_forward_proj.*gated-silu"),
        ('{"hidden_size": 8}', "not the config.json of a T5, found no d_model"),
        ("{", "not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"config.json: {message}"):
            T5Config.from_file(path)


@pytest.mark.parametrize(
    "key",
    [
        "d_model",
        "d_kv",
        "d_ff",
        "num_layers",
        "num_heads",
        "num_decoder_layers",
        "vocab_size",
        "tie_word_embeddings",
    ],
)
def test_a_config_that_lacks_a_size_does_not_fit_the_weights(key, tmp_path):
    make_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="tensor .* (expected|missing|unknown)|found no d_model"):
        T5.from_pretrained(tmp_path)


# Copies of shared.weight that files hold. The last one is a copy in tied models only.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


def logits_of(folder):
    return T5.from_pretrained(folder)(*make_inputs())[0]


def rewrite(folder, form):
    """Write the weights of a folder in another form that public checkpoints have."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    if form == "copies":
        copies = {name: tensors["shared.weight"].clone() for name in COPIES}
        save_file({**tensors, **copies, t5.STRAY: torch.zeros(32, 3)}, path)
    elif form == "alias":
        tensors[COPIES[0]] = tensors.pop("shared.weight")
        save_file(tensors, path, {"format": "pt", "shared.weight": COPIES[0]})
    elif form in ("bin", "old bin"):
        torch.save(
            tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin"
        )
    else:
        whole, save = {
            "shards": ("model.safetensors", save_file),
            "bin shards": ("pytorch_model.bin", torch.save),
        }[form]
        place = {name: f"{i % 2}-{whole}" for i, name in enumerate(tensors)}
        for file in set(place.values()):
            save({name: tensors[name] for name in tensors if place[name] == file}, folder / file)
        (folder / f"{whole}.index.json").write_text(json.dumps({"weight_map": place}))


@pytest.mark.parametrize("form", ["copies", "alias", "shards", "bin", "old bin", "bin shards"])
def test_all_forms_of_a_checkpoint_give_the_same_model(form, tmp_path):
    make_checkpoint(tmp_path, "v1.0")
    expected = logits_of(tmp_path)
    rewrite(tmp_path, form)
    assert torch.equal(logits_of(tmp_path), expected)


def test_a_loaded_model_is_float32_in_eval_mode_and_not_mapped(tmp_path):
    path = tmp_path / "model.safetensors"
    for dtype in (torch.float32, torch.bfloat16):
        make_checkpoint(tmp_path)
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
        model = T5.from_pretrained(tmp_path)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert not any(module.training for module in model.modules())
        maps = Path("/proc/self/maps")
        assert not maps.exists() or str(path) not in maps.read_text()


WI = "encoder.block.0.layer.1.DenseReluDense.wi.weight"


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        (WI, None, "is missing"),
        ("extra.weight", torch.ones(2), "is unknown"),
        (t5.STRAY.replace("block.0", "block.1"), torch.ones(2), "is unknown"),
        ("lm_head.weight", torch.ones(64, 32), "is unknown"),
        (WI, torch.ones(48, 31), r"has shape \[48, 31\], expected \[48, 32\]"),
        (WI, torch.full((48, 32), torch.nan), "holds numbers that are not finite"),
        (WI, torch.full((48, 32), torch.inf), "holds numbers that are not finite"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name, tensor, message, tmp_path):
    make_checkpoint(tmp_path, "v1.0")
    path = tmp_path / "model.safetensors"
    tensors = {**load_file(path), name: tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    with pytest.raises(ValueError, match=f"^{path}: tensor {name} {message}$"):
        T5.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("UMT5", {}, "block.1.layer.0.SelfAttention.relative_attention_bias.weight is unknown"),
        (
            "LongT5",
            {},
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight is miss",
        ),
        ("SwitchTransformers", {}, "encoder.block.0.layer.1.DenseReluDense.wi.weight is missing"),
        (
            "T5",
            {"feed_forward_proj": "gated-silu"},
            "found 'gated-silu', expected relu or gated-gelu",
        ),
    ],
)
def test_relatives_of_t5_are_refused(name, settings, message, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**SIZES, vocab_size=64, **settings)
    getattr(transformers, f"{name}ForConditionalGeneration")(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        T5.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "file, save", [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)]
)
def test_damaged_and_missing_weights(file, save, tmp_path):
    make_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights, expected one of model.safetensors"):
        T5.from_pretrained(tmp_path)
    save(tensors, tmp_path / file)
    whole = (tmp_path / file).read_bytes()
    for length in (0, 5, 1000, len(whole) - 1):
        (tmp_path / file).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{file}: not a whole file of weights \(.*\)$"):
            T5.from_pretrained(tmp_path)


# ---- download ------------------------------------------------------------------------------------


class Hub(http.server.SimpleHTTPRequestHandler):
    """Serves org/tiny as the hub does: weights are redirected to a storage, with their sha256."""

    wrong, requests = set(), []

    def send_head(self):
        Hub.requests.append(self.path)
        if not self.path.startswith(("/org/tiny/resolve/main/", "/storage/")):
            return self.send_error(401)
        name = self.path.rsplit("/", 1)[1]
        file = Path(self.directory, name)
        if self.path.startswith("/storage/") or file.suffix == ".json" or not file.exists():
            self.path = f"/{name}"
            return super().send_head()
        known = hashlib.sha256(file.read_bytes() + b"x" * (name in Hub.wrong)).hexdigest()
        self.send_response(302)
        self.send_header("Location", f"/storage/{name}")
        self.send_header("X-Linked-Etag", f'"{known}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """-> the folder that the hub serves; HF_HOME is the folder `home` beside it."""
    served = tmp_path / "served"
    make_checkpoint(served, "v1.0")
    shutil.copy(SPIECE, served)
    Hub.wrong, Hub.requests = set(), []
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: Hub(*arguments, directory=str(served))
    )
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    yield served
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("form", ["copies", "shards", "bin"])
def test_a_public_model_is_downloaded_once(form, hub):
    rewrite(hub, form)
    expected = logits_of(hub)
    assert torch.equal(logits_of("org/tiny"), expected)
    folder = hub.parent / "home" / "hyperpelt" / "org--tiny"
    files = {path.name: path.read_bytes() for path in hub.iterdir()}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    # A second use needs no network, but a lost file is fetched again.
    count = len(Hub.requests)
    assert Tokenizer.from_pretrained("org/tiny").encode("") == [1]
    assert torch.equal(logits_of("org/tiny"), expected) and len(Hub.requests) == count
    max(folder.iterdir(), key=lambda path: path.stat().st_size).unlink()
    assert t5.find_checkpoint("org/tiny") == folder and len(Hub.requests) > count


def test_downloads_that_fail(hub, monkeypatch):
    def refused(error, name, message):
        with pytest.raises(error, match=message) as found:
            T5.from_pretrained(name)
        assert "\n" not in str(found.value)

    Hub.wrong = {"model.safetensors"}
    refused(OSError, "org/tiny", "^http.*/model.safetensors: invalid hash value")
    assert not list(hub.parent.glob("home/**/model*"))
    (hub / "model.safetensors").unlink()
    refused(FileNotFoundError, "org/tiny", "org/tiny/resolve/main: found no weights")
    (hub / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')
    refused(FileNotFoundError, "org/tiny", "/a.safetensors: no such file, expected by model.safe")
    refused(FileNotFoundError, "org/missing", "org/missing/resolve/main/config.json")
    refused(FileNotFoundError, "t5-small", "google-t5/t5-small/resolve/main/config.json")
    refused(FileNotFoundError, "flan-small", "'flan-small': no such folder.*google/flan-t5-small")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(OSError, "org/new", "^http://127.0.0.1:9/org/new/resolve/main/config.json: .*refused")


def test_optional_files_and_the_cache_of_the_hub(hub):
    (hub / "there.json").write_text("{}")
    folder = t5.find_checkpoint("org/tiny", ["config.json"], ["there.json", "absent.json"])
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "there.json", "model.safetensors"}
    # A snapshot of the hub's own cache is used where it is complete, without the network.
    Hub.requests = []
    snapshots = hub.parent / "home" / "hub" / "models--org--tiny" / "snapshots"
    shutil.copytree(hub, snapshots / "a", ignore=lambda *_: ["spiece.model"])
    shutil.copytree(hub, snapshots / "b")
    assert t5.find_checkpoint("org/tiny") == snapshots / "b" and not Hub.requests
    (snapshots / "b" / "model.safetensors").unlink()
    assert t5.find_checkpoint("org/tiny") == folder and Hub.requests
