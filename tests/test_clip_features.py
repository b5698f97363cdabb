"""The encoders against transformers and a second ResNet, the pixels against Pillow, the command in subprocesses."""
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import clip_features
from clip_features import load_encoder, load_features, normalise, preprocess
from conftest import ROOT, read_json, run
from data import UserError

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=8, projection_dim=20)
TEXT = dict(hidden_size=20, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=30, max_position_embeddings=9)


def make_vit(folder, whole=False, dtype=None, seed=0, **sizes):
    """Write a tiny random CLIP by transformers -> the transformers model (eval mode)."""
    transformers = pytest.importorskip("transformers", reason="transformers makes the checkpoints to compare with")
    sizes = SIZES | sizes
    torch.manual_seed(seed)
    if whole:
        model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=sizes, text_config=TEXT, projection_dim=20))
    else:
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0, 0.2) if "norm" in name and name.endswith("weight") else parameter.normal_(0.0, 0.15)
    model.to(dtype or torch.float32).save_pretrained(folder, safe_serialization=True)
    return model.float().eval()


def pixels(count=3, size=24, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- vision transformer

def compare(theirs, ours, x, **more):
    """Every hidden state within 1e-5, the features exactly the last one without the class token."""
    found = []
    hooks = [module.register_forward_hook(lambda module, args, output: found.append(output)) for module in [ours.pre_norm, *ours.layers]]
    with torch.no_grad():
        expected, features = theirs(pixel_values=x, output_hidden_states=True, **more), ours(x)
    for hook in hooks:
        hook.remove()
    assert len(found) == len(expected.hidden_states)
    for i, (a, b) in enumerate(zip(found, expected.hidden_states)):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-5, f"hidden state {i}"
    assert (features - expected.last_hidden_state[:, 1:]).abs().max() < 1e-5
    assert expected.last_hidden_state.std() > 0.5                # the comparison is not one of zeros


OTHER = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3, image_size=40, patch_size=10, layer_norm_eps=1e-3)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("sizes", [SIZES, OTHER], ids=["24px", "40px"])
def test_every_hidden_state_equals_transformers(activation, sizes, tmp_path):
    theirs = make_vit(tmp_path, hidden_act=activation, **sizes)
    ours, path = load_encoder(tmp_path)
    assert path == tmp_path / "model.safetensors" and (ours.width, ours.stride) == (sizes["hidden_size"], sizes["patch_size"])
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training
    compare(theirs, ours, pixels(size=sizes["image_size"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_whole_clip(dtype, tmp_path):
    """The text half, the projections and the buffers of old files are passed by; 16-bit weights become float32."""
    theirs = make_vit(tmp_path, whole=True, dtype=dtype)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path) | {"vision_model.embeddings.position_ids": torch.arange(10)[None], "text_model.embeddings.position_ids": torch.arange(9)[None]}
    assert any(name.startswith("text_model.") for name in tensors) and "visual_projection.weight" in tensors
    save_file(tensors, path)
    compare(theirs.vision_model, load_encoder(tmp_path)[0], pixels())


def test_config_may_leave_out_what_is_usual(tmp_path):
    """Public config.json files hold only what differs from ViT-B/32; heads and activation come from there as well."""
    theirs = make_vit(tmp_path, hidden_size=24, intermediate_size=3072, num_attention_heads=12, hidden_act="quick_gelu")
    config = tmp_path / "config.json"
    found = read_json(config)
    config.write_text(json.dumps({k: v for k, v in found.items() if k not in ("intermediate_size", "num_attention_heads", "hidden_act", "layer_norm_eps")}))
    compare(theirs, load_encoder(tmp_path)[0], pixels())
    config.write_text(json.dumps({"model_type": "clip", "vision_config": {k: v for k, v in found.items() if k != "num_attention_heads"}}))
    compare(theirs, load_encoder(tmp_path)[0], pixels())


def test_one_head(tmp_path):
    compare(make_vit(tmp_path, num_attention_heads=1), load_encoder(tmp_path)[0], pixels())


@pytest.mark.parametrize("size", [16, 40, 64])
def test_other_resolutions(size, tmp_path):
    """Only the grid part of the position table is interpolated: written out here, and as transformers has it."""
    theirs = make_vit(tmp_path)
    ours, side = load_encoder(tmp_path)[0], size // 8
    table = load_file(tmp_path / "model.safetensors")["vision_model.embeddings.position_embedding.weight"]
    grid = F.interpolate(table[1:].reshape(1, 3, 3, 32).permute(0, 3, 1, 2), size=(side, side), mode="bicubic", align_corners=False)
    expected = torch.cat([table[:1], grid.permute(0, 2, 3, 1).reshape(side * side, 32)])
    assert torch.allclose(ours.position_table(side), expected, atol=1e-6) and torch.equal(ours.position_table(3), table)
    compare(theirs, ours, pixels(size=size), interpolate_pos_encoding=True)
    with torch.no_grad():
        assert ours(pixels(size=size)).shape == (3, side * side, 32)


# ------------------------------------------------------------------------------------------------- modified ResNet

class Reference(nn.Module):
    """CLIP's ResNet a second time, from the paper: a flat state dict and nn's own batch norm, pools as modules."""

    def __init__(self, channels, blocks, grid):
        super().__init__()
        self.names, c, h = [], channels, channels // 2
        self.stem = nn.Sequential(nn.Conv2d(3, h, 3, 2, 1, bias=False), nn.BatchNorm2d(h), nn.ReLU(), nn.Conv2d(h, h, 3, 1, 1, bias=False),
                                  nn.BatchNorm2d(h), nn.ReLU(), nn.Conv2d(h, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(), nn.AvgPool2d(2))
        self.main, self.side, d_in = nn.ModuleDict(), nn.ModuleDict(), c
        for i, count in enumerate(blocks):
            for j in range(count):
                d, stride, name = c << i, 2 if i > 0 and j == 0 else 1, f"{i + 1}_{j}"
                self.main[name] = nn.Sequential(
                    nn.Conv2d(d_in, d, 1, bias=False), nn.BatchNorm2d(d), nn.ReLU(), nn.Conv2d(d, d, 3, 1, 1, bias=False), nn.BatchNorm2d(d),
                    nn.ReLU(), nn.AvgPool2d(stride), nn.Conv2d(d, 4 * d, 1, bias=False), nn.BatchNorm2d(4 * d))
                if j == 0:
                    self.side[name] = nn.Sequential(nn.AvgPool2d(stride), nn.Conv2d(d_in, 4 * d, 1, bias=False), nn.BatchNorm2d(4 * d))
                d_in = 4 * d
        self.table = nn.Parameter(torch.randn(grid * grid + 1, d_in))

    def forward(self, x):
        maps = [self.stem(x)]
        for name, block in self.main.items():
            short = self.side[name](maps[-1]) if name in self.side else maps[-1]
            maps.append(torch.relu(block(maps[-1]) + short))
        return maps

    def public(self):
        """The state dict under OpenAI's names, with the attention pool."""
        numbers = {"stem": {0: "conv1", 1: "bn1", 3: "conv2", 4: "bn2", 6: "conv3", 7: "bn3"},
                   "main": {0: "conv1", 1: "bn1", 3: "conv2", 4: "bn2", 7: "conv3", 8: "bn3"}, "side": {1: "downsample.0", 2: "downsample.1"}}
        width, out = self.table.size(1), {"visual.attnpool.positional_embedding": self.table.detach()}
        for name, tensor in self.state_dict().items():
            part, *rest = name.split(".")
            if part == "stem":
                out[f"visual.{numbers[part][int(rest[0])]}.{rest[1]}"] = tensor
            elif part in numbers:
                out[f"visual.layer{rest[0].replace('_', '.')}.{numbers[part][int(rest[1])]}.{rest[2]}"] = tensor
        for name in "qkvc":
            out |= {f"visual.attnpool.{name}_proj.weight": torch.randn(width, width), f"visual.attnpool.{name}_proj.bias": torch.randn(width)}
        return {name: tensor.clone() for name, tensor in out.items()}


def make_resnet(folder, file="model.safetensors", channels=8, blocks=(2, 1, 3, 1), grid=2, seed=0):
    torch.manual_seed(seed)
    model = Reference(channels, blocks, grid)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3), module.running_var.uniform_(0.3, 2.0)
                module.weight.normal_(1, 0.2), module.bias.normal_(0, 0.2)
    folder.mkdir(exist_ok=True)
    save_file(model.public() | {"positional_embedding": torch.ones(9, 20), "transformer.resblocks.0.ln_1.weight": torch.ones(20), "ln_final.bias": torch.ones(20),
                                "text_projection": torch.ones(20, 20), "token_embedding.weight": torch.ones(30, 20), "logit_scale": torch.tensor(4.0)}, folder / file)
    return model.eval()


def test_a_resnet_without_one_of_its_layers_is_refused(tmp_path):
    make_resnet(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    for layer in (2, 4):
        save_file({name: tensor for name, tensor in whole.items() if f".layer{layer}." not in name}, path)
        with pytest.raises(UserError, match=rf"layer{layer}\.0\.conv1\.weight is missing"):
            load_encoder(tmp_path)


@pytest.mark.parametrize("file", clip_features.FILES)
@pytest.mark.parametrize("shape", [(8, (2, 1, 3, 1), 2), (12, (1, 2, 1, 2), 3)])
def test_every_feature_map_equals_a_second_resnet(file, shape, tmp_path):
    channels, blocks, grid = shape
    theirs = make_resnet(tmp_path, file, *shape)
    ours, path = load_encoder(tmp_path)
    assert path.name == file and (ours.width, ours.stride, ours.trained_size) == (32 * channels, 32, 32 * grid)
    found = []
    for layer in (ours.layer1, ours.layer2, ours.layer3, ours.layer4):
        for block in layer:
            block.register_forward_hook(lambda module, args, output: found.append(output))
    for size in (32 * grid, 96, 160):
        found.clear()
        with torch.no_grad():
            features, (_, *maps) = ours(pixels(size=size)), theirs(pixels(size=size))
        assert len(found) == len(maps) == sum(blocks)
        for i, (a, b) in enumerate(zip(found, maps)):
            assert a.shape == b.shape and (a - b).abs().max() < 1e-5 * b.abs().max() and b.std() > 0.1, f"block {i}"
        side = size // 32                                        # cell row * side + column
        assert torch.allclose(features[:, side + 1] if side > 1 else features[:, 0], maps[-1][:, :, min(1, side - 1), min(1, side - 1)], rtol=1e-4, atol=1e-4)


def test_public_sizes():
    """Counts of the published encoders: RN50 is torchvision's (25,557,032 with its 2,049,000 of the classifier) with another
    stem, plus 2 statistics for each of 26,624 normed channels; ViT-B/32 has 87,456,000, of which 1,536 in its final norm."""
    with torch.device("meta"):
        resnet = clip_features.ModifiedResNet(64, (3, 4, 6, 3), 7)
        vit = clip_features.VisionTransformer(768, 32, 7, 12, 3072, 12, "quick_gelu", 1e-5)
    counts = [sum(p.numel() for p in model.parameters()) for model in (resnet, vit)]
    stem = 9408 + 128, 864 + 64 + 9216 + 64 + 18432 + 128
    assert counts == [25_557_032 - 2_049_000 - stem[0] + stem[1] + 2 * 26_624, 87_456_000 - 1_536]
    assert (resnet.width, resnet.trained_size, vit.width, vit.trained_size) == (2048, 224, 768, 224)


def test_a_wrong_encoder_is_one_line(tmp_path):
    """Vision transformer and ResNet: every file that is not what it should be is refused, and the tensor is named."""
    make_vit(tmp_path / "vit")
    make_resnet(tmp_path / "rn")

    def refused(folder, *words):
        with pytest.raises(UserError) as error:
            load_encoder(folder)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value

    fc1, table, conv = "vision_model.encoder.layers.1.mlp.fc1.weight", "vision_model.embeddings.position_embedding.weight", "visual.layer3.1.conv2.weight"
    patch, pool, mean = "vision_model.embeddings.patch_embedding.weight", "visual.attnpool.positional_embedding", "visual.layer1.0.bn1.running_mean"
    for folder, changes in (
            (tmp_path / "vit", [
                ({fc1: None}, (fc1, "missing")), ({fc1: torch.ones(48, 31)}, (fc1, "[48, 31]", "[48, 32]")), ({fc1: torch.ones(48, 32).long()}, (fc1, "int64", "float32")),
                ({fc1: torch.ones(48, 32).double()}, (fc1, "float64")), ({"vision_model.extra": torch.ones(2)}, ("vision_model.extra", "unknown")),
                ({"visual.layer1.0.conv1.weight": torch.ones(2)}, ("visual.layer1.0.conv1.weight", "unknown")),
                ({table: torch.ones(9, 32)}, (table, "[9, 32]", "a square")), ({table: torch.ones(5, 32)}, ("image_size", "24", "16")),
                ({table: torch.ones(10, 31)}, (table, "[10, 31]", "[10, 32]")), ({table: None}, (table, "missing")),
                ({patch: torch.ones(32, 3, 8)}, (patch, "[32, 3, 8]", "4 dimensions")),
                ({patch: torch.ones(32, 1, 8, 8)}, (patch, "[32, 1, 8, 8]", "[32, 3, 8, 8]")), ({patch: torch.ones(32, 3, 0, 0)}, (patch, "at least 1")),
                ({"vision_model.encoder.layers.7.layer_norm1.bias": torch.ones(32)}, ("num_hidden_layers", "found 3", "4"))]),
            (tmp_path / "rn", [
                ({conv: None}, (conv, "missing")), ({conv: torch.ones(32, 32, 1, 1)}, (conv, "[32, 32, 1, 1]", "[32, 32, 3, 3]")),
                ({conv: torch.ones(32, 32, 3, 3).int()}, (conv, "int32")), ({pool: None}, (pool, "missing")), ({pool: torch.ones(6, 256)}, (pool, "[6, 256]", "square")),
                ({pool: torch.ones(5, 128)}, (pool, "[5, 128]", "256")), ({mean: None}, (mean, "missing")), ({"visual.proj": torch.ones(2)}, ("visual.proj", "unknown")),
                ({"extra": torch.ones(2)}, ("extra", "unknown")),
                ({"visual.conv3.weight": None}, ("visual.conv3.weight", "missing")), ({"visual.layer2.9.conv1.weight": torch.ones(2)}, ("layer2.9", "unknown"))])):
        path = folder / "model.safetensors"
        tensors, whole = load_file(path), path.read_bytes()
        for changed, words in changes:
            save_file({k: v for k, v in (tensors | changed).items() if v is not None}, path)
            refused(folder, str(folder), *words)
        for broken in (b"", whole[:7], whole[:500], whole[:-1]):
            path.write_bytes(broken)
            refused(folder, str(path), "safetensors")
        path.write_bytes(whole)
        load_encoder(folder)
    config = tmp_path / "vit" / "config.json"
    settings = read_json(config)
    for key, value in (("num_attention_heads", 5), ("num_attention_heads", 0), ("num_attention_heads", True), ("hidden_act", "relu"), ("hidden_act", []), ("layer_norm_eps", "x"),
                       ("hidden_size", 64), ("intermediate_size", 49), ("num_hidden_layers", 2), ("patch_size", 16), ("image_size", 32), ("model_type", "siglip")):
        config.write_text(json.dumps(settings | {key: value}))
        refused(tmp_path / "vit", str(config), key, repr(value))
    for text, word in (("{", "not JSON"), ("[]", "expected a JSON object"), ('{"vision_config": 3}', "expected a JSON object")):
        config.write_text(text)
        refused(tmp_path / "vit", str(config), word)
    config.unlink()
    refused(tmp_path / "vit", str(config), "no such file")
    save_file({"a": torch.ones(1)}, tmp_path / "rn" / "model.safetensors")
    refused(tmp_path / "rn", "vision_model.", "visual.layer1.")
    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path, "neither model.safetensors nor open_clip_model.safetensors")


def test_the_second_file_where_the_first_is_something_else(tmp_path):
    """Some public folders hold model.safetensors of another library beside open_clip_model.safetensors."""
    make_resnet(tmp_path, "open_clip_model.safetensors")
    save_file({"stem.conv1.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    assert load_encoder(tmp_path)[1].name == "open_clip_model.safetensors"


# --------------------------------------------------------------------------------------------------- preprocessing

def picture(height, width, kind, seed=0):
    """uint8 [height, width, 3]: noise, or a smooth gradient with an edge."""
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    smooth = np.stack([255 * x + 0 * y, 255 * y + 0 * x, 127 + 120 * np.sin(6 * x + 9 * y)], 2)
    smooth[height // 3:height // 2, width // 4:width // 3] = 255
    return smooth.astype(np.uint8)


def pillow_preprocess(image, size, squash=False):
    """What CLIP does, by Pillow -> uint8 [3, size, size]. One axis at a time: the order is Pillow's classic one."""
    Image = pytest.importorskip("PIL.Image")
    width, height = image.size
    if squash:
        columns = rows = size
    elif width <= height:
        columns, rows = size, int(size * height / width)
    else:
        columns, rows = int(size * width / height), size
    image = image.resize((columns, height), Image.Resampling.BICUBIC).resize((columns, rows), Image.Resampling.BICUBIC)
    left, top = int(round((columns - size) / 2.0)), int(round((rows - size) / 2.0))
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


SHAPES = [(37, 91), (91, 37), (224, 224), (500, 333), (333, 500), (480, 640), (225, 226), (8, 5), (1, 1), (1000, 230), (3, 400)]


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_pixels_equal_pillow(kind, squash):
    Image = pytest.importorskip("PIL.Image")
    for height, width in SHAPES:
        for size in (224, 32, 97):
            image = Image.fromarray(picture(height, width, kind))
            found = preprocess(np.asarray(image), size, squash)
            assert found.dtype == torch.uint8 and found.shape == (3, size, size)
            difference = np.abs(found.numpy().astype(int) - pillow_preprocess(image, size, squash))
            assert difference.max() <= 1, f"{height} x {width} -> {size}: {difference.max()}"
            if 0.5 <= height / width <= 2 and squash is False:   # in one call, as CLIP has it
                whole = image.resize((size, int(size * height / width)) if width <= height else (int(size * width / height), size), Image.Resampling.BICUBIC)
                left, top = int(round((whole.width - size) / 2.0)), int(round((whole.height - size) / 2.0))
                whole = np.asarray(whole.crop((left, top, left + size, top + size))).transpose(2, 0, 1).astype(int)
                assert np.abs(found.numpy() - whole).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_photographs(mode, tmp_path):
    """Two real photographs, cut to odd sizes, as JPEG and PNG of each kind, against one call of Pillow."""
    Image = pytest.importorskip("PIL.Image")
    from sklearn.datasets import load_sample_images
    for number, pixels in enumerate(load_sample_images().images):
        image = Image.fromarray(pixels[3 * number:, 7:]).convert(mode)
        image.save(tmp_path / f"{number}.{'jpg' if mode in ('RGB', 'L') else 'png'}")
    _, names, read = clip_features.open_images(tmp_path)
    assert len(names) == 2
    for i, name in enumerate(names):
        with Image.open(tmp_path / name) as image:
            assert image.mode == mode and image.height % 2 + image.width % 2 > 0
            whole = image.convert("RGB")
        whole = whole.resize((int(224 * whole.width / whole.height), 224), Image.Resampling.BICUBIC)
        left = int(round((whole.width - 224) / 2.0))
        expected = np.asarray(whole.crop((left, 0, left + 224, 224))).transpose(2, 0, 1).astype(int)
        assert np.abs(preprocess(read(i), 224).numpy() - expected).max() <= 1 and expected.std() > 20


def test_kinds_of_files(tmp_path):
    """Grey, RGBA, palette and 16-bit pictures are converted as CLIP does; ids come from COCO's names and from others."""
    Image = pytest.importorskip("PIL.Image")
    base = Image.fromarray(picture(37, 91, "smooth"))
    alpha = base.copy()
    alpha.putalpha(Image.fromarray(picture(37, 91, "noise")[:, :, 0]))
    base.save(tmp_path / "COCO_train2014_000000000009.jpg")
    base.convert("L").save(tmp_path / "000000000123.PNG")
    alpha.save(tmp_path / "rgba.png")
    base.convert("P").save(tmp_path / "palette.png")
    base.convert("CMYK").save(tmp_path / "cmyk.jpeg")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "deeper").mkdir()
    ids, names, read = clip_features.open_images(tmp_path)
    assert names == sorted(["COCO_train2014_000000000009.jpg", "000000000123.PNG", "rgba.png", "palette.png", "cmyk.jpeg"])
    assert dict(zip(names, ids)) == {"COCO_train2014_000000000009.jpg": "9", "000000000123.PNG": "123", "rgba.png": "rgba", "palette.png": "palette", "cmyk.jpeg": "cmyk"}
    for i, name in enumerate(names):
        with Image.open(tmp_path / name) as image:
            expected = pillow_preprocess(image.convert("RGB"), 64)
        assert np.abs(preprocess(read(i), 64).numpy().astype(int) - expected).max() <= 1, name


def test_normalise():
    """(x / 255 - mean) / std, by hand for black and white."""
    found = normalise(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 1, 1))[:, :, 0, 0]
    assert np.allclose(found, [[-1.79226, -1.75210, -1.48022], [1.93033, 2.07488, 2.14590]], atol=1e-4)


# ---------------------------------------------------------------------------------------------------- feature file

@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    make_vit(folder)
    return folder


def make_images(folder, count=11):
    Image = pytest.importorskip("PIL.Image")
    folder.mkdir()
    for i in range(count):
        Image.fromarray(picture(30 + 3 * i, 50 - 2 * i, "noise", i)).save(folder / f"COCO_val2014_{7 * i:012}.png")
    return folder


def command(vit, images, out, *more, ok=True):
    return run("clip_features.py", "--model", vit, "--images", images, "--out", out, "--batch-size", 4, *more, ok=ok)


def expected_features(vit, images, squash=False):
    """Picture by picture, by transformers and Pillow."""
    import transformers
    model, rows = transformers.CLIPVisionModel.from_pretrained(vit).eval(), []
    for image in images:
        x = torch.from_numpy(pillow_preprocess(image, 24, squash).copy()).float()[None] / 255
        x = (x - torch.tensor(clip_features.MEAN).view(3, 1, 1)) / torch.tensor(clip_features.STD).view(3, 1, 1)
        with torch.no_grad():
            rows.append(model(pixel_values=x).last_hidden_state[0, 1:])
    return torch.stack(rows).numpy()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("squash", [[], ["--squash"]])
def test_a_folder(vit, tmp_path, squash):
    Image = pytest.importorskip("PIL.Image")
    images, out = make_images(tmp_path / "images"), tmp_path / "new" / "f.npy"
    printed, errors = command(vit, images, out, *squash)
    assert "11 images x 9 cells x 32" in printed and errors == ""            # no progress bar where nobody watches
    features, row_of, meta = load_features(out)
    assert isinstance(features, np.memmap) and features.dtype == np.float16 and features.shape == (11, 9, 32)
    assert row_of == {str(7 * i): i for i in range(11)} and meta["ids"] == list(row_of) and meta["skipped"] == []
    expected = expected_features(vit, [Image.open(images / name) for name in files(images)], bool(squash))
    assert np.abs(features - expected).max() < 4e-3 and np.abs(expected).max() < 8               # float16: 2^-8 at 4 to 8
    assert meta["model"] == "tiny-vit" and meta["grid"] == [3, 3] and meta["width"] == 32 and "quick_gelu" in meta["kind"]
    assert meta["sha256"] == clip_features.digest(out) and meta["weights"] == clip_features.digest(vit / "model.safetensors")[:16]
    assert meta["preprocessing"]["size"] == 24 and ("both sides" in meta["preprocessing"]["resize"]) == bool(squash)
    assert files(out.parent) == ["f.json", "f.npy"]
    for name in ("f.npy", "f.json"):
        assert "exists already" in command(vit, images, out, ok=False)[1]
        (out.parent / name).rename(tmp_path / name)


def test_resnet_and_another_size(tmp_path):
    images = make_images(tmp_path / "images", 3)
    theirs = make_resnet(tmp_path / "rn")
    command(tmp_path / "rn", images, tmp_path / "f.npy", "--size", 96)
    features, _, meta = load_features(tmp_path / "f.npy")
    Image = pytest.importorskip("PIL.Image")
    x = normalise(torch.stack([torch.from_numpy(pillow_preprocess(Image.open(images / name), 96).copy()) for name in files(images)]))
    with torch.no_grad():
        expected = theirs(x)[-1].flatten(2).transpose(1, 2).numpy()
    assert features.shape == (3, 9, 256) and meta["grid"] == [3, 3] and "ResNet" in meta["kind"]
    assert np.allclose(features, expected, rtol=1e-3, atol=2e-3)


def make_array(folder, count=9, ids=None, size=24):
    pixels = np.random.default_rng(3).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    np.save(folder / "pixels.npy", pixels)
    (folder / "pixels.json").write_text(json.dumps(list(range(100, 100 + count)) if ids is None else ids))
    return folder / "pixels.npy"


def test_an_array(vit, tmp_path):
    """Pixels from an .npy file, ids beside it or named; no Pillow is needed (an empty module stands in its place)."""
    path = make_array(tmp_path)
    (tmp_path / "none" / "PIL").mkdir(parents=True)
    (tmp_path / "none" / "PIL" / "__init__.py").write_text("raise ImportError")
    (tmp_path / "other.json").write_text(json.dumps([f"x{i}" for i in range(9)]))
    for out, more, first in (("a.npy", [], "100"), ("b.npy", ["--ids", tmp_path / "other.json"], "x0")):
        run("clip_features.py", "--model", vit, "--images", path, "--out", tmp_path / out, *more, PYTHONPATH=str(tmp_path / "none"))
        features, row_of, _ = load_features(tmp_path / out)
        assert len(features) == 9 and row_of[first] == 0
    with torch.no_grad():
        x = normalise(torch.from_numpy(np.load(path)).permute(0, 3, 1, 2))
        assert np.abs(load_encoder(vit)[0](x).numpy() - features).max() < 4e-3
    (tmp_path / "images").mkdir()
    _, error = run("clip_features.py", "--model", vit, "--images", tmp_path / "images", "--out", tmp_path / "c.npy", ok=False, PYTHONPATH=str(tmp_path / "none"))
    assert "needs Pillow" in error


def start(arguments, save_every=0.0):
    """The command in a subprocess that notes its progress after every batch."""
    program = f"import sys, clip_features; clip_features.SAVE_EVERY = {save_every}; clip_features.run(clip_features.main)"
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def stop_at(process, progress, count, number):
    """Send a signal once `count` images are done -> (stderr, exit code, images done when it had ended)."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if progress.exists() and read_json(progress)["done"] >= count:
            process.send_signal(number)
            break
        time.sleep(0.005)
    _, error = process.communicate(timeout=120)
    return error, process.returncode, read_json(progress)["done"]


def test_a_stopped_run_goes_on(vit, tmp_path):
    """Stopped by Ctrl-C, killed, asked to stop: the same command each time, and in the end the same bytes as in one go."""
    path = make_array(tmp_path, 1200, size=40)
    command(vit, path, tmp_path / "whole.npy")
    arguments = ["--model", vit, "--images", path, "--out", tmp_path / "f.npy", "--batch-size", 4]
    progress, before = tmp_path / "f.json.part", 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        error, found, done = stop_at(start(arguments), progress, before + 40, number)
        assert found == code and before + 40 <= done < 1200 and not (tmp_path / "f.npy").exists()
        assert error == ("" if code == -9 else f"stopped at image {done} of 1200; the same command goes on\n")
        before = done
    with open(tmp_path / "f.npy.part", "ab") as file:                        # a row that was on its way
        file.write(b"x" * 777)
    _, error = command(vit, path, tmp_path / "f.npy")
    assert error == "" and "f.json.part" not in files(tmp_path) and "f.npy.part" not in files(tmp_path)
    for end in ("npy", "json"):
        assert (tmp_path / f"f.{end}").read_bytes() == (tmp_path / f"whole.{end}").read_bytes()


def in_process(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["clip_features.py", *map(str, arguments)])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        clip_features.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_crash_at_any_write(vit, tmp_path, monkeypatch):
    """The disk refuses the first write of a JSON, the second, ...: after each failure the same command ends with the same bytes."""
    path = make_array(tmp_path, 11)
    command(vit, path, tmp_path / "whole.npy")
    monkeypatch.setattr(clip_features, "SAVE_EVERY", 0.0)
    write_whole = clip_features.write_whole
    for fails in range(1, 9):
        out, calls = tmp_path / f"f{fails}.npy", []

        def failing(*arguments):
            calls.append(arguments)
            if len(calls) == fails:
                raise OSError("no space left")
            write_whole(*arguments)

        monkeypatch.setattr(clip_features, "write_whole", failing)
        arguments = ["--model", vit, "--images", path, "--out", out, "--batch-size", 4]
        with contextlib.suppress(OSError):
            in_process(monkeypatch, *arguments)
        gc.collect()                                             # a process that failed would be gone, and with it its lock
        if not out.exists():
            assert not out.with_suffix(".json").exists()
            monkeypatch.setattr(clip_features, "write_whole", write_whole)
            in_process(monkeypatch, *arguments)
        for end in (".npy", ".json"):
            assert out.with_suffix(end).read_bytes() == (tmp_path / "whole").with_suffix(end).read_bytes()
    assert fails > len(calls) >= 6                               # the last round met no failure


def test_a_part_that_was_cut(vit, tmp_path, monkeypatch, capsys):
    """Fewer rows on the disk than the progress says (a disk that lost them): noted, and computed again."""
    path = make_array(tmp_path, 11)
    command(vit, path, tmp_path / "whole.npy")
    (tmp_path / "f.json").mkdir()                                # nothing can be put in place here
    arguments = ["--model", vit, "--images", path, "--out", tmp_path / "f.npy", "--batch-size", 4]
    with pytest.raises(UserError, match="exists already"):
        in_process(monkeypatch, *arguments)
    (tmp_path / "f.json").rmdir()
    write_whole, calls = clip_features.write_whole, []
    monkeypatch.setattr(clip_features, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(clip_features, "write_whole", lambda *a: write_whole(*a) if calls.append(a) or len(calls) < 3 else os.truncate(tmp_path / "f.npy.part", 1500) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        in_process(monkeypatch, *arguments)
    monkeypatch.setattr(clip_features, "write_whole", write_whole)
    assert read_json(tmp_path / "f.json.part")["rows"] == 4 and capsys.readouterr().err == ""
    in_process(monkeypatch, *arguments)
    assert "beginning again" in capsys.readouterr().err
    assert (tmp_path / "f.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_other_settings_begin_again(vit, tmp_path):
    path = make_array(tmp_path, 1200, size=40)
    arguments = ["--model", vit, "--images", path, "--out", tmp_path / "f.npy", "--batch-size", 4]
    stop_at(start(arguments), tmp_path / "f.json.part", 40, signal.SIGINT)
    _, error = command(vit, path, tmp_path / "f.npy", "--squash", "--size", 16)
    assert error.startswith("note: ") and error.count("\n") == 1 and "beginning again" in error
    features, _, meta = load_features(tmp_path / "f.npy")
    command(vit, path, tmp_path / "g.npy", "--squash", "--size", 16)
    assert features.shape == (1200, 4, 32) and np.array_equal(features, load_features(tmp_path / "g.npy")[0])


def break_image(images, i, how):
    path = sorted(images.iterdir())[i]
    content = path.read_bytes()
    path.write_bytes({"cut": content[:len(content) // 2], "text": b"not an image\n\nat all", "empty": b""}[how])
    return path


@pytest.mark.parametrize("how", ["cut", "text", "empty"])
def test_a_broken_image(how, vit, tmp_path):
    """Named and an error; with --skip-broken left out of rows and ids. The ten rows' header is shorter than the planned one."""
    images, out = make_images(tmp_path / "images"), tmp_path / "f.npy"
    command(vit, images, tmp_path / "whole.npy")
    whole = load_features(tmp_path / "whole.npy")[0]
    broken = [break_image(images, i, how) for i in (5, 9)]
    _, error = command(vit, images, out, ok=False)
    assert f"{broken[0]}: not a whole image" in error and "--skip-broken" in error and "0x" not in error
    assert read_json(tmp_path / "f.json.part")["done"] == 4 and not out.exists()         # the first batch is kept
    printed, error = command(vit, images, out, "--skip-broken")
    assert "2 broken images left out" in printed and error.count("left out: ") == 2 == error.count("\n") and all(str(path) in error for path in broken)
    features, row_of, meta = load_features(out)
    kept = [i for i in range(11) if i not in (5, 9)]
    assert features.shape == (9, 9, 32) and np.allclose(features, whole[kept], atol=4e-3)
    assert row_of == {str(7 * i): row for row, i in enumerate(kept)} and meta["skipped"] == [path.name for path in broken]


def test_nothing_but_broken_images(vit, tmp_path, monkeypatch):
    """Never an empty file; what an interrupted run left out is not left out silently by one without --skip-broken."""
    images = make_images(tmp_path / "images", 3)
    for i in range(3):
        break_image(images, i, "text")
    arguments = ["--model", vit, "--images", images, "--out", tmp_path / "f.npy"]
    with pytest.raises(UserError, match="none of the 3 images"):
        in_process(monkeypatch, *arguments, "--skip-broken", "--batch-size", 1)
    assert not (tmp_path / "f.npy").exists()
    path = tmp_path / "f.json.part"
    path.write_text(json.dumps(read_json(path) | {"done": 1, "skipped": ["COCO_val2014_000000000000.png"]}))
    with pytest.raises(UserError, match="left out broken images, as COCO_val2014_000000000000.png; go on with --skip-broken"):
        in_process(monkeypatch, *arguments)


def test_a_picture_that_is_a_bomb(vit, tmp_path):
    """200 million pixels in a file of a few kilobytes: refused by Pillow, named by us."""
    Image = pytest.importorskip("PIL.Image")
    images = make_images(tmp_path / "images", 2)
    Image.new("1", (20000, 10000)).save(images / "bomb.png")
    _, error = command(vit, images, tmp_path / "f.npy", ok=False)
    assert "bomb.png" in error and "decompression bomb" in error


def test_mistakes_are_one_line(vit, tmp_path, monkeypatch, capsys):
    """One line and exit code 2: through the same door as in a subprocess, only quicker."""
    images, out, path = make_images(tmp_path / "images", 3), tmp_path / "f.npy", make_array(tmp_path)
    (tmp_path / "empty").mkdir()

    def refused(word, model=vit, images=images, out=out, more=()):
        monkeypatch.setattr(sys, "argv", ["clip_features.py", *map(str, ("--model", model, "--images", images, "--out", out, *more))])
        with pytest.raises(SystemExit) as left:
            clip_features.run(clip_features.main)
        error = capsys.readouterr().err
        assert left.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and word in error, error

    refused("no such folder", model=tmp_path / "nowhere")
    refused("neither model.safetensors", model=tmp_path / "empty")
    refused("nowhere: no such file", images=tmp_path / "nowhere")
    refused("found no .jpg", images=tmp_path / "empty")
    refused("--size: found 20, expected a multiple of 8", more=["--size", 20])
    refused("--size: found 0", more=["--size", 0])
    refused("--batch-size: found 0", more=["--batch-size", 0])
    refused("ends with .npy", out=tmp_path / "f.bin")
    refused("--ids goes with", more=["--ids", tmp_path / "pixels.json"])
    refused("invalid int value", more=["--size", "big"])
    (images / "COCO_train2014_000000000007.jpg").write_bytes(b"")
    refused("COCO_train2014_000000000007.jpg and COCO_val2014_000000000007.png have the same id 7")
    for ids, word in (([1, 2], "found 2 ids for 9 rows"), ([1, "1", *range(3, 10)], "id 1 is there twice"), ({}, "expected a list"), ([True] * 9, "expected a list")):
        make_array(tmp_path, ids=ids)
        refused(word, images=path)
    (tmp_path / "pixels.json").write_text("[")
    refused("not JSON", images=path)
    (tmp_path / "pixels.json").unlink()
    refused("pixels.json: no such file", images=path)
    for array in (np.zeros((9, 24, 24, 3)), np.zeros((9, 24, 24), np.uint8), np.zeros((9, 24, 24, 4), np.uint8), np.zeros((0, 24, 24, 3), np.uint8)):
        np.save(path, array)
        refused("expected uint8" if array.dtype != np.uint8 or array.ndim != 4 else "[images, height, width, 3]", images=path)
    assert not list(tmp_path.glob("f.*"))


def test_features_that_overflow(tmp_path, vit):
    tensors = load_file(vit / "model.safetensors")
    tensors["vision_model.encoder.layers.2.mlp.fc2.bias"] += 1e5
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((vit / "config.json").read_bytes())
    assert "images 1 to 4: a feature is not finite" in command(tmp_path, make_array(tmp_path), tmp_path / "f.npy", ok=False)[1]


def test_wrong_feature_files(tmp_path):
    path, about = tmp_path / "f.npy", tmp_path / "f.json"

    def refused(word):
        with pytest.raises(UserError) as error:
            load_features(path)
        assert word in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value), error.value

    about.write_text(json.dumps({"ids": ["a", "b", "c"]}))
    refused("no such file")
    np.save(path, np.arange(24, dtype=np.float16).reshape(3, 2, 4))
    features, row_of, _ = load_features(path)
    assert row_of == {"a": 0, "b": 1, "c": 2} and features[row_of["b"], 1, 3] == 15
    whole = path.read_bytes()
    for cut in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused("not a whole .npy file")
    path.write_bytes(whole + b"x")
    refused("bytes, its header says")
    for wrong in (np.zeros((3, 2, 4), np.float32), np.zeros((3, 8), np.float16)):
        np.save(path, wrong)
        refused("expected float16 [images, cells, width]")
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    refused("not a whole .npy file of numbers")
    path.write_bytes(whole)
    for content, word in (({"ids": ["a", "b"]}, "found 2 ids for 3 rows"), ({"ids": ["a", "b", "a"]}, "id a is there twice"), ({}, "found None"), ([], "expected a JSON object")):
        about.write_text(json.dumps(content))
        refused(word)
    about.unlink()
    refused("f.json: no such file")
