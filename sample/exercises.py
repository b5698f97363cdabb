"""Build HyperPELT yourself, and check your answers. EXERCISES.md is the page to this program.

    python sample/exercises.py blank            # build/: the five files, eq. (1) to (6) left out
    python sample/exercises.py check 3          # is your eq. (3) right?
    python sample/exercises.py answer count 123 # is your prediction right?
"""
import argparse
import ast
import importlib.util
import shutil
import sys
import traceback
from functools import partial
from pathlib import Path

# The modules lie in the folder above, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

from t5 import T5, T5Config

ROOT = Path(__file__).resolve().parent.parent
FILES = ("hyperpelt.py", "t5.py", "train.py", "data.py", "clip_features.py")

# What is left out: equation: (class, method, what its docstring says instead).
BLANKS = {
    1: ("Hypernetworks", "hyper_embedding", """
        z [B, N, Z] with l [L, N, Z] and b [5, N, Z] -> I of every site [sites, B, N, E].

        Write eq. (1). self.from_z, self.from_layer and self.from_block are the three parts of W1,
        self.to_hyper is W2, self.norm the norm. self.layer_ids and self.block_ids tell the layer
        and the block type of every site."""),
    2: ("Hypernetworks", "prefixes", """
        I [sites, B, N, E] -> P_k, P_v, each [sites, B, H, N, K].

        Write eq. (2). self.to_key is W_k and c_k, self.to_value is W_v and c_v. They give all
        heads side by side: self.head_shape is (N, H, K)."""),
    3: ("Prefix", "__call__", """
        s W_K and s W_V, each [B, H, S, K] -> K' and V' of the task, [B, H, N+S, K].

        Write eq. (3) for all of self.parts, pairs (P_k, P_v) [1 or B, H, N, K]; eq. (9) is the
        same with two parts. A part with 1 in place of B serves the whole batch."""),
    4: ("Hypernetworks", "adapters", """
        I [sites, B, N, E] -> W_down [sites, B, D, r], b_down [sites, B, 1, r],
        W_up [sites, B, r, D], b_up [sites, B, 1, D], lambda [sites], the same number for each.

        Write eq. (4). self.to_down, self.to_down_bias, self.to_up and self.to_up_bias are h_A;
        self.down_shape is (D, r), self.up_shape is (r, D); self.scale is lambda."""),
    5: ("Adapter", "__call__", """
        u [B, S, D] -> lambda A(u) [B, S, D], summed over self.parts, tuples
        (W_down [1 or B, D, r], b_down [1 or B, 1, r], W_up, b_up, lambda).

        Write eq. (5), and of eq. (6) the terms lambda A(u), one for each part. A part with 1 in
        place of B serves the whole batch. In a beam search, u has several rows for each example,
        one after the other. t5.py adds FFN(u) and x."""),
}


# ---- part A: build it ----------------------------------------------------------------------------

def blank(folder):
    """Copy the five files to a folder, hyperpelt.py without the bodies of BLANKS."""
    if folder.exists():
        sys.exit(f"{folder} exists already; remove it to begin again")
    folder.mkdir(parents=True)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    path = folder / "hyperpelt.py"
    lines = path.read_text().splitlines()
    places = find_methods(path.read_text())
    # From the end of the file on, so that the line numbers before stay true.
    for number in sorted(BLANKS, key=lambda number: -places[BLANKS[number][:2]].lineno):
        owner, name, text = BLANKS[number]
        method = places[owner, name]
        lines[method.body[0].lineno - 1:method.end_lineno] = [
            f'        """{text.strip()}',
            '        """',
            f'        raise NotImplementedError("eq. ({number}) is yours to write")'
        ]
    path.write_text("\n".join(lines) + "\n")
    print(f"{path} is yours: write eq. (1) to (6), and check each.")


def find_methods(source):
    """-> {(class, method): its node in the syntax tree}."""
    methods = {}
    for part in ast.parse(source).body:
        if isinstance(part, ast.ClassDef):
            for method in part.body:
                if isinstance(method, ast.FunctionDef):
                    methods[part.name, method.name] = method
    return methods


def load(folder):
    """-> the module hyperpelt of a folder."""
    spec = importlib.util.spec_from_file_location("built", folder / "hyperpelt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_side(hyperpelt, **switches):
    """-> Hypernetworks of small sizes with random weights, for 10 sites."""
    sizes = T5Config(d_model=10, d_kv=3, num_heads=2, num_layers=2)
    config = hyperpelt.HyperPELTConfig(
        prefix_length=4, embedding_dim=6, hyper_dim=5, projector_dim=7, bottleneck=3, **switches)
    attentions = hyperpelt.list_sites(sizes, hyperpelt.ATTENTION_BLOCKS)
    ffns = hyperpelt.list_sites(sizes, hyperpelt.FFN_BLOCKS)
    side = hyperpelt.Hypernetworks(config, sizes, attentions, ffns)
    for parameter in side.parameters():
        parameter.data.normal_()
    return side


def array(tensor):
    return tensor.detach().numpy().astype(np.float64)


def linear(layer, x):
    bias = 0 if layer.bias is None else array(layer.bias)
    return x @ array(layer.weight).T + bias


def layer_norm(x, norm):
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(-1, keepdims=True) + norm.eps)
    return centred / deviation * array(norm.weight) + array(norm.bias)


# Each function yields (name, found, expected, mistakes) of every tensor that an equation computes.
# mistakes: {what was done wrong: what then comes out}.

def check_hyper_embedding(hyperpelt):
    side = small_side(hyperpelt)
    z, layer, block = torch.randn(2, 4, 6), torch.randn(4, 4, 6), torch.randn(5, 4, 6)
    joined = []
    for i, j in zip(side.layer_ids.tolist(), side.block_ids.tolist(), strict=True):
        from_layer = linear(side.from_layer, array(layer[i]))
        from_block = linear(side.from_block, array(block[j]))
        joined.append(linear(side.from_z, array(z)) + from_layer + from_block)
    hyper = linear(side.to_hyper, np.maximum(joined, 0))
    no_relu = layer_norm(linear(side.to_hyper, np.array(joined)), side.norm)
    mistakes = {"without the ReLU": no_relu, "without the norm": hyper}
    yield "I", side.hyper_embedding(z, layer, block), layer_norm(hyper, side.norm), mistakes


def check_prefixes(hyperpelt):
    # In the vector form, one row of I gives all four positions.
    for form, rows in (("", 4), (" with per_position=False", 1)):
        side = small_side(hyperpelt, per_position=not form)
        hyper = torch.randn(10, 2, rows, 5)
        keys, values = side.prefixes(hyper)
        for name, found, output_map in (("P_k", keys, side.to_key), ("P_v", values, side.to_value)):
            all_heads = linear(output_map, array(hyper))
            mistakes = {"with the axes of heads and positions mixed up":
                        all_heads.reshape(10, 2, 2, 4, 3)}
            expected = all_heads.reshape(10, 2, 4, 2, 3).swapaxes(2, 3)
            yield name + form, found, expected, mistakes


def check_attention(hyperpelt):
    # The task's part serves the whole batch, the image's has one entry for each example.
    parts = [[torch.randn(batch, 2, 4, 3) for _ in range(2)] for batch in (1, 5)]
    text = [torch.randn(5, 2, 6, 3) for _ in range(2)]
    found = hyperpelt.Prefix(parts)(*text)
    for i, name in enumerate(("K'", "V'")):
        task, image = [np.broadcast_to(array(part[i]), (5, 2, 4, 3)) for part in parts]
        mistakes = {"with the prefix after the text": [array(text[i]), task, image],
                    "with the second part before the first": [image, task, array(text[i])],
                    "with the first part alone": [task, array(text[i])]}
        mistakes = {mistake: np.concatenate(rows, 2) for mistake, rows in mistakes.items()}
        yield name, found[i], np.concatenate([task, image, array(text[i])], 2), mistakes


def check_adapters(hyperpelt):
    side = small_side(hyperpelt)
    hyper = torch.randn(10, 2, 4, 5)
    down, down_bias, up, up_bias, scale = side.adapters(hyper)
    for name, found, output_map, shape in (
        ("W_down", down, side.to_down, (10, 3)),
        ("b_down", down_bias, side.to_down_bias, (1, 3)),
        ("W_up", up, side.to_up, (3, 10)),
        ("b_up", up_bias, side.to_up_bias, (1, 10)),
    ):
        mean, first = array(hyper).mean(2), array(hyper)[:, :, 0]
        expected = linear(output_map, mean).reshape(10, 2, *shape)
        mistakes = {"of the first position instead of the mean":
                    linear(output_map, first).reshape(10, 2, *shape)}
        yield name, found, expected, mistakes
    yield "lambda", scale, np.full(10, side.scale.item()), {}


def check_adapter(hyperpelt, name="A(u)", scales=(1.0, 1.0)):
    # As above: the task's part, and the image's.
    shapes = (10, 3), (1, 3), (3, 10), (1, 10)
    parts = [[torch.randn(batch, *shape) for shape in shapes] for batch in (1, 2)]
    # Two rows for each of two examples, as in a search with two beams.
    u = torch.randn(4, 6, 10)
    scaled = [[*part, torch.tensor(scale)] for part, scale in zip(parts, scales, strict=True)]
    found = hyperpelt.Adapter(scaled)(u)
    terms = []
    for part, scale in zip(parts, scales, strict=True):
        down, down_bias, up, up_bias = [np.repeat(array(one), 4 // len(one), 0) for one in part]
        before = array(u) @ down + down_bias
        hidden = np.maximum(before, 0)
        terms.append({"": scale * (hidden @ up + up_bias),
                      "without the ReLU": scale * (before @ up + up_bias),
                      "without lambda": hidden @ up + up_bias,
                      "with lambda on W_up alone": scale * (hidden @ up) + up_bias})
    sums = {mistake: terms[0][mistake] + terms[1][mistake] for mistake in terms[0]}
    expected = sums.pop("")
    yield name, found, expected, {**sums, "with the first part alone": terms[0][""]}


CHECKS = {
    1: check_hyper_embedding,
    2: check_prefixes,
    3: check_attention,
    4: check_adapters,
    5: check_adapter,
    # The same method as eq. (5), with lambdas that are not 1.
    6: partial(check_adapter, name="lambda A(u)", scales=(0.25, 0.5)),
}


def check(number, hyperpelt):
    """Compare an equation with numpy. Explain the first mismatch in one sentence."""
    for name, found, expected, mistakes in CHECKS[number](hyperpelt):
        problem = mismatch(found, expected, mistakes)
        if problem:
            sys.exit(f"eq. ({number}): {name} {problem}")
    print(f"eq. ({number}) is right.")


def mismatch(found, expected, mistakes):
    """-> what is wrong with a tensor; nothing where it equals an array."""
    if not hasattr(found, "detach"):
        return f"is a {type(found).__name__}, expected a tensor {list(expected.shape)}"
    found = array(found)
    if same(found, expected):
        return ""
    for mistake, outcome in mistakes.items():
        if same(found, outcome):
            return f"is what comes out {mistake}"
    if found.shape != expected.shape:
        return f"has shape {list(found.shape)}, expected {list(expected.shape)}"
    wrong = np.argwhere(~np.isclose(found, expected, rtol=1e-3, atol=1e-4))
    place = tuple(wrong[0])
    return (f"differs first at {list(map(int, place))}: found {found[place]:.4f},"
            f" expected {expected[place]:.4f}; {len(wrong)} of {found.size} numbers differ")


def same(found, expected):
    return found.shape == expected.shape and np.allclose(found, expected, rtol=1e-3, atol=1e-4)


# ---- part B: predict, then run -------------------------------------------------------------------

def trained(hyperpelt, tasks, method="hyperpelt", **settings):
    """-> the numbers that a method trains on T5-base."""
    names = [f"task {i}" for i in range(tasks)]
    config = hyperpelt.HyperPELTConfig(method, **settings)
    with torch.device("meta"):
        model = hyperpelt.HyperPELT(T5(T5Config()), names, config)
    return hyperpelt.count(model.trained().values())


def cost_of_a_task(hyperpelt):
    return trained(hyperpelt, 9) - trained(hyperpelt, 8)


def crossing(hyperpelt):
    """-> the smallest number of tasks for which hyperpelt trains less than adapter."""
    tasks = 1
    while trained(hyperpelt, tasks) >= trained(hyperpelt, tasks, "adapter"):
        tasks += 1
    return tasks


def same_sites(hyperpelt):
    """-> the number of pairs of sites whose I is the same (cosine above 0.9999), of 10 sites."""
    z, layer, block = torch.randn(1, 4, 6), torch.randn(4, 4, 6), torch.randn(5, 4, 6)
    hyper = small_side(hyperpelt).hyper_embedding(z, layer, block)
    rows = F.normalize(hyper.flatten(1), dim=1)                     # [sites, N*E]
    return int(((rows @ rows.T).triu(1) > 0.9999).sum())


def share_of_zeros(hyperpelt):
    """-> the share of the attention that an all-zero prefix of 49 takes from 49 keys of zeros."""
    zeros = torch.zeros(1, 1, 49, 3)
    keys, _ = hyperpelt.Prefix([(zeros, zeros)])(zeros, zeros)
    return keys.sum(-1).softmax(-1)[..., :49].sum().item()


ANSWERS = {
    "count": partial(trained, tasks=8),
    "task": cost_of_a_task,
    "crossing": crossing,
    "vector": partial(trained, tasks=8, per_position=False),
    "same": same_sites,
    "zeros": share_of_zeros,
}


def answer(question, value, hyperpelt):
    """Compare a prediction with what the module computes."""
    found = ANSWERS[question](hyperpelt)
    if not abs(found - value) <= 1e-6:
        sys.exit(f"{question}: {value:,.10g} is not what the code computes.")
    print(f"{question}: {value:,.10g} is right.")


def number(text):
    return float(text.replace(",", ""))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("build"), help="default: build")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("blank", help="write the files of part A")
    one = commands.add_parser("check", help="check an equation of part A")
    one.add_argument("number", type=int, choices=CHECKS)
    one = commands.add_parser("answer", help="check a prediction of part B")
    one.add_argument("question", choices=ANSWERS)
    one.add_argument("value", type=number)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    folder = args.folder.resolve()
    if args.command == "blank":
        return blank(folder)
    if not (folder / "hyperpelt.py").exists():
        if args.command == "check":
            sys.exit(f"{folder} is not there; python sample/exercises.py blank writes it")
        folder = ROOT
    hyperpelt = load(folder)
    try:
        if args.command == "check":
            check(args.number, hyperpelt)
        else:
            answer(args.question, args.value, hyperpelt)
    except NotImplementedError as error:
        sys.exit(str(error))
    except Exception as error:
        # The last line of the student's file that was at work, if one was.
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if Path(frame.filename).parent == folder]
        place = f"line {lines[-1]} of hyperpelt.py" if lines else "what it returns"
        sys.exit(f"{place} leads to {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
