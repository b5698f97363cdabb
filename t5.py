"""T5 encoder-decoder (v1.0, v1.1 and Flan) in plain PyTorch: config, tokenizer, model, generation, loading.

    model, tokenizer = T5.from_pretrained("google/flan-t5-small"), Tokenizer.from_pretrained("google/flan-t5-small")
    ids = torch.tensor([tokenizer.encode("translate English to German: The house is wonderful.")])
    print(tokenizer.decode(model.generate(ids)[0].tolist()))

The file is a T5 with its tokenizer and its download, and nothing more, with two seams through which a method may inject weights.
(Embedded tokens may stand before the text as well: `front` of T5.encode.) Both are looked up in `sites`, a dict from (block type, layer) to a callable; with no `sites` neither does anything:
    1. Attention.keys_values: prefix(k, v) returns the keys and values with `prefix.length` more columns in front;
    2. Block.forward: adapter(u) is a term beside FFN(u), both fed by the same normed input u.

Source: Raffel et al. 2020 (T5), Shazeer 2020 (gated feed-forward of v1.1); tensor names as in public checkpoints.
Shapes: B batch, S source length, T target length, N prefix length, D d_model, H heads, K d_kv, F d_ff; the vocabulary is spelled out.
"""
import itertools
import math
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import UserError, digest, download, read_json, read_safetensors, read_tensors

# The five block types of an encoder-decoder: the first half of a site's name.
ENCODER_SELF, ENCODER_FFN = "encoder self-attention", "encoder FFN"
DECODER_SELF, DECODER_CROSS, DECODER_FFN = "decoder self-attention", "decoder cross-attention", "decoder FFN"
MASKED = -1e9  # added to a score: finite, so that a row of padding gives a number and not NaN; fits bfloat16

# name -> (d_model, d_kv, d_ff, layers in each stack, heads)
V1_0 = {"t5-small": (512, 64, 2048, 6, 8), "t5-base": (768, 64, 3072, 12, 12), "t5-large": (1024, 64, 4096, 24, 16),
        "t5-3b": (1024, 128, 16384, 24, 32), "t5-11b": (1024, 128, 65536, 24, 128)}
V1_1 = {"small": (512, 64, 1024, 8, 6), "base": (768, 64, 2048, 12, 12), "large": (1024, 64, 2816, 24, 16),
        "xl": (2048, 64, 5120, 24, 32), "xxl": (4096, 64, 10240, 24, 64)}
NAMES = [*V1_0, *(f"google/{family}-{size}" for family in ("flan-t5", "t5-v1_1") for size in V1_1)]


@dataclass
class T5Config:
    d_model: int
    d_kv: int                   # width of one head; num_heads * d_kv need not be d_model (T5-3B, T5-11B, v1.1 small)
    d_ff: int
    num_layers: int             # of the encoder
    num_heads: int
    num_decoder_layers: int
    vocab_size: int = 32128
    feed_forward_proj: str = "relu"         # "relu": v1.0; "gated-gelu": v1.1 and Flan
    tie_word_embeddings: bool = True        # True: head = embedding, its input times d_model^-0.5 (v1.0)
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dropout_rate: float = 0.1
    pad_token_id: int = 0                   # also the decoder's start token
    eos_token_id: int = 1

    @classmethod
    def from_file(cls, path):
        """Read a checkpoint's config.json; keys that the model has no use for are ignored. Raises UserError."""
        found = read_json(path)
        if found.get("model_type", "t5") != "t5":
            raise UserError(f"{path}: model_type: found {found['model_type']!r}, expected 't5'")
        values = {"num_decoder_layers": found.get("num_layers"), **found}
        values = {field.name: values.get(field.name, field.default) for field in fields(cls)}
        special = {"dropout_rate": (0, 0.99), "layer_norm_epsilon": (0, 1), "relative_attention_num_buckets": (4, 10**6),
                   "pad_token_id": (0, 0), "eos_token_id": (1, 1), "num_layers": (1, 1000), "num_decoder_layers": (1, 1000)}
        for field in fields(cls):
            value, (low, high) = values[field.name], special.get(field.name, (1, 10**7))
            if field.type in (int, float):
                good, expected = type(value) in (int, field.type) and low <= value <= high, f"{field.type.__name__} from {low} to {high}"
            elif field.type is bool:
                good, expected = type(value) is bool, "true or false"
            else:
                good, expected = value in ("relu", "gated-gelu"), "relu or gated-gelu"
            if not good:
                shown = repr(value) if field.name in found else "nothing"
                raise UserError(f"{path}: {field.name}: found {shown}, expected {expected}")
        config = cls(**values)
        exact = config.relative_attention_num_buckets // 2
        if config.relative_attention_max_distance <= exact:
            raise UserError(f"{path}: relative_attention_max_distance: found {config.relative_attention_max_distance}, expected more than {exact},"
                            " half of the buckets")
        return config

    @classmethod
    def from_name(cls, name):
        """The config of a public size (no file needed): t5-base, google/flan-t5-base, ... Raises UserError."""
        short = name.removeprefix("google-t5/")
        if short in V1_0:
            (d_model, d_kv, d_ff, layers, heads), more = V1_0[short], {}
        elif name in NAMES:
            d_model, d_kv, d_ff, layers, heads = V1_1[name.rsplit("-", 1)[1]]
            more = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        else:
            raise UserError(f"model {name!r} is neither a folder nor a known size; the known ones are {', '.join(NAMES)}")
        return cls(d_model, d_kv, d_ff, layers, heads, layers, **more)


# ------------------------------------------------------------------------------------------------------- tokenizer

class Tokenizer:
    """Text <-> ids by a SentencePiece file, plus the 100 sentinels, which are not in the file.

    T5's ids: pad 0, eos 1, unk 2, pieces up to 31,999, then <extra_id_99> = 32000 ... <extra_id_0> = 32099.
    """

    def __init__(self, path):
        """Raises UserError where `path` is missing or no SentencePiece model with T5's special ids."""
        import sentencepiece
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file, expected the tokenizer's SentencePiece model")
        open(path, "rb").close()                                 # without the right to read it: the system's own message
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"{path}: not a SentencePiece model (damaged?)") from None
        special = self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id()
        if special != (0, 1, 2):
            raise UserError(f"{path}: found pad, eos, unk = {special}, expected (0, 1, 2)")
        self.first_sentinel = len(self.pieces) + 99              # the id of <extra_id_0>; they count downwards
        self.mark = digest(path)[:16]                            # of the file, to tell it from others

    @classmethod
    def from_pretrained(cls, name_or_folder):
        return cls(find_checkpoint(name_or_folder) / "spiece.model")

    def encode(self, text):
        """str -> list of ids that ends with eos."""
        ids, text = [], text.encode(errors="replace").decode()               # JSON can hold lone surrogates
        for i, part in enumerate(re.split(r"\s*<extra_id_(\d\d?)>", text)):  # odd parts are the sentinels' numbers
            ids += [self.first_sentinel - int(part)] if i % 2 else self.pieces.encode(part)
        return ids + [1]

    def decode(self, ids):
        """Ids (with or without pad and eos) -> str."""
        parts = []
        known = (int(i) for i in ids if 1 < i <= self.first_sentinel)        # the embedding's last rows stand for nothing
        for is_sentinel, run in itertools.groupby(known, lambda i: i >= len(self.pieces)):
            parts += [f"<extra_id_{self.first_sentinel - i}>" for i in run] if is_sentinel else [self.pieces.decode(list(run))]
        return " ".join(parts)


# ----------------------------------------------------------------------------------------------------------- model

def embedding(rows, width):
    """Holds whatever lies in memory until weights are loaded: to draw numbers makes PyTorch load its compiler, a second and more."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Linear(nn.Linear):
    """No bias, as everywhere in T5. The weight follows the dtype of the activations: a frozen weight is held in it
    already (nothing happens), a trained one stays float32 and is cast here."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.epsilon = config.layer_norm_epsilon

    def forward(self, x):                                                    # [B, S, D]; no mean, no bias
        # The mean square in float32 by way of a norm, which reads x as it is: .float() would write a copy of it first.
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square() / x.size(-1)     # [B, S, 1]
        return x * torch.rsqrt(mean_square + self.epsilon).to(x.dtype) * self.weight.to(x.dtype)


class Dropout(nn.Module):
    """nn.Dropout, whose random numbers take a quarter of a training step on a CPU: there, one draw of 64 random bits
    decides on four elements (16 bits each: the rate is exact to 1/65,536), which is eight times faster."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.rate)
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        keep = bits[:x.numel()].view(x.shape) >= round(self.rate * 2**16) - 2**15
        return x * keep.to(x.dtype).mul_(1 / (1 - self.rate))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = (Linear(config.d_model, inner) for _ in range(3))
        self.o = Linear(inner, config.d_model)
        self.heads, self.dropout = config.num_heads, Dropout(config.dropout_rate)

    def split(self, x):                                                      # [B, S, H*K] -> [B, H, S, K]
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, source, prefix=None):                              # [B, S, D]: what is looked at, its own input or the memory
        k, v = self.split(self.k(source)), self.split(self.v(source))        # [B, H, S, K]
        if prefix is not None:                                               # seam 1: more keys and values in front
            k, v = prefix(k, v)                                              # [B, H, N+S, K]
        return k, v

    def forward(self, u, k, v, mask):
        """u [B, T, D]; k, v [B, H, N+S, K]; mask, added to the scores, [B or 1, H or 1, T or 1, N+S] -> [B, T, D]."""
        q = self.split(self.q(u))                                            # [B, H, T, K]
        # Both branches are softmax(q k^T + mask) v: T5 does not divide scores by sqrt(K). Written out it is faster on a CPU.
        if u.device.type == "cpu":
            y = self.dropout(torch.softmax(q @ k.transpose(2, 3) + mask, -1)) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0,
                                               dropout_p=self.dropout.rate if self.training else 0.0)
        return self.o(y.transpose(1, 2).flatten(2))                          # [B, T, D]


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        if self.gated:
            self.wi_0 = Linear(config.d_model, config.d_ff)
            self.wi_1 = Linear(config.d_model, config.d_ff)
        else:
            self.wi = Linear(config.d_model, config.d_ff)
        self.wo = Linear(config.d_ff, config.d_model)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, u):                                                    # [B, S, D]
        y = F.gelu(self.wi_0(u), approximate="tanh") * self.wi_1(u) if self.gated else F.relu(self.wi(u))
        return self.wo(self.dropout(y))                                      # [B, S, F] -> [B, S, D]


class Block(nn.Module):
    """A layer of either stack (checkpoints say block; in hyperpelt.py a block is one of its terms): x + SelfAttention(norm(x)), in the
    decoder + CrossAttention(norm(x)), + FFN(norm(x))."""

    def __init__(self, config, is_decoder):
        super().__init__()
        self.self_norm, self.self_attention = RMSNorm(config), Attention(config)
        if is_decoder:
            self.cross_norm, self.cross_attention = RMSNorm(config), Attention(config)
        self.ffn_norm, self.ffn = RMSNorm(config), FeedForward(config)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x, mask, prefix, adapter, memory=None, memory_mask=None, memory_prefix=None, cache=None):
        """x [B, T, D], memory (decoder only) [B, S, D] -> [B, T, D]. mask (with the position bias) and memory_mask are added, as in
        Attention; prefix, memory_prefix, adapter: of this layer's sites, or None; cache: this block's keys and values of earlier steps."""
        cache = {} if cache is None else cache
        u = self.self_norm(x)
        earlier = cache.get("self")
        k, v = self.self_attention.keys_values(u, prefix if earlier is None else None)  # the prefix is in the cache already
        if earlier is not None:
            k, v = torch.cat([earlier[0], k], 2), torch.cat([earlier[1], v], 2)         # [B, H, N+t, K]
        cache["self"] = k, v
        x = x + self.dropout(self.self_attention(u, k, v, mask))
        if memory is not None:
            if "cross" not in cache:                                         # the same at every decoding step
                keys_values = self.cross_attention.keys_values(memory, memory_prefix)
                cache["cross"] = tuple(t.contiguous() for t in keys_values)  # one copy now in place of one at every step
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), *cache["cross"], memory_mask))
        u = self.ffn_norm(x)
        y = self.ffn(u)
        if adapter is not None:                                              # seam 2: y = FFN(u) + lambda A(u), lambda being in adapter:
            y = y + adapter(u)                                               # eq. (6), (10) of hyperpelt.py; T5's dropout is on the sum [C]
        return x + self.dropout(y)


def relative_bucket(distance, bidirectional, buckets, max_distance):
    """Key position minus query position -> bucket id, both [T, S]. Half of the buckets are exact, the rest logarithmic."""
    bucket = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        bucket += (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    return bucket + torch.where(distance < exact, distance, (exact + far.long()).clamp(max=buckets - 1))


class Stack(nn.Module):
    """Encoder or decoder: blocks, the relative position bias that all its self-attentions share, the last norm."""

    def __init__(self, config, is_decoder):
        super().__init__()
        self.config, self.is_decoder = config, is_decoder
        self.relative_bias = embedding(config.relative_attention_num_buckets, config.num_heads)
        count = config.num_decoder_layers if is_decoder else config.num_layers
        self.blocks = nn.ModuleList(Block(config, is_decoder) for _ in range(count))
        self.norm = RMSNorm(config)
        self.dropout = Dropout(config.dropout_rate)

    def self_mask(self, length, past, padding, prefix_length, dtype):
        """Additive mask of all self-attentions: position bias, padding, causality; 0 over the N prefix columns. For `length` new
        tokens, T, after `past` ones that are in the cache."""
        keys = torch.arange(past + length, device=self.norm.weight.device)
        distance = keys - keys[past:, None]                                  # [T, past+T]
        bucket = relative_bucket(distance, not self.is_decoder, self.config.relative_attention_num_buckets,
                                 self.config.relative_attention_max_distance)
        mask = F.embedding(bucket, self.relative_bias.weight).permute(2, 0, 1)[None]    # [1, H, T, past+T]
        if self.is_decoder:
            mask = mask + MASKED * (distance > 0)
        mask = F.pad(mask, (prefix_length, 0)).to(dtype)                     # [1, H, T, N+past+T]
        return mask if padding is None else mask + padding_mask(padding, prefix_length, dtype)

    def forward(self, x, padding=None, memory=None, memory_padding=None, sites=None, caches=None):
        """x [B, T, D] (in the encoder T = S), padding and memory_padding [B, S] (1 real, 0 padding), memory [B, S, D] -> [B, T, D].

        caches: one dict for each block, empty at the first decoding step; filled and extended in place.
        """
        sites = sites or {}
        self_type, ffn_type = (DECODER_SELF, DECODER_FFN) if self.is_decoder else (ENCODER_SELF, ENCODER_FFN)
        # The prefixes of a block type are of one length, so that one mask serves all layers.
        n, memory_n = (sites[kind, 0].length if (kind, 0) in sites else 0 for kind in (self_type, DECODER_CROSS))
        past = 0
        if caches is not None and "self" in caches[0]:
            past = caches[0]["self"][0].size(2) - n
        mask = self.self_mask(x.size(1), past, padding, n, x.dtype)
        memory_mask = None if memory is None else padding_mask(memory_padding, memory_n, x.dtype)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, sites.get((self_type, i)), sites.get((ffn_type, i)), memory, memory_mask,
                      sites.get((DECODER_CROSS, i)), None if caches is None else caches[i])
        return self.dropout(self.norm(x))


def padding_mask(real, prefix_length, dtype):
    """[B, S] of 1 (real) and 0 (padding) -> additive [B, 1, 1, N+S]; the N columns of a prefix are never masked."""
    return F.pad((1 - real.to(dtype)) * MASKED, (prefix_length, 0))[:, None, None]


class T5(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.shared = embedding(config.vocab_size, config.d_model)
        self.encoder, self.decoder = Stack(config, is_decoder=False), Stack(config, is_decoder=True)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size)
        self.dtype = torch.float32              # of the activations; HyperPELT sets bfloat16 when it freezes the model

    def encode(self, input_ids, attention_mask=None, sites=None, front=None):
        """input_ids [B, S], attention_mask [B, S] (1 real, 0 padding; default: not pad) -> memory [B, S, D], its mask [B, S].

        front: tokens [B, N, D] that are embedded already and go before the text; memory and mask are longer by them.
        """
        attention_mask = input_ids != self.config.pad_token_id if attention_mask is None else attention_mask
        x = self.shared(input_ids).to(self.dtype)
        if front is not None:
            x, attention_mask = torch.cat([front, x], 1), F.pad(attention_mask, (front.size(1), 0), value=1)
        return self.encoder(x, attention_mask, sites=sites), attention_mask

    def decode(self, decoder_input_ids, memory, attention_mask, sites=None, caches=None):
        """decoder_input_ids [B, T], memory [B, S, D] -> logits [B, T, vocabulary]. With caches: only the new tokens are given."""
        x = self.decoder(self.shared(decoder_input_ids).to(self.dtype), None, memory, attention_mask, sites, caches)
        if self.config.tie_word_embeddings:
            return F.linear(x * self.config.d_model**-0.5, self.shared.weight.to(x.dtype))
        return self.lm_head(x)

    def forward(self, input_ids, attention_mask, labels, sites=None, front=None, label_smoothing=0.0):
        """input_ids, attention_mask (or None) [B, S], labels [B, T] (-100: no loss) -> logits [B, T, vocabulary], mean loss per token."""
        shifted = F.pad(labels, (1, -1), value=self.config.pad_token_id)     # the decoder starts from pad
        shifted = shifted.masked_fill(shifted == -100, self.config.pad_token_id)
        logits = self.decode(shifted, *self.encode(input_ids, attention_mask, sites, front), sites)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100,
                               label_smoothing=label_smoothing)
        return logits, loss

    # ------------------------------------------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, max_new_tokens=20, num_beams=1, sites=None, front=None):
        """Greedy (num_beams 1) or beam search -> ids [B, <= max_new_tokens], padded after eos, without the start token."""
        memory, attention_mask = self.encode(input_ids, attention_mask, sites, front)
        caches = [{} for _ in self.decoder.blocks]
        start = torch.full_like(input_ids[:, :1], self.config.pad_token_id)
        logits = self.decode(start, memory, attention_mask, sites, caches)[:, -1].float()      # [B, vocabulary]
        if num_beams > 1:
            return self.beam_search(logits, memory, attention_mask, max_new_tokens, num_beams, sites, caches)
        output, done = [], torch.zeros_like(start, dtype=torch.bool)
        while True:
            token = logits.argmax(-1, keepdim=True).masked_fill(done, self.config.pad_token_id)  # [B, 1]
            output.append(token)
            done |= token == self.config.eos_token_id
            if done.all() or len(output) == max_new_tokens:
                return torch.cat(output, 1)
            logits = self.decode(token, memory, attention_mask, sites, caches)[:, -1]

    def beam_search(self, logits, memory, attention_mask, max_new_tokens, beams, sites, caches):
        """Beams ranked by log-probability over length, as transformers does by default (length_penalty 1, no early stop).

        A row is settled once its `beams` finished outputs are at least as good as its best running beam is now.
        """
        batch, vocabulary = logits.shape
        rows = torch.arange(batch, device=logits.device)[:, None]                              # [B, 1]
        running = logits.new_zeros(batch, 1, 0, dtype=torch.long)                              # [B, beams, t]
        score = logits.new_zeros(batch, 1)                                                     # [B, beams]
        finished = torch.full((batch, beams, max_new_tokens), self.config.pad_token_id, device=logits.device)
        finished_score = torch.full((batch, beams), -1e9, device=logits.device)
        settled = torch.zeros(batch, 1, dtype=torch.bool, device=logits.device)                # of each row: nothing better can come
        memory, attention_mask = (t.repeat_interleave(beams, 0) for t in (memory, attention_mask))
        for length in range(1, max_new_tokens + 1):
            total = score[:, :, None] + logits.float().log_softmax(-1).view(batch, -1, vocabulary)
            best, index = total.flatten(1).topk(2 * beams)                 # twice as many: half of them may be finished
            parent, token = index // vocabulary, index % vocabulary                            # [B, 2*beams]
            candidate = torch.cat([running[rows, parent], token[:, :, None]], 2)               # [B, 2*beams, t]
            ended = (token == self.config.eos_token_id) | (length == max_new_tokens)
            new_score = (best / length).masked_fill(~ended | settled, -1e9)
            new_score[:, beams:] = -1e9                                    # only the best `beams` candidates may finish
            padded = F.pad(candidate, (0, max_new_tokens - length), value=self.config.pad_token_id)
            finished_score, keep = torch.cat([finished_score, new_score], 1).topk(beams)
            finished = torch.cat([finished, padded], 1)[rows, keep]
            score, keep = best.masked_fill(ended, -1e9).topk(beams)
            running, parent = candidate[rows, keep], parent[rows, keep]
            settled |= score[:, :1] / length <= finished_score[:, -1:]
            if settled.all() or length == max_new_tokens:
                break
            # A beam takes its parent's cache along; the cross-attention's is the same for all beams of a row. After the first token
            # the caches still have one line for each row, later one for each beam.
            order = (rows * (beams if length > 1 else 1) + parent).flatten()
            for cache in caches:
                cache["self"] = tuple(t[order] for t in cache["self"])
                if length == 1:
                    cache["cross"] = tuple(t.repeat_interleave(beams, 0) for t in cache["cross"])
            logits = self.decode(running[:, :, -1].reshape(-1, 1), memory, attention_mask, sites, caches)[:, -1]
        return finished[:, 0, :length]

    # ---------------------------------------------------------------------------------------------------- loading

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """A folder with config.json and model.safetensors (or its shards and index), or a public name -> float32 T5, in eval mode.

        Raises UserError for a missing or damaged file, and for every missing, unknown or misshapen tensor.
        """
        folder = find_checkpoint(name_or_folder)
        with torch.device("meta"):                                           # shapes only: nothing is filled twice
            model = cls(T5Config.from_file(folder / "config.json"))
        wanted = {public_name(name): tensor for name, tensor in model.state_dict().items()}
        copies = [name for name in COPIES if name not in wanted]
        paths = [folder / "model.safetensors"]
        if not paths[0].exists() and (folder / INDEX).exists():
            paths = [folder / file for file in shard_names(folder / INDEX)]
        found, _ = read_tensors(paths, wanted | dict.fromkeys(copies, model.shared.weight), "the weights of the T5 in config.json",
                                optional=copies, passed_by=lambda name: name == STRAY)
        for copy in copies:
            if copy in found and not torch.equal(found[copy], found["shared.weight"]):
                raise UserError(f"{folder}: tensor {copy} differs from shared.weight, but config.json says that they are one")
        model.load_state_dict({name: found[public_name(name)].float() for name in model.state_dict()}, assign=True)
        return model.eval()


# ours -> the name in public checkpoints
RENAMED = [("blocks.", "block."), ("self_norm", "layer.0.layer_norm"), ("self_attention", "layer.0.SelfAttention"),
           ("cross_norm", "layer.1.layer_norm"), ("cross_attention", "layer.1.EncDecAttention"),
           ("relative_bias", "block.0.layer.0.SelfAttention.relative_attention_bias")]
COPIES = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]   # of shared.weight, in some files
INDEX = "model.safetensors.index.json"
STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"            # a relic of old conversions


def public_name(name):
    for ours, public in RENAMED:
        name = name.replace(ours, public)
    last = 2 if name.startswith("decoder") else 1                            # the FFN comes after the attentions
    name = name.replace("ffn_norm", f"layer.{last}.layer_norm").replace(".ffn.", f".layer.{last}.DenseReluDense.")
    return re.sub(r"^(\w+)\.norm\.", r"\1.final_layer_norm.", name)


def shard_names(index):
    """model.safetensors.index.json -> names of the files that hold the tensors, all in the same folder."""
    files = list(read_json(index, "weight_map")["weight_map"].values())
    if not files or any(not isinstance(file, str) or Path(file).name != file or file in ("", "..") for file in files):
        raise UserError(f"{index}: weight_map: found {str(files)[:80]}, expected tensor names -> files of this folder")
    return sorted(set(files))


def find_checkpoint(name_or_folder):
    """A folder as it is; a public name after its files are in the cache, downloaded where they are not -> Path.

    The hub is HF_ENDPOINT (default https://huggingface.co), the cache HF_HOME or ~/.cache. Raises UserError.
    """
    folder, name = Path(name_or_folder), str(name_or_folder)
    if folder.is_dir():
        return folder
    if name not in NAMES and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise UserError(f"model {name!r} is neither a folder nor a known name; the known ones are {', '.join(NAMES)}")
    cache = Path(os.environ.get("HF_HOME") or os.path.expanduser("~/.cache")) / "hyperpelt" / name.replace("/", "--")
    repository = name if "/" in name else f"google-t5/{name}"
    base = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{repository}/resolve/main/"

    def fetch(file, optional=False):
        check = {".json": read_json, ".model": Tokenizer}.get(Path(file).suffix, lambda part: read_safetensors(part, "the weights of a T5"))
        return (cache / file).is_file() or download(base + file, cache / file, optional, check=check)

    if not fetch("config.json", optional=True):
        raise UserError(f"model {name!r}: no such folder, and no such repository with a config.json at {base}")
    fetch("spiece.model")
    if (cache / INDEX).is_file() or not fetch("model.safetensors", optional=True):
        if not fetch(INDEX, optional=True):
            raise UserError(f"{base}: found neither model.safetensors nor {INDEX}; older formats of weights are not read")
        for file in shard_names(cache / INDEX):
            fetch(file)
    return cache
