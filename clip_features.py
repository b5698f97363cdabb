"""A folder of images -> grid features of a frozen CLIP, computed once and read by train.py from one memory-mapped file.

    python clip_features.py --model DIR --images train2014 --out features/train2014.npy
    features, row_of, meta = load_features("features/train2014.npy");  features[row_of["9"]]      # [N, V] of COCO's image 9

DIR holds model.safetensors or open_clip_model.safetensors: a CLIP vision transformer in the names of `transformers` (then with
its config.json), or a CLIP ResNet in OpenAI's names. A whole CLIP will do; its text half is not read.
    vision transformer: one vector for each patch, the last layer's output without the class token, before the final layer norm
    and the projection; ResNet: the last feature map (7 x 7 x 2048 for RN50 and RN101), before the attention pool.
The file is float16 [images, N, V]; beside it lies a .json with the ids in row order and all that the features depend on.
A run that is stopped or killed goes on where it was when the same command is given again.

What comes out is V of eq. (7) in hyperpelt.py. The paper's 7 x 7 cells are printed [P], though known to us second-hand; that they were ResNet-101's at 224
pixels is reconstructed [R], as VL-Adapter had them [X]; float16, and the last map rather than what the pool makes of it, are ours [C].

Source: Radford et al. 2021 (CLIP); tensor names as in public checkpoints. The order of the file: the two encoders, loading, preprocessing;
then plumbing, which a first reading can leave out: images, the feature file, the command.
Shapes: B batch, N cells of the grid, V visual width, H heads, K width of one head, P patch, C channels, I side of the input in pixels.
"""
import contextlib
import hashlib
import io
import json
import math
import os
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import Parser, UserError, catch_signals, digest, in_range, leave, lock, parse_json, read_json, read_safetensors, read_tensors, run, write_whole

FILES = ["model.safetensors", "open_clip_model.safetensors"]
TEXT_HALF = ("text_model.", "text_projection", "logit_scale", "logit_bias", "positional_embedding", "token_embedding.",
             "transformer.", "ln_final.", "attn_mask")          # how the names of tensors begin that no image needs
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}    # OpenAI's weights, most others
SAVE_EVERY = 5.0                # seconds between two notes of the progress on disk


# ---------------------------------------------------------------------------------------------- vision transformer

class Layer(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(x))."""

    def __init__(self, width, inner, heads, activation, epsilon):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, epsilon), nn.LayerNorm(width, epsilon)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.heads, self.activation = heads, ACTIVATIONS[activation]

    def forward(self, x):                                                    # [B, 1+N, V]
        u = self.norm1(x)
        q, k, v = (f(u).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))  # [B, H, 1+N, K]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    name_prefix = "vision_model."        # of its tensors in public files
    unused = re.compile(r"vision_model\.(post_layernorm\.(weight|bias)|embeddings\.position_ids)|visual_projection\.weight")
    renamed = [("class_token", "embeddings.class_embedding"), ("positions", "embeddings.position_embedding.weight"),
               ("patches.", "embeddings.patch_embedding."), ("pre_norm.", "pre_layrnorm."), ("layers.", "encoder.layers."),
               ("norm1.", "layer_norm1."), ("norm2.", "layer_norm2."), ("fc", "mlp.fc"),
               *((f".{name}.", f".self_attn.{name}_proj.") for name in ("q", "k", "v", "out"))]   # ours -> public, in order

    def __init__(self, width, patch, grid, layers, inner, heads, activation, epsilon):
        super().__init__()
        self.class_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(1 + grid * grid, width))   # the class token's first, then row by row
        self.patches = nn.Conv2d(3, width, patch, patch, bias=False)
        self.pre_norm = nn.LayerNorm(width, epsilon)
        self.layers = nn.ModuleList(Layer(width, inner, heads, activation, epsilon) for _ in range(layers))
        self.width, self.stride, self.trained_size = width, patch, grid * patch
        self.kind = f"vision transformer, {layers} layers, {heads} heads, patches of {patch}, {activation}"
        self.output = "last layer, class token dropped, before the final layer norm and the projection"

    @staticmethod
    def sizes(need, names, folder):
        """Sizes from the tensors' shapes, the rest from config.json, whose sizes must be the same. Raises UserError."""
        width, _, patch, _ = need("embeddings.patch_embedding.weight", 4)
        rows, _ = need("embeddings.position_embedding.weight", 2)
        inner, _ = need("encoder.layers.0.mlp.fc1.weight", 2)
        if rows - 1 != math.isqrt(rows - 1)**2:
            need("embeddings.position_embedding.weight", 2, "[1 + a square, width]")
        grid, layers = math.isqrt(rows - 1), len({m[1] for m in map(re.compile(r"encoder\.layers\.(\d+)\.").match, names) if m})
        path = folder / "config.json"
        config = read_json(path)
        vision = read_json(path, "vision_config")["vision_config"] if "vision_config" in config else config
        if config.get("model_type", "clip") not in ("clip", "clip_vision_model"):
            raise UserError(f"{path}: model_type: found {config['model_type']!r}, expected 'clip' or 'clip_vision_model'")
        vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
                  "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **vision}  # the file may leave these out
        for key, value in (("hidden_size", width), ("intermediate_size", inner), ("num_hidden_layers", layers),
                           ("patch_size", patch), ("image_size", grid * patch)):
            if vision[key] != value:
                raise UserError(f"{path}: {key}: found {vision[key]!r}, the tensors say {value}")
        heads, activation, epsilon = (vision[key] for key in ("num_attention_heads", "hidden_act", "layer_norm_eps"))
        for key, good, expected in (
                ("num_attention_heads", type(heads) is int and heads > 0 and width % heads == 0, f"a divisor of the width {width}"),
                ("hidden_act", activation in list(ACTIVATIONS), " or ".join(ACTIVATIONS)),
                ("layer_norm_eps", type(epsilon) is float and 0 < epsilon < 1, "a number between 0 and 1")):
            if not good:
                raise UserError(f"{path}: {key}: found {vision[key]!r}, expected {expected}")
        return (width, patch, grid, layers, inner, heads, activation, epsilon)

    def position_table(self, side):
        """Positions [1+N, V] for a grid of side x side cells: another grid than the trained one is interpolated (bicubic)."""
        trained = math.isqrt(len(self.positions) - 1)
        if side == trained:
            return self.positions
        grid = self.positions[1:].T.unflatten(1, (trained, trained))[None]                     # [1, V, trained, trained]
        grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)[0].flatten(1).T
        return torch.cat([self.positions[:1], grid])                         # the class token's position stays

    def tokens(self, pixels):                                                # [B, 3, I, I]
        x = self.patches(pixels)                                             # [B, V, I/P, I/P]
        x, side = x.flatten(2).transpose(1, 2), x.size(2)                    # [B, N, V]
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1) + self.position_table(side)
        x = self.pre_norm(x)
        for layer in self.layers:
            x = layer(x)
        return x                                                             # [B, 1+N, V]

    def forward(self, pixels):                                               # [B, 3, I, I]
        return self.tokens(pixels)[:, 1:]                                    # [B, N, V]


# ------------------------------------------------------------------------------------------------- modified ResNet

class FrozenNorm(nn.Module):
    """Batch norm by the statistics of the training set; epsilon 1e-5, as everywhere in CLIP's ResNets."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(channels)) for _ in range(2))
        self.running_mean, self.running_var = (nn.Parameter(torch.empty(channels)) for _ in range(2))

    def forward(self, x):                                                    # [B, C, h, w]
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def convolution(d_in, d_out, size, stride=1):
    return nn.Conv2d(d_in, d_out, size, stride, padding=size // 2, bias=False)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolution beside a shortcut. No convolution has a stride: an average pool before it halves the map."""

    def __init__(self, d_in, d_inner, stride):
        super().__init__()
        self.conv1, self.bn1 = convolution(d_in, d_inner, 1), FrozenNorm(d_inner)
        self.conv2, self.bn2 = convolution(d_inner, d_inner, 3), FrozenNorm(d_inner)
        self.conv3, self.bn3 = convolution(d_inner, 4 * d_inner, 1), FrozenNorm(4 * d_inner)
        self.stride, self.downsample = stride, None
        if stride > 1 or d_in != 4 * d_inner:
            self.downsample = nn.Sequential(convolution(d_in, 4 * d_inner, 1), FrozenNorm(4 * d_inner))

    def forward(self, x):                                                    # [B, C, h, w] -> [B, 4*d_inner, h/stride, w/stride]
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.avg_pool2d(F.relu(self.bn2(self.conv2(y))), self.stride)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (self.downsample(F.avg_pool2d(x, self.stride)) if self.downsample else x))


class ModifiedResNet(nn.Module):
    name_prefix, renamed, stride = "visual.", [], 32
    unused = re.compile(r"visual\.(attnpool\.(positional_embedding|[qkvc]_proj\.(weight|bias))|.*\.num_batches_tracked)")

    def __init__(self, channels, blocks, grid):
        super().__init__()
        self.conv1, self.bn1 = convolution(3, channels // 2, 3, stride=2), FrozenNorm(channels // 2)
        self.conv2, self.bn2 = convolution(channels // 2, channels // 2, 3), FrozenNorm(channels // 2)
        self.conv3, self.bn3 = convolution(channels // 2, channels, 3), FrozenNorm(channels)
        for i, count in enumerate(blocks):
            inner, before = channels * 2**i, channels * 2**(i + 1) if i else channels
            self.add_module(f"layer{i + 1}", nn.Sequential(*(
                Bottleneck(4 * inner if block else before, inner, 2 if i and not block else 1) for block in range(count))))
        self.width, self.trained_size = 32 * channels, 32 * grid
        self.kind = f"modified ResNet, {'-'.join(map(str, blocks))} blocks, {channels} channels"
        self.output = "last feature map, before the attention pool"

    @staticmethod
    def sizes(need, names, folder):
        """All sizes come from the tensors. Raises UserError."""
        channels, half = need("conv3.weight", 4)[:2]
        cells, width = need("attnpool.positional_embedding", 2)              # used for nothing else
        grid, blocks = math.isqrt(cells - 1), [len({m[1] for m in map(re.compile(rf"layer{i}\.(\d+)\.").match, names) if m}) for i in (1, 2, 3, 4)]
        if 0 in blocks:                                                      # none of a layer's blocks: its first is missing
            need(f"layer{1 + blocks.index(0)}.0.conv1.weight", 4)
        if (cells, width) != (1 + grid * grid, 32 * channels) or channels != 2 * half:
            need("attnpool.positional_embedding", 2, f"[1 + a square, {64 * half}]")
        return (channels, blocks, grid)

    def forward(self, pixels):                                               # [B, 3, I, I]
        x = F.relu(self.bn1(self.conv1(pixels)))                             # [B, C/2, I/2, I/2]
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)                 # [B, C, I/4, I/4]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return x.flatten(2).transpose(1, 2)                                  # [B, V, I/32, I/32] -> [B, N, V]


# --------------------------------------------------------------------------------------------------------- loading

def load_encoder(folder):
    """Folder with a public CLIP -> (float32 VisionTransformer or ModifiedResNet in eval mode, path of its weights).

    Raises UserError for a missing or damaged file, and for every missing, unknown or misshapen tensor of the image half.
    """
    paths = [Path(folder) / file for file in FILES if (Path(folder) / file).is_file()]
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder, expected one with {FILES[0]} or {FILES[1]}")
    if not paths:
        raise UserError(f"{folder}: found neither {FILES[0]} nor {FILES[1]}; older formats of weights are not read")
    for path in paths:
        tensors, _ = read_safetensors(path, "the weights of a CLIP")
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        for kind, sign in ((VisionTransformer, "vision_model."), (ModifiedResNet, "visual.layer1.")):
            if any(name.startswith(sign) for name in shapes):
                return read_encoder(kind, shapes, path), path
    raise UserError(f"{paths[0]}: found no tensor vision_model.* nor visual.layer1.*, expected a CLIP vision transformer in the names of"
                    " transformers or a CLIP ResNet in OpenAI's names")


def public_name(kind, name):
    """Our name of an encoder's tensor -> its name in public files."""
    for ours, theirs in kind.renamed:
        name = name.replace(ours, theirs)
    return kind.name_prefix + name


def read_encoder(kind, shapes, path):
    """A file of weights, the shapes of whose tensors are known -> encoder of this kind."""
    def need(name, dimensions, expected=None):
        """The shape of a tensor that tells a size; `expected`: there is none like it, say so."""
        if kind.name_prefix + name not in shapes:
            raise UserError(f"{path}: tensor {kind.name_prefix}{name} is missing")
        shape = shapes[kind.name_prefix + name]
        if expected or len(shape) != dimensions or min(shape) < 1:
            raise UserError(f"{path}: tensor {kind.name_prefix}{name} has shape {shape}, expected {expected or f'{dimensions} dimensions of at least 1'}")
        return shape

    names = [name.removeprefix(kind.name_prefix) for name in shapes if name.startswith(kind.name_prefix)]
    with torch.device("meta"):                                               # shapes only
        model = kind(*kind.sizes(need, names, path.parent))
    wanted = {public_name(kind, name): tensor for name, tensor in model.state_dict().items()}
    tensors, _ = read_tensors([path], wanted, f"the weights of a {kind.__name__}",
                              passed_by=lambda name: name.startswith(TEXT_HALF) or kind.unused.fullmatch(name))
    model.load_state_dict({name: tensors[public_name(kind, name)].float() for name in model.state_dict()}, assign=True)
    return model.requires_grad_(False).eval()


# --------------------------------------------------------------------------------------------------- preprocessing

def resize_rows(x, length, first, count):
    """uint8 [rows, ...], its rows resized to `length` -> uint8 [count, ...], those from `first` on. Bicubic, antialiased.

    Every new row is a sum of old ones around its centre, weighted by Keys' cubic (a = -1/2), which is stretched over more
    rows where the image shrinks. In integers, weights in units of 2^-22, rounded and clamped: so has Pillow the pixels.
    """
    if length == len(x):
        return x[first:first + count]
    scale = len(x) / length
    reach = 2 * max(scale, 1.0)
    centre = (torch.arange(first, first + count, dtype=torch.float64) + 0.5) * scale             # [count]
    begin, end = (centre - reach + 0.5).int().clamp(min=0), (centre + reach + 0.5).int().clamp(max=len(x))
    taps = begin[:, None] + torch.arange(int((end - begin).max()))                               # [count, taps]
    d = (taps + 0.5 - centre[:, None]).abs() * 2 / reach
    weight = torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2)
    weight = weight * (d < 2) * (taps < end[:, None])
    weight = (weight / weight.sum(1, keepdim=True) * 2**22).round().int()
    total = torch.full((count, *x.shape[1:]), 2**21, dtype=torch.int32)                          # half of a unit: rounds
    for tap, w in zip(taps.clamp(max=len(x) - 1).T, weight.T):
        total += x[tap].int() * w.view(-1, *[1] * (x.dim() - 1))
    return (total >> 22).clamp(0, 255).to(torch.uint8)


def preprocess(pixels, size, squash=False):
    """One decoded image, uint8 RGB [height, width, 3] -> uint8 [3, size, size].

    As CLIP does it: the shorter side becomes `size`, then the centre is cut out. squash: both sides become `size`.
    Columns first, as Pillow has always done it (its newest versions begin with the rows where an image is very tall).
    """
    height, width = pixels.shape[:2]
    short = min(height, width)
    rows, columns = (size, size) if squash else (int(size * height / short), int(size * width / short))
    x = torch.from_numpy(np.array(pixels)).transpose(0, 1).contiguous()                          # [width, height, 3]
    x = resize_rows(x, columns, round((columns - size) / 2), size).transpose(0, 1).contiguous()  # [height, size, 3]
    return resize_rows(x, rows, round((rows - size) / 2), size).permute(2, 0, 1)


def normalise(pixels):
    """uint8 [B, 3, I, I] -> what CLIP was trained on."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


# ---------------------------------------------------------------------------- images (from here on plumbing)

class Broken(Exception):
    """An image that cannot be decoded."""


def open_images(source, ids_file=None):
    """A folder or an .npy file of pixels -> (ids in order, names in order, function: number -> uint8 [height, width, 3])."""
    source = Path(source)
    if source.is_dir():
        if ids_file:
            raise UserError("--ids goes with an .npy file; the images of a folder are called after their files")
        return open_folder(source)
    pixels = open_array(source, np.uint8, "[images, height, width, 3]")
    if pixels.shape[3] != 3 or 0 in pixels.shape:
        raise UserError(f"{source}: found shape {list(pixels.shape)}, expected [images, height, width, 3]")
    path = Path(ids_file or source.with_suffix(".json"))
    if not path.exists():
        raise UserError(f"{path}: no such file, expected a JSON list of the ids of {source.name}")
    ids = check_ids(path, parse_json(path.read_bytes(), path), len(pixels))
    return ids, ids, lambda i: pixels[i]


def open_folder(folder):
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise UserError("decoding images needs Pillow (pip install pillow); an .npy file of pixels does not") from None
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not names:
        raise UserError(f"{folder}: found no .jpg, .jpeg or .png file")
    seen = {}
    for name in names:
        coco = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", Path(name).stem)      # COCO_train2014_000000000009.jpg -> 9
        id = str(int(coco[1])) if coco else Path(name).stem
        if id in seen:
            raise UserError(f"{folder}: {seen[id]} and {name} have the same id {id}")
        seen[id] = name

    def read(i):
        content = (folder / names[i]).read_bytes()                           # a failing disk is no broken image
        try:
            image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
            if image.mode == "F" or image.mode.startswith("I"):              # would be cut off at 255
                raise ValueError(f"{image.mode}, more than 8 bits a colour")
            return np.asarray(image.convert("RGB"))
        except MemoryError:
            raise
        except Exception as error:                                           # decoders raise nearly everything
            what = "unknown format" if isinstance(error, UnidentifiedImageError) else error
            raise Broken(f"{folder / names[i]}: not a whole image ({what})") from None

    return list(seen), names, read


def read_ahead(load, start, count, size):
    """Yield for every batch of numbers from `start` on the futures of load(number). Threads are one batch ahead, no further, so that
    memory does not grow with the number of images."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ahead = []
        for first in range(start, count + size, size):
            batch, ahead = ahead, [pool.submit(load, i) for i in range(first, min(first + size, count))]
            if batch:
                yield batch


# ---------------------------------------------------------------------------------------------------- feature file

def open_array(path, dtype, shape):
    """An .npy file -> memory-mapped array. Raises UserError where it is missing, cut, pickled or of another type or shape."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:                                               # numpy reads the header as Python: it raises nearly everything
        raise UserError(f"{path}: not a whole .npy file of numbers ({error})") from None
    if array.dtype != dtype or array.ndim != shape.count(",") + 1:
        raise UserError(f"{path}: found {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} {shape}")
    if Path(path).stat().st_size != array.offset + array.nbytes:
        raise UserError(f"{path}: found {Path(path).stat().st_size} bytes, its header says {array.offset + array.nbytes}")
    return array


def check_ids(path, ids, count):
    """What a JSON file has as ids -> list of str, one for each of `count` rows, no two the same. Raises UserError."""
    if not isinstance(ids, list) or any(type(id) not in (str, int) for id in ids):
        raise UserError(f"{path}: ids: found {str(ids)[:40]}, expected a list of strings")
    if len(ids) != count:
        raise UserError(f"{path}: found {len(ids)} ids for {count} rows")
    ids = [str(id) for id in ids]
    if len(set(ids)) < count:
        raise UserError(f"{path}: id {Counter(ids).most_common(1)[0][0]} is there twice")
    return ids


def load_features(path):
    """FILE.npy, with FILE.json beside it -> (memory-mapped float16 [images, N, V], {id: row}, the .json's content)."""
    path = Path(path)
    features, meta = open_array(path, np.float16, "[images, cells, width]"), read_json(path.with_suffix(".json"))
    ids, about = check_ids(path.with_suffix(".json"), meta.get("ids"), len(features)), [meta.get("grid"), meta.get("width")]
    if "grid" in meta and about != [[math.isqrt(features.shape[1])] * 2, features.shape[2]]:
        raise UserError(f"{path}: found {features.shape[1]} cells of width {features.shape[2]}; {path.with_suffix('.json').name} says"
                        f" grid {about[0]}, width {about[1]}")
    return features, {id: row for row, id in enumerate(ids)}, meta


def header(shape):
    """The first bytes of a float16 .npy. numpy leaves room for a longer first number: all counts of rows fit in place."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, dict(descr="<f2", fortran_order=False, shape=shape))
    return content.getvalue()


class Writer:
    """A feature file as it grows: rows are appended to FILE.npy.part, and FILE.json.part says how many of them count.

    Both are put in place when they are whole, the .npy last. Raises UserError where they exist.
    """

    def __init__(self, out, settings, ids, names):
        self.out, self.about = Path(out), Path(out).with_suffix(".json")
        self.part, self.progress = Path(f"{self.out}.part"), Path(f"{self.about}.part")
        self.ids, self.names, self.cells = ids, names, (math.prod(settings["grid"]), settings["width"])
        settings = json.loads(json.dumps(settings))                          # tuples become lists, as they will be read
        images = hashlib.sha256(json.dumps([names, ids]).encode()).hexdigest()
        self.state = {"settings": settings, "images": images, "done": 0, "rows": 0, "skipped": []}
        saved = read_json(self.progress) if self.progress.exists() else None
        if self.out.exists() or self.about.exists() and not saved:           # of an interrupted run .json may be in place already
            raise UserError(f"{self.out if self.out.exists() else self.about}: exists already; remove it to compute it again")
        if saved and self.fits(saved):
            self.state = saved
        elif saved:
            print(f"note: {self.part} does not fit this command (settings, weights or images); beginning again", file=sys.stderr)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.part.touch()
        self.file = open(self.part, "r+b")
        lock(self.part, self.file.fileno())
        self.file.write(header((len(ids), *self.cells)))
        self.file.truncate(self.end(self.state["rows"]))                     # rows that were written after the last save
        self.file.seek(0, os.SEEK_END)
        self.save()

    def fits(self, saved):
        """Is this the state of a run with the same settings and images, whose rows are all on the disk?"""
        counts = [saved.get(key) for key in ("rows", "done")]
        return ({**saved, "done": 0, "rows": 0, "skipped": []} == self.state and isinstance(saved.get("skipped"), list)
                and all(type(count) is int and count >= 0 for count in counts)
                and counts[0] + len(saved["skipped"]) == counts[1] <= len(self.ids)
                and self.part.exists() and self.part.stat().st_size >= self.end(counts[0]))

    def end(self, rows):
        """The size of a file with so many rows."""
        return len(header((len(self.ids), *self.cells))) + rows * 2 * math.prod(self.cells)

    def append(self, rows, count, skipped):
        """`count` more images are done: `rows` (array [B, N, V], or None) of the good ones, and the names of the others."""
        if rows is not None:
            try:
                self.file.write(rows.astype("<f2").tobytes())
                self.file.flush()
            except OSError as error:
                raise UserError(f"{self.part}: cannot be written: {error.strerror}; with room again the same command goes on") from None
            self.state["rows"] += len(rows)
        self.state["done"] += count
        self.state["skipped"] += skipped

    def save(self):
        self.file.flush()
        os.fsync(self.file.fileno())                                         # the rows are on the disk before the number is
        write_whole(self.progress, json.dumps(self.state).encode())

    def finish(self, model):
        """Put the true number of rows into the header, and both files in their places."""
        self.file.seek(0)
        self.file.write(header((self.state["rows"], *self.cells)))
        self.save()
        self.file.close()
        skipped = set(self.state["skipped"])
        meta = {"model": model, **self.state["settings"], "skipped": self.state["skipped"], "sha256": digest(self.part),
                "ids": [id for id, name in zip(self.ids, self.names) if name not in skipped]}
        write_whole(self.about, json.dumps(meta, indent=1).encode() + b"\n")
        os.replace(self.part, self.out)
        self.progress.unlink()


# -------------------------------------------------------------------------------------------------------- the command

def extract(args):
    if Path(args.out).suffix != ".npy":
        raise UserError(f"--out {args.out}: expected a name that ends with .npy")
    model, weights = load_encoder(args.model)
    size = model.trained_size if args.size is None else args.size
    if size < 1 or size % model.stride:
        raise UserError(f"--size: found {size}, expected a multiple of {model.stride}")
    side, (ids, names, read) = size // model.stride, open_images(args.images, args.ids)
    settings = {"kind": model.kind, "weights": digest(weights)[:16], "features": model.output, "grid": [side, side], "width": model.width,
                "preprocessing": {"size": size, "trained_size": model.trained_size, "mean": MEAN, "std": STD,
                                  "resize": "both sides, bicubic" if args.squash else "shorter side, bicubic, then centre crop"}}
    writer = Writer(args.out, settings, ids, names)
    state, count, saved_at = writer.state, len(ids), time.monotonic()
    if state["skipped"] and not args.skip_broken:
        raise UserError(f"{writer.progress}: the interrupted run left out broken images, as {state['skipped'][0]}; go on with --skip-broken")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    stop = catch_signals()
    batches = read_ahead(lambda i: preprocess(read(i), size, args.squash), state["done"], count, args.batch_size)
    with contextlib.closing(batches), torch.inference_mode(), \
            tqdm(total=count, initial=state["done"], unit=" images", smoothing=0.05, disable=None) as bar:
        for batch in batches:
            problems = {names[state["done"] + i]: image.exception() for i, image in enumerate(batch)}
            broken = {name: problem for name, problem in problems.items() if isinstance(problem, Broken)}
            for problem in broken.values():
                if not args.skip_broken:
                    writer.save()
                    raise UserError(f"{problem}; --skip-broken leaves such images out")
                bar.write(f"left out: {' '.join(str(problem).split())}", file=sys.stderr)
            good, features = [image.result() for image in batch if not isinstance(image.exception(), Broken)], None
            if good:
                features = model(normalise(torch.stack(good).to(device))).half()                 # [B, N, V]
                if not features.isfinite().all():
                    raise UserError(f"images {state['done'] + 1} to {state['done'] + len(batch)}: a feature is not finite in float16")
                features = features.cpu().numpy()
            writer.append(features, len(batch), list(broken))
            bar.update(len(batch))
            if stop or time.monotonic() - saved_at > SAVE_EVERY:
                writer.save()
                saved_at = time.monotonic()
            if stop:
                break
    if state["done"] < count:
        leave(f"stopped at image {state['done']} of {count}; the same command goes on", 128 + stop[0])
    if not state["rows"]:
        raise UserError(f"{args.images}: none of the {count} images can be decoded")
    writer.finish(Path(args.model).resolve().name)
    print(f"{args.out}: {state['rows']:,} images x {side * side} cells x {model.width}, float16"
          + (f"; {len(state['skipped'])} broken images left out, named in {writer.about}" if state["skipped"] else ""))


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder with a CLIP's safetensors file (and config.json)")
    parser.add_argument("--images", required=True, help="folder of .jpg and .png files, or .npy file, uint8 [images, height, width, 3]")
    parser.add_argument("--ids", help="JSON list of the ids of an .npy file's images (default: beside it, .json for .npy)")
    parser.add_argument("--out", required=True, help="the feature file to write, FILE.npy; FILE.json comes with it")
    parser.add_argument("--batch-size", type=in_range(int, 1), default=64, help="images in one pass of the encoder (default: 64)")
    parser.add_argument("--size", type=int, help="side of the encoder's input in pixels (default: as it was trained)")
    parser.add_argument("--squash", action="store_true", help="resize both sides to --size instead of cutting the centre out")
    parser.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be decoded (default: stop)")
    extract(parser.parse_args())


if __name__ == "__main__":
    run(main)
