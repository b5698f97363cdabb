"""clip_features.py against transformers, Pillow and a second ResNet, and as a command."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SAMPLE
from safetensors.torch import load_file, save_file

import clip_features
import data
import test_t5
from clip_features import load_encoder, load_features, normalise, preprocess
from data import UserError

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=24,
    patch_size=8,
    projection_dim=20,
)
OTHER = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=40,
    patch_size=10,
    layer_norm_eps=1e-3,
)
TEXT = dict(
    hidden_size=20,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=30,
    max_position_embeddings=9,
)


# ---- helpers -------------------------------------------------------------------------------------


def make_transformer(folder, **sizes):
    """Write a whole random CLIP by transformers; return its vision model."""
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        vision_config=SIZES | sizes, text_config=TEXT, projection_dim=20
    )
    model = transformers.CLIPModel(config).eval()
    for name, parameter in model.named_parameters():
        is_scale = "norm" in name and name.endswith("weight")
        parameter.data.normal_(1.0 if is_scale else 0.0, 0.2)
    model.save_pretrained(folder)
    return model.vision_model


def random_resnet(channels=8, blocks=(2, 1, 3, 1), grid=2):
    """Random tensors of a CLIP ResNet, and of the text half that comes with it."""
    torch.manual_seed(0)
    model = clip_features.ModifiedResNet(channels, blocks, grid)
    tensors = {}
    for name, tensor in model.state_dict().items():
        # The numbers of a norm, of which the variance must be positive; or those of a convolution.
        tensors[f"visual.{name}"] = 0.5 + torch.rand(tensor.shape)
        if tensor.dim() == 4:
            tensors[f"visual.{name}"] = torch.randn(tensor.shape) / tensor[0].numel() ** 0.5
    tensors["visual.attnpool.positional_embedding"] = torch.ones(1 + grid**2, 32 * channels)
    for name in (
        "visual.attnpool.q_proj.weight",
        "positional_embedding",
        "text_projection",
        "ln_final.bias",
        "logit_scale",
        "transformer.resblocks.0.ln_1.weight",
    ):
        tensors[name] = torch.ones(4)
    return tensors


def random_pixels(size=24):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def picture(height, width, seed=0):
    shape = (height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_images(folder, count=9):
    folder.mkdir()
    for i in range(count):
        image = Image.fromarray(picture(30 + 3 * i, 50 - 2 * i, i))
        image.save(folder / f"COCO_val2014_{7 * i:012}.png")
    return folder


def make_array(folder, count=9, size=24):
    np.save(folder / "pixels.npy", np.stack([picture(size, size + 6, i) for i in range(count)]))
    (folder / "pixels.json").write_text(json.dumps(list(range(100, 100 + count))))
    return folder / "pixels.npy"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_transformer(folder)
    return folder


@pytest.fixture
def copy(model, tmp_path):
    """A copy of the model that a test may change."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command: exit code, stdout, stderr."""

    def run(model, images, out, *more):
        arguments = ["--model", model, "--images", images, "--out", out, "--batch-size", 4, *more]
        monkeypatch.setattr(sys, "argv", ["clip_features.py", *map(str, arguments)])
        code = 0
        try:
            data.run(clip_features.main)
        except SystemExit as left:
            code = left.code
        return code, *capsys.readouterr()

    return run


def assert_one_line(result, *words):
    code, _, error = result
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert str(word) in error


# ---- encoders ------------------------------------------------------------------------------------


def assert_equal_layers(theirs, ours, pixels, **more):
    """Each hidden state is as in transformers; the features are the last, without class token."""
    found = []
    for module in (ours.pre_layrnorm, *ours.encoder.layers):
        module.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, output_hidden_states=True, **more).hidden_states
        features = ours(pixels)
    for a, b in zip([*found, features], [*expected, expected[-1][:, 1:]], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    assert features.std() > 0.5


@pytest.mark.parametrize(
    "sizes, activation, side",
    [
        (SIZES, "quick_gelu", 24),
        (SIZES, "quick_gelu", 16),
        (SIZES, "quick_gelu", 40),
        (OTHER, "quick_gelu", 40),
        (OTHER, "gelu", 40),
    ],
)
def test_every_hidden_state_equals_transformers(sizes, activation, side, tmp_path):
    """At another side, only the grid part of the positions is interpolated."""
    theirs = make_transformer(tmp_path, hidden_act=activation, **sizes)
    ours, path = load_encoder(tmp_path)
    assert path == tmp_path / "model.safetensors"
    assert (ours.width, ours.stride) == (sizes["hidden_size"], sizes["patch_size"])
    assert ours.trained_size == sizes["image_size"] and activation in ours.kind
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    assert_equal_layers(theirs, ours, random_pixels(side), interpolate_pos_encoding=True)


def test_a_bin_file_of_16_bit_numbers_with_a_config_that_leaves_out_defaults(tmp_path):
    defaults = transformers.CLIPVisionConfig(hidden_size=24, projection_dim=20).to_dict()
    theirs = make_transformer(tmp_path, **defaults).half().float()
    (tmp_path / "config.json").write_text('{"vision_config": {"hidden_size": 24}}')
    tensors = {name: t.half() for name, t in load_file(tmp_path / "model.safetensors").items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(50)[None]
    assert {"visual_projection.weight", "text_projection.weight", "logit_scale"} <= set(tensors)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert_equal_layers(theirs, load_encoder(tmp_path)[0], random_pixels(224))


def plain_resnet(tensors, pixels, blocks):
    """CLIP's ResNet once more: names in full, batch norm by its equation, pools as means."""

    def step(x, conv, norm, stride=1):
        weight = tensors[f"visual.{conv}.weight"]
        x = F.conv2d(F.pad(x, [weight.shape[-1] // 2] * 4), weight, stride=stride)
        scale, bias, mean, var = (
            tensors[f"visual.{norm}.{name}"][:, None, None]
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        return scale * (x - mean) / torch.sqrt(var + 1e-5) + bias

    def halve(x):
        return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))

    x = step(pixels, "conv1", "bn1", 2).relu()
    x = step(x, "conv2", "bn2").relu()
    x = halve(step(x, "conv3", "bn3").relu())
    maps = []
    for i, count in enumerate(blocks):
        for j in range(count):
            block = f"layer{i + 1}.{j}."
            y = step(x, block + "conv1", block + "bn1").relu()
            y = step(y, block + "conv2", block + "bn2").relu()
            if i > 0 and j == 0:
                x, y = halve(x), halve(y)
            if j == 0:
                x = step(x, block + "downsample.0", block + "downsample.1")
            x = (x + step(y, block + "conv3", block + "bn3")).relu()
            maps.append(x)
    return maps


@pytest.mark.parametrize("file", clip_features.CLIP_WEIGHTS)
@pytest.mark.parametrize("shape", [(8, (2, 1, 3, 1), 2), (12, (1, 2, 1, 2), 3)])
def test_every_map_of_the_resnet_equals_a_second_implementation(file, shape, tmp_path):
    tensors = random_resnet(*shape)
    save = torch.save if file.endswith(".bin") else save_file
    save(tensors, tmp_path / file)
    channels, blocks, grid = shape
    ours, path = load_encoder(tmp_path)
    assert path.name == file and (ours.trained_size, ours.width) == (32 * grid, 32 * channels)
    found = []
    for block in (*ours.layer1, *ours.layer2, *ours.layer3, *ours.layer4):
        block.register_forward_hook(lambda module, args, output: found.append(output))
    pixels = random_pixels(96)
    features = ours(pixels)
    maps = plain_resnet(tensors, pixels, blocks)
    cells = maps[-1].permute(0, 2, 3, 1).reshape(2, 9, 32 * channels)
    for a, b in zip([*found, features], [*maps, cells], strict=True):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-5 * b.abs().max()
        assert b.std() > 0.1


# It serves a T5, whose weights have other names than a CLIP's.
hub = test_t5.hub


def test_a_public_name_brings_both_configs_and_the_right_weights(model, hub):
    save_file(random_resnet(), hub / "open_clip_model.safetensors")
    (hub / "preprocessor_config.json").write_text("{}")
    for name in ("org/tiny", hub):
        assert load_encoder(name)[1].name == "open_clip_model.safetensors"
    fetched = {path.name for path in (hub.parent / "home/hyperpelt/org--tiny").iterdir()}
    assert fetched == {path.name for path in hub.iterdir()} - {"spiece.model"}
    for name in ("config.json", "model.safetensors"):
        (hub / name).write_bytes((model / name).read_bytes())
    assert load_encoder(hub)[1].name == "model.safetensors"


POSITIONS = "vision_model.embeddings.position_embedding.weight"


@pytest.mark.parametrize(
    "is_resnet, name, tensor, message",
    [
        (False, POSITIONS, None, "missing"),
        (False, POSITIONS, torch.ones(5, 32), "[5, 32], expected [10, 32]"),
        (False, "vision_model.embeddings.patch_embedding.bias", torch.ones(32), "unknown"),
        (True, "visual.layer3.1.conv2.weight", torch.ones(32, 32, 1, 1), "expected [32, 32, 3, 3]"),
        (True, "visual.attnpool.positional_embedding", None, "found no"),
        (True, "visual.proj", torch.ones(2), "unknown"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(is_resnet, name, tensor, message, copy):
    path = copy / "open_clip_model.safetensors"
    (copy / "model.safetensors").rename(path)
    tensors = {**(random_resnet() if is_resnet else load_file(path)), name: tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    with pytest.raises(UserError) as error:
        load_encoder(copy)
    assert all(word in str(error.value) for word in (str(copy), name, message))


# ---- preprocessing -------------------------------------------------------------------------------


def pillow_preprocess(pixels, size, squash=False):
    """The preprocessing of OpenAI's CLIP, by Pillow: int [3, size, size]."""
    height, width = pixels.shape[:2]
    rows, columns = int(size * height / min(height, width)), int(size * width / min(height, width))
    if squash:
        rows = columns = size
    # One side after the other, because Pillow's order depends on the image.
    image = Image.fromarray(pixels).resize((columns, height), Image.Resampling.BICUBIC)
    image = image.resize((columns, rows), Image.Resampling.BICUBIC)
    left, top = int(round((columns - size) / 2.0)), int(round((rows - size) / 2.0))
    image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize("squash", [False, True])
def test_pixels_equal_those_of_pillow_but_for_rounding(squash):
    differences = []
    for height, width in [(37, 91), (91, 37), (333, 500), (225, 231), (8, 5), (1, 1), (500, 230)]:
        for size in (224, 97, 32):
            pixels = picture(height, width)
            found = preprocess(pixels, size, squash)
            assert found.dtype == torch.uint8 and found.shape == (3, size, size)
            differences.append(np.abs(found.numpy() - pillow_preprocess(pixels, size, squash)))
    differences = np.concatenate([difference.ravel() for difference in differences])
    assert differences.max() <= 2 and (differences > 1).mean() < 1e-4
    assert (differences > 0).mean() < 0.01


@pytest.mark.parametrize(
    "key, value",
    [
        ("resample", 2),
        ("do_resize", False),
        ("do_normalize", False),
        ("do_rescale", False),
        ("rescale_factor", 1 / 127.5),
    ],
)
def test_preprocessing_that_cannot_be_honoured_is_refused(key, value, copy, command):
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps({key: value}))
    assert_one_line(command(copy, make_array(copy), copy / "f.npy"), path, key, value, "expected")


def test_features_that_overflow_are_an_error(copy, command):
    tensors = load_file(copy / "model.safetensors")
    tensors["vision_model.encoder.layers.2.mlp.fc2.bias"] += 1e5
    save_file(tensors, copy / "model.safetensors")
    assert_one_line(command(copy, make_array(copy), copy / "f.npy"), "100", "not finite")


@pytest.mark.parametrize(
    "changes, more, side",
    [(None, [], 24), ({}, ["--size", 40], 40), ({"do_center_crop": False}, ["--squash"], 24)],
)
def test_colours_size_and_squash(changes, more, side, copy, command):
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    array = make_array(copy)
    out = copy / "f.npy"
    path = copy / "preprocessor_config.json"
    if changes is not None:
        mean, std = [0.5, 0.4, 0.3], [0.5, 0.6, 0.7]
        path.write_text(json.dumps({"image_mean": mean, "image_std": std, **changes}))
    squash = "--squash" in more
    if squash:
        assert_one_line(command(copy, array, out), path, "do_center_crop: found False, expected")
    assert command(copy, array, out, *more)[0] == 0
    features, _, about = load_features(out)
    assert about["preprocessing"]["resize"].startswith("both" if squash else "shorter")
    pixels = np.stack([preprocess(image, side, squash) for image in np.load(array)])
    colours = [np.reshape(numbers, (3, 1, 1)) for numbers in (mean, std)]
    x = ((pixels / 255 - colours[0]) / colours[1]).astype(np.float32)
    assert np.abs(load_encoder(copy)[0](torch.tensor(x)).numpy() - features).max() < 4e-3


# ---- the command ---------------------------------------------------------------------------------


def test_a_folder_with_and_without_broken_images(model, tmp_path, command):
    images = make_images(tmp_path / "images")
    out = tmp_path / "new" / "f.npy"
    assert command(model, images, out) == (0, f"{out}: float16 [9, 9, 32], 0 images left out\n", "")
    assert sorted(path.name for path in out.parent.iterdir()) == ["f.json", "f.npy"]
    whole, rows, about = load_features(out)
    assert isinstance(whole, np.memmap) and about["ids"] == list(rows)
    assert rows == {str(7 * i): i for i in range(9)}
    assert (about["grid"], about["width"], about["skipped"]) == ([3, 3], 32, [])
    paths = sorted(images.iterdir())
    pixels = [pillow_preprocess(np.asarray(Image.open(path)), 24) for path in paths]
    expected = load_encoder(model)[0](normalise(torch.tensor(np.stack(pixels)))).numpy()
    assert np.abs(whole - expected).mean() < 0.01

    paths[5].write_bytes(paths[5].read_bytes()[:500])
    paths[8].write_bytes(b"not an image\n")
    out = tmp_path / "f.npy"
    assert_one_line(command(model, images, out), images, "['35']", "--skip-broken")
    assert not out.exists() and json.loads(out.with_suffix(".json").read_text())["done"] == 4
    assert "2 images left out" in command(model, images, out, "--skip-broken")[1]
    features, rows, about = load_features(out)
    assert about["skipped"] == ["35", "56"]
    assert rows == {str(7 * i): i for i in (0, 1, 2, 3, 4, 6, 7)}
    for row in rows.values():
        assert np.array_equal(features[row], whole[row])


def test_the_bundled_features_come_out_again(tmp_path, command):
    images = SAMPLE / "vqa" / "images" / "val2014.npy"
    assert command(SAMPLE / "mini-clip", images, tmp_path / "f.npy")[0] == 0
    found, rows, about = load_features(tmp_path / "f.npy")
    bundled, bundled_rows, bundled_about = load_features(SAMPLE / "vqa/features/val2014.npy")
    assert np.abs(found.astype(np.float32) - bundled).max() < 0.01 and rows == bundled_rows
    for key in ("kind", "weights", "grid", "width", "preprocessing"):
        assert about[key] == bundled_about[key]


def test_kinds_of_files_and_their_ids(tmp_path):
    base = Image.fromarray(picture(37, 41))
    for name, mode in (
        ("COCO_train2014_000000000009.jpg", "RGB"),
        ("000000000120.PNG", "L"),
        ("000000000000.png", "RGBA"),
        ("0042.png", "P"),
        ("cmyk.jpeg", "CMYK"),
    ):
        base.convert(mode).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    images = clip_features.Images(tmp_path, None, 24, False)
    assert images.ids == ["0", "120", "0042", "9", "cmyk"]
    for i, path in enumerate(images.images):
        expected = pillow_preprocess(np.asarray(Image.open(path).convert("RGB")), 24)
        assert np.abs(images[i][0].numpy() - expected).max() <= 1 and images[i][1] == ""
    # More than 8 bits a colour.
    Image.fromarray(np.full((30, 30), 999, np.uint16)).save(images.images[-1], "PNG")
    assert images[4][1] == "cmyk"


def stop_after(arguments, about, count, number):
    """Start the program, send a signal once `count` images are done: stderr, images done."""
    program = [sys.executable, ROOT / "clip_features.py", *arguments]
    child = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    done = 0
    while done < count and child.poll() is None:
        time.sleep(0.002)
        done = json.loads(about.read_text())["done"] if about.exists() else 0
    child.send_signal(number)
    error = child.communicate(timeout=60)[1]
    assert child.returncode == -number, error
    return error, json.loads(about.read_text())["done"]


def test_a_stopped_or_killed_run_continues_to_the_same_bytes(model, tmp_path, command):
    array = make_array(tmp_path, 400, size=40)
    assert command(model, array, tmp_path / "whole.npy")[0] == 0
    out = tmp_path / "f.npy"
    about = tmp_path / "f.json"
    arguments = ["--model", model, "--images", array, "--out", out, "--batch-size", "4"]
    before = 0
    for number in (signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        error, done = stop_after(arguments, about, before + 8, number)
        assert before < done < 400 and not out.exists() and "Traceback" not in error
        before = done
    assert_one_line(command(model, array, out, "--squash"), about, "other settings")
    assert command(model, array, out)[0] == 0
    assert not [*tmp_path.glob("*.part.*"), *tmp_path.glob("*.tmp")]
    # It may also be killed after its last batch.
    out.rename(tmp_path / "f.part.npy")
    assert command(model, array, out)[0] == 0
    for end in ("npy", "json"):
        assert (tmp_path / f"f.{end}").read_bytes() == (tmp_path / f"whole.{end}").read_bytes()


@pytest.mark.parametrize(
    "name, content, more, words",
    [
        ("config.json", '{"hidden_act": "relu"}', [], ["hidden_act: found relu", "quick_gelu"]),
        ("config.json", "{", [], ["config.json: not JSON"]),
        ("pixels.json", "[1, 2]", [], ["pixels.json: found 2 ids, 2 of", "each of 9 images"]),
        ("f.json", "{}", [], ["f.json: has other settings"]),
        ("f.npy", "", [], ["f.npy", "exists already"]),
        (
            "images/COCO_train2014_000000000007.jpg",
            "",
            ["--images", "images"],
            ["images: found 3 ids, 2 of them different"],
        ),
        ("empty/notes.txt", "", ["--images", "empty"], ["empty: found 0 ids"]),
        ("notes", "", ["--ids", "nowhere.json"], ["nowhere.json: [Errno 2] No such file"]),
        ("notes", "", ["--model", "nowhere"], ["nowhere"]),
        ("notes", "", ["--size", "20"], ["--size", "found 20", "multiple of 8"]),
        ("notes", "", ["--size", "-8"], ["--size", "found -8"]),
        ("notes", "", ["--batch-size", "0"], ["--batch-size: "]),
        ("notes", "", ["--out", "f"], ["--out: found f, expected", ".npy"]),
        ("f.json", "[1, 2]", [], ["f.json: "]),
    ],
)
def test_a_mistake_is_one_line(name, content, more, words, copy, command, monkeypatch):
    array = make_array(copy)
    make_images(copy / "images", 2)
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text(content)
    monkeypatch.chdir(copy)
    assert_one_line(command(copy, array, copy / "f.npy", *more), *words)


ROWS = np.zeros((3, 2, 4), np.float16)


@pytest.mark.parametrize(
    "array, length, ids, words",
    [
        (None, 0, "abc", ["f.npy", "No such file"]),
        (ROWS.astype(np.float32), 999, "abc", ["f.npy", "float32", "expected float16"]),
        (ROWS.reshape(3, 8), 999, "abc", ["f.npy", "[3, 8]", "3 dimensions"]),
        (np.array([{}]), 999, "a", ["f.npy", "Python objects"]),
        (ROWS, 0, "abc", ["f.npy", "EOF"]),
        (ROWS, 175, "abc", ["f.npy", "greater than file size"]),
        (ROWS, 999, "ab", ["f.json: found 2 ids, 2", "3 images"]),
        (ROWS, 999, "aba", ["f.json: found 3 ids, 2", "3 images"]),
        (ROWS, 999, "", ["f.json: found 0 ids"]),
        (ROWS, 999, None, ["f.json: [Errno 2] No such file"]),
    ],
)
def test_a_wrong_feature_file_is_named(array, length, ids, words, tmp_path):
    if array is not None:
        np.save(tmp_path / "f.npy", array, allow_pickle=True)
        content = (tmp_path / "f.npy").read_bytes()
        (tmp_path / "f.npy").write_bytes(content[:length])
    if ids is not None:
        (tmp_path / "f.json").write_text(json.dumps({"ids": list(ids)}))
    with pytest.raises(UserError) as error:
        load_features(tmp_path / "f.npy")
    assert all(word in str(error.value) for word in words), error.value
