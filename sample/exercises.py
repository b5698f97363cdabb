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
from pathlib import Path

import numpy as np

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

        Write eq. (5), and of eq. (6) the term lambda A(u). t5.py adds FFN(u) and x."""),
}
# Eq. (6) is checked on the same method as eq. (5), with a lambda that is not 1.
EQUATIONS = (1, 2, 3, 4, 5, 6)


# ---- part A: build it ----------------------------------------------------------------------------

def blank(folder):
    """Copy the five files to a folder, hyperpelt.py without the bodies of BLANKS."""
    if folder.exists():
        sys.exit(f"{folder} exists already; remove it to begin again")
    folder.mkdir(parents=True)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    source = (ROOT / "hyperpelt.py").read_text()
    lines = source.splitlines()
    places = {(part.name, method.name): method
              for part in ast.parse(source).body if isinstance(part, ast.ClassDef)
              for method in part.body if isinstance(method, ast.FunctionDef)}
    # From the end of the file on, so that the line numbers before stay true.
    for number, (owner, name, text) in sorted(
            BLANKS.items(), key=lambda item: -places[item[1][:2]].lineno):
        method = places[owner, name]
        body = [f'        """{text.strip()}', '        """',
                f'        raise NotImplementedError("eq. ({number}) is yours to write")']
        lines[method.body[0].lineno - 1:method.end_lineno] = body
    (folder / "hyperpelt.py").write_text("\n".join(lines) + "\n")
    print(f"{folder}/hyperpelt.py is yours: write eq. (1) to (6), and check each.")


def load(folder):
    """-> the module hyperpelt of a folder, and the t5 that it uses."""
    sys.path.insert(0, str(ROOT))
    import t5

    spec = importlib.util.spec_from_file_location("built", folder / "hyperpelt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, t5


def small_side(hyperpelt, t5):
    """-> hypernetworks of small sizes with random weights, and their sizes."""
    import torch

    torch.manual_seed(0)
    sizes = t5.T5Config(d_model=10, d_kv=3, num_heads=2, num_layers=2)
    config = hyperpelt.HyperPELTConfig(prefix_length=4, embedding_dim=6, hyper_dim=5,
                                       projector_dim=7, bottleneck=3)
    sites = [hyperpelt.list_sites(sizes, blocks)
             for blocks in (hyperpelt.ATTENTION_BLOCKS, hyperpelt.FFN_BLOCKS)]
    side = hyperpelt.Hypernetworks(config, sizes, *sites)
    for parameter in side.parameters():
        parameter.data.normal_()
    return side, sites[0] + sites[1]


def array(tensor):
    return tensor.detach().numpy().astype(np.float64)


def linear(layer, x):
    bias = 0 if layer.bias is None else array(layer.bias)
    return x @ array(layer.weight).T + bias


def expected_hyper(side, z, layer, block):
    """Eq. (1) in numpy, site by site."""
    sites = []
    for i, j in zip(array(side.layer_ids).astype(int), array(side.block_ids).astype(int),
                    strict=True):
        joined = (linear(side.from_z, z) + linear(side.from_layer, layer[i])
                  + linear(side.from_block, block[j]))
        hyper = linear(side.to_hyper, np.maximum(joined, 0))
        centred = hyper - hyper.mean(-1, keepdims=True)
        normed = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5)
        sites.append(normed * array(side.norm.weight) + array(side.norm.bias))
    return np.stack(sites)


def cases(number, hyperpelt, t5):
    """-> (name, found, expected) of every tensor that an equation computes."""
    import torch

    side, _ = small_side(hyperpelt, t5)
    hyper = torch.randn(10, 2, 4, 5)
    values = array(hyper)
    if number == 1:
        z, layer, block = torch.randn(2, 4, 6), torch.randn(4, 4, 6), torch.randn(5, 4, 6)
        yield ("I", side.hyper_embedding(z, layer, block),
               expected_hyper(side, array(z), array(layer), array(block)))
    if number == 2:
        for name, found, head in zip(("P_k", "P_v"), side.prefixes(hyper),
                                     (side.to_key, side.to_value), strict=True):
            rows = linear(head, values).reshape(10, 2, 4, 2, 3)
            yield name, found, rows.swapaxes(2, 3)
    if number == 3:
        parts = [[torch.randn(1, 2, 4, 3) for _ in range(2)] for _ in range(2)]
        text = [torch.randn(5, 2, 6, 3) for _ in range(2)]
        found = hyperpelt.Prefix(parts)(*text)
        for i, name in enumerate(("K'", "V'")):
            before = [np.repeat(array(part[i]), 5, 0) for part in parts]
            yield name, found[i], np.concatenate([*before, array(text[i])], 2)
    if number == 4:
        found = side.adapters(hyper)
        mean = values.mean(2)
        shapes = {"W_down": (side.to_down, (10, 3)), "b_down": (side.to_down_bias, (1, 3)),
                  "W_up": (side.to_up, (3, 10)), "b_up": (side.to_up_bias, (1, 10))}
        for one, (name, (head, shape)) in zip(found, shapes.items(), strict=False):
            yield name, one, linear(head, mean).reshape(10, 2, *shape)
        yield "lambda", found[-1], np.full(10, side.scale.item())
    if number in (5, 6):
        scale = 1.0 if number == 5 else 0.25
        part = [torch.randn(1, *shape) for shape in ((10, 3), (1, 3), (3, 10), (1, 10))]
        u = torch.randn(2, 6, 10)
        down, down_bias, up, up_bias = map(array, part)
        hidden = np.maximum(array(u) @ down + down_bias, 0)
        found = hyperpelt.Adapter([[*part, torch.tensor(scale)]])(u)
        yield "A(u)" if number == 5 else "lambda A(u)", found, scale * (hidden @ up + up_bias)


def check(number, folder):
    """Compare an equation with numpy. Explain the first mismatch in one sentence."""
    try:
        for name, found, expected in cases(number, *load(folder)):
            problem = mismatch(found, expected)
            if problem:
                sys.exit(f"eq. ({number}): {name} {problem}")
    except NotImplementedError as error:
        sys.exit(str(error))
    print(f"eq. ({number}) is right.")


def mismatch(found, expected):
    """-> what is wrong with a tensor; nothing where it equals an array."""
    if not hasattr(found, "detach"):
        return f"is a {type(found).__name__}, expected a tensor {list(expected.shape)}"
    found = array(found)
    if found.shape != expected.shape:
        return f"has shape {list(found.shape)}, expected {list(expected.shape)}"
    wrong = np.argwhere(~np.isclose(found, expected, rtol=1e-3, atol=1e-4))
    if len(wrong):
        place = tuple(wrong[0])
        return (f"differs first at {list(map(int, place))}: found {found[place]:.4f},"
                f" expected {expected[place]:.4f}; {len(wrong)} of {found.size} numbers differ")


# ---- part B: predict, then run -------------------------------------------------------------------

def trained(hyperpelt, t5, tasks, method="hyperpelt", **settings):
    import torch

    with torch.device("meta"):
        model = hyperpelt.HyperPELT(t5.T5(t5.T5Config()), [f"task {i}" for i in range(tasks)],
                                    hyperpelt.HyperPELTConfig(method, **settings))
    return hyperpelt.count(model.trained().values())


def same_sites(hyperpelt, t5):
    """-> the number of pairs of sites whose I is the same (cosine above 0.9999), of 10 sites."""
    import torch

    side, sites = small_side(hyperpelt, t5)
    hyper = side.hyper_embedding(torch.randn(1, 4, 6), torch.randn(4, 4, 6), torch.randn(5, 4, 6))
    rows = torch.nn.functional.normalize(hyper.flatten(1), dim=1)
    return int(((rows @ rows.T).triu(1) > 0.9999).sum())


def share_of_zeros(hyperpelt, t5):
    """-> the share of a uniform attention that an all-zero prefix of 49 takes from 49 tokens."""
    import torch

    zeros = torch.zeros(1, 1, 49, 3)
    keys, _ = hyperpelt.Prefix([(zeros, zeros)])(torch.zeros(1, 1, 49, 3), torch.ones(1, 1, 49, 3))
    return keys.sum(-1).softmax(-1)[..., :49].sum().item()


ANSWERS = {
    "count": lambda *modules: trained(*modules, 8),
    "task": lambda *modules: trained(*modules, 9) - trained(*modules, 8),
    "crossing": lambda *modules: next(
        n for n in range(1, 99) if trained(*modules, n) < trained(*modules, n, "adapter")),
    "vector": lambda *modules: trained(*modules, 8, per_position=False),
    "same": same_sites,
    "zeros": share_of_zeros,
}


def answer(question, value, folder):
    """Compare a prediction with what the code in a folder computes."""
    found = ANSWERS[question](*load(folder))
    if abs(found - value) > 1e-6:
        sys.exit(f"{question}: {value:g} is not what the code computes.")
    print(f"{question}: {value:g} is right.")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("build"), help="default: build")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("blank", help="write the files of part A")
    one = commands.add_parser("check", help="check an equation of part A")
    one.add_argument("number", type=int, choices=EQUATIONS)
    one = commands.add_parser("answer", help="check a prediction of part B")
    one.add_argument("question", choices=ANSWERS)
    one.add_argument("value", type=float)
    args = parser.parse_args(arguments)
    folder = args.folder.resolve()
    if args.command == "blank":
        blank(folder)
    elif args.command == "check":
        check(args.number, folder)
    else:
        answer(args.question, args.value, folder if folder.exists() else ROOT)


if __name__ == "__main__":
    main()
