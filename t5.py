"""A complete T5 in plain PyTorch: config, tokenizer, model, generation, loading and download.

The file reads the public checkpoints of T5 v1.0, T5 v1.1 and Flan-T5. It knows nothing about
hypernetworks. A method that injects weights does so at two seams, which are marked "seam 1" and
"seam 2" in comments. It passes `sites`, a dict {(block type, layer): object}:

    seam 1, attention   prefix(k, v) returns keys and values [B, H, N+S, K], which have
                        prefix.length (N) more columns in front
    seam 2, FFN         adapter(u) is added to FFN(u), where u is the normed input of the FFN

All layers of a block type have prefixes of the same length, so that they can share one mask.
Source: Raffel et al. 2020 (T5) and Shazeer 2020 (the gated FFN of v1.1).

Example of use:

    model = T5.from_pretrained("google/flan-t5-small")
    tokenizer = Tokenizer.from_pretrained("google/flan-t5-small")
    ids = torch.tensor([tokenizer.encode("translate English to German: The house is wonderful.")])
    print(tokenizer.decode(model.generate(ids)[0]))

Shapes: B batch, S source, T target, N prefix, D d_model, H heads, K d_kv.
"""
import json
import math
import os
import re
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor
from torch.utils.checkpoint import checkpoint

ENCODER_SELF = "encoder self-attention"
ENCODER_FFN = "encoder FFN"
DECODER_SELF = "decoder self-attention"
DECODER_CROSS = "decoder cross-attention"
DECODER_FFN = "decoder FFN"

# These ids are the same in every T5. Pad is also the first token that the decoder reads.
PAD = 0
EOS = 1

# Added to the scores of masked keys, and the score of impossible beams. It is finite, so that a
# source of nothing but padding gives numbers instead of NaN, and it fits into bfloat16.
MASKED = -1e9


# ---- config --------------------------------------------------------------------------------------

@dataclass
class T5Config:
    """Sizes and variant of a T5, named as in a public config.json. The defaults are T5-base."""
    d_model: int = 768
    # The width of one head. num_heads * d_kv may differ from d_model.
    d_kv: int = 64
    d_ff: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    # None stands for as many layers as the encoder has.
    num_decoder_layers: int = None
    vocab_size: int = 32128
    # "relu" is v1.0, "gated-gelu" is v1.1 and Flan.
    feed_forward_proj: str = "relu"
    # A tied model (v1.0) uses its embedding as output head and scales the input of the head.
    tie_word_embeddings: bool = True
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dropout_rate: float = 0.1

    def __post_init__(self):
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers

    @classmethod
    def from_file(cls, path):
        """Read a public config.json. What it lacks is as in T5-base. Raises ValueError."""
        found = read_json(path)
        if "d_model" not in found:
            raise ValueError(f"{path}: not the config.json of a T5, found no d_model")
        config = cls(**{key: found[key] for key in found.keys() & cls.__annotations__})
        if config.feed_forward_proj not in ("relu", "gated-gelu"):
            raise ValueError(f"{path}: feed_forward_proj: found {config.feed_forward_proj!r},"
                             " expected relu or gated-gelu")
        return config


# ---- tokenizer -----------------------------------------------------------------------------------

class Tokenizer:
    """Text <-> ids by a SentencePiece file, and the 100 sentinels, which are not in that file.

    The pieces end at id 31999, then come <extra_id_99> = 32000 to <extra_id_0> = 32099. A file
    that does not fit raises FileNotFoundError or ValueError.
    """

    def __init__(self, path):
        try:
            self.pieces = SentencePieceProcessor(model_proto=Path(path).read_bytes())
            self.names = [self.pieces.id_to_piece(i) for i in range(len(self.pieces))]
        except RuntimeError:
            raise ValueError(f"{path}: not a SentencePiece model") from None
        if self.names[:3] != ["<pad>", "</s>", "<unk>"]:
            raise ValueError(f"{path}: ids 0 to 2 are {self.names[:3]}, not <pad>, </s>, <unk>")
        # With the space that separates it from the text before.
        self.names += [f" <extra_id_{i}>" for i in reversed(range(100))]
        # The id of <extra_id_0>.
        self.largest_id = len(self.names) - 1

    @classmethod
    def from_pretrained(cls, name_or_folder):
        return cls(find_checkpoint(name_or_folder) / "spiece.model")

    def encode(self, text):
        """Text -> list of ids that ends with eos."""
        ids = []
        # Every second part is the number of a sentinel.
        for i, part in enumerate(re.split(r"\s*<extra_id_(\d\d?)>", text)):
            if i % 2 == 1:
                ids.append(self.largest_id - int(part))
            else:
                ids += self.pieces.encode(part)
        return ids + [EOS]

    def decode(self, ids):
        """Ids, with or without pad and eos -> text. Ids that stand for nothing are left out."""
        names = [self.names[i] for i in map(int, ids) if EOS < i <= self.largest_id]
        return self.pieces.decode(names).strip()


# ---- layers --------------------------------------------------------------------------------------

class Linear(nn.Linear):
    """A linear map without bias. A weight that is trained stays float32 and is cast for use."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + epsilon) * weight, with the mean in float32.

    The mean comes from a vector norm, which makes no float32 copy of x. F.rms_norm on a CPU, and
    the mean of x.float(), make a step or an evaluation 3 to 10 % slower.
    """

    def forward(self, x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square() / x.size(-1) + self.eps)
        return x * scale.to(x.dtype) * self.weight.to(x.dtype)


class Dropout(nn.Dropout):
    """nn.Dropout with cheaper random numbers on a CPU.

    One draw of 64 random bits decides four elements, 16 bits each, because one draw for every
    element would make a training step a sixth slower.
    """

    def forward(self, x):
        if not (self.training and self.p and x.device.type == "cpu"):
            return super().forward(x)
        draws = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2**63, None)
        bits = draws.view(torch.int16)[:x.numel()].view(x.shape)
        keep = bits >= round(self.p * 2**16) - 2**15
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))


class Attention(nn.Module):
    """Multi-head attention at one site. `sites` and `cache` are looked up by (block type, layer).

    The cache holds keys and values: of all earlier decoding steps, or of the memory.
    """

    def __init__(self, config, site):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.q = Linear(config.d_model, inner)
        self.k = Linear(config.d_model, inner)
        self.v = Linear(config.d_model, inner)
        self.o = Linear(inner, config.d_model)
        self.dropout = Dropout(config.dropout_rate)
        self.heads = config.num_heads
        self.site = site

    def split(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, H, S, K]

    def keys_values(self, source, sites, cache):
        earlier = cache.get(self.site) if cache else None
        if earlier and self.site[0] == DECODER_CROSS:
            return earlier

        k = self.split(self.k(source))
        v = self.split(self.v(source))
        if earlier:
            # The cached keys and values begin with the prefix already.
            k = torch.cat([earlier[0], k], 2)
            v = torch.cat([earlier[1], v], 2)
        elif self.site in sites:
            # This is seam 1: a prefix extends the keys and values.
            k, v = sites[self.site](k, v)  # [B, H, N+S, K]
        if cache is not None:
            # One copy now spares one at every later step.
            k, v = k.contiguous(), v.contiguous()
            cache[self.site] = (k, v)
        return k, v

    def forward(self, u, source, mask, sites, cache):
        """u [B, T, D] attends to source [B, S, D] -> [B, T, D]. mask is added to the scores."""
        q = self.split(self.q(u))  # [B, H, T, K]
        k, v = self.keys_values(source, sites, cache)

        # T5 does not divide the scores by sqrt(K), so the scale is 1.
        if u.device.type == "cpu":
            # Written out, attention is faster here.
            scores = q @ k.transpose(2, 3) + mask  # [B, H, T, N+S]
            y = self.dropout(scores.softmax(-1)) @ v
        else:
            rate = self.dropout.p * self.training
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=rate, scale=1.0)
        return self.o(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config, site):
        super().__init__()
        self.is_gated = config.feed_forward_proj == "gated-gelu"
        if self.is_gated:
            self.wi_0 = Linear(config.d_model, config.d_ff)
            self.wi_1 = Linear(config.d_model, config.d_ff)
        else:
            self.wi = Linear(config.d_model, config.d_ff)
        self.wo = Linear(config.d_ff, config.d_model)
        self.dropout = Dropout(config.dropout_rate)
        self.site = site

    def forward(self, u, sites):
        if self.is_gated:
            y = F.gelu(self.wi_0(u), approximate="tanh") * self.wi_1(u)
        else:
            y = F.relu(self.wi(u))
        y = self.wo(self.dropout(y))
        if self.site in sites:
            # This is seam 2: an adapter stands beside the FFN.
            y = y + sites[self.site](u)
        return y


class Block(nn.Module):
    """One layer of a stack: x + SelfAttention(norm(x)), + CrossAttention(norm(x)) in the decoder,
    + FFN(norm(x)), with dropout on each term."""

    def __init__(self, config, is_decoder, layer):
        super().__init__()
        self_type = DECODER_SELF if is_decoder else ENCODER_SELF
        ffn_type = DECODER_FFN if is_decoder else ENCODER_FFN
        self.self_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.self_attention = Attention(config, (self_type, layer))
        if is_decoder:
            self.cross_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
            self.cross_attention = Attention(config, (DECODER_CROSS, layer))
        self.ffn_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.ffn = FeedForward(config, (ffn_type, layer))
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x, mask, memory, memory_mask, sites, cache):
        u = self.self_norm(x)
        x = x + self.dropout(self.self_attention(u, u, mask, sites, cache))
        if memory is not None:
            u = self.cross_norm(x)
            x = x + self.dropout(self.cross_attention(u, memory, memory_mask, sites, cache))
        u = self.ffn_norm(x)
        return x + self.dropout(self.ffn(u, sites))


# ---- stacks --------------------------------------------------------------------------------------

def relative_bucket(distance, is_decoder, config):
    """Key position minus query position -> number of the bucket, both [T, S].

    The encoder uses the upper half of the buckets for keys after the query. The decoder masks such
    keys and uses all buckets for earlier ones. On each side, half of the buckets hold one distance
    each, the others grow logarithmically.
    """
    buckets = config.relative_attention_num_buckets
    first = 0
    if not is_decoder:
        buckets = buckets // 2
        first = buckets * (distance > 0)

    distance = distance.abs()
    exact = buckets // 2
    growth = math.log(config.relative_attention_max_distance / exact) / (buckets - exact)
    far = exact + (torch.log(distance.clamp(min=1) / exact) / growth).long()
    return first + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


class Stack(nn.Module):
    """The encoder or the decoder. Its self-attentions share one table of position biases."""

    def __init__(self, config, is_decoder):
        super().__init__()
        self.config = config
        self.is_decoder = is_decoder
        layers = config.num_decoder_layers if is_decoder else config.num_layers
        self.relative_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        self.blocks = nn.ModuleList(Block(config, is_decoder, layer) for layer in range(layers))
        self.norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = Dropout(config.dropout_rate)
        # Training then keeps only the inputs of the blocks and computes the rest of their
        # activations again in the backward pass.
        self.recompute = False

    def position_bias(self, length, past):
        """The bias, and in the decoder causality, of `length` tokens after `past` cached ones."""
        keys = torch.arange(past + length, device=self.relative_bias.weight.device)
        distance = keys - keys[past:, None]  # [T, past+T]
        bucket = relative_bucket(distance, self.is_decoder, self.config)
        bias = self.relative_bias(bucket).permute(2, 0, 1)[None]  # [1, H, T, past+T]
        if self.is_decoder:
            bias = bias + MASKED * (distance > 0)
        return bias

    def forward(self, x, attention_mask, memory=None, sites=None, cache=None):
        """x [B, T, D] -> [B, T, D]. attention_mask [B, S] is the source's; the encoder has T = S.

        The decoder gets the memory [B, S, D], and fills `cache`, a dict that is empty at first.
        """
        sites = sites or {}
        self_site = self.blocks[0].self_attention.site
        prefix_length = getattr(sites.get(self_site), "length", 0)
        memory_prefix_length = getattr(sites.get((DECODER_CROSS, 0)), "length", 0)
        past = cache[self_site][0].size(2) - prefix_length if cache else 0

        # One mask serves all layers. A prefix has no position bias and is never masked.
        mask = self.position_bias(x.size(1), past).to(x.dtype)  # [1, H, T, past+T]
        padding = (1 - attention_mask.to(x.dtype))[:, None, None] * MASKED  # [B, 1, 1, S]
        if not self.is_decoder:
            mask = mask + padding
        mask = F.pad(mask, (prefix_length, 0))  # [1 or B, H, T, N+past+T]
        padding = F.pad(padding, (memory_prefix_length, 0))  # [B, 1, 1, N+S]

        x = self.dropout(x)
        for block in self.blocks:
            inputs = (x, mask, memory, padding, sites, cache)
            if self.recompute and self.training:
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        return self.dropout(self.norm(x))


# ---- model ---------------------------------------------------------------------------------------

class T5(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        # The dtype of the activations. Trained parameters stay float32 beside bfloat16.
        self.dtype = torch.float32
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, is_decoder=False)
        self.decoder = Stack(config, is_decoder=True)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size)

    def encode(self, input_ids, attention_mask=None, sites=None, front=None):
        """input_ids [B, S] -> memory [B, S, D] and its attention_mask [B, S].

        attention_mask: 1 for real tokens, 0 for padding. By default all but pad is real.
        front: embeddings [B, N, D] that go before the text; memory and mask grow by them.
        """
        if attention_mask is None:
            attention_mask = input_ids != PAD
        x = self.shared(input_ids).to(self.dtype)
        if front is not None:
            x = torch.cat([front, x], 1)  # [B, N+S, D]
            attention_mask = F.pad(attention_mask, (front.size(1), 0), value=1)
        return self.encoder(x, attention_mask, sites=sites), attention_mask

    def decode(self, decoder_input_ids, memory, attention_mask, sites=None, cache=None):
        """decoder_input_ids [B, T] -> logits [B, T, vocabulary]; with a cache, only new ids."""
        x = self.shared(decoder_input_ids).to(self.dtype)
        x = self.decoder(x, attention_mask, memory, sites, cache)
        if not self.config.tie_word_embeddings:
            return self.lm_head(x)
        return F.linear(x * self.config.d_model**-0.5, self.shared.weight.to(x.dtype))

    def forward(self, input_ids, attention_mask, labels, sites=None, front=None,
                label_smoothing=0.0):
        """labels [B, T], -100 for no loss -> logits [B, T, vocabulary], mean loss per token."""
        # The decoder reads pad, then the labels that precede the one to predict; -100 becomes pad.
        shifted = F.pad(labels, (1, -1), value=PAD).clamp(min=PAD)
        memory, attention_mask = self.encode(input_ids, attention_mask, sites, front)
        logits = self.decode(shifted, memory, attention_mask, sites)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100,
                               label_smoothing=label_smoothing)
        return logits, loss

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, max_new_tokens=20, num_beams=1, sites=None,
                 front=None):
        """Beam search, greedy with one beam -> ids [B, <= max_new_tokens], padded after eos."""
        memory, attention_mask = self.encode(input_ids, attention_mask, sites, front)
        if num_beams > 1:
            return self.beam_search(input_ids, memory, attention_mask, max_new_tokens, num_beams,
                                    sites)

        # One beam needs no scores and no candidates, which makes it a tenth faster.
        cache = {}
        output = []
        token = torch.full_like(input_ids[:, :1], PAD)
        done = torch.zeros_like(token, dtype=torch.bool)  # [B, 1]
        while len(output) < max_new_tokens and not done.all():
            logits = self.decode(token, memory, attention_mask, sites, cache)  # [B, 1, vocabulary]
            token = logits.argmax(-1).masked_fill(done, PAD)
            output.append(token)
            done |= token == EOS
        return torch.cat(output, 1)

    def beam_search(self, input_ids, memory, attention_mask, max_new_tokens, num_beams, sites):
        """Outputs are ranked by log-probability over length. An example is settled once num_beams
        finished outputs are at least as good as its best running beam."""
        cache = {}
        # All outputs have a column for each token. The start token is the only beam at first.
        ids = input_ids.new_full((len(input_ids), 1, 1 + max_new_tokens), PAD)  # [B, beams, 1+max]
        rows = torch.arange(len(ids), device=ids.device)[:, None]  # [B, 1], to index examples
        score = torch.zeros_like(rows, dtype=torch.float32)  # [B, beams]
        finished = ids.repeat(1, num_beams, 1)
        finished_score = score.repeat(1, num_beams) + MASKED
        settled = torch.zeros_like(rows, dtype=torch.bool)

        for length in range(1, max_new_tokens + 1):
            newest = ids[:, :, length - 1].reshape(-1, 1)  # [B * beams, 1]
            logits = self.decode(newest, memory, attention_mask, sites, cache)
            log_p = logits.float().log_softmax(-1).view(*score.shape, -1)
            total = score[:, :, None] + log_p  # [B, beams, vocabulary]
            # Take twice as many candidates as beams, because half of them may end here.
            best, index = total.flatten(1).topk(2 * num_beams)  # [B, 2 * beams]
            parent = index // total.size(2)
            token = index % total.size(2)
            candidate = ids[rows, parent]  # [B, 2 * beams, 1+max]
            candidate[:, :, length] = token
            ended = (token == EOS) | (length == max_new_tokens)
            # Of the best num_beams candidates, those that ended compete with the finished ones.
            end_score = (best / length).masked_fill(~ended | settled, MASKED)[:, :num_beams]
            finished_score, kept = torch.cat([finished_score, end_score], 1).topk(num_beams)
            finished = torch.cat([finished, candidate], 1)[rows, kept]  # [B, beams, 1+max]

            # The others are the new beams.
            score, running = best.masked_fill(ended, MASKED).topk(num_beams)
            settled |= score[:, :1] / length <= finished_score[:, -1:]
            if settled.all():
                break
            ids = candidate[rows, running]
            order = (rows * total.size(1) + parent)[rows, running].flatten()  # [B * beams]
            attention_mask = attention_mask[order]
            follow_parents(cache, order, length)
        return finished[:, 0, 1:length + 1]

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """A folder or a public name -> float32 T5 in eval mode.

        Raises FileNotFoundError, or ValueError for a file that does not fit config.json.
        """
        folder = find_checkpoint(name_or_folder)
        with torch.device("meta"):
            model = cls(T5Config.from_file(folder / "config.json"))
        path, tensors = read_weights(folder)

        def is_ignored(name):
            # Some files hold copies of the embedding, also under the name of the head.
            return name == STRAY or tensors[name].equal(tensors["shared.weight"])

        load_weights(model, tensors, path, public_name, is_ignored)
        return model.eval()


def follow_parents(cache, order, length):
    """Give each beam the keys and values of its parent. order: rows of the parents [B * beams]."""
    for site, pair in cache.items():
        # Those of the memory are the same for all beams of an example: they are only repeated,
        # after the first step.
        if length == 1 or site[0] == DECODER_SELF:
            cache[site] = tuple(tensor[order] for tensor in pair)


# ---- weights -------------------------------------------------------------------------------------

# Kinds of weights, from the best to the oldest. An index names the files of a split checkpoint.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")
# A relic of old conversions that no model uses.
STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
# Our names -> public ones. The FFN is layer 1 of an encoder block and layer 2 of a decoder block.
RENAMED = {
    "blocks.": "block.",
    "self_norm": "layer.0.layer_norm",
    "self_attention": "layer.0.SelfAttention",
    "cross_norm": "layer.1.layer_norm",
    "cross_attention": "layer.1.EncDecAttention",
    "ffn_norm": "layer.{}.layer_norm",
    "ffn.": "layer.{}.DenseReluDense.",
    ".norm.": ".final_layer_norm.",
    "relative_bias": "block.0.layer.0.SelfAttention.relative_attention_bias",
}


def public_name(name):
    """The name of one of our parameters -> its name in public checkpoints."""
    last = 2 if name.startswith("decoder") else 1
    for ours, public in RENAMED.items():
        name = name.replace(ours, public.format(last))
    return name


def read_json(path):
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def weight_files(folder, weights):
    """The files of the first kind of weights that a folder has; none where it has no weights."""
    for path in (folder / name for name in weights):
        if path.is_file():
            if path.suffix != ".json":
                return [path]
            shards = set(read_json(path)["weight_map"].values())
            return [folder / shard for shard in sorted(shards)]
    return []


def read_weights(folder, weights=WEIGHTS):
    """Read the first kind of `weights` that a folder has -> its first file, {name: tensor}.

    Raises FileNotFoundError, or ValueError for a damaged file.
    """
    tensors = {}
    files = weight_files(folder, weights)
    if not files:
        raise FileNotFoundError(f"{folder}: no weights, expected one of {', '.join(weights)}")
    for path in files:
        try:
            if path.suffix == ".bin":
                tensors |= torch.load(path, "cpu", weights_only=True)
                continue
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}
                aliases = file.metadata() or {}
        except Exception as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path}: not a whole file of weights ({reason})") from None
        # Of a tensor with two names, a file holds one: {the other name: the stored one}.
        for alias, stored in aliases.items():
            if stored in tensors:
                tensors[alias] = tensors[stored]
    return files[0], tensors


def load_weights(model, tensors, path, rename, ignored):
    """Give a model its tensors, as float32. Raises ValueError for the first that does not fit.

    rename: our name -> the public one. ignored: whether an unknown public name may be there.
    """
    state = model.state_dict()
    for ours, expected in state.items():
        name = rename(ours)
        if name not in tensors:
            raise ValueError(f"{path}: tensor {name} is missing")
        tensor = tensors[name]
        if tensor.shape != expected.shape:
            shapes = f"{list(tensor.shape)}, expected {list(expected.shape)}"
            raise ValueError(f"{path}: tensor {name} has shape {shapes}")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: tensor {name} holds numbers that are not finite")
        # A copy, because the tensors of a file may be mapped from it.
        state[ours] = tensor.to(torch.float32, copy=True)
    for name in sorted(tensors.keys() - map(rename, state)):
        if not ignored(name):
            raise ValueError(f"{path}: tensor {name} is unknown")
    model.load_state_dict(state, assign=True)


# ---- download ------------------------------------------------------------------------------------

def find_checkpoint(name_or_folder, files=("config.json", "spiece.model"), optional=(),
                    weights=WEIGHTS):
    """A folder as it is, or the name of a public model, which is downloaded once -> Path.

    The hub is HF_ENDPOINT. Its own cache is used where it holds the model already. `optional` files
    may be missing. Raises FileNotFoundError, or OSError with the address that failed.
    """
    name = str(name_or_folder)
    if Path(name).is_dir():
        return Path(name)
    if re.fullmatch(r"t5-\w+", name):
        name = f"google-t5/{name}"
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(f"model {name!r}: no such folder, and no public name, such as"
                                " t5-base or google/flan-t5-small")

    repository = name.replace("/", "--")
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    folder = home / "hyperpelt" / repository
    for place in (*home.glob(f"hub/models--{repository}/snapshots/*"), folder):
        found = weight_files(place, weights)
        if found and all(path.is_file() for path in [*found, *(place / file for file in files)]):
            return place

    folder.mkdir(parents=True, exist_ok=True)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    base = f"{endpoint}/{name}/resolve/main"
    for file in (*files, *optional):
        if not download(base, folder / file) and file in files:
            raise FileNotFoundError(f"{base}/{file}: no such file, and {name} is no folder here")
    for file in weights:
        if download(base, folder / file):
            for path in weight_files(folder, [file]):
                if not download(base, path):
                    raise FileNotFoundError(f"{base}/{path.name}: no such file, expected by {file}")
            return folder
    raise FileNotFoundError(f"{base}: found no weights, expected one of {', '.join(weights)}")


class AnyAnswer(urllib.request.HTTPErrorProcessor):
    """Takes an answer as it comes, without following a redirect."""

    def https_response(self, request, response):
        return response

    http_response = https_response


def download(base, path):
    """Fetch base/NAME to the file of that name, unless it is there -> False where it is not."""
    if path.is_file():
        return True
    url = f"{base}/{path.name}"
    try:
        # The hub announces the sha256 of a large file where it redirects to its storage.
        request = urllib.request.Request(url, method="HEAD")
        answer = urllib.request.build_opener(AnyAnswer).open(request, timeout=30)
        sha256 = re.findall("[0-9a-f]{64}", answer.headers.get("X-Linked-Etag", ""))
        # Where it announces none, the empty text fits every file.
        torch.hub.download_url_to_file(url, path, "".join(sha256), progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:
        # The hub answers 401 for a repository that does not exist.
        if getattr(error, "code", None) in (401, 404):
            return False
        raise OSError(f"{url}: {error}") from None
    return True
