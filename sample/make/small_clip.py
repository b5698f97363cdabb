"""Train a small vision transformer on a VQA data set and write it in CLIP's public format.

    python sample/make/small_clip.py --data-dir DIR --images DIR/images/train2014 --out FOLDER

It serves to try the visual side where no public CLIP is at hand; it is no CLIP. It learns from the
training questions alone: the mean of the image's 7 x 7 cells, times the mean embedding of the
question's words, gives the answer. It needs transformers and Pillow. FOLDER gets config.json and
model.safetensors, which clip_features.py reads like those of any other CLIP.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

SIDE = 56
WIDTH = 128
BATCH_SIZE = 64
QUESTIONS_PER_IMAGE = 8
LEARNING_RATE = 1e-3
WARMUP = 50
# The mean and the standard deviation of the pixels of CLIP's training images.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


class Answerer(nn.Module):
    """Answers a question on an image. Only `vision` is kept."""

    def __init__(self, words, answers):
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=8,
            hidden_act="quick_gelu",
            projection_dim=WIDTH,
        )
        self.vision = CLIPVisionModel(config)
        self.words = nn.EmbeddingBag(words, WIDTH, padding_idx=0)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, answers)

    def forward(self, pixels, rows, questions):
        """pixels [B, 3, 56, 56], rows [Q] (the image of each question), questions [Q, words]."""
        cells = self.vision(pixels).last_hidden_state[:, 1:]  # [B, 49, V]
        images = self.mix(cells.mean(1))[rows]  # [Q, V]
        return self.head(F.relu(images * self.words(questions)))


def read_questions(folder):
    """{image id: [(words of the question, answer)]} of VQAv2's training files."""
    questions = (folder / "v2_OpenEnded_mscoco_train2014_questions.json").read_text()
    annotations = (folder / "v2_mscoco_train2014_annotations.json").read_text()
    answers = {}
    for entry in json.loads(annotations)["annotations"]:
        answers[entry["question_id"]] = entry["multiple_choice_answer"]

    asked = {}
    for entry in json.loads(questions)["questions"]:
        words = re.findall(r"\w+", entry["question"].lower())
        asked.setdefault(entry["image_id"], []).append((words, answers[entry["question_id"]]))
    return asked


def read_images(folder, asked):
    """uint8 pixels [images, 3, 56, 56] and ids of the images that questions are asked about."""
    pixels = []
    ids = []
    for path in sorted(folder.iterdir()):
        # The id is the last number of the name, as in COCO_train2014_000000000009.jpg.
        image_id = int(re.findall(r"\d+", path.stem)[-1])
        if image_id in asked:
            image = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
            ids.append(image_id)
    return torch.stack(pixels), ids


def number(values, first):
    """{value: its number}, counted from `first`."""
    return {value: i for i, value in enumerate(sorted(values), first)}


def encode_questions(asked):
    """{image id: (questions [Q, words] padded with 0, answers [Q])}, and how many of both."""
    pairs = [pair for questions in asked.values() for pair in questions]
    word_ids = number({word for words, _ in pairs for word in words}, 1)
    answer_ids = number({answer for _, answer in pairs}, 0)
    longest = max(len(words) for words, _ in pairs)

    encoded = {}
    for image_id, questions in asked.items():
        rows = torch.zeros(len(questions), longest, dtype=torch.long)
        for row, (words, _) in zip(rows, questions, strict=True):
            row[: len(words)] = torch.tensor([word_ids[word] for word in words])
        answers = torch.tensor([answer_ids[answer] for _, answer in questions])
        encoded[image_id] = rows, answers
    return encoded, 1 + len(word_ids), len(answer_ids)


def make_batch(pixels, ids, encoded, chosen, rng):
    """Some questions on each of the chosen images."""
    rows = []
    questions = []
    answers = []
    for row, i in enumerate(chosen):
        all_questions, all_answers = encoded[ids[i]]
        some = rng.permutation(len(all_answers))[:QUESTIONS_PER_IMAGE]
        rows += [row] * len(some)
        questions.append(all_questions[some])
        answers.append(all_answers[some])
    images = (pixels[chosen] / 255 - MEAN) / STD
    return images, torch.tensor(rows), torch.cat(questions), torch.cat(answers)


def train(pixels, ids, encoded, sizes, epochs):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = Answerer(*sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    per_epoch = max(1, len(ids) // BATCH_SIZE)
    steps = epochs * per_epoch
    for epoch in range(epochs):
        order = rng.permutation(len(ids))
        right = 0
        seen = 0
        for batch in range(per_epoch):
            step = epoch * per_epoch + batch
            rate = min(1, (step + 1) / WARMUP, 2 * (1 - step / steps))
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
            chosen = order[batch * BATCH_SIZE :][:BATCH_SIZE]
            *inputs, answers = make_batch(pixels, ids, encoded, chosen, rng)

            logits = model(*inputs)
            optimizer.zero_grad()
            F.cross_entropy(logits, answers).backward()
            optimizer.step()
            right += (logits.argmax(1) == answers).sum().item()
            seen += len(answers)
        print(f"epoch {epoch + 1}: {right / seen:.3f} of the training questions right", flush=True)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with VQAv2's files")
    parser.add_argument("--images", type=Path, required=True, help="folder of training images")
    parser.add_argument("--out", required=True, help="folder for the encoder")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    asked = read_questions(args.data_dir)
    pixels, ids = read_images(args.images, asked)
    encoded, *sizes = encode_questions(asked)
    print(f"{len(ids)} images, {sizes[0] - 1} words, {sizes[1]} answers")
    model = train(pixels, ids, encoded, sizes, args.epochs)
    model.vision.save_pretrained(args.out)


if __name__ == "__main__":
    main()
