"""Write figures/dataflow.svg: how data flow through the method, with shapes on the arrows.

    python sample/make/drawing.py

Frozen parts have one colour, trained ones another. All coordinates are in pixels.
"""

import argparse
from pathlib import Path

SAMPLE = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 1150, 610
HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"
  width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="text and image to hyper-embeddings,
  hypernetworks, prefixes and adapters in a frozen T5">
<style>
  text {{ font: 13px sans-serif; fill: #1f2328; text-anchor: middle }}
  .small {{ font-size: 11px; fill: #59636e }}
  .title {{ font-weight: bold }}
  rect {{ stroke: #59636e; rx: 6px }}
  .frozen {{ fill: #cfe3fa }}
  .trained {{ fill: #fddcb5 }}
  .plain {{ fill: #ffffff }}
  .frame {{ fill: none; stroke-dasharray: 5 4 }}
  path {{ stroke: #59636e; stroke-width: 1.5px; fill: none; marker-end: url(#head) }}
  marker path {{ fill: #59636e; stroke: none; marker-end: none }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #f0f6fc }}
    .small {{ fill: #b1bac4 }}
    rect, path {{ stroke: #9198a1 }}
    marker path {{ fill: #9198a1 }}
    .frozen {{ fill: #1b3a5c }}
    .trained {{ fill: #6b4417 }}
    .plain {{ fill: #0d1117 }}
    .frame {{ fill: none }}
  }}
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"
  orient="auto"><path d="M 0 0 L 8 4 L 0 8 z"/></marker></defs>
"""


def words(x, y, line, kind=""):
    """Text whose baseline has its middle at (x, y)."""
    return f'<text x="{x}" y="{y}" class="{kind}">{line}</text>'


def box(x, y, width, height, kind, *lines):
    """A box whose upper left corner is (x, y), with lines of text in its middle."""
    size = f'width="{width}" height="{height}"'
    parts = [f'<rect x="{x}" y="{y}" {size} class="{kind}"/>']
    baseline = y + height / 2 + 5 - 8 * (len(lines) - 1)
    for i, line in enumerate(lines):
        parts.append(words(x + width / 2, baseline + 16 * i, line))
    return "\n".join(parts)


def arrow(*points):
    """An arrow along the points (x, y)."""
    places = " L ".join(f"{x} {y}" for x, y in points)
    return f'<path d="M {places}"/>'


def task_side():
    """From the embeddings to the hyper-embedding I of the task side."""
    parts = [words(300, 28, "the task’s side", "title")]
    for i, line in enumerate(("zτ   task", "lᵢ   layer", "bⱼ   block type")):
        parts.append(box(20, 50 + 50 * i, 120, 40, "trained", line))
        parts.append(arrow((140, 70 + 50 * i), (215, 108 + 12 * i)))
    return [
        *parts,
        words(185, 62, "[N, d_t] each", "small"),
        box(215, 90, 130, 60, "trained", "projector", "eq. (1)"),
        words(395, 112, "I  [N, d_I]", "small"),
    ]


def image_side():
    """From the image to the hyper-embedding of the image's side, which has a batch axis."""
    return [
        words(300, 308, "the image’s side", "title"),
        box(20, 400, 70, 40, "plain", "image"),
        arrow((90, 420), (115, 420)),
        box(115, 400, 70, 40, "frozen", "CLIP"),
        arrow((185, 420), (250, 420)),
        words(217, 414, "[N, V]", "small"),
        box(250, 400, 85, 40, "trained", "W_g, c_g", "eq. (7)"),
        arrow((292, 400), (292, 380)),
        words(345, 394, "zᵥ  [B, N, d_t]", "small"),
        box(215, 320, 145, 60, "trained", "projector of its own", "eq. (8)"),
        # Its layer and block embeddings are those of the task's side.
        arrow((80, 190), (80, 350), (215, 350)),
        words(142, 343, "lᵢ, bⱼ  [N, d_t]", "small"),
        words(404, 343, "Iᵛ  [B, N, d_I]", "small"),
    ]


def hypernetworks():
    """The heads that write prefixes and adapters, for each side."""
    parts = []
    for start, y, side in ((345, 120, ""), (360, 350, "ᵛ")):
        parts += [
            arrow((start, y), (450, y), (450, y - 40), (475, y - 40)),
            arrow((start, y), (450, y), (450, y + 40), (475, y + 40)),
            box(475, y - 60, 150, 40, "trained", f"h_P{side}   prefixes", "eq. (2)"),
            box(475, y + 20, 150, 40, "trained", f"h_A{side}   adapters", "eq. (4)"),
        ]
    return parts


def sublayer(top, height, *lines):
    """A norm, a frozen block, and the path around both that adds their input to their output.

    What comes before ends at `top`. The path of the sublayer before joins 8 pixels below it, the
    sublayer's own path leaves 18 pixels below it.
    """
    bottom = top + 66 + height
    around = ((980, top + 18), (1121, top + 18), (1121, bottom + 8), (982, bottom + 8))
    return [
        arrow((980, top), (980, top + 30)),
        box(890, top + 30, 180, 24, "trained", "layer norm:  u = norm(x)"),
        arrow((980, top + 54), (980, top + 66)),
        box(850, top + 66, 260, height, "frozen", *lines),
        arrow(*around),
        words(962, bottom + 13, "+ x", "small"),
    ]


def backbone():
    """One layer of the T5: each of its blocks reads a normed input and is added to it."""
    attention = ("K′ = [P_k ; P_kᵛ ; u W_K]", "V′ = [P_v ; P_vᵛ ; u W_V]", "eq. (3), (9)")
    cross = ("cross-attention (decoder only)", "K′, V′ from the encoder’s output")
    adapters = ("FFN(u) + λ A(u) + λᵥ Aᵛ(u)", "eq. (5), (6), (10)")
    return [
        box(830, 30, 310, 560, "frame"),
        words(985, 50, "T5: each layer of encoder and decoder", "title"),
        box(920, 60, 120, 32, "plain", "text"),
        words(945, 108, "[B, S, D]", "small"),
        *sublayer(92, 84, "self-attention", *attention),
        *sublayer(242, 50, *cross),
        *sublayer(358, 70, "feed-forward block", *adapters),
        arrow((980, 494), (980, 550)),
        words(1015, 540, "[B, S, D]", "small"),
        words(980, 570, "next layer"),
    ]


def injections():
    """What the hypernetworks write enters the blocks of the T5."""
    return [
        # Prefixes enter both attentions.
        arrow((625, 80), (800, 80), (800, 190), (850, 190)),
        arrow((625, 80), (800, 80), (800, 325), (850, 325)),
        words(690, 73, "[H, N, d_kv]", "small"),
        arrow((625, 310), (785, 310), (785, 220), (850, 220)),
        arrow((625, 310), (785, 310), (785, 350), (850, 350)),
        words(690, 303, "[B, H, N, d_kv]", "small"),
        # Adapters stand beside the feed-forward block.
        arrow((625, 160), (765, 160), (765, 455), (850, 455)),
        words(690, 153, "[D, r], [r, D]", "small"),
        arrow((625, 390), (750, 390), (750, 485), (850, 485)),
        words(688, 383, "[B, D, r], [B, r, D]", "small"),
    ]


def legend():
    parts = []
    for x, kind in ((20, "frozen"), (130, "trained")):
        parts.append(box(x, 574, 16, 16, kind))
        parts.append(words(x + 48, 587, kind))
    return parts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=SAMPLE, help="folder that holds figures/")
    args = parser.parse_args()

    parts = [*task_side(), *image_side(), *hypernetworks(), *backbone(), *injections(), *legend()]
    folder = args.out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataflow.svg").write_text(HEAD + "\n".join(parts) + "\n</svg>\n")


if __name__ == "__main__":
    main()
