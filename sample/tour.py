"""Walk one example of a run through HyperPELT: python sample/tour.py [RUN]

RUN is the folder of a run with method hyperpelt, by default runs/rte-hyperpelt. The script prints
what hyperpelt.py computes for the run's first validation example, equation by equation, with the
shapes of the tensors. With matplotlib, it also draws RUN/tour.png.
"""
import sys
from pathlib import Path

# The modules lie in the folder above, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_hook

import data
import train
from hyperpelt import ATTENTION_BLOCKS, FFN_BLOCKS
from t5 import ENCODER_SELF


def show(title, *lines):
    print(f"\n{title}")
    for line in lines:
        print(f"    {line}")


def show_layers(title, values, blocks):
    """values: {site: number}. Print a line for each block type, with its layers in order."""
    lines = []
    for block in blocks:
        numbers = [f"{value:.3f}" for site, value in values.items() if site[0] == block]
        lines.append(f"{block:26}{' '.join(numbers)}")
    show(title, *lines)


def watch(model, input_ids, labels, injected):
    """Run the T5 -> {site: attention [T, N+S], mean over the heads}, {site: norm of lambda A(u),
    relative to FFN(u)}."""
    attentions, ratios = {}, {}

    def note(module, inputs, output):
        site = getattr(module, "site", None)
        if site in model.hypernetworks.attentions:
            u, source, mask, sites, cache = inputs
            keys, _ = module.keys_values(source, sites, cache)  # [1, H, N+S, K]
            attention = (module.split(module.q(u)) @ keys.mT + mask).softmax(-1)  # [1, H, T, N+S]
            attentions[site] = attention[0].mean(0).float().cpu()
        elif site in model.hypernetworks.ffns:
            added = injected["sites"][site](inputs[0])  # [1, T, D]
            ratios[site] = (added.norm() / (output - added).norm()).item()

    with register_module_forward_hook(note):
        model.t5(input_ids, None, labels, **injected)
    return attentions, ratios


def draw(path, attention, tokens, sites, cosines):
    """Draw an attention and the cosines of I, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(15, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(5, 3))
    prefix_length = attention.size(1) - len(tokens)
    image = left.imshow(attention, aspect="auto", interpolation="none", norm="log", vmin=1e-3)
    left.set_yticks(range(len(tokens)), tokens, fontsize=7)
    columns = range(prefix_length, attention.size(1))
    left.set_xticks([0, prefix_length - 1, *columns], [1, prefix_length, *tokens], fontsize=7,
                    rotation=90)
    left.axvline(prefix_length - 0.5, color="white")
    left.set(xlabel="attends to: positions of the prefix | tokens of the text",
             title=f"{sites[0][0]}, layer 0: mean over the heads")
    figure.colorbar(image, ax=left)

    image = right.imshow(cosines)
    starts = [i for i, (_, layer) in enumerate(sites) if layer == 0]
    right.set_yticks(starts, [f"{sites[i][0]}, layer 0" for i in starts])
    right.set(xticks=starts, xticklabels=[], title="cosine of I of two sites")
    figure.colorbar(image, ax=right)
    figure.savefig(path, dpi=100)
    print(f"\n{path}: drawn")


def show_hyper_embeddings(model, task):
    """-> cosine similarity of the I of any two sites [sites, sites]."""
    lines = [f"{symbol} {list(table.shape)}, norm of a position {table.norm(dim=-1).mean():.2f}"
             for symbol, table in (("z", model.task[task]), ("l", model.layer), ("b", model.block))]
    show(f"embeddings z of {task}, l of all layers, b of all block types", *lines)

    networks = model.hypernetworks
    hyper = networks.hyper_embedding(model.task[task][None], model.layer, model.block)
    directions = F.normalize(hyper.flatten(1), dim=1)
    cosines = directions @ directions.T
    same_layer = networks.layer_ids[:, None] == networks.layer_ids
    same_block = networks.block_ids[:, None] == networks.block_ids
    of_layer = cosines[same_layer & ~same_block].mean()
    of_block = cosines[same_block & ~same_layer].mean()
    show("eq. (1): hyper-embedding I of every site", f"[sites, 1, N, d_I] = {list(hyper.shape)}",
         f"mean cosine of two sites of a layer {of_layer:.3f}, of a block type {of_block:.3f}")
    return cosines.cpu()


def differs(model, weights):
    """-> how much the keys of a prefix differ between its positions, relative to their size."""
    keys = [weights[site][0] for site in model.hypernetworks.attentions]
    keys = torch.stack(keys).float()                                # [sites, 1, H, N, K]
    own = keys - keys.mean(3, keepdim=True)
    return (own.norm() / keys.norm()).item()


def show_prefixes(networks, weights, before, after):
    site = networks.attentions[0]
    keys, values = weights[site]
    show(f"eq. (2): P_k, P_v of {site[0]}, layer 0: [1, H, N, K]",
         f"{list(keys.shape)}, standard deviation {keys.std():.2f} and {values.std():.2f}",
         "part of P_k that differs between positions:"
         f" before training {before:.3f}, after {after:.3f}")


def show_adapters(networks, weights, ratios):
    *adapter, scale = weights[networks.ffns[0]]
    shapes = [list(tensor.shape) for tensor in adapter]
    show("eq. (4): W_down, b_down, W_up, b_up of encoder FFN, layer 0;"
         f" lambda {scale.item():.3f}", *shapes)
    show_layers("eq. (5), (6): norm of lambda A(u), relative to FFN(u)", ratios, FFN_BLOCKS)


@torch.no_grad()
def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/rte-hyperpelt"
    args = train.read_settings(["--run", folder, "--eval-only"])
    if args.method != "hyperpelt":
        raise data.UserError(f"{folder}: found method {args.method}, expected hyperpelt")
    run = train.load_run(args)
    model, networks = run.model, run.model.hypernetworks
    name, task = next(iter(run.tasks.items()))
    example = run.splits[name]["validation"][0]

    # The same example before and after training.
    before = train.generate_outputs(run, task, [example])[0]
    differs_before = differs(model, model.generate_weights(name))
    train.load_best(run)
    after = train.generate_outputs(run, task, [example])[0]
    weights = model.generate_weights(name)

    # One pass of the T5 with what is generated.
    input_ids, features = train.make_inputs(run, [example])
    labels = train.make_labels(run, [example.target])
    injected = model.inject(weights, features)
    attentions, ratios = watch(model, input_ids, labels, injected)
    shares = {}
    for site, attention in attentions.items():
        prefix = attention[:, :injected["sites"][site].length]
        shares[site] = prefix.sum(1).mean()

    # Equation by equation.
    show(f"the example: {example.source}", f"ids [1, S] = {list(input_ids.shape)}")
    cosines = show_hyper_embeddings(model, name)
    show_prefixes(networks, weights, differs_before, differs(model, weights))
    show_layers("eq. (3): share of the attention on the prefix", shares, ATTENTION_BLOCKS)
    show_adapters(networks, weights, ratios)
    show("output", f"before training {before!r}, after {after!r}; the label is {example.target!r}")

    # The rows and columns of the picture are tokens of the text.
    sites = networks.attentions + networks.ffns
    if sites[0][0] == ENCODER_SELF and model.image_tokens is None:
        tokens = [run.tokenizer.names[i] for i in input_ids[0]]
        draw(run.folder / "tour.png", attentions[sites[0]], tokens, sites, cosines)


if __name__ == "__main__":
    data.run(main)
