"""Train a small vision transformer on the images and questions of a VQA set, and write it in CLIP's public format.

    python tests/small_clip.py --data-dir DIR --images DIR/images/train2014 --out FOLDER [--epochs 20]

For trying the visual side where no public CLIP is at hand; it is no CLIP. Learned from the training questions alone: the mean
of the image's 7 x 7 grid features, times the mean embedding of the question's words, gives the answer. Only the encoder is
written: config.json and model.safetensors (transformers' CLIPVisionModel), which clip_features.py takes like any other.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip_features
import data


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", required=True, help="folder with questions and annotations as VQAv2's")
    parser.add_argument("--images", required=True, help="folder with the training images")
    parser.add_argument("--out", required=True, help="folder for the encoder")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    examples = data.make_splits(data.find_task("vqa"), args.data_dir, "official")["train"]
    words = {word: i for i, word in enumerate(sorted({w for e in examples for w in e.parts[1].split()}))}
    answers = {answer: i for i, answer in enumerate(sorted({e.target for e in examples}))}
    asked = {}
    for e in examples:
        asked.setdefault(e.image[1], []).append(([words[w] for w in e.parts[1].split()], answers[e.target]))
    ids, _, read = clip_features.open_images(args.images)
    pixels = clip_features.normalise(torch.stack([clip_features.preprocess(read(i), 56) for i in range(len(ids))]))
    pixels, ids = pixels[[i for i, id in enumerate(ids) if id in asked]], [id for id in ids if id in asked]
    print(f"{len(ids)} images, {len(examples)} questions, {len(words)} words, {len(answers)} answers")

    model = CLIPVisionModel(CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                                             image_size=56, patch_size=8, hidden_act="quick_gelu", projection_dim=128)).train()
    embedding, mix, head = nn.EmbeddingBag(len(words), 128), nn.Linear(128, 128), nn.Linear(128, len(answers))
    parameters = [p for module in (model, embedding, mix, head) for p in module.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    per_epoch = len(ids) // 64
    steps = args.epochs * per_epoch
    for step in range(steps):
        if step % per_epoch == 0:
            order, right, seen = rng.permutation(len(ids)), 0, 0
        chosen = order[step % per_epoch * 64:][:64]
        questions = [(row, *asked[ids[i]][k]) for row, i in enumerate(chosen) for k in rng.permutation(len(asked[ids[i]]))[:8]]
        image = mix(model(pixels[chosen]).last_hidden_state[:, 1:].mean(1))                        # [B, 128]
        bags = torch.tensor([w for _, bag, _ in questions for w in bag]), torch.tensor(np.cumsum([0] + [len(q[1]) for q in questions[:-1]]))
        logits = head(F.relu(image[[q[0] for q in questions]] * embedding(*bags)))
        target = torch.tensor([q[2] for q in questions])
        optimiser.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50, 2 * (1 - step / steps))
        optimiser.zero_grad()
        F.cross_entropy(logits, target).backward()
        optimiser.step()
        right, seen = right + int((logits.argmax(-1) == target).sum()), seen + len(target)
        if (step + 1) % per_epoch == 0:
            print(f"epoch {(step + 1) // per_epoch}: {right / seen:.3f} of the training questions right", flush=True)
    model.save_pretrained(args.out, safe_serialization=True)


if __name__ == "__main__":
    main()
