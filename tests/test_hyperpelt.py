"""The method against an independent computation: the equations at the top of hyperpelt.py in numpy, in float64, without torch."""
import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import hyperpelt
import t5 as t5_module
from conftest import make_checkpoint, run
from hyperpelt import BLOCK_TYPES, METHODS, VISION, HyperEmbedding, HyperPELT, HyperPELTConfig, Prefix
from t5 import DECODER_CROSS, DECODER_SELF, ENCODER_SELF, T5, T5Config
from test_t5 import inputs

SMALL = dict(prefix_length=5, embedding_dim=12, hyper_dim=6, projector_dim=7, bottleneck=4)


def make(folder, kind="v1.1", method="hyperpelt", tasks=("rte", "stsb"), seed=0, **changes):
    make_checkpoint(folder, kind)
    torch.manual_seed(seed)
    model = HyperPELT(T5.from_pretrained(folder), tasks, HyperPELTConfig(method, **{**SMALL, **changes}))
    with torch.no_grad():                                        # every part must matter, also what starts at zero
        for name, parameter in model.named_parameters():
            if not name.startswith("t5."):
                parameter.normal_(std=0.5)
    return model.eval()


def normalised(features):
    """Layer norm without weights, one position after the other."""
    return np.array([(row - row.mean()) / np.sqrt(row.var() + 1e-5) for row in features])


# ----------------------------------------------------------------- the whole method once more, literally, in numpy

def numpy_hyper_embedding(p, z, layer, block, projector="projector"):
    """Eq. (1) and (8) as they are written: concatenate, multiply, ReLU, multiply; one position after the other."""
    rows, name = [], f"hyper_embedding.{projector}"
    for z, l, b in zip(z, p["hyper_embedding.layer"][layer], p["hyper_embedding.block"][block]):
        hidden = p[f"{name}.hidden.weight"] @ np.concatenate([z, l, b]) + p[f"{name}.hidden.bias"]
        rows.append(p[f"{name}.out.weight"] @ np.maximum(hidden, 0) + p[f"{name}.out.bias"])
    return np.array(rows)                                        # [N, E]


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


class NumpyT5:
    """T5 v1.1 with prefixes and adapters for one sequence, from the tensors' names and the equations alone.

    features [N, V] of its image, or None; vision: (visual prefix, visual adapter, tokens).
    """

    def __init__(self, p, config, task, prefix=True, adapter=True, features=None, vision=(False, False, False)):
        self.p, self.c, self.features, self.tokens = p, config, features, vision[2]
        z = p["hyper_embedding.task"][task]
        z_v = linear(p, "hyper_embedding.visual", features) if vision[0] or vision[1] else None     # eq. (7)
        task, image = ("", z, "projector"), ("visual_", z_v, "visual_projector")
        self.prefixes = [task] * prefix + [image] * (prefix and vision[0])          # the task's first: eq. (9)
        self.adapters = [task] * adapter + [image] * (adapter and vision[1])

    def norm(self, x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * self.p[f"t5.{name}.weight"]

    def attention(self, name, u, memory, bias, kind, layer_id):
        p, c = self.p, self.c
        q, k, v = u @ p[f"t5.{name}.q.weight"].T, memory @ p[f"t5.{name}.k.weight"].T, memory @ p[f"t5.{name}.v.weight"].T
        n = 0
        for side, z, projector in reversed(self.prefixes):
            hyper = numpy_hyper_embedding(p, z, layer_id, BLOCK_TYPES.index(kind), projector)
            k = np.concatenate([linear(p, f"{side}prefix_hypernetwork.key", hyper), k])     # eq. (2), (3), (9)
            v = np.concatenate([linear(p, f"{side}prefix_hypernetwork.value", hyper), v])
            n += len(hyper)
        heads = []
        for h in range(c.num_heads):
            part = slice(h * c.d_kv, (h + 1) * c.d_kv)
            scores = q[:, part] @ k[:, part].T
            scores[:, n:] += bias[h]                             # prefix columns: no bias, no mask
            weights = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
        return np.concatenate(heads, 1) @ p[f"t5.{name}.o.weight"].T

    def feed_forward(self, name, u, kind, layer_id):
        p = self.p
        gate = u @ p[f"t5.{name}.wi_0.weight"].T
        gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        y = (gate * (u @ p[f"t5.{name}.wi_1.weight"].T)) @ p[f"t5.{name}.wo.weight"].T
        for side, z, projector in self.adapters:
            mean = numpy_hyper_embedding(p, z, layer_id, BLOCK_TYPES.index(kind), projector).mean(0)
            a, d = f"{side}adapter_hypernetwork", self.c.d_model
            w_down = linear(p, f"{a}.down", mean).reshape(-1, d)                        # eq. (4)
            w_up = linear(p, f"{a}.up", mean).reshape(d, -1)
            hidden = np.maximum(u @ w_down.T + linear(p, f"{a}.down_bias", mean), 0)    # eq. (5)
            y = y + p[f"{a}.scale"] * (hidden @ w_up.T + linear(p, f"{a}.up_bias", mean))  # eq. (6), (10)
        return y

    def bias(self, stack, queries, keys, causal):
        c, out = self.c, np.zeros((self.c.num_heads, queries, keys))
        for i in range(queries):
            for j in range(keys):
                d, b = j - i, c.relative_attention_num_buckets
                base, d, b = (0, max(-d, 0), b) if causal else ((b // 2 if d > 0 else 0), abs(d), b // 2)
                bucket = d if d < b // 2 else min(b // 2 + int(math.log(d / (b // 2)) / math.log(128 / (b // 2)) * (b - b // 2)), b - 1)
                out[:, i, j] = self.p[f"t5.{stack}.relative_bias.weight"][base + bucket] + (-np.inf if causal and j > i else 0)
        return out

    def encode(self, ids):
        x = self.p["t5.shared.weight"][ids]
        if self.tokens:
            x = np.concatenate([linear(self.p, "image_tokens", self.features), x])
        bias = self.bias("encoder", len(x), len(x), False)
        for i in range(self.c.num_layers):
            name = f"encoder.blocks.{i}"
            u = self.norm(x, f"{name}.self_norm")
            x = x + self.attention(f"{name}.self_attention", u, u, bias, "encoder self-attention", i)
            x = x + self.feed_forward(f"{name}.ffn", self.norm(x, f"{name}.ffn_norm"), "encoder FFN", i)
        return self.norm(x, "encoder.norm")

    def logits(self, ids, decoder_ids):
        memory, x = self.encode(ids), self.p["t5.shared.weight"][decoder_ids]
        bias, nothing = self.bias("decoder", len(x), len(x), True), np.zeros((self.c.num_heads, 1, 1))
        for i in range(self.c.num_decoder_layers):
            name, layer_id = f"decoder.blocks.{i}", self.c.num_layers + i
            u = self.norm(x, f"{name}.self_norm")
            x = x + self.attention(f"{name}.self_attention", u, u, bias, "decoder self-attention", layer_id)
            u = self.norm(x, f"{name}.cross_norm")
            x = x + self.attention(f"{name}.cross_attention", u, memory, nothing, "decoder cross-attention", layer_id)
            x = x + self.feed_forward(f"{name}.ffn", self.norm(x, f"{name}.ffn_norm"), "decoder FFN", layer_id)
        return self.norm(x, "decoder.norm") @ self.p["t5.lm_head.weight"].T


@pytest.mark.parametrize("method", ["hyperpelt", "hyperprefix", "hyperadapter"])
@pytest.mark.parametrize("task", ["rte", "stsb"])
def test_model_equals_numpy(method, task, tmp_path):
    """Eq. (1) to (6) in their places: all logits, rows of different length in one batch, both tasks."""
    model = make(tmp_path, method=method)
    ids, mask, labels = inputs()
    with torch.no_grad():
        logits, _ = model(ids, mask, labels, task)
    p = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    independent = NumpyT5(p, model.t5.config, ["rte", "stsb"].index(task), *METHODS[method][:2])
    for row in range(len(ids)):
        real = int((labels[row] != -100).sum())
        expected = independent.logits(ids[row][mask[row] == 1].numpy(), np.concatenate([[0], labels[row][:real - 1].numpy()]))
        assert np.abs(expected - logits[row, :real].numpy()).max() < 1e-3 * np.abs(expected).max(), row


def test_a_grid_of_another_size_is_refused(tmp_path):
    """Features of one position would otherwise serve for all N, without a word."""
    model, (ids, mask, labels) = make(tmp_path, visual_width=9, vision="both"), inputs()
    for positions in (1, 4):
        with pytest.raises(ValueError, match=f"{positions} positions and width 9, expected prefix_length, 5, and visual_width, 9"):
            model(ids, mask, labels, "rte", features=torch.zeros(len(ids), positions, 9))


@pytest.mark.parametrize("method,vision", [("hyperpelt", "both"), ("hyperpelt", "prefix"), ("hyperpelt", "adapter"), ("hyperpelt", "tokens"),
                                           ("hyperprefix", "both"), ("hyperadapter", "both")])
def test_images_equal_numpy(method, vision, tmp_path):
    """Eq. (7) to (10): every row of a batch has its own image; nothing leaks between rows; a text task sees no image."""
    model = make(tmp_path, method=method, visual_width=9, vision=vision)
    ids, mask, labels = inputs()
    features = 30 * torch.randn(len(ids), 5, 9, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids, mask, labels, "rte", features=features)[0]
        text = model(ids, mask, labels, "rte")[0]
    p = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    for row in range(len(ids)):
        real = int((labels[row] != -100).sum())
        for found, image, ways in ((logits, normalised(features[row].double().numpy()), VISION[vision]), (text, None, (False,) * 3)):
            independent = NumpyT5(p, model.t5.config, 0, *METHODS[method][:2], image, ways)
            expected = independent.logits(ids[row][mask[row] == 1].numpy(), np.concatenate([[0], labels[row][:real - 1].numpy()]))
            assert np.abs(expected - found[row, :real].numpy()).max() < 1e-3 * np.abs(expected).max(), row
    assert (logits - text).abs().max() > 0.1


def test_images_in_generation(tmp_path):
    """Greedy and beam search with images: each row as it is alone; beams of a row share its image's weights."""
    for method, vision in (("hyperpelt", "both"), ("norms", "tokens")):
        model = make(tmp_path, method=method, visual_width=9, vision=vision)
        ids, mask, _ = inputs(vocabulary=64)
        features = 4 * torch.randn(len(ids), 5, 9, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            sites = model.generate_sites("rte")
            for beams in (1, 3):
                together = model.t5.generate(ids, mask, 8, beams, **model.inject(sites, features))
                for row in range(len(ids)):
                    one = slice(row, row + 1)
                    alone = model.t5.generate(ids[one], mask[one], 8, beams, **model.inject(sites, features[one]))[0]
                    assert torch.equal(together[row, :len(alone)], alone) and (together[row, len(alone):] == 0).all()
            other = model.t5.generate(ids, mask, 8, 1, **model.inject(sites, features.flip(0)))
            assert not torch.equal(other, model.t5.generate(ids, mask, 8, 1, **model.inject(sites, features)))


@pytest.mark.parametrize("vision", VISION)
def test_images_in_bfloat16(vision, tmp_path):
    """The same as in float32, to what bfloat16 can hold; the generated weights of images are in the dtype of the backbone."""
    models = {}
    for dtype in (torch.float32, torch.bfloat16):
        make_checkpoint(tmp_path, "v1.1")
        torch.manual_seed(0)
        models[dtype] = HyperPELT(T5.from_pretrained(tmp_path), ["vqa"], HyperPELTConfig(**SMALL, visual_width=9, vision=vision), dtype).eval()
    features, ids = torch.randn(3, 5, 9), torch.randint(5, 40, (3, 7))
    outputs = {dtype: model(ids, None, ids[:, :4], "vqa", features=features)[0] for dtype, model in models.items()}
    assert outputs[torch.bfloat16].dtype == torch.bfloat16
    difference = (outputs[torch.float32] - outputs[torch.bfloat16].float()).norm() / outputs[torch.float32].norm()
    assert difference < 0.1
    injected = models[torch.bfloat16].inject(models[torch.bfloat16].generate_sites("vqa"), features)
    tensors = [tensor for site in injected["sites"].values() for part in site.parts for tensor in part] + [injected.get("front", torch.zeros(0, dtype=torch.bfloat16))]
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors)


def test_ways_in_for_images():
    """Weights are generated from images by hypernetworks only; to every other method images come as tokens, or not at all."""
    for method, (*_, source) in METHODS.items():
        for vision in VISION if source == "hypernetworks" else ["tokens"]:
            if (method, vision) not in (("hyperprefix", "adapter"), ("hyperadapter", "prefix"), ("hyperformer", "prefix")):
                with torch.device("meta"):
                    model = HyperPELT(T5(T5Config.from_name("t5-small")), ["vqa"], HyperPELTConfig(method, visual_width=9, vision=vision))
                assert any("visual" in name or "image_tokens" in name for name in model.trained())
    for method, vision in (("norms", "both"), ("adapter", "both"), ("prefix", "prefix"), ("mam", "adapter"), ("full", "both"), ("hyperprefix", "adapter")):
        with pytest.raises(hyperpelt.UserError, match="lets no image in"), torch.device("meta"):
            HyperPELT(T5(T5Config.from_name("t5-small")), ["vqa"], HyperPELTConfig(method, visual_width=9, vision=vision))


def test_vector_form_and_norm(tmp_path):
    """per_position False: one hyper-embedding per site, whose heads emit all N rows; hyper_norm: layer norm on I."""
    model = make(tmp_path, per_position=False, hyper_norm=True)
    p = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    site = model.generate_sites("stsb")[DECODER_CROSS, 1]
    hyper = numpy_hyper_embedding(p, p["hyper_embedding.task"][1], 3 + 1, BLOCK_TYPES.index(DECODER_CROSS))
    assert hyper.shape == (1, SMALL["hyper_dim"])
    hyper = (hyper - hyper.mean()) / np.sqrt(hyper.var() + 1e-5) * p["hyper_embedding.projector.norm.weight"] + p["hyper_embedding.projector.norm.bias"]
    expected = linear(p, "prefix_hypernetwork.key", hyper).reshape(SMALL["prefix_length"], 3, 16)
    assert np.allclose(expected.transpose(1, 0, 2), site.parts[0][0].detach().numpy(), atol=1e-4)
    # an image's side of it: the mean of its cells stands for it
    model = make(tmp_path, per_position=False, visual_width=9)
    p = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    features = torch.randn(2, 7, 9)
    site = model.add_images(model.generate_sites("stsb"), features)[DECODER_CROSS, 1]
    z = linear(p, "hyper_embedding.visual", features[1].double().numpy()).mean(0, keepdims=True)
    hyper = numpy_hyper_embedding(p, z, 3 + 1, BLOCK_TYPES.index(DECODER_CROSS), "visual_projector")
    expected = linear(p, "visual_prefix_hypernetwork.key", hyper).reshape(SMALL["prefix_length"], 3, 16)
    assert np.allclose(expected.transpose(1, 0, 2), site.parts[1][0][1].detach().numpy(), atol=1e-4)


# --------------------------------------------------------------------------------------- baselines: weights learned as they are

def test_learned_weights_equal_numpy(tmp_path):
    """Eq. (11) site by site, of both tasks; adapters are the tensors themselves, W_up and b_up times lambda."""
    model = make(tmp_path, method="mam", reparam_dim=7)
    p = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    for number, task in enumerate(("rte", "stsb")):
        sites, ffn = model.generate_sites(task), [site for site in model.generate_sites(task) if site[0].endswith("FFN")]
        assert len(sites) == 3 + 3 + 2 + 2 + 2 and len(ffn) == 5
        for k, (kind, layers) in enumerate(((ENCODER_SELF, 3), (DECODER_SELF, 2), (DECODER_CROSS, 2))):
            both = linear(p, f"learned.out.{k}", np.tanh(linear(p, f"learned.hidden.{k}", p["learned.embedding"][number, k])))
            for layer in range(layers):
                for part, found in enumerate(sites[kind, layer].parts[0]):
                    columns = both[:, (2 * layer + part) * 48:][:, :48]                          # [N, H*K]
                    assert np.allclose(np.stack(np.split(columns, 3, 1)), found.detach().numpy(), atol=1e-4)
        for i, site in enumerate(ffn):
            scales = 1, 1, p["learned.scale"], p["learned.scale"]
            for name, scale, found in zip(("down", "down_bias", "up", "up_bias"), scales, sites[site].parts[0]):
                assert np.allclose(scale * p[f"learned.{name}"][number, i], found.detach().numpy(), atol=1e-5)


def test_learned_adapters_start_as_linear_maps_do(tmp_path):
    """W_down: uniform between -1/sqrt(D) and 1/sqrt(D), as nn.Linear; W_up and the biases 0; lambda 1."""
    make_checkpoint(tmp_path, "v1.1")
    torch.manual_seed(0)
    learned = HyperPELT(T5.from_pretrained(tmp_path), ["rte", "stsb"], HyperPELTConfig("adapter", bottleneck=64)).learned
    down, bound = learned.down.detach(), 1 / math.sqrt(learned.down.size(-1))
    assert down.abs().max() <= bound and down.max() > 0.99 * bound and down.min() < -0.99 * bound and abs(down.mean()) < 0.02 * bound
    assert not any(getattr(learned, name).any() for name in ("down_bias", "up", "up_bias")) and learned.scale == 1


def test_learned_adapters_act_as_generated_ones(tmp_path):
    """The tensors that a hypernetwork generates, put into the baseline as its own, give the same logits: one injection."""
    generated, learned = (make(tmp_path, method=method) for method in ("hyperadapter", "adapter"))
    with torch.no_grad():
        for number, task in enumerate(generated.tasks):
            hyper = generated.hyper_embedding(number, generated.layer_ids, generated.block_ids)
            learned.learned.scale.fill_(1)
            for name, tensor in zip(("down", "down_bias", "up", "up_bias"), generated.adapter_hypernetwork(hyper)):
                getattr(learned.learned, name)[number] = tensor
            assert torch.equal(generated(*inputs(), task)[0], learned(*inputs(), task)[0])


# ------------------------------------------------------------------------------------------------------------ prefix

def test_prefix_leaves_bias_and_mask_alone(tmp_path):
    """Real keys keep their bias, N columns of 0 stand in front, for padded rows and later steps too."""
    stack = make(tmp_path).t5.decoder
    for module in (stack, make(tmp_path).t5.encoder):
        padding = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        plain, extended = (module.self_mask(4, 0, padding, n, torch.float32) for n in (0, 5))
        assert torch.equal(extended[..., 5:], plain) and (extended[..., :5] == 0).all()
        assert (plain[1, :, :, 2:] < -1e8).all()
    later = stack.self_mask(1, 3, None, 5, torch.float32)   # the query at step 3 has position 3
    assert torch.equal(later[..., 5:], stack.self_mask(4, 0, None, 0, torch.float32)[:, :, 3:])
    assert torch.equal(t5_module.padding_mask(torch.tensor([[1, 0]]), 5, torch.float32)[0, 0, 0, :6], torch.zeros(6))


def test_masked_prefix_is_the_plain_model(tmp_path, monkeypatch):
    """With the prefix columns masked out by hand, bias and all, the logits are the plain model's."""
    t5 = make(tmp_path, method="norms").t5
    sites = {(kind, i): Prefix((torch.randn(3, 5, 16), torch.randn(3, 5, 16)))
             for kind, count in ((ENCODER_SELF, 3), (DECODER_SELF, 2), (DECODER_CROSS, 2)) for i in range(count)}
    ids, mask, labels = inputs()
    with torch.no_grad():
        plain, prefixed = t5(ids, mask, labels)[0], t5(ids, mask, labels, sites)[0]
        pad = torch.nn.functional.pad
        monkeypatch.setattr(t5_module.F, "pad", lambda x, by, value=0.0: pad(x, by, value=-1e9 if by == (5, 0) else value))
        masked = t5(ids, mask, labels, sites)[0]
    assert torch.allclose(masked, plain, atol=1e-5) and (prefixed - plain).abs().max() > 0.1


def test_zero_prefix_still_takes_mass(tmp_path):
    """With all-zero keys and values the output shrinks; it is not the plain model's."""
    t5 = make(tmp_path, method="norms").t5
    ids, mask, labels = inputs()
    sites = {(ENCODER_SELF, i): Prefix((torch.zeros(3, 5, 16), torch.zeros(3, 5, 16))) for i in range(3)}
    with torch.no_grad():
        assert (t5(ids, mask, labels, sites)[0] - t5(ids, mask, labels)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["v1.0", "v1.1"])
def test_cached_decoding_equals_uncached(kind, tmp_path):
    """The prefix is prepended once; 9 steps of greedy decoding against full recomputation, padded rows included."""
    model = make(tmp_path, kind)
    ids, mask, _ = inputs(vocabulary=64)
    with torch.no_grad():
        sites = model.generate_sites("rte")
        found = model.t5.generate(ids, mask, max_new_tokens=9, sites=sites)
        (memory, _), sequence = model.t5.encode(ids, mask, sites), torch.zeros(len(ids), 1, dtype=torch.long)
        done = torch.zeros(len(ids), dtype=torch.bool)
        for _ in range(found.size(1)):
            token = model.t5.decode(sequence, memory, mask, sites)[:, -1].argmax(-1).masked_fill(done, 0)
            done |= token == 1
            sequence = torch.cat([sequence, token[:, None]], 1)
    assert found.size(1) >= 6 and torch.equal(found, sequence[:, 1:])


# --------------------------------------------------------------------------------- freezing, generation, initial state

@pytest.mark.parametrize("method", METHODS)
def test_only_the_declared_is_trained(method, tmp_path):
    """Gradients reach exactly what `trained` names; all else is bit-identical after several steps."""
    model = make(tmp_path, method=method).train()
    before = copy.deepcopy(model.state_dict())
    requires, config = {n: p.requires_grad for n, p in model.named_parameters()}, dataclasses.asdict(model.config)
    optimiser = torch.optim.AdamW(model.trained().values(), lr=1e-2)
    for step in range(4):
        loss = model(*inputs(step), ["rte", "stsb"][step % 2])[1]
        loss.backward()
        if step == 0:
            assert {n for n, p in model.named_parameters() if p.grad is not None} == set(model.trained())
        optimiser.step()
        optimiser.zero_grad()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == set(model.trained())
    if method != "full":
        in_t5 = {n for n in changed if n.startswith("t5.")}
        assert in_t5 == {n for n in before if n.startswith("t5.") and "norm" in n} and len(in_t5) == 3 * 2 + 2 * 3 + 2
    assert requires == {n: p.requires_grad for n, p in model.named_parameters()} and config == dataclasses.asdict(model.config)


def test_weights_are_generated_once(tmp_path):
    """One call of each hypernetwork in a training step. (For an evaluation: in test_train.py.)"""
    model = make(tmp_path)
    calls = []
    for network in (model.prefix_hypernetwork, model.adapter_hypernetwork):
        network.register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    model(*inputs(), "rte")
    assert sorted(calls) == ["AdapterHypernetwork", "PrefixHypernetwork"]


def test_adapters_start_as_no_op(tmp_path):
    make_checkpoint(tmp_path)
    plain, model = T5.from_pretrained(tmp_path).eval(), HyperPELT(T5.from_pretrained(tmp_path), ["rte"], HyperPELTConfig("hyperadapter", **SMALL)).eval()
    with torch.no_grad():
        assert torch.equal(plain(*inputs())[0], model(*inputs(), "rte")[0])


def test_bfloat16_holds_frozen_weights_once(tmp_path):
    make_checkpoint(tmp_path)
    model = HyperPELT(T5.from_pretrained(tmp_path), ["rte"], HyperPELTConfig(**SMALL), torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in model.trained() else torch.bfloat16), name
    torch.manual_seed(0)
    exact = HyperPELT(T5.from_pretrained(tmp_path), ["rte"], HyperPELTConfig(**SMALL)).eval()
    exact.load_state_dict(model.state_dict())
    a, b = (m(*inputs(), "rte")[0] for m in (model, exact))
    assert a.dtype == torch.bfloat16 and 0 < (a - b).std() < 0.05 * b.std()


def test_same_seed_same_weights(tmp_path):
    a, b, c = (make(tmp_path, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(a["hyper_embedding.task"], c["hyper_embedding.task"])


# ------------------------------------------------------------------------------------------------------------- budget

def test_parameter_budget():
    """The figures of the README, by arithmetic from the sizes: T5-base, N 49, d_t 768, d_I 64, h 128, b 24, 8 tasks."""
    norms, embeddings = 62 * 768, (8 + 24 + 5) * 49 * 768
    projector = 3 * 768 * 128 + 128 + 128 * 64 + 64
    prefix_heads = 2 * (64 * 768 + 768)
    adapter_heads = 2 * (64 + 1) * 24 * 768 + (64 + 1) * 24 + (64 + 1) * 768 + 1
    assert norms == 47_616 and norms + embeddings + projector + prefix_heads == 1_843_136
    with torch.device("meta"):
        counts = {}
        for method in METHODS:
            model = HyperPELT(T5(T5Config.from_name("t5-base")), list("abcdefgh"), HyperPELTConfig(method))
            counts[method] = sum(p.numel() for p in model.trained().values())
            if method == "hyperpelt":
                assert hyperpelt.deployed(model) == norms + 8 * (36 * 2 * 49 * 768 + 24 * (2 * 24 * 768 + 24 + 768))
    assert counts["hyperprefix"] == 1_843_136 and counts["hyperpelt"] == 1_843_136 + adapter_heads
    prefix = 8 * 3 * 49 * 768 + 3 * 769 * 512 + 3 * 513 * 12 * 2 * 768
    adapter = 8 * 24 * (2 * 24 * 768 + 24 + 768) + 1
    assert counts["prefix"] == norms + prefix and counts["adapter"] == norms + adapter and counts["mam"] == norms + prefix + adapter
    vector = (8 + 24 + 5) * 768 + projector + 2 * 64
    assert counts["hyperformer"] == norms + vector + adapter_heads
    assert counts["norms"] == norms and counts["full"] == 222_903_552
    assert f"{1 + counts['hyperprefix'] / counts['full']:.2f} {1 + counts['hyperpelt'] / counts['full']:.2f} {1 + counts['prefix'] / counts['full']:.2f}" == "1.01 1.02 1.14"
    assert f"{100 * counts['hyperpelt'] / 8 / counts['full']:.2f}" == "0.24"


def test_budget_command(tmp_path):
    out, _ = run("hyperpelt.py", "--model", "t5-base", "--tasks", 8)
    assert "1.0083x" in out and "1.0192x" in out and "0.241 %" in out and "4,290,777" in out and "8 x 49 x 768" in out
    make_checkpoint(tmp_path)
    assert "2 tasks" in run("hyperpelt.py", "--model", tmp_path, "--tasks", 2)[0]
    assert "t5-bas" in run("hyperpelt.py", "--model", "t5-bas", ok=False)[1]
    assert "--tasks" in run("hyperpelt.py", "--tasks", 0, ok=False)[1]


def test_gradients_do_not_depend_on_the_order_of_threads():
    """T5-base's sites, the paper's sizes: PyTorch sums the gradient of x[ids] by several threads as they come, unless x is small."""
    torch.manual_seed(0)
    embedding, layer_ids = HyperEmbedding(HyperPELTConfig(), 1, 24, visual=False), torch.arange(60) % 24
    for parameter in embedding.parameters():
        torch.nn.init.normal_(parameter)
    out, found = torch.randn(60, 49, 64), set()
    torch.set_num_threads(2)
    try:
        for _ in range(50):
            embedding.zero_grad()
            hyper = embedding(0, layer_ids, torch.arange(60) % 5)
            hyper.backward(out)
            found.add(embedding.layer.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(1)
    assert len(found) == 1
    nodes = [hyper.grad_fn]                                      # it takes many tries to see, so look for the gradient of x[ids] itself
    for node in nodes:
        nodes += [following for following, _ in node.next_functions if following is not None and following not in nodes]
    assert len(nodes) > 8 and not any("IndexBackward" in node.name() for node in nodes)
