"""T5 against transformers, layer by layer; loading, tokenizer, generation; downloads against a server on loopback."""
import hashlib
import http.server
import json
import os
import threading

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import t5
from conftest import ROOT, make_checkpoint
from data import UserError, download
from t5 import T5, T5Config, Tokenizer

KINDS = ["v1.0", "v1.1"]


def inputs(seed=0, vocabulary=64, rows=4, source=11, target=6):
    """Random ids with padding on the right of some rows -> input_ids, attention_mask, labels (-100 where padded)."""
    g = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(3, vocabulary, (rows, n), generator=g) for n in (source, target))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, source - 2 * row:] = 0
        labels[row, target - row:] = -100
    return ids * mask, mask, labels


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_equals_transformers(kind, tmp_path):
    """H * d_kv != d_model, other numbers of layers in encoder and decoder, padding, all distances; hidden states 1e-5, logits 1e-4."""
    theirs, ours = make_checkpoint(tmp_path, kind), T5.from_pretrained(tmp_path).eval()
    compare_with_transformers(theirs, ours, *inputs())
    compare_with_transformers(theirs, ours, *inputs(source=150, target=40), relative=True)       # beyond the largest distance that the bias tells apart


def compare_with_transformers(theirs, ours, ids, mask, labels, relative=False):
    # transformers gives the embedding, each block but the last, then the last block after the final norm
    watched = [*ours.encoder.blocks[:-1], ours.encoder, *ours.decoder.blocks[:-1], ours.decoder]
    found = []
    hooks = [module.register_forward_hook(lambda module, args, output: found.append(output)) for module in watched]
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
        logits, loss = ours(ids, mask, labels)
    for hook in hooks:
        hook.remove()
    theirs_in_order = [*expected.encoder_hidden_states[1:], *expected.decoder_hidden_states[1:]]
    assert len(found) == len(watched) == len(theirs_in_order)
    for i, (a, b) in enumerate(zip(found, theirs_in_order)):
        real = mask if i < len(ours.encoder.blocks) else torch.ones_like(labels)
        assert (a - b)[real.bool()].abs().max() < 1e-5 * (b.abs().max() if relative else 1), f"layer {i}"
    assert (logits - expected.logits).abs().max() < (1e-5 * expected.logits.abs().max() if relative else 1e-4)
    assert torch.allclose(loss, expected.loss, rtol=1e-5)


def until_eos(ids, length):
    """[B, T] -> [B, length] with 0 after the first eos; transformers' beam search fills up with eos where pad is 0."""
    ids = F.pad(ids, (0, length - ids.size(1)))
    return ids * ((ids == 1).cumsum(1) - (ids == 1).long() == 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 4])
def test_generation_equals_transformers(kind, beams, tmp_path):
    """Greedy and beam search, over many rows, of which some end early and some never do."""
    lengths = set()
    for seed in range(12):
        theirs = make_checkpoint(tmp_path, kind, seed, std=0.3, vocab_size=14)
        ours = T5.from_pretrained(tmp_path).eval()
        ids, mask, _ = inputs(seed, vocabulary=14)
        expected = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=9, num_beams=beams, do_sample=False)[:, 1:]
        found = ours.generate(ids, mask, max_new_tokens=9, num_beams=beams)
        assert torch.equal(*(until_eos(x, 9) for x in (found, expected)))
        lengths |= {int((row == 1).nonzero()[0]) if (row == 1).any() else None for row in found}
    assert len(lengths) > 2 and None in lengths                  # the test has met early, late and missing ends


def test_real_checkpoint_equals_transformers(flan):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(flan).eval()
    ours, tokenizer = T5.from_pretrained(flan).eval(), Tokenizer.from_pretrained(flan)
    texts = ["translate English to German: The house is wonderful.", "Which is larger, the moon or the sun?",
             "summarize: A frozen model can learn a new task through a few generated weights."]
    rows = [tokenizer.encode(text) for text in texts]
    ids = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
    labels = torch.tensor([[644, 4598, 229, 19250, 5, 1]] * 3)
    # its hidden states reach several hundred: 1e-5 is relative to the largest of the layer
    compare_with_transformers(theirs, ours, ids, (ids != 0).long(), labels, relative=True)
    for beams in (1, 4):
        expected = theirs.generate(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=20, num_beams=beams, do_sample=False)[:, 1:]
        found = ours.generate(ids, max_new_tokens=20, num_beams=beams)
        assert torch.equal(*(until_eos(x, 20) for x in (found, expected)))
    assert tokenizer.decode(ours.generate(ids)[0].tolist()) == "Das Haus ist wunderbar."


def test_relative_buckets_by_hand():
    """32 buckets up to distance 128. Encoder: 16 for each side, 8 of them exact; decoder: 32 for the past, 16 exact."""
    far = [0, 1, 7, 8, 15, 16, 127, 128, 500]
    both = t5.relative_bucket(torch.tensor(far + [-d for d in far]), True, 32, 128)
    #                         8 + floor(8 ln(d/8) / ln 16): d = 15: 1.81, 16: 2, 127: 7.98
    exact = [0, 1, 7, 8, 9, 10, 15, 15, 15]
    assert both.tolist() == [0] + [16 + bucket for bucket in exact[1:]] + exact
    past = t5.relative_bucket(torch.tensor([-d for d in far] + far), False, 32, 128)
    #                         16 + floor(16 ln(d/16) / ln 8): d = 127: 15.94
    assert past.tolist() == [0, 1, 7, 8, 15, 16, 31, 31, 31] + [0] * 9


def test_dropout_is_dropout():
    """The CPU's own generator of masks: rate, scale, gradient, and nothing outside training."""
    torch.manual_seed(0)
    drop, x = t5.Dropout(0.1), torch.ones(1001, 999, requires_grad=True)
    y = drop(x)
    y.sum().backward()
    assert abs((y == 0).float().mean() - 0.1) < 1e-3 and torch.allclose(y[y > 0], torch.tensor(1 / 0.9))
    assert torch.equal(x.grad, y.detach()) and abs(y.mean() - 1) < 1e-3
    rows = (y == 0).double()
    assert abs(torch.corrcoef(rows[:50].reshape(50, -1)).fill_diagonal_(0)).max() < 0.15      # no pattern from row to row
    assert drop.eval()(x) is x


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_where_transformers_has_it(kind, tmp_path, monkeypatch):
    """Every dropout halves its input instead, theirs and ours: one too many, too few or in another place changes the logits."""
    theirs, ours = make_checkpoint(tmp_path, kind).train(), T5.from_pretrained(tmp_path).train()
    ids, mask, labels = inputs()
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: x / 2 if training else x)
    monkeypatch.setattr(t5.Dropout, "forward", lambda self, x: x / 2 if self.training else x)
    with torch.no_grad():
        expected, (logits, _) = theirs(input_ids=ids, attention_mask=mask, labels=labels).logits, ours(ids, mask, labels)
    assert (logits - expected).abs().max() < 1e-4
    for module in (ours.encoder.dropout, ours.decoder.blocks[0].dropout, ours.decoder.blocks[0].ffn.dropout, ours.encoder.blocks[1].self_attention.dropout):
        with torch.no_grad(), monkeypatch.context() as one:
            one.setattr(module, "training", False)
            assert (ours(ids, mask, labels)[0] - expected).abs().max() > 1e-2


class Elsewhere(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU."""
    device = property(lambda self: torch.device("cuda"))


def test_written_out_attention_equals_sdpa(tmp_path):
    """On a CPU attention is written out; it must be what the kernel of other devices gives, with a bias, padding and causality in the mask."""
    make_checkpoint(tmp_path)
    stack = T5.from_pretrained(tmp_path).eval().decoder
    attention, g = stack.blocks[1].self_attention, torch.Generator().manual_seed(0)
    u = torch.randn(4, 11, stack.config.d_model, generator=g)
    padding = torch.ones(4, 11)
    padding[1:, 7:] = 0
    called = []
    kernel = F.scaled_dot_product_attention
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda *args, **named: called.append(1) or kernel(*args, **named))
        k, v = attention.keys_values(u)
        mask = stack.self_mask(11, 0, padding, 0, torch.float32)
        written_out = attention(u, k, v, mask)
        assert not called
        by_kernel = attention(u.as_subclass(Elsewhere), k, v, mask)
    assert called and (by_kernel - written_out).abs().max() < 1e-5 * written_out.abs().max()


# --------------------------------------------------------------------------------------------------------- loading

def logits_of(folder):
    with torch.no_grad():
        return T5.from_pretrained(folder).eval()(*inputs())[0]


def test_forms_of_a_checkpoint(tmp_path):
    """Copies of the embedding, the stray bias of old conversions, aliases of deduplicated files, shards: all the same."""
    make_checkpoint(tmp_path, "v1.0")
    expected, path = logits_of(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(path)
    copies = {name: tensors["shared.weight"].clone() for name in t5.COPIES} | {t5.STRAY: torch.zeros(32, 3)}
    save_file(tensors | copies, path)
    assert torch.equal(logits_of(tmp_path), expected)
    alias = {k: v for k, v in tensors.items() if k != "shared.weight"} | {"encoder.embed_tokens.weight": tensors["shared.weight"]}
    save_file(alias, path, {"shared.weight": "encoder.embed_tokens.weight"})
    assert torch.equal(logits_of(tmp_path), expected)
    path.unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits_of(tmp_path), expected)


def test_a_wrong_checkpoint_is_one_line(tmp_path):
    make_checkpoint(tmp_path, "v1.0")
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, settings, wi = load_file(path), json.loads(config.read_text()), "encoder.block.0.layer.1.DenseReluDense.wi.weight"

    def refused(*words):
        with pytest.raises(UserError) as error:
            T5.from_pretrained(tmp_path)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value

    for changed, words in (({wi: None}, (wi, "missing")), ({"extra.weight": torch.ones(2)}, ("extra.weight", "unknown")),
                           ({wi: torch.ones(48, 31)}, (wi, "[48, 31]", "[48, 32]")),
                           ({wi: torch.ones(48, 32, dtype=torch.int64)}, (wi, "int64")),
                           ({"lm_head.weight": torch.ones(64, 32)}, ("lm_head.weight", "differs"))):
        save_file({k: v for k, v in (tensors | changed).items() if v is not None}, path)
        refused(*words)
    save_file(tensors, path)
    whole = path.read_bytes()
    for broken in (b"", whole[:7], whole[:500], whole[:-1]):
        path.write_bytes(broken)
        refused(str(path), "safetensors")
    path.write_bytes(whole)
    for key, value in (("d_model", 0), ("d_model", "32"), ("num_heads", True), ("d_kv", None), ("feed_forward_proj", "gelu"), ("model_type", "bert"),
                       ("dropout_rate", 1.0), ("relative_attention_num_buckets", 1), ("eos_token_id", 2)):
        config.write_text(json.dumps(settings | {key: value}))
        refused(str(config), key, repr(value))
    for text, word in (("{", "not JSON"), ("[]", "expected a JSON object"), ("{}", "d_model: found nothing, expected int from 1")):
        config.write_text(text)
        refused(str(config), word)
    config.unlink()
    refused(str(config), "no such file")


def test_public_sizes():
    """Counts of the published checkpoints."""
    known = {"t5-small": 60_506_624, "t5-base": 222_903_552, "t5-large": 737_668_096, "t5-3b": 2_851_598_336, "google/flan-t5-small": 76_961_152,
             "google/flan-t5-base": 247_577_856, "google/t5-v1_1-large": 783_150_080}
    for name, count in known.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in T5(T5Config.from_name(name)).parameters()) == count, name
    with pytest.raises(UserError, match="t5-bse"):
        T5.from_pretrained("t5-bse")


# ------------------------------------------------------------------------------------------------------- tokenizer

def test_sentinels_equal_transformers():
    transformers = pytest.importorskip("transformers")
    folder = ROOT / "sample" / "mini-t5"
    theirs, ours = transformers.T5Tokenizer(str(folder / "spiece.model"), legacy=True), Tokenizer.from_pretrained(folder)
    for text in ("A <extra_id_0> in the <extra_id_99> end", "The dog <extra_id_12> the cat."):
        assert ours.encode(text) == theirs(text)["input_ids"], text


def test_tokenizer_equals_transformers(flan):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.T5Tokenizer(str(flan / "spiece.model"), legacy=True), Tokenizer.from_pretrained(flan)
    for text in ("The house is wonderful.", "  two  spaces, 3.14 and ünïcode — 東京 ", "", "A <extra_id_0> in the <extra_id_99> end"):
        assert ours.encode(text) == theirs(text)["input_ids"], text
    ids = ours.encode("He said: The <extra_id_0> walks <extra_id_1> today.")
    assert 32099 in ids and 32098 in ids and ours.encode("<extra_id_99>") == [32000, 1]
    assert ours.decode(ids) == "He said: The <extra_id_0> walks <extra_id_1> today."
    assert ours.decode([0, *ours.encode("a fine day"), 0, 0]) == "a fine day"
    assert ours.decode([32127]) == ""                            # a row of the embedding that stands for nothing


def test_a_loaded_model_does_not_drop_out(checkpoint):
    """Ready to generate, as in the example at the top of t5.py: the same logits twice."""
    model, ids = T5.from_pretrained(checkpoint), torch.arange(2, 12)[None]
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(ids, None, ids)[0], model(ids, None, ids)[0])


def test_wrong_tokenizer_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Tokenizer(tmp_path / "spiece.model")
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "spiece.model")


# ------------------------------------------------------------------------------------------------------- downloads

class Hub(http.server.BaseHTTPRequestHandler):
    """A model hub in small: large files are redirected to a storage path, hashes announced, connections cut on demand."""
    files, cuts, log, wrong, target, broken = {}, [], [], set(), "/storage", []

    def log_message(self, *args):
        pass

    def do_GET(self):
        name = self.path.split("?")[0].removeprefix("/storage").removeprefix("/org/tiny/resolve/main/")
        Hub.log.append((self.path, self.headers.get("Range")))
        if Hub.broken:
            return self.send_error(Hub.broken.pop())
        content = Hub.files.get(name)
        if content is None:
            return self.send_error(404)
        digest = hashlib.sha256(content + (b"x" if name in Hub.wrong else b"")).hexdigest()
        if not self.path.startswith("/storage"):
            if name != "config.json":
                self.send_response(302)
                self.send_header("Location", f"{Hub.target}{name}" if Hub.target == "/storage" else Hub.target)
                self.send_header("X-Linked-Size", str(len(content)))
                self.send_header("X-Linked-Etag", f'"{digest}"')
                self.send_header("Content-Length", "0")
                return self.end_headers()
            digest = hashlib.sha1(b"blob %d\0" % len(content) + content + (b"x" if name in Hub.wrong else b"")).hexdigest()
        start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{digest}"')
        self.end_headers()
        end = start + Hub.cuts.pop(0) if Hub.cuts and name == "model.safetensors" else len(content)
        self.wfile.write(content[start:end])


@pytest.fixture
def hub(tmp_path, monkeypatch, vocabulary):
    make_checkpoint(tmp_path / "served", vocab_size=256)
    (tmp_path / "served" / "spiece.model").write_bytes(vocabulary.read_bytes())
    Hub.files = {name: (tmp_path / "served" / name).read_bytes() for name in ("config.json", "spiece.model", "model.safetensors")}
    Hub.cuts, Hub.log, Hub.wrong, Hub.target, Hub.broken = [], [], set(), "/storage", []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    yield tmp_path
    server.shutdown()


def test_download_resume_and_cache(hub):
    """Cut twice in the middle: resumed by ranges, whole in the end; the second load asks the server for nothing."""
    Hub.cuts[:] = [1000, 5000]
    expected = T5.from_pretrained(hub / "served").state_dict()
    found = T5.from_pretrained("org/tiny").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    starts = [start for path, start in Hub.log if path.startswith("/storage") and "safetensors" in path]
    assert starts == ["bytes=0-", "bytes=1000-", "bytes=6000-"]
    asked = len(Hub.log)
    T5.from_pretrained("org/tiny"), Tokenizer.from_pretrained("org/tiny")
    assert len(Hub.log) == asked
    assert not list((hub / "cache").rglob("*.part"))


@pytest.mark.parametrize("code, tries", [(400, 1), (403, 1), (408, 4), (429, 4), (499, 1), (500, 4), (503, 4)])
def test_which_answers_are_tried_again(hub, code, tries):
    """A refusal (4xx) is final but for "timeout" and "too many requests"; a server's own trouble (5xx) may pass."""
    Hub.broken[:] = [code] * 9
    with pytest.raises(UserError, match=f"the server answers {code} .*; try again later"):
        download(f"{os.environ['HF_ENDPOINT']}/org/tiny/resolve/main/config.json", hub / "fetched", tries=4)
    assert len(Hub.log) == tries and not (hub / "fetched").exists()
    Hub.broken[:] = [503, 408]
    assert download(f"{os.environ['HF_ENDPOINT']}/org/tiny/resolve/main/config.json", hub / "fetched", tries=4)
    assert (hub / "fetched").read_bytes() == Hub.files["config.json"]


def test_download_that_cannot_be_trusted(hub):
    """A wrong hash, a redirect to a strange host, a missing repository, a server that always breaks off: never in place."""
    place = hub / "cache" / "hyperpelt" / "org--tiny" / "model.safetensors"
    Hub.wrong = {"config.json"}                                              # a small file: its git hash, in ETag alone
    with pytest.raises(UserError, match="config.json: found hash [0-9a-f]{40}, expected"):
        T5.from_pretrained("org/tiny")
    assert not place.with_name("config.json").exists()
    Hub.wrong = {"model.safetensors"}
    with pytest.raises(UserError, match="found hash"):
        T5.from_pretrained("org/tiny")
    Hub.wrong, Hub.cuts[:] = set(), [10] * 9
    with pytest.raises(UserError, match="broken off at byte 50 of"):
        T5.from_pretrained("org/tiny")
    assert not place.exists() and place.with_name(place.name + ".part").stat().st_size == 50
    Hub.cuts[:], Hub.target = [], "http://example.com/x"
    with pytest.raises(UserError, match="example.com, which is not trusted"):
        T5.from_pretrained("org/tiny")
    assert not place.exists()
    with pytest.raises(UserError, match="no such folder, and no such repository"):
        T5.from_pretrained("org/missing")


def test_download_of_shards(hub):
    tensors = load_file(hub / "served" / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k < "encoder"}, hub / "a.safetensors")
    save_file({k: v for k, v in tensors.items() if k >= "encoder"}, hub / "b.safetensors")
    del Hub.files["model.safetensors"]
    Hub.files |= {name: (hub / name).read_bytes() for name in ("a.safetensors", "b.safetensors")}
    Hub.files["model.safetensors.index.json"] = json.dumps(
        {"weight_map": {k: "a.safetensors" if k < "encoder" else "b.safetensors" for k in tensors}}).encode()
    found = T5.from_pretrained("org/tiny").state_dict()
    assert torch.equal(found["shared.weight"], tensors["shared.weight"])
    asked = len(Hub.log)
    T5.from_pretrained("org/tiny")
    assert len(Hub.log) == asked                                 # a cached model, sharded or not, needs no network
    (hub / "cache/hyperpelt/org--tiny/model.safetensors.index.json").unlink()
    del Hub.files["model.safetensors.index.json"]
    with pytest.raises(UserError, match="found neither model.safetensors nor"):
        T5.from_pretrained("org/tiny")


def test_no_network(hub):
    with pytest.raises(UserError, match="refused; try again later, or fetch it by hand and put it at .*nothing"):
        download("http://127.0.0.1:9/nothing", hub / "nothing", tries=2)
    with pytest.raises(UserError, match="nonnumeric port"):
        download("http://127.0.0.1:abc/nothing", hub / "nothing")
