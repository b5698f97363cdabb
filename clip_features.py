"""Compute the grid features of images with a frozen CLIP, once, and store them in one file.

    python clip_features.py --model CLIP --images train2014 --out features/train2014.npy

CLIP is a folder or a public name, such as openai/clip-vit-base-patch32. It is one of two encoders:
    a vision transformer in the tensor names of `transformers`, with its config.json. Its features
    are the last layer's output, without the class token and before the final layer norm;
    a modified ResNet in the tensor names of OpenAI and open_clip. Its features are the last map,
    before the attention pool (7 x 7 x 2048 for RN50 and RN101).
FILE.npy is float16 [images, N, V]. FILE.json holds the ids, in the same order, and the settings.
A run that is stopped or killed continues when the same command is given again: until the end, the
features are in FILE.part.npy, and FILE.json says how many of them are done.

The features are G of eq. (7) in hyperpelt.py. The 7 x 7 cells are printed, though we know them at
second hand [P]. ResNet-101 at 224 pixels is a reconstruction [R]. The map before the pool, and
float16, are our choice [C]. Source of the encoders: Radford et al. 2021 (CLIP).

Shapes: B batch, N cells of the grid, V visual width, H heads, K width of one head, C channels,
P side of a patch in pixels, I side of the input in pixels, h and w sides of a map.
"""
import signal

if __name__ == "__main__":
    # Ctrl-C ends the program at once, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import hashlib
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import UserError, read_json_file, reading, run, write_file
from t5 import find_checkpoint, load_weights, read_weights

OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CLIP_WEIGHTS = ("model.safetensors", "pytorch_model.bin", *OPEN_CLIP_WEIGHTS)

# Beginnings of the names of tensors that the features do not need. The first line matches every
# name outside the two encoders. The others name parts of an encoder that come after the features,
# or hold no weights.
UNUSED = re.compile(
    r"(?!vision_model\.|visual\.)"
    r"|vision_model\.(post_layernorm\.|embeddings\.position_ids)"
    r"|visual\.attnpool\."
)

# Means and standard deviations of red, green and blue in OpenAI's training images.
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]

# COCO's ids are the numbers in the names of its images. This is what stands before the id in
# COCO_train2014_000000000009 or 000000000009: the set, and zeros.
COCO_NAME = r"^(COCO_\w+_)?(?=\d{12}$)0*(?=\d)"


# ---- vision transformer --------------------------------------------------------------------------

def quick_gelu(x):
    """OpenAI's approximation of GELU. config.json says which one the weights were trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Layer(nn.Module):
    def __init__(self, width, inner, heads, activation, epsilon):
        super().__init__()
        self.heads = heads
        self.activation = ACTIVATIONS[activation]
        self.layer_norm1 = nn.LayerNorm(width, epsilon)
        self.layer_norm2 = nn.LayerNorm(width, epsilon)
        projections = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in projections})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def split_heads(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x):                                                   # [B, 1+N, V]
        u = self.layer_norm1(x)
        q = self.split_heads(self.self_attn.q_proj(u))                      # [B, H, 1+N, K]
        k = self.split_heads(self.self_attn.k_proj(u))
        v = self.split_heads(self.self_attn.v_proj(u))
        u = F.scaled_dot_product_attention(q, k, v)
        u = u.transpose(1, 2).flatten(2)                                    # [B, 1+N, V]
        x = x + self.self_attn.out_proj(u)
        u = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(self.activation(u))


class VisionTransformer(nn.Module):
    """CLIP's vision transformer. Its tensors are named as in public files, after `name_prefix`.

    The arguments are the keys of config.json. What that file leaves out is as in ViT-B/32.
    """

    name_prefix = "vision_model."

    def __init__(
        self,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=32,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        **other_keys
    ):
        super().__init__()
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act: found {hidden_act}, expected one of {list(ACTIVATIONS)}")
        self.kind = (
            f"vision transformer, {num_hidden_layers} layers, {num_attention_heads} heads, "
            f"patches of {patch_size}, {hidden_act}"
        )
        self.width = hidden_size
        self.stride = patch_size
        self.trained_size = image_size
        self.grid = image_size // patch_size

        patches = nn.Conv2d(3, hidden_size, patch_size, patch_size, bias=False)
        table = nn.Embedding(1 + self.grid**2, hidden_size)
        self.embeddings = nn.ModuleDict({"patch_embedding": patches, "position_embedding": table})
        self.embeddings.class_embedding = nn.Parameter(torch.empty(hidden_size))

        # The public name is spelled this way.
        self.pre_layrnorm = nn.LayerNorm(hidden_size, layer_norm_eps)
        layers = [
            Layer(hidden_size, intermediate_size, num_attention_heads, hidden_act, layer_norm_eps)
            for _ in range(num_hidden_layers)
        ]
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*layers)})

    def resize_positions(self, side):
        """Return positions [1+N, V] for side x side cells, interpolated from the trained grid."""
        table = self.embeddings.position_embedding.weight
        cells = table[1:].T.unflatten(1, (self.grid, self.grid))            # [V, grid, grid]
        cells = F.interpolate(cells[None], (side, side), mode="bicubic")[0]
        # The class token has no place in the grid, so its position stays as it is.
        return torch.cat([table[:1], cells.flatten(1).T])

    def forward(self, pixels):                                              # [B, 3, I, I]
        x = self.embeddings.patch_embedding(pixels)                         # [B, V, I/P, I/P]
        positions = self.resize_positions(x.shape[-1])
        x = x.flatten(2).transpose(1, 2)                                    # [B, N, V]
        class_token = self.embeddings.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([class_token, x], dim=1) + positions                  # [B, 1+N, V]
        x = self.encoder.layers(self.pre_layrnorm(x))
        return x[:, 1:]                                                     # [B, N, V]


# ---- modified ResNet -----------------------------------------------------------------------------

def convolution(d_in, d_out, size, stride=1):
    return nn.Conv2d(d_in, d_out, size, stride, padding=size // 2, bias=False)


class ThreeConvolutions(nn.Module):
    """What the stem and the blocks have in common: three convolutions, each with a batch norm.

    The stem inherits it because the public names of its tensors have no prefix of their own.
    """

    def __init__(self, d_in, d_inner, d_out, size, stride):
        super().__init__()
        self.conv1 = convolution(d_in, d_inner, size, stride)
        self.bn1 = nn.BatchNorm2d(d_inner)
        self.conv2 = convolution(d_inner, d_inner, 3)
        self.bn2 = nn.BatchNorm2d(d_inner)
        self.conv3 = convolution(d_inner, d_out, size)
        self.bn3 = nn.BatchNorm2d(d_out)

    def convolve(self, x, pool):                                            # [B, d_in, h, w]
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(x, pool)
        return self.bn3(self.conv3(x))                                      # [B, d_out, h', w']


class Bottleneck(ThreeConvolutions):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut.

    No convolution has a stride. An average pool before the last one shrinks the map instead.
    """

    def __init__(self, d_in, d_inner, pool):
        d_out = 4 * d_inner
        super().__init__(d_in, d_inner, d_out, size=1, stride=1)
        self.pool = pool
        self.downsample = nn.Sequential()
        if d_in != d_out:
            self.downsample = nn.Sequential(convolution(d_in, d_out, 1), nn.BatchNorm2d(d_out))

    def forward(self, x):                                                   # [B, d_in, h, w]
        shortcut = self.downsample(F.avg_pool2d(x, self.pool))
        return F.relu(self.convolve(x, self.pool) + shortcut)               # [B, d_out, h', w']


class ModifiedResNet(ThreeConvolutions):
    """CLIP's ResNet. Its tensors are named as in public files, after `name_prefix`."""

    name_prefix = "visual."
    stride = 32

    def __init__(self, channels, blocks, grid):
        super().__init__(3, channels // 2, channels, size=3, stride=2)
        self.kind = f"modified ResNet, {'-'.join(map(str, blocks))} blocks, {channels} channels"
        self.trained_size = self.stride * grid
        d_in = channels
        for i, count in enumerate(blocks):
            d_inner = channels * 2**i
            # Layers 2 to 4 halve the map in their first block.
            layer = nn.Sequential(Bottleneck(d_in, d_inner, 2 if i else 1))
            d_in = 4 * d_inner
            for _ in range(count - 1):
                layer.append(Bottleneck(d_in, d_inner, 1))
            self.add_module(f"layer{i + 1}", layer)
        self.width = d_in

    def forward(self, pixels):                                              # [B, 3, I, I]
        x = F.relu(self.convolve(pixels, 1))                                # [B, C, I/2, I/2]
        x = F.avg_pool2d(x, 2)
        x = self.layer2(self.layer1(x))
        x = self.layer4(self.layer3(x))                                     # [B, V, I/32, I/32]
        return x.flatten(2).transpose(1, 2)                                 # [B, N, V]


# ---- loading -------------------------------------------------------------------------------------

def load_encoder(name_or_folder):
    """Return the encoder of a public CLIP and the path of its weights.

    The encoder is a VisionTransformer or a ModifiedResNet in float32 and eval mode. Raises
    UserError, which names the file and the tensor or the value.
    """
    with reading(name_or_folder):
        # A repository may hold weights of timm, in other names, beside those of open_clip. So
        # where the first kind is not CLIP's, try open_clip's file.
        for weights in (CLIP_WEIGHTS, OPEN_CLIP_WEIGHTS):
            configs = ("config.json", "preprocessor_config.json")
            folder = find_checkpoint(name_or_folder, (), configs, weights)
            path, tensors = read_weights(folder, weights)
            is_transformer = "vision_model.embeddings.class_embedding" in tensors
            if is_transformer or "visual.attnpool.positional_embedding" in tensors:
                break

        # The meta device gives shapes without memory. The tensors of the file take their places.
        with torch.device("meta"):
            if is_transformer:
                config = read_json_file(folder / "config.json")
                encoder = VisionTransformer(**config.get("vision_config", config))
            else:
                encoder = ModifiedResNet(*resnet_sizes(tensors))

        load_weights(encoder, tensors, path, lambda name: encoder.name_prefix + name, UNUSED.match)
    return encoder.requires_grad_(False).eval(), path


def resnet_sizes(tensors):
    """Return a CLIP ResNet's channels, the blocks of its four layers, and the side of its grid."""
    cells, width = tensors["visual.attnpool.positional_embedding"].shape
    layers = re.findall(r"visual\.layer(\d)\.\d+\.conv1\.weight", " ".join(tensors))
    blocks = [layers.count(number) for number in "1234"]
    return width // 32, blocks, math.isqrt(cells - 1)


# ---- preprocessing -------------------------------------------------------------------------------

def read_preprocessing(folder, trained_size, size, squash):
    """Return a dict of what happens to each image, by preprocessor_config.json if there is one.

    Its sizes are not read: they follow from the weights or --size. Raises UserError for a step that
    the file leaves out or does in another way, such as no centre crop without `squash`.
    """
    path = folder / "preprocessor_config.json"
    config = read_json_file(path) if path.exists() else {}
    # 3 is Pillow's number for bicubic.
    expected = {"do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255}
    expected |= {"do_normalize": True, "do_center_crop": True}
    if squash:
        del expected["do_center_crop"]
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise UserError(f"{path}: {key}: found {config[key]!r}, expected {value!r}")
    return {
        "size": size or trained_size,
        "trained_size": trained_size,
        "mean": config.get("image_mean", MEAN),
        "std": config.get("image_std", STD),
        "resize": "both sides, bicubic" if squash else "shorter side, bicubic, then centre crop"
    }


def preprocess(pixels, size, squash=False):
    """Return an image as uint8 [3, size, size], given uint8 RGB [height, width, 3].

    The shorter side becomes `size`, then the centre is cut out. With `squash`, both sides become
    `size`. Where the centre lies between two pixels, we round as OpenAI does, to an even offset.
    """
    sides = pixels.shape[:2]
    new_sides = [size * side // min(sides) for side in sides]
    if squash:
        new_sides = [size, size]
    x = torch.tensor(pixels).permute(2, 0, 1)
    x = F.interpolate(x[None], new_sides, mode="bicubic", antialias=True)[0]
    top, left = [round((side - size) / 2) for side in new_sides]
    return x[:, top:top + size, left:left + size]


def normalise(pixels, mean=MEAN, std=STD):
    """Return float32 pixels [B, 3, I, I] with about mean 0 and variance 1, given uint8 ones."""
    mean, std = torch.tensor([mean, std], device=pixels.device).view(2, 3, 1, 1)
    return (pixels.float() / 255 - mean) / std


# ---- images --------------------------------------------------------------------------------------

class Images:
    """The images of a folder, or of an .npy file of uint8 [images, height, width, 3].

    An item is (uint8 [3, size, size], the id of the image if it is broken, else "").
    """

    def __init__(self, source, ids_file, size, squash):
        self.size = size
        self.squash = squash
        if source.is_dir():
            from PIL import Image

            self.open = Image.open
            suffixes = (".jpg", ".jpeg", ".png")
            paths = [path for path in source.iterdir() if path.suffix.lower() in suffixes]
            self.images = sorted(paths)
            ids = [re.sub(COCO_NAME, "", path.stem) for path in self.images]
            place = source
        else:
            self.images = open_array(source, np.uint8, 4)
            place = ids_file or source.with_suffix(".json")
            ids = read_json_file(place)
        self.ids = check_ids(ids, self.images, place)

    def __getitem__(self, index):
        pixels = self.images[index]
        broken = ""
        if isinstance(pixels, Path):
            try:
                image = self.open(pixels)
                # More than 8 bits for a colour would be cut off at 255.
                if image.mode.startswith(("I", "F")):
                    raise ValueError
                pixels = np.array(image.convert("RGB"))
            except Exception:
                # Decoders raise nearly every kind of exception. A black pixel stands for the image.
                pixels = np.zeros((1, 1, 3), np.uint8)
                broken = self.ids[index]
        return preprocess(pixels, self.size, self.squash), broken


def check_ids(ids, images, place):
    """Return the ids as strings. Raises UserError unless each image has one of its own."""
    with reading(place):
        ids = list(map(str, ids))
        different = len(set(ids))
        if not len(images) == len(ids) == different > 0:
            raise ValueError(
                f"found {len(ids)} ids, {different} of them different, "
                f"expected one for each of {len(images)} images"
            )
    return ids


# ---- feature file --------------------------------------------------------------------------------

def open_array(path, dtype, dimensions):
    """Return the memory-mapped array of an .npy file. Raises UserError."""
    with reading(path):
        array = np.lib.format.open_memmap(path, mode="r")
        if array.dtype != dtype or array.ndim != dimensions:
            raise ValueError(
                f"found {array.dtype} {list(array.shape)}, "
                f"expected {dtype.__name__} with {dimensions} dimensions"
            )
    return array


def load_features(path):
    """Return what FILE.npy and FILE.json hold: features, {id: row} and the content of FILE.json.

    The features are memory-mapped float16 [images, N, V]. An image that was skipped has no row
    here. Raises UserError, which names the file.
    """
    features = open_array(path, np.float16, 3)
    about_path = Path(path).with_suffix(".json")
    about = read_json_file(about_path)
    ids = check_ids(about.get("ids", []), features, about_path)
    skipped = about.get("skipped", [])
    row_of = {image_id: row for row, image_id in enumerate(ids) if image_id not in skipped}
    return features, row_of, about


def open_part(path, about):
    """Begin or continue FILE.part.npy. Return its array and what FILE.json says about it.

    Raises UserError for a finished file, and for a partial one of another command.
    """
    if path.suffix != ".npy":
        raise UserError(f"--out: found {path}, expected the name of an .npy file")
    if path.exists():
        raise UserError(f"{path}: exists already; remove it and its .json to compute it again")
    path.parent.mkdir(parents=True, exist_ok=True)
    about_path = path.with_suffix(".json")
    with reading(about_path):
        saved = read_json_file(about_path) if about_path.exists() else about
        if saved | {"done": 0, "skipped": []} != about:
            raise UserError(f"{about_path}: has other settings, weights or images; remove it")
        mode = "r+" if saved["done"] else "w+"
    shape = (len(about["ids"]), math.prod(about["grid"]), about["width"])
    return np.lib.format.open_memmap(path.with_suffix(".part.npy"), mode, np.float16, shape), saved


# ---- the command ---------------------------------------------------------------------------------

def prepare(args):
    """Return the encoder, the batches of images, the array to fill and what is known about it."""
    encoder, path = load_encoder(args.model)
    preprocessing = read_preprocessing(path.parent, encoder.trained_size, args.size, args.squash)
    size = preprocessing["size"]
    if size < 1 or size % encoder.stride:
        raise UserError(f"--size: found {size}, expected a multiple of {encoder.stride}")
    images = Images(args.images, args.ids, size, args.squash)
    about = {
        "kind": encoder.kind,
        "weights": hashlib.sha256(np.memmap(path, mode="r")).hexdigest()[:16],
        "grid": [size // encoder.stride] * 2,
        "width": encoder.width,
        "preprocessing": preprocessing,
        "ids": images.ids,
        "skipped": [],
        "done": 0
    }
    array, about = open_part(args.out, about)

    # Workers decode files. An array needs none, and each of them might get a copy of it.
    workers = min(8, os.cpu_count()) if args.images.is_dir() else 0
    remaining = range(about["done"], len(array))
    with reading("--batch-size"):
        loader = DataLoader(images, args.batch_size, sampler=remaining, num_workers=workers)
    return encoder, loader, array, about


@torch.inference_mode()
def extract(args, encoder, loader, array, about):
    """Compute the remaining rows of the array, batch by batch, and put the files in place."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder.to(device)
    preprocessing = about["preprocessing"]

    for pixels, broken in tqdm(loader, unit=" batches", disable=None):
        broken = [image_id for image_id in broken if image_id]
        if broken and not args.skip_broken:
            raise UserError(
                f"{args.images}: images {broken} cannot be decoded; "
                "--skip-broken leaves such images out"
            )
        about["skipped"] += broken
        x = normalise(pixels.to(device), preprocessing["mean"], preprocessing["std"])
        features = encoder(x).half().cpu().numpy()
        if not np.isfinite(features).all():
            first = about["ids"][about["done"]]
            raise UserError(f"images from {first} on: a feature is not finite")

        # The rows are on the disk before their number is, so that a run that is killed here
        # computes them again. Unlike a memory map, a write to a full disk can be reported.
        with open(array.filename, "r+b") as file:
            # The rows start behind the file's header.
            file.seek(array.offset + array[:about["done"]].nbytes)
            file.write(features.tobytes())
            file.flush()
            os.fsync(file.fileno())
        about["done"] += len(features)
        write_file(args.out.with_suffix(".json"), json.dumps(about).encode())

    os.replace(array.filename, args.out)
    print(f"{args.out}: float16 {list(array.shape)}, {len(about['skipped'])} images left out")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="folder or public name of a CLIP")
    add("--images", type=Path, required=True, help="folder (by Pillow), or .npy file of pixels")
    add("--ids", type=Path, help="JSON list of an .npy file's ids; a folder has its names as ids")
    add("--out", type=Path, required=True, help="the file to write, FILE.npy")
    add("--batch-size", type=int, default=64, help="images in one pass")
    add("--size", type=int, help="side of the input in pixels (default: as in training)")
    add("--squash", action="store_true", help="resize both sides instead of cutting the centre out")
    add("--skip-broken", action="store_true", help="leave out images that cannot be decoded")
    args = parser.parse_args()
    extract(args, *prepare(args))


if __name__ == "__main__":
    run(main)
