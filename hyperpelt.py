"""HyperPELT: hypernetworks that turn hyper-embeddings into prefixes and adapters for every block of a frozen T5.

    python hyperpelt.py --model t5-base --tasks 8      # what is trained, with shapes and counts; needs no weights
    python hyperpelt.py --tour runs/rte-hyperpelt      # one example on its way through the method (sample/tour.py)

Zhang et al., HyperPELT, Findings of ACL 2023. The paper's equation numbers are not known to us; these are our own, each with what we
know of it: [P] printed in the paper, [D] derived from that, [X] borrowed from the code of earlier work, [R] reconstructed, [C] our choice.
Rows times matrices in (2), (3), (7) and (9), matrices times columns in the others.
    (1)  I^tau_{i,j} = W2 ReLU(W1 [z_tau ; l_i ; b_j] + c1) + c2       hyper-embedding of task tau, layer i, block type j [P; this form R]
    (2)  P_k = I W_k + c_k,   P_v = I W_v + c_v                        prefix hypernetwork h_P [P; row by row R]
    (3)  K' = [P_k ; x W_K],  V' = [P_v ; x W_V]                       prefix-tuning of an attention [P; not multiplied by W_K, W_V X: MAM]
    (4)  (W_down, b_down, W_up, b_up) = h_A(mean over positions of I)  adapter hypernetwork h_A [P; the mean C]
    (5)  A(u) = W_up ReLU(W_down u + b_down) + b_up                    adapter [P; ReLU X: MAM], u = norm(x) [C]
    (6)  y = x + FFN(u) + lambda A(u)                                  parallel to the feed-forward block, lambda trained [R]
VL-HyperPELT, for a task that comes with images, has a second side, with hypernetworks h_P^v and h_A^v of its own [P]:
    (7)  z_v = V W_v + c_v                                             visual embedding of an image's N grid features V [P; linear,
                                                                       position by position R], each normalised first [C]
    (8)  I^v_{i,j} = W2^v ReLU(W1^v [z_v ; l_i ; b_j] + c1^v) + c2^v   visual hyper-embedding [P; this form, a projector of its own R;
                                                                       shared l_i, b_j C]; h_P^v, h_A^v are (2), (4) again
    (9)  K' = [P_k ; P_k^v ; x W_K],  V' = [P_v ; P_v^v ; x W_V]       the image's prefix after the task's [P; the order C]
    (10) y = x + FFN(u) + lambda A(u) + lambda_v A^v(u)                the image's adapter beside the task's [P; as in (6), lambda_v R]
What it is compared with enters by (3), (5) and (6) too; its adapters are trained as they are, a set a task, its prefixes come from
    (11) [P_k, P_v] = W_b tanh(W_a E_tau + c_a) + c_b                  prefix-tuning, reparameterised: one network a block type gives
                                                                       all its layers [X], for all tasks [R]

A site is a place that receives generated weights: (block type, layer), five block types [D]. The weights of all sites are made at once,
in a few batched products, then handed to the two seams of t5.py. The order of the file: HyperPELTConfig; hyper-embeddings (1), (7), (8);
hypernetworks (2), (4); injection (3), (5), (6), (9), (10); HyperPELT, which is the model; the baselines' LearnedWeights (11); the budget.

Shapes: B batch, S source length (in the decoder's adapters the target's), T target length, N prefix length (1 as the axis of a
hyper-embedding in the vector form), D d_model, H heads, K d_kv, R bottleneck, M tasks, L layers of encoder and decoder, E hyper-embedding
width d_I, Z input embedding width d_t, Q width of a hidden layer, V width of an image's features. These letters are sizes in shapes only:
in equations V, K', E_tau and W_v are what is said there, and an [R] that stands alone is the mark.

    model = HyperPELT(T5.from_pretrained(folder), ["rte"], HyperPELTConfig())                    # what train.py does with it
    logits, loss = model(input_ids, attention_mask, labels, "rte")
    model.eval().t5.generate(input_ids, sites=model.generate_sites("rte"))
"""
import math
import runpy
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Parser, UserError, in_range, run
from t5 import DECODER_CROSS, DECODER_FFN, DECODER_SELF, ENCODER_FFN, ENCODER_SELF, T5, RMSNorm, T5Config

BLOCK_TYPES = [ENCODER_SELF, ENCODER_FFN, DECODER_SELF, DECODER_CROSS, DECODER_FFN]  # b_j's index [D: five]
METHODS = {  # (prefix, adapter, where they come from)
    "hyperpelt": (True, True, "hypernetworks"),         # HyperPELT [P], in the form of the equations above
    "hyperprefix": (True, False, "hypernetworks"),      # HyperPrefix [P], likewise
    "hyperadapter": (False, True, "hypernetworks"),     # the other half alone [C]
    "hyperformer": (False, True, "hypernetworks"),      # HyperFormer++'s way: one vector I a site, layer norm on it [X]; our sites [C]
    "prefix": (True, False, "learned"),                 # prefix-tuning [X]
    "adapter": (False, True, "learned"),                # parallel adapters [X: MAM]
    "mam": (True, True, "learned"),                     # both: the MAM adapter [X]
    "norms": (False, False, "nowhere"),                 # only the layer norms, which every other method trains too [C]
    "full": (False, False, "nowhere"),                  # full fine-tuning
}
VISION = {  # what an image gives the T5: (visual prefix, visual adapter, tokens in the encoder's input)
    "both": (True, True, False),               # VL-HyperPELT [P], likewise
    "prefix": (True, False, False),
    "adapter": (False, True, False),
    "tokens": (False, False, True),            # the baseline, VL-Adapter's way [X]: hypernetworks for the task side only
}


@dataclass
class HyperPELTConfig:
    """Sizes and switches; what is R, X or C and no field is marked at its line."""
    method: str = "hyperpelt"       # a key of METHODS
    prefix_length: int = 49         # N [R]: the 7 x 7 cells of an image's features fit it position by position
    embedding_dim: int = 768        # d_t [R]: this and the next three give the printed 1.01x, and 1.02x and 0.24 % per task (R)
    hyper_dim: int = 64             # d_I [R]
    projector_dim: int = 128        # hidden width of the projector of eq. (1) [R]
    bottleneck: int = 24            # width of an adapter [R]
    reparam_dim: int = 512          # width of the hidden layer of eq. (11) [X: prefix-tuning; with it the paper's 1.14x, D]
    per_position: bool = True       # True: an embedding for each of the N positions [R]; False: one vector [X: HyperFormer]
    hyper_norm: bool = False        # layer norm on I [X: HyperFormer has it; off: C]
    prefix_blocks: tuple = (ENCODER_SELF, DECODER_SELF, DECODER_CROSS)  # [X: MAM]
    adapter_scale: float = 0.1      # lambda, lambda_v at the start, of hypernetworks [C; MAM's is 1, X, less steady here: see README]
    position_noise: float = 0.5     # z, l, b at the start: how much of their variance is between positions; see `initialise` [C]
    visual_width: int = 0           # of an image's features; 0: no image side. 2048: the last map of CLIP's ResNet-101 [R, X: VL-Adapter]
    visual_norm: bool = True        # layer norm, without weights, on the image's features: encoders differ widely in scale [C]
    vision: str = "both"            # a key of VISION; if the method has no prefixes (or no adapters), images get none either [C]


# -------------------------------------------------------------------------------- hyper-embeddings: eq. (1), (7), (8)

class Projector(nn.Module):
    """The MLP of eq. (1) and, with weights of its own, of eq. (8): the same one at every site and position."""

    def __init__(self, config):
        super().__init__()
        self.hidden = nn.Linear(3 * config.embedding_dim, config.projector_dim)                     # W1, c1
        self.out = nn.Linear(config.projector_dim, config.hyper_dim)                                # W2, c2
        self.norm = nn.LayerNorm(config.hyper_dim) if config.hyper_norm else nn.Identity()

    def forward(self, z, layer, block, layer_ids, block_ids):
        """z: of a task [N, Z], of images [B, N, Z]; tables [L, N, Z] and [5, N, Z]; ids [sites] -> [sites, (B,) N, E]."""
        # W1 [z; l; b] is the sum of three products: each embedding meets its own columns of W1 once, not once per site.
        w_z, w_layer, w_block = self.hidden.weight.chunk(3, dim=1)                                  # [Q, Z] each
        z = F.linear(z, w_z, self.hidden.bias)                                                      # [(B,) N, Q]
        # index_select, as the gradient of x[ids] is summed in the order in which threads come.
        l = F.linear(layer, w_layer).index_select(0, layer_ids)                                     # [sites, N, Q]
        b = F.linear(block, w_block).index_select(0, block_ids)                                     # [sites, N, Q]
        place = l + b
        if z.dim() == 3:                                                                            # one for all images
            place = place[:, None]                                                                  # [sites, 1, N, Q]
        return self.norm(self.out(F.relu(z + place)))                                               # eq. (1), (8)


class HyperEmbedding(nn.Module):
    """The embeddings of task, layer, block type and image, and the projectors that make hyper-embeddings of them
    (paper: section 4). Layer and block embeddings serve both sides [C], the projectors one side each [R]."""

    def __init__(self, config, tasks, layers, visual):
        super().__init__()
        positions = config.prefix_length if config.per_position else 1
        self.task = nn.Parameter(torch.empty(tasks, positions, config.embedding_dim))               # z_tau  [M, N, Z]
        self.layer = nn.Parameter(torch.empty(layers, positions, config.embedding_dim))             # l_i    [L, N, Z]
        self.block = nn.Parameter(torch.empty(len(BLOCK_TYPES), positions, config.embedding_dim))   # b_j    [5, N, Z]
        self.projector, self.per_position = Projector(config), config.per_position
        if visual:
            self.visual = nn.Linear(config.visual_width, config.embedding_dim)                      # W_v, c_v
            self.visual_projector = Projector(config)

    def forward(self, task, layer_ids, block_ids):
        """task: its number; ids [sites] -> I [sites, N, E]."""
        return self.projector(self.task[task], self.layer, self.block, layer_ids, block_ids)

    def embed_images(self, features):
        """Grid features [B, N, V] -> z_v [B, N, Z]."""
        z = self.visual(features)                                           # eq. (7); normalised before, in HyperPELT.inject
        return z if self.per_position else z.mean(1, keepdim=True)          # the vector form has one position [C]

    def of_images(self, z, layer_ids, block_ids):
        """z_v [B, N, Z]; ids [sites] -> I^v [sites, B, N, E]."""
        return self.visual_projector(z, self.layer, self.block, layer_ids, block_ids)


# ------------------------------------------------------------------------------------------ hypernetworks: eq. (2), (4)

class PrefixHypernetwork(nn.Module):
    """h_P: hyper-embeddings -> keys and values for every attention; one linear map each, shared by all sites."""

    def __init__(self, config, heads, d_kv):
        super().__init__()
        self.shape = config.prefix_length, heads, d_kv
        rows = 1 if config.per_position else config.prefix_length           # a vector I gives all N rows at once
        self.key = nn.Linear(config.hyper_dim, rows * heads * d_kv)         # W_k, c_k
        self.value = nn.Linear(config.hyper_dim, rows * heads * d_kv)       # W_v, c_v

    def forward(self, hyper):                                               # I [sites, N, E], of images [sites, B, N, E]
        keys = self.key(hyper)                                              # eq. (2): P_k  [sites, (B,) N, H*K]
        values = self.value(hyper)                                          # eq. (2): P_v
        # Into N rows of H heads, from [sites, (B,) N, H*K] or, in the vector form, [sites, (B,) 1, N*H*K].
        keys, values = (p.reshape(*hyper.shape[:-2], *self.shape) for p in (keys, values))          # [sites, (B,) N, H, K]
        return keys.transpose(-3, -2), values.transpose(-3, -2)                                     # [sites, (B,) H, N, K]


class AdapterHypernetwork(nn.Module):
    """h_A: one hyper-embedding per feed-forward site -> its adapter; one linear head for each of the four tensors."""

    def __init__(self, config, d_model):
        super().__init__()
        self.d_model, self.bottleneck = d_model, config.bottleneck
        self.down = nn.Linear(config.hyper_dim, config.bottleneck * d_model)
        self.down_bias = nn.Linear(config.hyper_dim, config.bottleneck)
        self.up = nn.Linear(config.hyper_dim, d_model * config.bottleneck)
        self.up_bias = nn.Linear(config.hyper_dim, d_model)
        self.scale = nn.Parameter(torch.tensor(config.adapter_scale))       # lambda, in h_A^v lambda_v; one for all sites [C], trained [R]

    def forward(self, hyper):                                               # I [sites, N, E], of images [sites, B, N, E]
        mean = hyper.mean(-2)                                               # [sites, (B,) E]; mean over positions: [C]
        down = self.down(mean).unflatten(-1, (self.bottleneck, self.d_model))       # eq. (4): W_down  [sites, (B,) R, D]
        down_bias = self.down_bias(mean)                                            # eq. (4): b_down  [sites, (B,) R]
        up = self.up(mean).unflatten(-1, (self.d_model, self.bottleneck))           # eq. (4): W_up    [sites, (B,) D, R]
        up_bias = self.up_bias(mean)                                                # eq. (4): b_up    [sites, (B,) D]
        # lambda A(u) = (lambda W_up) ReLU(...) + lambda b_up: scaling the small tensors spares one pass over [B, S, D].
        return down, down_bias, self.scale * up, self.scale * up_bias               # lambda of eq. (6), (10)


# ------------------------------------------------------- injection, at the seams of t5.py: eq. (3), (5), (6), (9), (10)
# Each holds its parts: the task's, which all rows of a batch share, and for an image task the images', with a batch axis.

class Prefix:
    names = "key", "value"                                                  # of a part's tensors, in an exported file

    def __init__(self, *parts):                                             # (P_k, P_v) [H, N, K]; images [B, H, N, K]
        self.parts, self.length = parts, sum(keys.size(-2) for keys, _ in parts)

    def __call__(self, k, v):                                               # x W_K, x W_V, in heads [B, H, S, K]
        p_k = [keys.expand(len(k), -1, -1, -1) for keys, _ in self.parts]   # the task's serve every row of the batch
        p_v = [values.expand(len(v), -1, -1, -1) for _, values in self.parts]
        return torch.cat([*p_k, k], 2), torch.cat([*p_v, v], 2)             # eq. (3), (9): [B, H, N+S, K]


class Adapter:
    names = "down", "down_bias", "up", "up_bias"

    def __init__(self, *parts):                                             # (W_down, b_down, lambda W_up, lambda b_up)
        self.parts = parts                                                  # [R, D], [R], [D, R], [D]; of images with B in front

    def __call__(self, u):                                                  # [B, S, D]; t5.py adds it to FFN(u): eq. (6)
        return sum(self.adapt(u, *part) for part in self.parts)             # eq. (10)

    @staticmethod
    def adapt(u, down, down_bias, up, up_bias):
        if down.dim() == 2:
            return F.linear(F.relu(F.linear(u, down, down_bias)), up, up_bias)                      # eq. (5)
        # Each image has an adapter of its own. Beam search repeats its row: the beams go side by side through it.
        x = u.reshape(len(down), -1, u.size(-1))                                                    # [B, beams*S, D]
        x = F.relu(torch.baddbmm(down_bias[:, None], x, down.transpose(1, 2)))                      # [B, beams*S, R]
        return torch.baddbmm(up_bias[:, None], x, up.transpose(1, 2)).view_as(u)                    # eq. (5), an image each


# ------------------------------------------------------------------------------------------------------------- the model

class HyperPELT(nn.Module):
    """A T5, frozen but for its layer norms, with the hypernetworks that serve it (paper: figure 1).

    t5: a float32 T5, which is frozen in place; tasks: list of names; dtype: of the frozen weights and the activations.
    Trained are layer norms, hypernetworks, and task, layer, block and visual embeddings, nothing else [P] (baselines: see METHODS);
    what is trained is held in float32 [C].
    """

    def __init__(self, t5, tasks, config, dtype=torch.float32):
        super().__init__()
        if config.method not in METHODS:
            raise UserError(f"method {config.method!r} is unknown; the known ones are {', '.join(METHODS)}")
        if config.method == "hyperformer":
            config = replace(config, per_position=False, hyper_norm=True)
        if unknown := set(config.prefix_blocks) - {ENCODER_SELF, DECODER_SELF, DECODER_CROSS}:
            raise UserError(f"prefix_blocks: found {', '.join(map(str, unknown))}, expected {ENCODER_SELF}, {DECODER_SELF} or {DECODER_CROSS}")
        self.t5, self.tasks, self.config = t5, list(tasks), config
        self.has_prefix, self.has_adapter, source = METHODS[config.method]
        visual_prefix, visual_adapter, tokens = VISION[config.vision] if config.visual_width else (False, False, False)
        generated = source == "hypernetworks"
        self.visual_prefix = generated and self.has_prefix and visual_prefix
        self.visual_adapter = generated and self.has_adapter and visual_adapter
        if config.visual_width and not (self.visual_prefix or self.visual_adapter or tokens):
            raise UserError(f"method {config.method} with vision {config.vision} lets no image in; vision tokens does")
        self.freeze(config.method == "full", dtype)

        # The sites, in one order: attentions, then feed-forward blocks. A layer's id counts through both stacks, the encoder first [C].
        d_model, heads, d_kv = t5.config.d_model, t5.config.num_heads, t5.config.d_kv
        encoder_layers, decoder_layers = len(t5.encoder.blocks), len(t5.decoder.blocks)
        all_sites = [(kind, i) for kind in BLOCK_TYPES for i in range(encoder_layers if kind.startswith("encoder") else decoder_layers)]
        self.prefix_sites = [site for site in all_sites if self.has_prefix and site[0] in config.prefix_blocks]
        self.adapter_sites = [site for site in all_sites if self.has_adapter and site[0].endswith("FFN")]
        sites = self.prefix_sites + self.adapter_sites
        layer_ids = [i if kind.startswith("encoder") else encoder_layers + i for kind, i in sites]
        block_ids = [BLOCK_TYPES.index(kind) for kind, _ in sites]
        self.register_buffer("layer_ids", torch.tensor(layer_ids, dtype=torch.long), persistent=False)
        self.register_buffer("block_ids", torch.tensor(block_ids, dtype=torch.long), persistent=False)

        self.learned = self.image_tokens = None
        if source == "learned":
            self.learned = LearnedWeights(config, t5.config, len(self.tasks), self.prefix_sites, self.adapter_sites)
        if generated:
            images = self.visual_prefix or self.visual_adapter
            self.hyper_embedding = HyperEmbedding(config, len(self.tasks), encoder_layers + decoder_layers, images)
        if generated and self.has_prefix:
            self.prefix_hypernetwork = PrefixHypernetwork(config, heads, d_kv)
        if generated and self.has_adapter:
            self.adapter_hypernetwork = AdapterHypernetwork(config, d_model)
        if self.visual_prefix:
            self.visual_prefix_hypernetwork = PrefixHypernetwork(config, heads, d_kv)
        if self.visual_adapter:
            self.visual_adapter_hypernetwork = AdapterHypernetwork(config, d_model)
        if tokens:
            self.image_tokens = nn.Linear(config.visual_width, d_model)
        self.initialise()

    def freeze(self, train_backbone, dtype):
        """All but the layer norms (full: nothing). What is frozen is held in `dtype`, which the activations then have too."""
        norms = {id(module.weight) for module in self.t5.modules() if isinstance(module, RMSNorm)}
        for parameter in self.t5.parameters():
            parameter.requires_grad = train_backbone or id(parameter) in norms
            # Trained ones get memory of their own: a tensor that lies in its file would keep the whole file in memory.
            parameter.data = parameter.data.clone() if parameter.requires_grad else parameter.data.to(dtype)
        self.t5.dtype = dtype

    @torch.no_grad()
    def initialise(self):
        """Linear maps start with PyTorch's weights and with biases of 0. Exceptions [C]:

        z_tau, l_i, b_j: 1 - position_noise of the variance is one vector for all N positions, so that their mean, which the
        adapters see, tells sites apart. W_up and b_up: heads of zeros, so that adapters are an exact no-op at first.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("t5."):
                module.bias.zero_()
            if isinstance(module, AdapterHypernetwork):
                module.up.weight.zero_()
                module.up_bias.weight.zero_()
        if hasattr(self, "hyper_embedding"):
            for table in (self.hyper_embedding.task, self.hyper_embedding.layer, self.hyper_embedding.block):
                noise = self.config.position_noise
                table.copy_((1 - noise) ** 0.5 * torch.randn_like(table[:, :1]) + noise ** 0.5 * torch.randn_like(table))

    def trained(self):
        """name -> parameter, of all that is trained."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def by_task(self):
        """name -> parameter, of those that hold a part for each task, on their first axis."""
        names = ["hyper_embedding.task", *(f"learned.{name}" for name in ("embedding", "down", "down_bias", "up", "up_bias"))]
        return {name: parameter for name, parameter in self.trained().items() if name in names}

    def generate_sites(self, task):
        """Generate the weights of all sites for one task: once per training step, once per evaluation.

        task: a name -> {(block type, layer): Prefix or Adapter}, in the dtype of the backbone, for T5's `sites`.
        """
        if not self.prefix_sites + self.adapter_sites:
            return {}
        weights_of = self.generate_weights if self.learned is None else self.learned         # hypernetworks, or a baseline
        prefixes, adapters = weights_of(self.tasks.index(task))
        sites = {site: Prefix(part) for site, part in self.by_site(self.prefix_sites, prefixes)}
        return sites | {site: Adapter(part) for site, part in self.by_site(self.adapter_sites, adapters)}

    def generate_weights(self, number):
        """Number of a task -> P_k, P_v of the prefix sites; the four tensors of the adapter sites; () where there are none."""
        hyper = self.hyper_embedding(number, self.layer_ids, self.block_ids)                        # [sites, N, E]
        for_prefixes, for_adapters = hyper.split([len(self.prefix_sites), len(self.adapter_sites)])
        return (self.prefix_hypernetwork(for_prefixes) if self.has_prefix else (),
                self.adapter_hypernetwork(for_adapters) if self.has_adapter else ())

    def by_site(self, sites, tensors):
        """Several [sites, ...] -> for each site the pair (site, its own slices of them), in the dtype of the backbone."""
        slices = [tensor.to(self.t5.dtype).unbind() for tensor in tensors]
        return zip(sites, zip(*slices))

    def add_images(self, sites, features):
        """A task's sites and a batch's grid features [B, N, V] -> the sites with the images' own parts. Leaves `sites` alone.

        A task's weights are made in float32. Here each image has its own: products as large as the backbone's, hence in its dtype.
        """
        sites, first_adapter = dict(sites), len(self.prefix_sites)          # adapter sites come after the prefix sites
        with torch.autocast(features.device.type, self.t5.dtype, enabled=self.t5.dtype != torch.float32):
            z = self.hyper_embedding.embed_images(features)                                         # [B, N, Z]
            if self.visual_prefix:
                hyper = self.hyper_embedding.of_images(z, self.layer_ids[:first_adapter], self.block_ids[:first_adapter])
                for site, part in self.by_site(self.prefix_sites, self.visual_prefix_hypernetwork(hyper)):
                    sites[site] = Prefix(*sites[site].parts, part)          # eq. (9)
            if self.visual_adapter:
                hyper = self.hyper_embedding.of_images(z, self.layer_ids[first_adapter:], self.block_ids[first_adapter:])
                for site, part in self.by_site(self.adapter_sites, self.visual_adapter_hypernetwork(hyper)):
                    sites[site] = Adapter(*sites[site].parts, part)         # eq. (10)
        return sites

    def inject(self, sites, features=None):
        """A task's sites, and features [B, N, V] of an image task -> what T5.forward and T5.generate take: sites and, for
        the baseline with image tokens only, `front`, embedded tokens [B, N, D] before the text."""
        if features is None:                                                # a text batch pays nothing for the visual side
            return dict(sites=sites)
        features = F.layer_norm(features.float(), features.shape[-1:]) if self.config.visual_norm else features      # V of eq. (7)
        features = features.to(self.t5.dtype)
        if self.image_tokens is not None:
            weight, bias = (p.to(self.t5.dtype) for p in self.image_tokens.parameters())
            return dict(sites=sites, front=F.linear(features, weight, bias))
        if not self.config.visual_width or features.size(1) != self.config.prefix_length:  # one row would silently serve for all N positions
            raise ValueError(f"features of {features.size(1)} positions and width {features.size(2)}, expected prefix_length,"
                             f" {self.config.prefix_length}, and visual_width, {self.config.visual_width}")
        return dict(sites=self.add_images(sites, features))

    def forward(self, input_ids, attention_mask, labels, task, label_smoothing=0.0, features=None):
        """A batch of one task; features [B, N, V] if it comes with images -> logits [B, T, vocabulary], loss."""
        injected = self.inject(self.generate_sites(task), features)
        return self.t5(input_ids, attention_mask, labels, label_smoothing=label_smoothing, **injected)


# ------------------------------------------------------------------- without a hypernetwork: the baselines, eq. (11)

class LearnedWeights(nn.Module):
    """Weights of all sites in the shapes that the hypernetworks give: prefixes by eq. (11), adapters trained as they are, a set a task."""

    def __init__(self, config, t5_config, tasks, prefix_sites, adapter_sites):
        super().__init__()
        d_model, self.head_shape = t5_config.d_model, (t5_config.num_heads, t5_config.d_kv)                             # (H, K)
        self.layer_counts = list(Counter(kind for kind, _ in prefix_sites).values())        # of each block type with prefixes
        self.has_adapters = bool(adapter_sites)
        if self.layer_counts:                       # each block type has an embedding and a network of its own [X: prefix-tuning, MAM]
            types, width = len(self.layer_counts), 2 * math.prod(self.head_shape)
            self.embedding = nn.Parameter(torch.randn(tasks, types, config.prefix_length, d_model))                     # E_tau
            self.hidden = nn.ModuleList(nn.Linear(d_model, config.reparam_dim) for _ in range(types))                   # W_a, c_a
            self.out = nn.ModuleList(nn.Linear(config.reparam_dim, layers * width) for layers in self.layer_counts)     # W_b, c_b
        if self.has_adapters:
            shape = tasks, len(adapter_sites)
            self.down = nn.Parameter((2 * torch.rand(*shape, config.bottleneck, d_model) - 1) * d_model**-0.5)          # as nn.Linear
            self.down_bias = nn.Parameter(torch.zeros(*shape, config.bottleneck))
            self.up = nn.Parameter(torch.zeros(*shape, d_model, config.bottleneck))         # a no-op at first, as in `initialise`
            self.up_bias = nn.Parameter(torch.zeros(*shape, d_model))
            self.scale = nn.Parameter(torch.ones(()))                                       # lambda, one for all: 1 at first [X: MAM]

    def forward(self, number):
        """Number of a task -> P_k, P_v [sites, H, N, K]; (W_down [sites, R, D], b_down [sites, R], lambda W_up, lambda b_up);
        () where there are no such sites."""
        prefixes, adapters = [], ()
        if self.layer_counts:
            for embedding, hidden, out, layers in zip(self.embedding[number], self.hidden, self.out, self.layer_counts):
                p = out(torch.tanh(hidden(embedding)))                      # eq. (11): [N, layers*2*H*K]
                p = p.unflatten(1, (layers, 2, *self.head_shape))           # [N, layers, 2, H, K]
                prefixes.append(p.permute(2, 1, 3, 0, 4))                   # [2, layers, H, N, K]
            prefixes = torch.cat(prefixes, 1).unbind()                      # P_k, P_v of all block types
        if self.has_adapters:
            up, up_bias = self.scale * self.up[number], self.scale * self.up_bias[number]
            adapters = self.down[number], self.down_bias[number], up, up_bias
        return prefixes, adapters


# ------------------------------------------------------------------------------- what is trained: the paper's appendix B

@torch.no_grad()
def deployed(model):
    """Numbers that are left for all tasks when the generated weights are baked in: prefixes, adapters, layer norms."""
    norms = [p for name, p in model.trained().items() if name.startswith("t5.")]
    generated = [tensor for task in model.tasks for site in model.generate_sites(task).values() for tensor in site.parts[0]]
    return sum(tensor.numel() for tensor in norms + generated)


def main():
    parser = Parser(description="Print what HyperPELT trains on a T5: shapes and counts. Needs no weights.")
    parser.add_argument("--tour", metavar="RUN", nargs="?", const="runs/rte-hyperpelt",
                        help="walk one example through a trained run (default: runs/rte-hyperpelt)")
    parser.add_argument("--model", default="t5-base", help="a public name, or a folder with config.json (default: t5-base)")
    parser.add_argument("--tasks", type=in_range(int, 1, 1000), default=8, help="number of tasks (default: 8, the paper's)")
    parser.add_argument("--visual-width", type=in_range(int, 0, 10**5), default=0, help="width of the images' features, 2048 for CLIP's ResNet-101 (default: no images)")
    args = parser.parse_args()
    if args.tour:
        return runpy.run_path(str(Path(__file__).resolve().parent / "sample" / "tour.py"))["tour"](args.tour)
    folder = Path(args.model)
    t5_config = T5Config.from_file(folder / "config.json") if folder.is_dir() else T5Config.from_name(args.model)
    methods = [method for method, (*_, source) in METHODS.items() if source == "hypernetworks" or not args.visual_width]
    with torch.device("meta"):                                              # shapes without numbers
        models = {method: HyperPELT(T5(t5_config), [f"task {i}" for i in range(args.tasks)], HyperPELTConfig(method, visual_width=args.visual_width))
                  for method in methods}
    trained = models["hyperpelt"].trained()
    norms = {name: p for name, p in trained.items() if name.startswith("t5.")}
    rows = [("layer norms of the T5", f"{len(norms)} x {t5_config.d_model}", sum(p.numel() for p in norms.values()))]
    rows += [(name, " x ".join(map(str, p.shape)) or "1", p.numel()) for name, p in trained.items() if name not in norms]
    for name, shape, count in rows:
        print(f"{name:40}{shape:>18}{count:>14,}")
    backbone = sum(p.numel() for p in models["hyperpelt"].t5.parameters())
    print(f"\n{args.model}: {backbone:,} parameters; {args.tasks} task{'s' * (args.tasks > 1)}\n\n"
          f"{'method':14}{'trained':>12}{'total':>10}{'per task':>11}{'deployed':>14}   known, T5-base, 8 tasks of text")
    known = {"hyperprefix": "1.01x [printed]", "hyperpelt": "1.02x, 0.24 % per task [reconstructed]", "prefix": "1.14x [printed]",
             "hyperformer": "0.29 % per task: HyperFormer++ itself, more sites [HyperFormer's paper]"}
    for method, model in models.items():
        count = sum(p.numel() for p in model.trained().values())
        print(f"{method:14}{count:>12,}{1 + count / backbone:>9.4f}x{100 * count / args.tasks / backbone:>9.3f} %"
              f"{deployed(model):>14,}   {known.get(method, '-')}")
    print("\ntrained: what training changes and a checkpoint holds.  total: backbone + trained, of the backbone.\n"
          "per task: trained, layer norms included [D], / tasks, of the backbone.  deployed: prefixes, adapters and norms once they are generated"
          + ("; an image's own are\nnot in it, they are generated for each image." if args.visual_width else "."))


if __name__ == "__main__":
    run(main)
