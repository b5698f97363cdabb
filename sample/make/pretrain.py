"""Train the small T5 from nothing and write mini-t5/config.json and model.safetensors.

    python sample/make/pretrain.py --work DIR

text.py and vocab.py come first. Each step trains on text with gaps (T5's span corruption) and on
questions with answers. DIR/last.pt is saved every 200 steps, so that the same command continues a
run that was stopped.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from questions import Questions, vocabulary_words
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

SAMPLE = Path(__file__).resolve().parent.parent
sys.path.append(str(SAMPLE.parent))
from t5 import T5, T5Config, Tokenizer, public_name  # noqa: E402

# The form of T5 v1.0. There is no dropout, neither here nor in later training, because so small a
# frozen model unlearns under it. [C]
CONFIG = T5Config(
    d_model=256,
    d_kv=64,
    d_ff=768,
    num_layers=6,
    num_heads=4,
    num_decoder_layers=2,
    vocab_size=5120,
    dropout_rate=0.0,
)
# Tokens of a piece of text, the share of them that gaps hide, and the mean length of a gap. [X: T5]
WINDOW = 128
NOISE = 0.15
SPAN = 3
# Source tokens of a step, and the share of them that are questions. From the first step of the
# second part on there is more text, and more of the questions that were hardest in the first part.
TOKENS = 4096
SECOND_PART = 4800
QUESTION_SHARE = {False: 0.75, True: 0.4}
# The learning rate rises for some steps and then falls to 0.
PEAK_RATE = 5e-3
WARMUP = 50
# Paragraphs that are never trained on; fill.py uses them.
HELD_OUT = 400
SAVE_EVERY = 200


# ---- data ----------------------------------------------------------------------------------------


def cut(rng, total, parts):
    """Random positive lengths of `parts` parts that add up to `total`."""
    places = rng.choice(np.arange(1, total), parts - 1, replace=False)
    return np.diff([0, *sorted(places), total])


def corrupt(ids, rng, sentinel):
    """Span corruption of T5: returns source and target ids, both with eos.

    The source has a sentinel in place of each gap. The target has the sentinels, each followed by
    the ids of its gap. Sentinels count down from `sentinel`.
    """
    noise = max(1, round(len(ids) * NOISE))
    gaps = max(1, round(noise / SPAN))
    kept = cut(rng, len(ids) - noise, gaps)
    hidden = cut(rng, noise, gaps)

    source = []
    target = []
    start = 0
    for i in range(gaps):
        gap = start + kept[i]
        end = gap + hidden[i]
        source += [*ids[start:gap], sentinel - i]
        target += [sentinel - i, *ids[gap:end]]
        start = end
    return source + [1], target + [1]


def encode_text(paragraphs, tokenizer):
    """All paragraphs one after another, as an array of ids. Each ends with eos."""
    ids = []
    for paragraph in tqdm(paragraphs, desc="tokenizing", disable=None):
        ids += tokenizer.encode(paragraph)
    return np.array(ids, dtype=np.uint16)


def pad_pairs(pairs):
    """Pairs of source and target ids -> [B, S] padded with 0, [B, T] padded with -100."""
    sources = [torch.tensor(source) for source, _ in pairs]
    targets = [torch.tensor(target) for _, target in pairs]
    return pad_sequence(sources, True, 0), pad_sequence(targets, True, -100)


def make_batch(step, ids, questions, tokenizer):
    """Text with gaps, short questions, long questions. It depends on the step alone."""
    second_part = step >= SECOND_PART
    question_tokens = TOKENS * QUESTION_SHARE[second_part]

    generator = np.random.default_rng([0, step])
    count = int(TOKENS - question_tokens) // WINDOW
    gaps = []
    for start in generator.integers(0, len(ids) - WINDOW, count):
        window = ids[start : start + WINDOW].tolist()
        gaps.append(corrupt(window, generator, tokenizer.largest_id))

    rng = random.Random(f"0 {step}")
    pairs = []
    while sum(len(source) for source, _ in pairs) < question_tokens:
        question, answer = questions.one(rng, second_part)
        pairs.append((tokenizer.encode(question), tokenizer.encode(answer)))

    # Questions of about the same length stand together, so that there is less padding.
    pairs.sort(key=lambda pair: len(pair[0]))
    short = len(pairs) * 2 // 3
    return [pad_pairs(part) for part in (gaps, pairs[:short], pairs[short:])]


# ---- model ---------------------------------------------------------------------------------------


def public_parameters(model):
    """{public name: parameter}"""
    return {public_name(name): parameter for name, parameter in model.named_parameters()}


def is_matrix(name, parameter):
    """Whether a parameter multiplies activations. Embeddings and position biases do not."""
    return parameter.dim() == 2 and name != "shared.weight" and "relative" not in name


@torch.no_grad()
def initialize(model):
    """T5's own initialisation, then two heads that look for words like their own."""
    width = CONFIG.d_model
    parameters = public_parameters(model)
    for name in sorted(parameters):
        parameter = parameters[name]
        if name.endswith(".q.weight"):
            parameter.normal_(0, (width * CONFIG.d_kv) ** -0.5)
        elif is_matrix(name, parameter):
            parameter.normal_(0, parameter.shape[1] ** -0.5)
        elif name == "shared.weight":
            parameter.normal_(0, 1.0)
        elif "relative" in name:
            parameter.normal_(0, width**-0.5)

    # In two heads of the encoder, queries begin as small copies of the keys. Without this, a model
    # of this size sees in 3,000 steps that two texts differ, but not which of them says more. [C,
    # after mimetic initialisation, Trockman and Kolter 2023]
    rows = 2 * CONFIG.d_kv
    for layer in range(CONFIG.num_layers):
        attention = f"encoder.block.{layer}.layer.0.SelfAttention"
        keys = parameters[f"{attention}.k.weight"]
        parameters[f"{attention}.q.weight"][:rows] = keys[:rows] * CONFIG.d_kv**-0.5

    # The first half of the buckets holds keys at the query's place (bucket 0) and before it. The
    # first head is to look before its own place, the second one behind it.
    bias = parameters["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    half = CONFIG.relative_attention_num_buckets // 2
    bias[half:, 0] -= 8
    bias[0, 0] -= 8
    bias[:half, 1] -= 8


def make_optimizers(model):
    """Muon for matrices, AdamW for the rest. Queries, norms and biases learn more slowly."""
    matrices = []
    others = []
    for name, parameter in public_parameters(model).items():
        group = {"params": [parameter], "scale": 1.0}
        if is_matrix(name, parameter):
            if name.endswith(".q.weight"):
                group["scale"] = 0.25
            matrices.append(group)
        else:
            if name != "shared.weight":
                group["scale"] = 0.08
            others.append(group)
    return [
        torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=0.0),
    ]


# ---- training ------------------------------------------------------------------------------------


def train_step(model, optimizers, step, steps, parts):
    """One update. Returns the loss per token of each of the three parts of the batch."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = min((step + 1) / WARMUP, 1 - step / steps)
            group["lr"] = PEAK_RATE * group["scale"] * rate

    # Gaps and questions weigh what their shares of the tokens are, however many answers there are.
    share = QUESTION_SHARE[step >= SECOND_PART]
    answers = [(target >= 0).sum() for _, target in parts[1:]]
    weights = [1 - share, *(share * count / sum(answers) for count in answers)]
    losses = []
    for (source, target), weight in zip(parts, weights, strict=True):
        _, loss = model(source, source != 0, target)
        (loss * weight).backward()
        losses.append(loss.item())

    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return losses


def save(path, step, modules):
    """Save what continues the run. A crash while saving leaves the earlier file whole."""
    temporary = path.with_suffix(".tmp")
    torch.save({"step": step, "modules": [one.state_dict() for one in modules]}, temporary)
    temporary.replace(path)


def load(path, modules):
    """Load what `save` wrote, if anything, and return the number of finished steps."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    for module, state in zip(modules, saved["modules"], strict=True):
        module.load_state_dict(state)
    return saved["step"]


# The small T5 learned with small weights and a narrow residual stream. These factors give it the
# magnitudes of the public T5s without changing its function, so that the learning rates of adapters
# and prefixes that suit them suit it, too. They are powers of two, so that nothing is rounded.
FACTORS = [
    # The norms before the blocks.
    ("layer_norm", 1 / 8),
    # The last norms. That of the decoder makes up for the embedding, which is the output head too.
    ("encoder.final_layer_norm", 1),
    ("decoder.final_layer_norm", 1 / 8),
    # What enters the residual stream, and the matrices that read a normed input.
    ("shared", 8),
    ("wo", 8),
    ("wi", 8),
    # Keys and values become four times as large, queries and outputs a fourth.
    ("q", 8 / 4),
    ("o", 8 / 4),
    ("SelfAttention.k", 8 * 4),
    ("SelfAttention.v", 8 * 4),
    ("EncDecAttention.k", 4),
    ("EncDecAttention.v", 4),
    ("relative_attention_bias", 1),
]


def factor(name):
    """The factor of the entry of FACTORS with which a tensor's public name ends."""
    stem = "." + name.removesuffix(".weight")
    return next(value for ending, value in FACTORS if stem.endswith("." + ending))


def export(model, folder):
    tensors = {}
    for name, parameter in public_parameters(model).items():
        tensor = parameter.detach() * factor(name)
        tensors[name] = tensor.to("cpu", torch.bfloat16).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        **vars(CONFIG),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of text.py")
    parser.add_argument("--out", type=Path, default=SAMPLE, help="folder that holds mini-t5/")
    parser.add_argument("--steps", type=int, default=9000, help="training steps")
    args = parser.parse_args()

    tokenizer = Tokenizer(args.out / "mini-t5" / "spiece.model")
    paragraphs = (args.work / "text.txt").read_text().splitlines()[HELD_OUT:]
    ids = encode_text(paragraphs, tokenizer)
    facts = json.loads((args.work / "wordnet.json").read_text())
    questions = Questions(facts, paragraphs, vocabulary_words(tokenizer.pieces))

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = T5(CONFIG).to(device).eval()
    initialize(model)
    model.dtype = torch.bfloat16
    modules = [model, *make_optimizers(model)]
    first = load(args.work / "last.pt", modules)

    recent = []
    for step in tqdm(range(first, args.steps), initial=first, total=args.steps, disable=None):
        batch = make_batch(step, ids, questions, tokenizer)
        parts = [(source.to(device), target.to(device)) for source, target in batch]
        recent.append(train_step(model, modules[1:], step, args.steps, parts))
        if (step + 1) % 50 == 0:
            gaps, short, long = np.mean(recent, axis=0)
            tqdm.write(f"step {step + 1}: loss in gaps {gaps:.3f}, answers {short:.3f} {long:.3f}")
            recent = []
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            save(args.work / "last.pt", step + 1, modules)
    export(model, args.out / "mini-t5")


if __name__ == "__main__":
    main()
