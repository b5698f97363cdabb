"""hyperpelt.py against its equations, written out once more in numpy, at the sites of a tiny T5."""

import copy
import re

import numpy as np
import pytest
import torch
from conftest import run_cli

import hyperpelt
import train
from hyperpelt import BLOCK_TYPES, FFN_BLOCKS, METHODS, VISION, HyperPELT, HyperPELTConfig
from t5 import DECODER_CROSS, DECODER_SELF, ENCODER_SELF, T5, T5Config

# heads * d_kv is not d_model, and the decoder has more layers than the encoder.
TINY = T5Config(
    d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=2, num_decoder_layers=3, vocab_size=50
)
SMALL = dict(prefix_length=5, embedding_dim=12, hyper_dim=6, projector_dim=7, bottleneck=4)
LAYERS = {block: 2 if block.startswith("encoder") else 3 for block in BLOCK_TYPES}
SITES = [(block, layer) for block in BLOCK_TYPES for layer in range(LAYERS[block])]
IMAGES = dict(visual_width=11)
VECTOR = dict(per_position=False)
# Ids and mask [3, 7], labels [3, 4], of which two are padded; features [3, 5, 11].
RANDOM = torch.Generator().manual_seed(0)
MASK = torch.arange(7) < torch.tensor([[7], [5], [3]])
IDS = torch.randint(2, 50, (3, 7), generator=RANDOM) * MASK
LABELS = torch.randint(2, 50, (3, 4), generator=RANDOM).masked_fill(~MASK[:, 2:6], -100)
BATCH = IDS, MASK, LABELS
FEATURES = 7 + 30 * torch.randn(3, 5, 11, generator=RANDOM)


def make_model(method="hyperpelt", fresh=False, dtype=torch.float32, **changes):
    """A model of two tasks in eval mode. Unless fresh, all of its parameters are random."""
    torch.manual_seed(0)
    config = HyperPELTConfig(method, **{**SMALL, **changes})
    model = HyperPELT(T5(TINY), ["rte", "stsb"], config, dtype).eval()
    for name, parameter in model.named_parameters():
        if not fresh:
            mean, spread = (1.0, 0.2) if "norm" in name else (0.0, 0.3)
            torch.nn.init.normal_(parameter, mean, spread)
    return model


def assert_close(found, expected):
    """Compare tensors with arrays one by one, or one tensor with an array along its first axis."""
    for tensor, array in zip(found, expected, strict=True):
        tensor = tensor.detach().double().numpy()
        assert tensor.shape == array.shape
        assert np.abs(tensor - array).max() < 1e-4 * max(1, np.abs(array).max())


# ---- the equations in numpy ----------------------------------------------------------------------


def to_numpy(model):
    return {name: p.detach().double().numpy() for name, p in model.named_parameters()}


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def layer_norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def hyper_embedding(p, side, z, site):
    """Eq. (1), (8) as they are written, with one matrix for the concatenation -> I [B, N, E]."""
    block, layer = site
    layer_embedding = p["layer"][layer + 2 if block.startswith("decoder") else layer]
    block_embedding = p["block"][BLOCK_TYPES.index(block)]
    inputs = np.broadcast_arrays(z, layer_embedding, block_embedding)
    maps = [p[f"{side}.{name}.weight"] for name in ("from_z", "from_layer", "from_block")]
    hidden = np.concatenate(inputs, 2) @ np.concatenate(maps, 1).T + p[f"{side}.from_z.bias"]
    hyper = linear(p, f"{side}.to_hyper", np.maximum(hidden, 0))
    if f"{side}.norm.weight" in p:
        hyper = layer_norm(hyper) * p[f"{side}.norm.weight"] + p[f"{side}.norm.bias"]
    return hyper


def through_maps(p, site, rows):
    """visual_maps: P_k^v, P_v^v -> norm(P_k^v) W_K, norm(P_v^v) W_V."""
    block, layer = site
    place = f"t5.{block.split()[0]}.blocks.{layer}"
    norm, attention = f"{place}.self_norm", f"{place}.self_attention"
    if block == DECODER_CROSS:
        norm, attention = "t5.encoder.norm", f"{place}.cross_attention"
    passed = []
    for x, part in zip(rows, "kv", strict=True):
        u = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[f"{norm}.weight"]
        passed.append(u @ p[f"{attention}.{part}.weight"].T)
    return passed


def generated(p, side, z, site):
    """Eq. (2) -> P_k, P_v [B, H, N, K]; eq. (4) -> W_down, b_down, W_up, b_up, lambda."""
    hyper = hyper_embedding(p, side, z, site)
    if site[0] not in FFN_BLOCKS:
        both = [linear(p, f"{side}.to_{part}", hyper) for part in ("key", "value")]
        # In the vector form, the numbers of all 5 rows come from a single one.
        rows = [x.reshape(len(x), 5, -1) for x in both]
        if rows[0].shape[2] == TINY.d_model:
            rows = through_maps(p, site, rows)
        return [x.reshape(-1, 5, 2, 8).transpose(0, 2, 1, 3) for x in rows]
    mean = hyper.mean(1)
    down = linear(p, f"{side}.to_down", mean).reshape(-1, 24, 4)
    up = linear(p, f"{side}.to_up", mean).reshape(-1, 4, 24)
    biases = [linear(p, f"{side}.to_{name}_bias", mean)[:, None] for name in ("down", "up")]
    return down, biases[0], up, biases[1], p[f"{side}.scale"]


# ---- the equations at the sites ------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        VECTOR,
        dict(hyper_norm=False),
        dict(visual_maps=True),
        dict(visual_maps=True, **VECTOR),
        dict(method="hypervector"),
    ],
)
def test_generated_weights_equal_the_equations(changes):
    model = make_model(**changes, **IMAGES)
    p, z, features = to_numpy(model), to_numpy(model)["task.stsb"][None], FEATURES / 30
    from_task, from_images = model.generate_weights("stsb"), model.generate_visual_weights(features)
    z_v = linear(p, "visual_embedding", features.numpy())  # eq. (7)
    z_v = z_v if model.config.per_position else z_v.mean(1, keepdims=True)
    has_prefix = model.config.method == "hyperpelt"
    sites = [site for site in SITES if has_prefix or site[0] in FFN_BLOCKS]
    assert sorted(from_task) == sorted(from_images) == sorted(sites)
    for site in sites:
        assert_close(from_task[site], generated(p, "hypernetworks", z, site))
        assert_close(from_images[site], generated(p, "visual_hypernetworks", z_v, site))


@pytest.mark.parametrize("sharing", ["shared", "per-task"])
def test_learned_prefixes_equal_equation_11_and_adapters_are_as_they_are(sharing):
    model = make_model("mam", sharing=sharing)
    p = to_numpy(model)
    for task in model.tasks:
        owner, weights = "all" if sharing == "shared" else task, model.generate_weights(task)
        assert sorted(weights) == sorted(SITES)
        for b, block in enumerate((ENCODER_SELF, DECODER_SELF, DECODER_CROSS)):
            E, network = p[f"learned.embedding.{owner}"][b], f"learned.networks.{b}"
            both = linear(p, f"{network}.2", np.tanh(linear(p, f"{network}.0", E)))
            both = both.reshape(5, LAYERS[block], 2, 2, 8).transpose(1, 2, 3, 0, 4)
            for layer in range(LAYERS[block]):
                assert_close(weights[block, layer], both[layer][:, None])
        ffns = [site for site in SITES if site[0] in FFN_BLOCKS]
        for i, site in enumerate(ffns):
            own = [p[f"learned.adapters.{owner}.{part}"][i] for part in range(4)]
            assert_close(weights[site], [*own, p["learned.scale"]])


def watch(t5, injected):
    """Run a T5 -> {module name: (inputs, output)}."""
    seen, names = {}, {module: name for name, module in t5.named_modules()}

    def note(module, *inputs_and_output):
        seen[names[module]] = inputs_and_output

    with torch.nn.modules.module.register_module_forward_hook(note):
        t5(*BATCH, **injected)
    return seen


def check_attention(p, name, seen, plain, given):
    """Eq. (3), (9). given: pairs (P_k, P_v) [B, H, N, K] of the task and of the images."""
    (u, source, *_), output = seen[name]
    projected = []
    for x, part in ((u, "q"), (source, "k"), (source, "v")):
        whole = x.numpy() @ p[f"t5.{name}.{part}.weight"].T
        projected.append(whole.reshape(3, -1, 2, 8).transpose(0, 2, 1, 3))
    q, k, v = projected
    keys = np.concatenate([*(np.broadcast_to(p_k, (3, 2, 5, 8)) for p_k, _ in given), k], 2)
    values = np.concatenate([*(np.broadcast_to(p_v, (3, 2, 5, 8)) for _, p_v in given), v], 2)
    # The text's own tokens keep the bias and the mask of the plain T5. A prefix has neither.
    scores = q @ keys.swapaxes(2, 3)
    scores[..., 5 * len(given) :] += plain[name][0][2].numpy()
    weights = np.exp(scores - scores.max(3, keepdims=True))
    heads = (weights / weights.sum(3, keepdims=True) @ values).transpose(0, 2, 1, 3)
    assert_close(output, heads.reshape(3, -1, 16) @ p[f"t5.{name}.o.weight"].T)


def check_ffn(t5, name, seen, given):
    """Eq. (6), (10): y = x + FFN(u) + lambda A(u) + lambda_v A^v(u), with A(u) by eq. (5)."""
    (x,), u = seen[f"{name}.ffn_norm"]
    expected = (x + t5.get_submodule(f"{name}.ffn")(u, {})).numpy()
    for down, down_bias, up, up_bias, scale in given:
        hidden = np.maximum(u.numpy() @ down + down_bias, 0)
        expected = expected + scale * (hidden @ up + up_bias)
    assert_close(seen[name][1], expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "method, changes",
    [
        ("hyperpelt", {}),
        ("mam", {}),
        ("norms", {}),
        ("hyperpelt", VECTOR),
        ("hyperpelt", IMAGES),
        ("hyperpelt", dict(prefix_blocks=(DECODER_CROSS,))),
        ("hyperpelt", {**IMAGES, **VECTOR}),
        ("hyperpelt", dict(**IMAGES, vision="prefix")),
        ("hyperpelt", dict(**IMAGES, visual_maps=True)),
        ("hyperpelt", dict(**IMAGES, vision="adapter")),
    ],
)
def test_every_site_equals_the_equations(method, changes):
    """The plain T5 gives the bias and the mask that the text's own tokens must keep."""
    model = make_model(method, **changes)
    sources, features = [model.generate_weights("rte")], None
    if model.config.visual_width:
        features, normalised = FEATURES, torch.from_numpy(layer_norm(FEATURES.numpy()))
        sources.append(model.generate_visual_weights(normalised))
        kinds = {"both": {False, True}, "prefix": {False}, "adapter": {True}}[model.config.vision]
        assert {block in FFN_BLOCKS for block, _ in sources[1]} == kinds
    seen = watch(model.t5, model.inject(sources[0], features))
    plain = watch(model.t5, {})
    for block, layer in SITES:
        name = f"{block.split()[0]}.blocks.{layer}"
        found = [weights[block, layer] for weights in sources if (block, layer) in weights]
        given = [[tensor.numpy() for tensor in tensors] for tensors in found]
        if block in FFN_BLOCKS:
            check_ffn(model.t5, name, seen, given)
        else:
            part = "cross_attention" if block == DECODER_CROSS else "self_attention"
            check_attention(to_numpy(model), f"{name}.{part}", seen, plain, given)


@torch.no_grad()
@pytest.mark.parametrize("beams, maps", [(1, False), (3, False), (3, True)])
def test_an_image_batch_generates_what_each_example_generates_alone(beams, maps):
    model = make_model(visual_maps=maps, **IMAGES)
    weights = model.generate_weights("rte")
    together = model.t5.generate(IDS, MASK, 7, beams, **model.inject(weights, FEATURES))
    for i in range(3):
        injected = model.inject(weights, FEATURES[i : i + 1])
        alone = model.t5.generate(IDS[i : i + 1], None, 7, beams, **injected)[0]
        assert torch.equal(together[i, : len(alone)], alone)


@torch.no_grad()
def test_a_prefix_is_prepended_once_and_not_at_every_step():
    model, cache = make_model(), {}
    sites = model.inject(model.generate_weights("rte"))["sites"]
    memory, mask = model.t5.encode(IDS, MASK, sites)
    steps = [model.t5.decode(IDS[:, t : t + 1], memory, mask, sites, cache) for t in range(7)]
    torch.testing.assert_close(torch.cat(steps, 1), model.t5.decode(IDS, memory, mask, sites))


@torch.no_grad()
def test_a_text_batch_needs_no_visual_side_and_another_grid_is_refused():
    with_images, without = make_model(**IMAGES), make_model()
    without.load_state_dict(with_images.state_dict(), strict=False)
    assert torch.equal(with_images(*BATCH, "rte")[0], without(*BATCH, "rte")[0])
    with pytest.raises(ValueError, match="1 positions, expected .* 5"):
        with_images(*BATCH, "rte", features=FEATURES[:, :1])


@torch.no_grad()
@pytest.mark.parametrize("vision, maps", [("both", False), ("both", True), ("tokens", False)])
def test_bfloat16_holds_what_is_frozen_only(vision, maps):
    changes = dict(vision=vision, visual_maps=maps, **IMAGES)
    model = make_model(dtype=torch.bfloat16, **changes)
    exact = make_model(**changes)
    exact.load_state_dict(model.state_dict())
    for parameter in model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    rough, fine = (m(*BATCH, "rte", features=FEATURES)[0] for m in (model, exact))
    assert rough.dtype == torch.bfloat16 and 0 < (rough - fine).std() < 0.1 * fine.std()
    if vision == "both":
        assert model.generate_visual_weights(FEATURES)[DECODER_SELF, 0][0].dtype == torch.bfloat16
    else:
        expected = linear(to_numpy(exact), "image_tokens", layer_norm(FEATURES.numpy()))
        assert_close(exact.inject({}, FEATURES)["front"], expected)


# ---- what is trained, how it starts, and how large it is -----------------------------------------

# What each method trains beside the layer norms, with images and without.
DECLARED = dict.fromkeys(METHODS, "task.rte|layer|block|(hypernetworks|visual_|image_tokens).*")
DECLARED |= {
    "prefix": "learned.(embedding.all|networks.*)",
    "adapter": "learned.(adapters.rte.*|scale)",
    "mam": "learned.*",
    "norms": "image_tokens.*",
    "full": "t5.*",
}


@pytest.mark.parametrize(
    "method, vision",
    [
        ("norms", "tokens"),
        *((method, "") for method in METHODS),
        *(("hyperpelt", vision) for vision in VISION),
    ],
)
def test_exactly_what_is_declared_is_trained(method, vision):
    """A task that is not in a batch has no gradient, and Adam leaves its parameters alone."""
    model = make_model(method, **dict(vision=vision, **IMAGES) if vision else {}).train()
    features = FEATURES if vision else None
    declared = f"t5.*norm.weight|{DECLARED[method]}"
    expected = {name for name, _ in model.named_parameters() if re.fullmatch(declared, name)}
    flags, config = [p.requires_grad for p in model.parameters()], copy.deepcopy(model.config)
    optimiser = torch.optim.AdamW(model.trained().values(), lr=1e-2)
    for step, task in enumerate(["stsb", "rte", "rte", "rte"]):
        if step == 1:
            before = copy.deepcopy(model.state_dict())
        model(*BATCH, task, features=features)[1].backward()
        with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
        assert with_gradient == expected or step == 0
        optimiser.step()
        optimiser.zero_grad()
    after = model.state_dict()
    assert {name for name in after if not torch.equal(before[name], after[name])} == expected
    assert flags == [p.requires_grad for p in model.parameters()] and config == model.config


def test_weights_are_generated_once_for_an_evaluation(tmp_path):
    run, calls = train.load_run(train.read_settings(["--run", str(tmp_path / "run")])), []
    for module in (run.model.hypernetworks, run.model.hypernetworks.to_key):
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    examples = run.splits["rte"]["validation"]
    assert len(train.generate_outputs(run, run.tasks["rte"], examples)) == len(examples) == 200
    assert calls == ["Linear", "Hypernetworks"]


def test_gradients_do_not_depend_on_the_order_of_threads():
    """The gradient of layer[ids] would: it is summed in the order in which threads come."""
    nodes = [make_model().generate_weights("rte")[DECODER_SELF, 0][0].grad_fn]
    for node in nodes:
        nodes += [other for other, _ in node.next_functions if other and other not in nodes]
    assert {n.name() for n in nodes if "Index" in n.name()} == {"IndexSelectBackward0"}


@torch.no_grad()
@pytest.mark.parametrize("method, changes", [("adapter", {}), ("hyperadapter", IMAGES)])
def test_adapters_do_nothing_at_first(method, changes):
    model = make_model(method, fresh=True, **changes)
    logits_and_loss = model(*BATCH, "rte", features=FEATURES if changes else None)
    assert all(map(torch.equal, logits_and_loss, model.t5(*BATCH)))


def test_the_start_has_the_declared_scales():
    defaults = dict(position_noise=0.5, adapter_scale=0.1, learned_scale=1.0)
    assert HyperPELTConfig(**defaults) == HyperPELTConfig()
    z = hyperpelt.embeddings(HyperPELTConfig(position_noise=0.3), 60, 49)
    assert abs(z.std() - 1) < 0.02 and abs(z.mean(1).var(0).mean() - 0.706) < 0.02
    model = make_model(fresh=True, embedding_dim=200, projector_dim=300, adapter_scale=0.7)
    networks, one_map = model.hypernetworks, torch.nn.Linear(3 * 200, 300).weight
    for part in (networks.from_z, networks.from_layer, networks.from_block):
        assert abs(part.weight.std() / one_map.std() - 1) < 0.02
    biases = [p for name, p in networks.named_parameters() if name.endswith("bias")]
    assert not any(bias.any() for bias in biases) and networks.scale == torch.tensor(0.7)
    learned = make_model("adapter", fresh=True, bottleneck=90, learned_scale=0.6).learned
    (down, *others), bound = learned.adapters["rte"], 24**-0.5
    assert 0.99 * bound < down.max() <= bound and 0.99 * bound < -down.min() <= bound
    assert not any(map(torch.any, others)) and learned.scale == torch.tensor(0.6)


@torch.no_grad()
def test_positions_are_alike_and_blocks_are_told_apart_by_b_alone():
    model, order = make_model(), torch.tensor([3, 0, 4, 1, 2])
    before = model(*BATCH, "rte")[0]
    for name, table in (("l", model.layer), ("b", model.block), ("z", model.task["rte"][None])):
        table.copy_(table[:, order])
        is_same = torch.allclose(model(*BATCH, "rte")[0], before, atol=1e-4)
        assert is_same is (name == "z")
    for factor in (1, 0):
        model.block.mul_(factor)
        weights = model.generate_weights("rte")
        is_same = torch.allclose(weights[DECODER_SELF, 1][0], weights[DECODER_CROSS, 1][0])
        assert is_same is (factor == 0)


# T5-base with 8 tasks, by hand: N 49, d_t 768, d_I 64, Q 128, r 24; 36 attentions and 24 FFNs.
NORMS = 62 * 768
# z, l, b; the projector; the layer norm on I.
HYPER = NORMS + (8 + 24 + 5) * 37_632 + (3 * 768 * 128 + 128) + (128 * 64 + 64) + 2 * 64
KEY_HEADS = 2 * 65 * 768
ADAPTER = 2 * 24 * 768 + 24 + 768
ADAPTER_HEADS = 65 * ADAPTER + 1
PREFIX = NORMS + 3 * 49 * 768 + 3 * (769 * 512 + 513 * 12 * 2 * 768)
DEPLOYED = 36 * 2 * 49 * 768 + 24 * (ADAPTER + 1)


@pytest.mark.parametrize(
    "method, changes, by_hand, ratio",
    [
        ("hyperprefix", {}, HYPER + KEY_HEADS, "1.0083"),
        ("hyperpelt", {}, HYPER + KEY_HEADS + ADAPTER_HEADS, "1.0193"),
        ("hyperpelt", VECTOR, 7_719_257, "1.0346"),
        ("prefix", {}, PREFIX, "1.1333"),
        ("mam", {}, PREFIX + 24 * ADAPTER + 1, "1.1373"),
        ("prefix", dict(sharing="per-task"), PREFIX + 7 * 3 * 49 * 768, "1.1368"),
        ("adapter", {}, NORMS + 8 * 903_744 + 1, "1.0326"),
        ("hyperadapter", {}, HYPER + ADAPTER_HEADS, "1.0188"),
        ("hypervector", {}, HYPER - 48 * 37 * 768 + ADAPTER_HEADS, "1.0127"),
    ],
)
def test_sizes_on_t5_base(method, changes, by_hand, ratio):
    with torch.device("meta"):
        model = HyperPELT(T5(T5Config()), list("abcdefgh"), HyperPELTConfig(method, **changes))
    trained = hyperpelt.count(model.trained().values())
    assert trained == by_hand and f"{1 + trained / 222_903_552:.4f}" == ratio


def test_the_command_prints_the_sizes_and_an_unknown_model_is_one_line():
    process = run_cli("hyperpelt.py", "--tasks", 3)
    lines = [line.split() for line in process.stdout.splitlines()]
    assert ["hyperpelt", "4,102,745", "1.0182x", "0.614%", f"{NORMS + 3 * DEPLOYED:,}"] in lines
    assert ["mam,", "shared", "30,612,289", "1.1371x", "4.578%", f"{NORMS + DEPLOYED:,}"] in lines
    assert process.returncode == 0
    process = run_cli("hyperpelt.py", "--model", "t5-bas")
    assert process.returncode == 2 and re.fullmatch("error: .*t5-bas.*\n", process.stderr)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(method="lora"), "method: found 'lora', expected one of hyperpelt, hyperprefix"),
        (dict(prefix_blocks=(DECODER_SELF, "decoder FFN")), "prefix_blocks: found 'decoder FFN'"),
        (dict(position_noise=1.5), "position_noise 1.5, expected"),
        (dict(prefix_length=0), "prefix_length 0 and"),
        (dict(method="mam", **IMAGES), "method mam with vision both lets no image in"),
        (dict(method="hyperadapter", vision="prefix", **IMAGES), "lets no image in"),
    ],
)
def test_a_wrong_choice_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes)
