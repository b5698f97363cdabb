"""HyperPELT: hypernetworks write prefixes and adapters for every block of a frozen T5.

    python hyperpelt.py --tasks 8       # what each method trains on T5-base; needs no weights

    model = HyperPELT(T5.from_pretrained(folder), ["rte"], HyperPELTConfig())
    logits, loss = model(input_ids, attention_mask, labels, "rte")
    model.eval().t5.generate(input_ids, **model.inject(model.generate_weights("rte")))

Zhang et al., HyperPELT, Findings of ACL 2023. The paper's equation numbers are not known to us.
These are our own. Each says what we know of it: [P] printed in the paper, [D] derived from that,
[X] borrowed from the code of earlier work, [R] reconstructed, [C] our choice.

The task side. A site is a layer i and a block type j (an attention or an FFN of that layer). It
receives generated weights:
    (1)  I = norm(ReLU([z ; l_i ; b_j] W1 + c1) W2 + c2)   hyper-embedding of task z at a site
         [P: made from z, l, b; R: this form, the same for each of N positions; X (HyperFormer):
         the layer norm, which can be left out]
    (2)  P_k = I W_k + c_k,  P_v = I W_v + c_v             prefix hypernetwork h_P
         [P; R: row by row]
    (3)  K' = [P_k ; s W_K],  V' = [P_v ; s W_V]           an attention with its prefix; s is what
         it attends to, W_K and W_V are T5's [P; X (MAM): the prefix bypasses W_K and W_V]
    (4)  (W_down, b_down, W_up, b_up) = h_A(mean of I)     adapter hypernetwork h_A
         [P; C: mean over the N positions]
    (5)  A(u) = ReLU(u W_down + b_down) W_up + b_up        adapter; u = norm(x) is the FFN's input
         [P; X (MAM): ReLU; C: u]
    (6)  y = x + FFN(u) + lambda A(u)                      beside the feed-forward block
         [R: lambda is trained]
The visual side has hypernetworks h_P^v and h_A^v of its own [P], again (2) and (4):
    (7)  z_v = G W_g + c_g                                 visual embedding; G: N grid features
         [P; R: linear, row by row; C: G is normalised before]
    (8)  I^v = (1) of z_v, with weights of its own         hyper-embedding of an image at a site
         [P; R: own weights; C: the same l_i and b_j]
    (9)  K' = [P_k ; P_k^v ; s W_K],  V' likewise          the image's prefix after the task's
         [P; X (MAM): it bypasses W_K and W_V, unless visual_maps is on; C: the order]
    (10) y = x + FFN(u) + lambda A(u) + lambda_v A^v(u)    the image's adapter beside the task's
         [P; R: lambda_v]
The baselines train weights of the same shapes directly, adapters as they are, prefixes by
    (11) [P_k, P_v] = tanh(P_0 W_a + c_a) W_b + c_b        reparameterised prefix
         [X: prefix-tuning]

All equations are written for rows: one row is one position or token. In (1), [a ; b] joins the
features of one position. In (3) and (9), it puts positions one after the other.

Shapes: B batch, S source or target length, N prefix length, D d_model, H heads, K d_kv,
r bottleneck, L layers (l counts those of both stacks), V visual width, Z width d_t of an embedding,
Q width of the projector's hidden layer, E width d_I of a hyper-embedding. The weights of a task
have B = 1, because all examples share them; those of images have one entry per example.
"""
import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from t5 import DECODER_CROSS, DECODER_FFN, DECODER_SELF, ENCODER_FFN, ENCODER_SELF, T5, T5Config

ATTENTION_BLOCKS = (ENCODER_SELF, DECODER_SELF, DECODER_CROSS)
FFN_BLOCKS = (ENCODER_FFN, DECODER_FFN)
BLOCK_TYPES = (ENCODER_SELF, ENCODER_FFN, DECODER_SELF, DECODER_CROSS, DECODER_FFN)

# name: (prefixes, adapters, where their weights come from)
METHODS = {
    "hyperpelt": (True, True, "hypernetworks"),
    "hyperprefix": (True, False, "hypernetworks"),
    "hyperadapter": (False, True, "hypernetworks"),
    # Adapters only, by one vector I per site: HyperFormer++'s idea at our sites. HyperPELT sets
    # per_position and hyper_norm for it.
    "hypervector": (False, True, "hypernetworks"),
    # Baselines. The paper trained prefix-tuning and MAM with one set of weights for all tasks [P].
    "prefix": (True, False, "shared"),
    "adapter": (False, True, "per-task"),
    "mam": (True, True, "shared"),
    "norms": (False, False, None),
    "full": (False, False, None),
}
# name: (visual prefixes, visual adapters, image tokens before the text); "tokens" is our baseline.
VISION = {
    "both": (True, True, False),
    "prefix": (True, False, False),
    "adapter": (False, True, False),
    "tokens": (False, False, True),
}
SHARING = ("default", "shared", "per-task")


@dataclass
class HyperPELTConfig:
    """Sizes and switches. What the paper does not print can be set here in one place."""
    method: str = "hyperpelt"
    prefix_length: int = 49         # N [R]: the 7 x 7 grid of an image fits position by position
    embedding_dim: int = 768        # Z [R]; with the next three, 1.01x for HyperPrefix [P]
    hyper_dim: int = 64             # E [R]
    projector_dim: int = 128        # Q [R]
    bottleneck: int = 24            # r [R]
    reparam_dim: int = 512          # hidden width of eq. (11) [X]
    per_position: bool = True       # embeddings have N rows [R]; False: one row [X: HyperFormer]
    # Layer norm on I [X: HyperFormer; C: on]. Without it, I grew ninefold in the first 20 steps of
    # a run (sample/EARLIER.md).
    hyper_norm: bool = True
    prefix_blocks: tuple = ATTENTION_BLOCKS     # which attentions receive a prefix [X: MAM]
    # lambda and lambda_v at the start, each one number for all sites [C]. A step of Adam moves a
    # generated weight far, so that training was less steady with 1 [X: MAM].
    adapter_scale: float = 0.1
    learned_scale: float = 1.0      # lambda at the start, of the baselines' adapters [C]
    position_noise: float = 0.5     # share of the variance of z, l, b between positions [C]
    sharing: str = "default"        # of baselines: "shared", "per-task"; "default": as in METHODS
    vision: str = "both"            # a key of VISION
    visual_width: int = 0           # V; 0: no images. CLIP's ResNet-101 has 2048 [R]
    visual_norm: bool = True        # normalise features, because encoders differ in scale [C]
    # True: in eq. (9), norm(P_k^v) W_K stands for P_k^v, and norm(P_v^v) W_V for P_v^v, as if rows
    # were tokens of the T5 [C]. It can learn more from images (sample/RESULTS.md).
    visual_maps: bool = False

    def __post_init__(self):
        choices = {"method": METHODS, "vision": VISION, "sharing": SHARING}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: found {getattr(self, name)!r},"
                                 f" expected one of {', '.join(known)}")
        for block in self.prefix_blocks:
            if block not in ATTENTION_BLOCKS:
                raise ValueError(f"prefix_blocks: found {block!r},"
                                 f" expected some of {', '.join(ATTENTION_BLOCKS)}")
        if self.prefix_length < 1 or not 0 <= self.position_noise <= 1:
            raise ValueError(f"found prefix_length {self.prefix_length} and position_noise"
                             f" {self.position_noise}, expected at least 1, and from 0 to 1")


# ---- hypernetworks: eq. (1), (2), (4), (8) -------------------------------------------------------

class Hypernetworks(nn.Module):
    """One side of the method: the projector, h_P and h_A (paper: section 4).

    The task side and the visual side are two instances. All sites share the weights of a side.
    With maps, a row of a prefix is as wide as a token and not yet split into heads.
    """

    def __init__(self, config, t5_config, attentions, ffns, maps=False):
        super().__init__()
        Z, Q, E = config.embedding_dim, config.projector_dim, config.hyper_dim
        N, r, D = config.prefix_length, config.bottleneck, t5_config.d_model
        self.attentions, self.ffns = attentions, ffns
        self.head_shape = (N, 1, D) if maps else (N, t5_config.num_heads, t5_config.d_kv)
        self.down_shape, self.up_shape = (D, r), (r, D)

        # A layer has one number in both stacks: the decoder's layers follow the encoder's [C].
        sites = attentions + ffns
        layers = [i + t5_config.num_layers * block.startswith("decoder") for block, i in sites]
        blocks = [BLOCK_TYPES.index(block) for block, _ in sites]
        self.register_buffer("layer_ids", torch.tensor(layers), persistent=False)
        self.register_buffer("block_ids", torch.tensor(blocks), persistent=False)

        # W1 [z ; l ; b] + c1 is the sum of three linear maps, one for each part of the input.
        self.from_z = nn.Linear(Z, Q)
        self.from_layer = nn.Linear(Z, Q, bias=False)
        self.from_block = nn.Linear(Z, Q, bias=False)
        self.to_hyper = nn.Linear(Q, E)
        self.norm = nn.LayerNorm(E) if config.hyper_norm else nn.Identity()

        if attentions:
            # In the vector form, a single I writes all N rows of a prefix at once.
            rows = 1 if config.per_position else N
            width = rows * math.prod(self.head_shape[1:])
            self.to_key, self.to_value = nn.Linear(E, width), nn.Linear(E, width)
        if ffns:
            self.to_down, self.to_down_bias = nn.Linear(E, r * D), nn.Linear(E, r)
            self.to_up, self.to_up_bias = nn.Linear(E, D * r), nn.Linear(E, D)
            self.scale = nn.Parameter(torch.tensor(config.adapter_scale))

    def hyper_embedding(self, z, layer, block):
        """z [B, N, Z] with l [L, N, Z] and b [5, N, Z] -> I of every site [sites, B, N, E]."""
        # On a CPU, the gradient of layer[ids] is summed in the order in which threads finish, that
        # of index_select in a fixed order. So a run can be repeated exactly.
        from_layer = self.from_layer(layer).index_select(0, self.layer_ids)     # [sites, N, Q]
        from_block = self.from_block(block).index_select(0, self.block_ids)     # [sites, N, Q]
        of_site = (from_layer + from_block)[:, None]                            # [sites, 1, N, Q]
        hidden = F.relu(self.from_z(z) + of_site)                               # [sites, B, N, Q]
        # On the visual side, z is z_v and the weights are those of the second instance.
        return self.norm(self.to_hyper(hidden))                                 # eq. (1), (8)

    def prefixes(self, hyper):
        """I [sites, B, N, E] -> P_k, P_v, each [sites, B, H, N, K]."""
        keys = self.to_key(hyper)                                   # eq. (2): P_k
        values = self.to_value(hyper)                               # eq. (2): P_v
        shape = (*hyper.shape[:2], *self.head_shape)                # [sites, B, N, H, K]
        return keys.reshape(shape).transpose(2, 3), values.reshape(shape).transpose(2, 3)

    def adapters(self, hyper):
        """I [sites, B, N, E] -> W_down [sites, B, D, r], b_down [sites, B, 1, r],
        W_up [sites, B, r, D], b_up [sites, B, 1, D], lambda [sites], the same number for each."""
        mean = hyper.mean(2)                                        # [sites, B, E]
        down = self.to_down(mean).unflatten(2, self.down_shape)     # eq. (4): W_down
        down_bias = self.to_down_bias(mean).unsqueeze(2)            # eq. (4): b_down
        up = self.to_up(mean).unflatten(2, self.up_shape)           # eq. (4): W_up
        up_bias = self.to_up_bias(mean).unsqueeze(2)                # eq. (4): b_up
        return down, down_bias, up, up_bias, self.scale.expand(len(hyper))

    def forward(self, z, layer, block, dtype):
        """z, l, b as above -> {site: (P_k, P_v) or (W_down, b_down, W_up, b_up, lambda)}."""
        hyper = self.hyper_embedding(z, layer, block)
        # The sites of the attentions come first, then those of the feed-forward blocks.
        for_prefixes, for_adapters = hyper.split([len(self.attentions), len(self.ffns)])
        weights = {}
        if self.attentions:
            weights |= split_by_site(self.attentions, self.prefixes(for_prefixes), dtype)
        if self.ffns:
            weights |= split_by_site(self.ffns, self.adapters(for_adapters), dtype)
        return weights


def split_by_site(sites, tensors, dtype):
    """Several tensors [sites, ...] -> {site: its slice of each}."""
    # unbind, because the gradient of each tensor[i] would be as large as the whole tensor.
    slices = [tensor.to(dtype).unbind() for tensor in tensors]
    return {site: [one[i] for one in slices] for i, site in enumerate(sites)}


# ---- injection at the two seams of t5.py: eq. (3), (5), (6), (9), (10) ---------------------------

class Prefix:
    """Seam 1, an attention: prefixes of the task and of the images stand before the text.

    `parts` holds the tensors of the task and, with images, those of the images, in this order.
    """
    # What the tensors of a part are called in an exported file.
    names = ("key", "value")

    def __init__(self, parts):
        self.parts = parts                                          # (P_k, P_v) [B, H, N, K] each
        self.length = sum(keys.size(2) for keys, _ in parts)

    def __call__(self, k, v):                                       # s W_K, s W_V [B, H, S, K]
        batch = len(k)
        keys = [p_k.expand(batch, -1, -1, -1) for p_k, _ in self.parts]
        values = [p_v.expand(batch, -1, -1, -1) for _, p_v in self.parts]
        return torch.cat([*keys, k], 2), torch.cat([*values, v], 2)     # eq. (3), (9)


class Adapter:
    """Seam 2, a feed-forward block: the terms lambda A(u) that t5.py adds to FFN(u)."""
    names = ("down", "down_bias", "up", "up_bias", "scale")

    def __init__(self, parts):
        self.parts = parts                      # (W_down, b_down, W_up, b_up, lambda)

    def __call__(self, u):                                          # [B, S, D]
        terms = []
        for down, down_bias, up, up_bias, scale in self.parts:
            # The tokens are grouped by the adapter they share: a task's serves the whole batch, an
            # image's the beams of one example. Lambda scales W_up and b_up, not the output, which
            # has more numbers.
            x = u.reshape(len(down), -1, u.size(2))                 # [1 or B, tokens, D]
            hidden = F.relu(torch.baddbmm(down_bias, x, down))      # eq. (5): u W_down + b_down
            x = torch.baddbmm(scale * up_bias, hidden, scale * up)  # eq. (5), (6): lambda A(u)
            terms.append(x.view_as(u))
        # t5.FeedForward adds FFN(u) to it, t5.Block adds x.
        return sum(terms[1:], start=terms[0])                       # eq. (6), (10)


def seam_of(block):
    """Block type -> the class of what its sites receive."""
    return Prefix if block in ATTENTION_BLOCKS else Adapter


# ---- the model -----------------------------------------------------------------------------------

class HyperPELT(nn.Module):
    """A frozen T5 with the hypernetworks that serve it (paper: figure 1).

    t5 is a float32 T5, which is frozen in place; tasks are names; dtype is that of the frozen
    weights and the activations. Trained are the T5's layer norms, the hypernetworks and the
    embeddings z, l, b, z_v [P] (baselines: what METHODS says); they stay float32. Raises ValueError
    for images with a method and a vision that give them no way in.
    """

    def __init__(self, t5, tasks, config, dtype=torch.float32):
        super().__init__()
        if config.method == "hypervector":
            config = replace(config, per_position=False, hyper_norm=True)
        self.t5, self.tasks, self.config = t5, list(tasks), config
        self.freeze(dtype)

        has_prefix, has_adapter, source = METHODS[config.method]
        attentions = list_sites(t5.config, config.prefix_blocks if has_prefix else ())
        ffns = list_sites(t5.config, FFN_BLOCKS if has_adapter else ())
        self.hypernetworks = self.learned = self.image_tokens = None
        if source == "hypernetworks":
            layers = t5.config.num_layers + t5.config.num_decoder_layers
            rows = config.prefix_length if config.per_position else 1
            self.task = nn.ParameterDict({task: embeddings(config, rows) for task in tasks})
            self.layer = embeddings(config, layers, rows)                       # l [L, N, Z]
            self.block = embeddings(config, len(BLOCK_TYPES), rows)             # b [5, N, Z]
            self.hypernetworks = Hypernetworks(config, t5.config, attentions, ffns)
        elif source:
            sharing = source if config.sharing == "default" else config.sharing
            owners = self.tasks if sharing == "per-task" else ["all"]
            self.learned = LearnedWeights(config, t5.config, owners, attentions, ffns)
        if config.visual_width:
            self.add_visual_side(source, attentions, ffns)
        self.initialise()

    def add_visual_side(self, source, attentions, ffns):
        """What lets images in: hypernetworks of their own, or tokens before the text."""
        config = self.config
        visual_prefix, visual_adapter, tokens = VISION[config.vision]
        attentions = attentions if visual_prefix else []
        ffns = ffns if visual_adapter else []
        if tokens:
            self.image_tokens = nn.Linear(config.visual_width, self.t5.config.d_model)
        elif source == "hypernetworks" and attentions + ffns:
            self.visual_embedding = nn.Linear(config.visual_width, config.embedding_dim)
            self.visual_hypernetworks = Hypernetworks(config, self.t5.config, attentions, ffns,
                                                      config.visual_maps)
        else:
            raise ValueError(f"method {config.method} with vision {config.vision} lets no image in;"
                             " every method does with vision tokens")

    def freeze(self, dtype):
        """Freeze all but the layer norms (full: nothing). Frozen weights are held in `dtype`."""
        for name, parameter in self.t5.named_parameters():
            parameter.requires_grad = "norm" in name or self.config.method == "full"
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        self.t5.dtype = dtype

    @torch.no_grad()
    def initialise(self):
        """How the linear maps start, where PyTorch's defaults are not used [C]."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, Hypernetworks):
                # PyTorch draws from +-1/sqrt(inputs). One map of the concatenation would have
                # 3 Z inputs, so each of its parts is divided by sqrt(3).
                for part in (module.from_z, module.from_layer, module.from_block):
                    part.weight.mul_(3 ** -0.5)
                # Adapters are an exact no-op at first.
                if module.ffns:
                    module.to_up.weight.zero_()
                    module.to_up_bias.weight.zero_()

    def trained(self):
        """-> {name: parameter} of all that is trained."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def generate_weights(self, task):
        """Name of a task -> {site: its tensors}, with a batch axis of 1 (lambda has none). Raises
        KeyError for a task that the model was not made for.

        Call it once per training step and once per evaluation, not per layer or output token.
        """
        if self.learned is not None:
            return self.learned(task, self.t5.dtype)
        if self.hypernetworks is not None:
            z = self.task[task][None]                                           # [1, N, Z]
            return self.hypernetworks(z, self.layer, self.block, self.t5.dtype)
        return {}

    def generate_visual_weights(self, features):
        """Grid features G [B, N, V], as inject prepares them -> {site: its tensors}, with a batch
        axis of B (lambda has none)."""
        # To generate weights for every image costs as much as the backbone itself, so it runs in
        # the backbone's dtype.
        low_precision = self.t5.dtype != torch.float32
        with torch.autocast(features.device.type, self.t5.dtype, enabled=low_precision):
            z = self.visual_embedding(features)                                 # eq. (7) [B, N, Z]
            if not self.config.per_position:
                z = z.mean(1, keepdim=True)                                     # [B, 1, Z]
            weights = self.visual_hypernetworks(z, self.layer, self.block, self.t5.dtype)
        if self.config.visual_maps:
            for site in self.visual_hypernetworks.attentions:
                weights[site] = self.pass_maps(site, *weights[site])
        return weights

    def pass_maps(self, site, keys, values):
        """P_k^v, P_v^v [B, 1, N, D] -> norm(P_k^v) W_K, norm(P_v^v) W_V, each [B, H, N, K]."""
        block, i = site
        layer = (self.t5.encoder if block == ENCODER_SELF else self.t5.decoder).blocks[i]
        if block == DECODER_CROSS:
            # What it attends to has passed the encoder's last norm.
            norm, attention = self.t5.encoder.norm, layer.cross_attention
        else:
            norm, attention = layer.self_norm, layer.self_attention
        keys = attention.split(attention.k(norm(keys.squeeze(1))))
        values = attention.split(attention.v(norm(values.squeeze(1))))
        return keys, values

    def inject(self, weights, features=None):
        """The weights of a task and, for images, grid features [B, N, V] -> what T5.forward and
        T5.generate take: `sites` and, with image tokens only, `front`. Raises ValueError where the
        number of positions is not prefix_length, which per_position=False needs too."""
        parts = {site: [tensors] for site, tensors in weights.items()}
        injected = {}
        if features is not None:
            # eq. (9), (10): what the images add stands after the task's.
            features = features.float()
            if self.config.visual_norm:
                features = F.layer_norm(features, features.shape[-1:])
            if self.image_tokens is not None:
                injected["front"] = self.image_tokens(features).to(self.t5.dtype)     # [B, N, D]
            elif features.size(1) != self.config.prefix_length:
                raise ValueError(f"features have {features.size(1)} positions,"
                                 f" expected prefix_length, {self.config.prefix_length}")
            else:
                for site, tensors in self.generate_visual_weights(features).items():
                    parts[site].append(tensors)

        injected["sites"] = {site: seam_of(site[0])(part) for site, part in parts.items()}
        return injected

    def forward(self, input_ids, attention_mask, labels, task, label_smoothing=0.0, features=None):
        """A batch of one task: ids and mask (None: all but pad) [B, S], labels [B, T] and, with
        images, features [B, N, V] -> logits [B, T, vocabulary], mean loss per token."""
        injected = self.inject(self.generate_weights(task), features)
        return self.t5(input_ids, attention_mask, labels,
                       label_smoothing=label_smoothing, **injected)


def list_sites(t5_config, blocks):
    """Block types -> [(block type, layer)] of every layer that has such a block."""
    counts = {"encoder": t5_config.num_layers, "decoder": t5_config.num_decoder_layers}
    return [(block, i) for block in blocks for i in range(counts[block.split()[0]])]


def embeddings(config, *shape):
    """-> a Parameter [*shape, Z] of standard normal numbers; the last axis of `shape` is N.

    Part of their variance is one vector for all N positions, so that the mean over positions,
    which the adapters see, tells tasks, layers and blocks apart [C].
    """
    noise = config.position_noise
    common = torch.randn(*shape[:-1], 1, config.embedding_dim)
    own = torch.randn(*shape, config.embedding_dim)
    return nn.Parameter((1 - noise) ** 0.5 * common + noise ** 0.5 * own)


# ---- baselines without a hypernetwork: eq. (11) --------------------------------------------------

class LearnedWeights(nn.Module):
    """Prefixes by eq. (11) and adapters trained as they are, in the shapes of Hypernetworks.

    owners are the names of the tasks, each with weights of its own, or ["all"]. The networks of
    eq. (11) are shared by all owners [R].
    """

    def __init__(self, config, t5_config, owners, attentions, ffns):
        super().__init__()
        self.owners, self.attentions, self.ffns = owners, attentions, ffns
        D, N, r = t5_config.d_model, config.prefix_length, config.bottleneck
        self.head_shape = (2, t5_config.num_heads, t5_config.d_kv)
        if attentions:
            # Each block type has an embedding P_0 and a network [X: prefix-tuning, MAM].
            blocks = list(dict.fromkeys(block for block, _ in attentions))
            self.embedding = nn.ParameterDict(
                {owner: torch.randn(len(blocks), N, D) for owner in owners})
            self.networks = nn.ModuleList()
            for block in blocks:
                layers = len(list_sites(t5_config, [block]))
                self.networks.append(nn.Sequential(
                    nn.Linear(D, config.reparam_dim), nn.Tanh(),
                    nn.Linear(config.reparam_dim, layers * math.prod(self.head_shape))))
        if ffns:
            self.adapters = nn.ModuleDict()
            for owner in owners:
                down = torch.empty(len(ffns), 1, D, r).uniform_(-D ** -0.5, D ** -0.5)
                # b_down, W_up, b_up
                others = [torch.zeros(len(ffns), 1, *shape) for shape in ((1, r), (r, D), (1, D))]
                self.adapters[owner] = nn.ParameterList([down, *others])
            self.scale = nn.Parameter(torch.tensor(config.learned_scale))

    def prefixes(self, owner):
        """-> P_k, P_v, each [sites, 1, H, N, K]."""
        prefixes = []
        for P_0, network in zip(self.embedding[owner], self.networks, strict=True):
            p = network(P_0)                                        # eq. (11) [N, layers*2*H*K]
            p = p.unflatten(1, (-1, *self.head_shape))              # [N, layers, 2, H, K]
            prefixes.append(p.permute(2, 1, 3, 0, 4))               # [2, layers, H, N, K]
        return torch.cat(prefixes, 1)[:, :, None].unbind()

    def forward(self, task, dtype):
        """Name of a task -> {site: its tensors}, as Hypernetworks gives them."""
        owner = "all" if "all" in self.owners else task
        weights = {}
        if self.attentions:
            weights |= split_by_site(self.attentions, self.prefixes(owner), dtype)
        if self.ffns:
            tensors = [*self.adapters[owner], self.scale.expand(len(self.ffns))]
            weights |= split_by_site(self.ffns, tensors, dtype)
        return weights


# ---- what is trained (paper: appendix B) ---------------------------------------------------------

def count(tensors):
    return sum(tensor.numel() for tensor in tensors)


@torch.no_grad()
def deployed(model):
    """Numbers left for all tasks once the weights are generated: prefixes, adapters (with a lambda
    each) and what is trained in the T5."""
    tensors = [p for p in model.t5.parameters() if p.requires_grad]
    for owner in model.learned.owners if model.learned else model.tasks:
        for generated in model.generate_weights(owner).values():
            tensors += generated
    return count(tensors)


def main():
    parser = argparse.ArgumentParser(description="Print what each method trains on a T5.")
    parser.add_argument("--model", default="", help="folder of a T5; default: T5-base")
    parser.add_argument("--tasks", type=int, default=8, metavar="M",
                        help="number of tasks; default: 8")
    args = parser.parse_args()
    if args.tasks < 1:
        parser.error(f"--tasks: found {args.tasks}, expected at least 1")
    try:
        path = Path(args.model, "config.json")
        t5_config = T5Config.from_file(path) if args.model else T5Config()
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")

    tasks = [f"task {i}" for i in range(args.tasks)]
    with torch.device("meta"):
        total = count(T5(t5_config).parameters())
    print(f"{args.model or 'T5-base'}: {total:,} parameters; {args.tasks} tasks\n")
    print(f"{'method':20}{'trained':>13}{'total':>11}{'per task':>11}{'deployed':>14}")
    for method, (_, _, source) in METHODS.items():
        for sharing in SHARING[1:] if source in SHARING else SHARING[:1]:
            with torch.device("meta"):
                model = HyperPELT(T5(t5_config), tasks, HyperPELTConfig(method, sharing=sharing))
            trained = count(model.trained().values())
            label = method if sharing == "default" else f"{method}, {sharing}"
            print(f"{label:20}{trained:>13,}{count(model.parameters()) / total:>10.4f}x"
                  f"{trained / args.tasks / total:>11.3%}{deployed(model):>14,}")
    print("\ntotal: the T5 and what the method adds, relative to the T5; per task: trained / tasks,"
          "\nrelative to the T5; deployed: what is left when the weights are generated.")


if __name__ == "__main__":
    main()
