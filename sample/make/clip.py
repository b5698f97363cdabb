"""Train the small CLIP and write mini-clip/config.json and model.safetensors.

    python sample/make/clip.py

It learns from scenes of 1 to 4 things that are not the sample's. Beside CLIP's own task (find the
caption of an image, and the image of a caption), single cells of the image have to find the
phrases that describe what they show. Only the vision transformer is kept.
Shapes: B images, T words, V width, P things in all images, N cells.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from captions import CELLS, PATCH, VOCABULARY, make_batch
from safetensors.torch import save_file
from scenes import SEED, SIDE
from tqdm import tqdm

SAMPLE = Path(__file__).resolve().parent.parent
WIDTH = 96
HEADS = 4
VISION_LAYERS = 4
TEXT_LAYERS = 2
LONGEST_TEXT = 48
# Images of a step, each with its twin.
PAIRS = 64
LEARNING_RATE = 2e-3
# The mean and the standard deviation of the pixels of CLIP's training images.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


# ---- model ---------------------------------------------------------------------------------------


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def transformer(layers):
    """Layers as CLIP has them, with the norms before attention and feed-forward block."""
    sizes = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 4 * WIDTH}
    options = {"dropout": 0.0, "activation": quick_gelu, "batch_first": True, "norm_first": True}
    return nn.Sequential(*(nn.TransformerEncoderLayer(**sizes, **options) for _ in range(layers)))


def projection():
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY), WIDTH)
        self.positions = nn.Parameter(torch.randn(LONGEST_TEXT, WIDTH) * 0.02)
        self.layers = transformer(TEXT_LAYERS)
        self.project = projection()
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, ids):
        x = self.words(ids) + self.positions[: ids.size(1)]  # [B, T, V]
        x = self.layers(x)
        # The vector of <start> stands for the text.
        return self.project(x[:, 0])


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(WIDTH) * WIDTH**-0.5)
        self.positions = nn.Parameter(torch.randn(1 + CELLS, WIDTH) * 0.02)
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = transformer(VISION_LAYERS)

    def forward(self, pixels):
        pixels = (pixels / 255 - MEAN) / STD  # [B, 3, 56, 56]
        cells = self.patches(pixels).flatten(2).transpose(1, 2)  # [B, N, V]
        class_token = self.class_token.expand(len(cells), 1, -1)
        x = torch.cat([class_token, cells], 1) + self.positions  # [B, 1+N, V]
        return self.layers(self.norm(x))


class Clip(nn.Module):
    """CLIP's vector of an image is that of the class token. Two more vectors only train."""

    def __init__(self):
        super().__init__()
        self.vision = Vision()
        self.text = Text()
        self.project = projection()
        self.project_mean = projection()
        self.project_cell = projection()
        self.scales = nn.Parameter(torch.full((3,), math.log(1 / 0.07)))

    def forward(self, pixels, captions, phrases, cells):
        """Similarities: image and caption [B, B], mean of the cells and caption [B, B], and cell
        and phrase [P, P]."""
        x = self.vision(pixels)  # [B, 1+N, V]
        captions = self.text(captions)
        phrases = self.text(phrases)
        chosen = x[:, 1:].flatten(0, 1)[cells]  # [P, V]
        pairs = [
            (self.project(x[:, 0]), captions),
            (self.project_mean(x[:, 1:].mean(1)), captions),
            (self.project_cell(chosen), phrases),
        ]
        similarities = []
        for (image, text), scale in zip(pairs, self.scales, strict=True):
            cosine = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
            similarities.append(scale.exp().clamp(max=100) * cosine)
        return similarities


# ---- training ------------------------------------------------------------------------------------


def contrastive_loss(similarity):
    """Every image has to find its text among those of the batch, and every text its image."""
    own = torch.arange(len(similarity))
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2


@torch.no_grad()
def retrieval(model, batches=8):
    """On unseen scenes: how often an image finds its caption among 128, and prefers it to its
    twin's."""
    found = 0.0
    preferred = 0.0
    images = torch.arange(2 * PAIRS)
    for batch in range(batches):
        similarity, _, _ = model(*make_batch([SEED + 2, batch], PAIRS))
        own = similarity.diagonal()
        twins = similarity[images, images ^ 1]
        found += (similarity.argmax(1) == images).float().mean().item()
        preferred += (own > twins).float().mean().item()
    return found / batches, preferred / batches


def learning_rate(step, steps):
    warmup = (step + 1) / 100
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return LEARNING_RATE * min(warmup, cosine)


def train(steps):
    torch.manual_seed(SEED)
    model = Clip()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98)
    )
    for step in tqdm(range(steps), disable=None):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
        similarities = model(*make_batch([SEED + 1, step], PAIRS))
        losses = [contrastive_loss(similarity) for similarity in similarities]
        optimizer.zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            text = ", ".join(f"{loss.item():.3f}" for loss in losses)
            tqdm.write(f"step {step + 1}: loss of image, mean, cell {text}")
    return model


# ---- the files -----------------------------------------------------------------------------------

# Our names of a layer's modules, and those of public CLIP vision transformers.
LAYER_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "linear1": "mlp.fc1",
    "linear2": "mlp.fc2",
    "self_attn.out_proj": "self_attn.out_proj",
}
CONFIG = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "model_type": "clip_vision_model",
    "num_channels": 3,
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": VISION_LAYERS,
    "num_attention_heads": HEADS,
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": WIDTH,
}


def public_tensors(model):
    """The tensors of the vision side under their public names."""
    vision = model.vision
    tensors = {
        "vision_model.embeddings.class_embedding": vision.class_token,
        "vision_model.embeddings.position_embedding.weight": vision.positions,
        "vision_model.embeddings.patch_embedding.weight": vision.patches.weight,
        "visual_projection.weight": model.project[1].weight,
    }
    norms = {"pre_layrnorm": vision.norm, "post_layernorm": model.project[0]}
    for name, norm in norms.items():
        tensors[f"vision_model.{name}.weight"] = norm.weight
        tensors[f"vision_model.{name}.bias"] = norm.bias

    for i, layer in enumerate(vision.layers):
        prefix = f"vision_model.encoder.layers.{i}"
        for ours, public in LAYER_NAMES.items():
            module = layer.get_submodule(ours)
            tensors[f"{prefix}.{public}.weight"] = module.weight
            tensors[f"{prefix}.{public}.bias"] = module.bias
        # PyTorch stores the three projections in one tensor.
        weights = layer.self_attn.in_proj_weight.chunk(3)
        biases = layer.self_attn.in_proj_bias.chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = weight
            tensors[f"{prefix}.self_attn.{name}_proj.bias"] = bias
    return tensors


def save(model, folder):
    tensors = {}
    for name, tensor in public_tensors(model).items():
        tensors[name] = tensor.detach().half().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=SAMPLE, help="folder that holds mini-clip/")
    parser.add_argument("--steps", type=int, default=2800, help="training steps")
    args = parser.parse_args()

    model = train(args.steps)
    save(model, args.out / "mini-clip")
    found, preferred = retrieval(model)
    print(f"caption found among 128: {found:.3f}; preferred to the twin's: {preferred:.3f}")


if __name__ == "__main__":
    main()
