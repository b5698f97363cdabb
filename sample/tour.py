"""One example on its way through a trained run: python hyperpelt.py --tour runs/rte-hyperpelt

Prints, step by step with shapes and a few numbers, what hyperpelt.py makes of the first validation row of a run's first text task:
embeddings, hyper-embeddings, prefixes and the attention that falls on them, adapters and their part beside the FFN, the answer before
and after training. With matplotlib it also draws RUN/tour.png.
"""
from pathlib import Path

import torch

import data
import train
from hyperpelt import BLOCK_TYPES, METHODS
from t5 import DECODER_SELF, ENCODER_SELF


def shape(tensor):
    return f"[{', '.join(map(str, tensor.shape))}]"


def step(title, *lines):
    print(f"\n{title}", *(f"    {line}" for line in lines), sep="\n")


def by_layer(values):
    """{site: number} -> a line for each block type, its layers from the first to the last."""
    kinds = [kind for kind in BLOCK_TYPES if any(site[0] == kind for site in values)]
    return [f"{kind:26}" + " ".join(f"{value:.3f}" for site, value in values.items() if site[0] == kind) for kind in kinds]


def block_part(t5, site):
    """-> the module of t5.py that a site's weights enter, or stand beside."""
    kind, layer = site
    block = (t5.encoder if kind.startswith("encoder") else t5.decoder).blocks[layer]
    if kind.endswith("FFN"):
        return block.ffn
    return block.self_attention if kind in (ENCODER_SELF, DECODER_SELF) else block.cross_attention


@torch.no_grad()
def watch(model, sites, ids, labels):
    """One pass of the T5 -> share of the attention on the prefix {site: 0 to 1}, size of the text's own keys {site: standard
    deviation}, length of lambda A(u) as a share of FFN(u)'s {site: ...}."""
    mass, keys_size, ratio, length = {}, {}, {}, model.config.prefix_length

    def on_attention(site):
        def hook(module, arguments, output):
            u, k, _, mask = arguments
            weights = torch.softmax(module.split(module.q(u)) @ k.transpose(2, 3) + mask, -1)       # [1, H, T, N+S]
            mass[site], keys_size[site] = weights[..., :length].sum(-1).mean().item(), k[0, :, length:].std().item()
        return hook

    def on_ffn(site):
        def hook(module, arguments, output):
            ratio[site] = (sites[site](arguments[0]).norm() / output.norm()).item()
        return hook

    hooks = [block_part(model.t5, site).register_forward_hook(on_attention(site)) for site in model.prefix_sites]
    hooks += [block_part(model.t5, site).register_forward_hook(on_ffn(site)) for site in model.adapter_sites]
    model.t5(ids, None, labels, sites)
    for hook in hooks:
        hook.remove()
    return mass, keys_size, ratio


@torch.no_grad()
def tour(run):
    """Folder of a run. Raises UserError where there is no such run, or one of another method or of images alone."""
    settings = train.complete_settings({"out": run, "ask": ["-"]})           # as for a question to the run: no data but the one row
    record = train.read_run(run)
    name = next((name for name in record["tasks"] if name in data.TASKS), None)
    if name is None or METHODS[settings.method] != METHODS["hyperpelt"]:
        raise data.UserError(f"{run}: found {settings.method} of {', '.join(record['tasks'])}, expected hyperpelt and a task without images")
    settings.precision = "fp32"
    tokenizer, tasks, *_, model, _ = train.prepare(settings, record)         # the weights that the run began with, by its seed
    model.eval()
    example = data.make_splits(tasks[name], settings.data_dir, settings.split)["validation"][0]
    ids = torch.from_numpy(train.encode([example], tokenizer, settings)[0].source)[None].long().to(model.layer_ids.device)

    def predict():
        return tokenizer.decode(model.t5.generate(ids, sites=model.generate_sites(name))[0].tolist())

    before = predict() if not settings.init_from else f"not shown, the run began from {settings.init_from}"
    train.load_best(Path(run) / "best.safetensors", model)
    step(f"the example: {example.source}", f"ids {shape(ids)}; the answer should be: {example.target}")

    h, number, length = model.hyper_embedding, model.tasks.index(name), model.config.prefix_length
    step("embeddings, trained (paper: section 4)", *(f"{what:24}{shape(table):>16}   norm of a row {table.norm(dim=-1).mean():.2f}" for what, table in (
        (f"z_tau of {name}", h.task[number]), ("l_i, of all layers", h.layer), ("b_j, of all block types", h.block))))

    hyper = h(number, model.layer_ids, model.block_ids)
    alike = train.cosines(hyper).to(hyper.device)                             # [sites, sites]
    same_layer, same_block = (ids_of[:, None] == ids_of for ids_of in (model.layer_ids, model.block_ids))
    step("eq. (1): hyper-embeddings I of all sites", f"{shape(hyper)}   mean {hyper.mean():.3f}, standard deviation {hyper.std():.3f}",
         *(f"cosine of two sites' I, {what:32}{alike[chosen].mean():.3f}" for what, chosen in (
             ("same layer, another block type", same_layer & ~same_block), ("same block type, another layer", same_block & ~same_layer))))

    sites, first = model.generate_sites(name), model.prefix_sites[0]
    mass, keys_size, ratio = watch(model, sites, ids, torch.tensor([tokenizer.encode(example.target)], device=ids.device))
    keys, values = sites[first].parts[0]
    step(f"eq. (2): P_k and P_v at {first[0]}, layer {first[1]}", f"{shape(keys)}, {shape(values)}: heads, N, d_kv",
         f"standard deviation of P_k {keys.std():.2f}, of the keys of the text's own tokens {keys_size[first]:.2f}")
    step(f"eq. (3): share of the attention that falls on the {length} rows of the prefix, layer by layer"
         f" (of {ids.size(1)} tokens each would have {length / (length + ids.size(1)):.2f})", *by_layer(mass))
    step(f"eq. (4): one adapter's W_down, b_down, lambda W_up, lambda b_up; lambda is {model.adapter_hypernetwork.scale.item():.3f}",
         ", ".join(map(shape, sites[model.adapter_sites[0]].parts[0])))
    step("eq. (5), (6): length of lambda A(u) as a share of FFN(u)'s, layer by layer", *by_layer(ratio))
    step("the answer", f"before training: {before or '(nothing)'}", f"after:           {predict()}")
    draw(Path(run) / "tour.png", mass, model)


def draw(path, mass, model):
    """The share of attention on the prefix by layer and block type, and how alike the tasks' embeddings are (of one task alone: the
    block types'), where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"\nfor {path}: pip install matplotlib")
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind in dict.fromkeys(kind for kind, _ in mass):
        left.plot(*zip(*((i, share) for (block_type, i), share in mass.items() if block_type == kind)), "o-", label=kind)
    left.set(xlabel="layer", ylabel="share of the attention on the prefix", ylim=(0, 1))
    left.legend()
    if len(model.tasks) > 1:
        train.draw_cosines(right, model.hyper_embedding.task, model.tasks, "cosine of the task embeddings z")
    else:
        train.draw_cosines(right, model.hyper_embedding.block, BLOCK_TYPES, "cosine of the block embeddings b")
    figure.savefig(path, dpi=120)
    print(f"\ndrawn: {path}")
