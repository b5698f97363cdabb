"""Does memory grow in a long run? Train on 200,000 made-up questions about 50,000 images (Linux).

python tests/stress/long.py --steps 3000
"""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import data
import train


def write_files(folder, part, questions, images):
    """Write the official files of VQAv2, and features of noise."""
    ids = [{"question_id": i, "image_id": i % images} for i in range(questions)]
    rows = [row | {"question": f"is {row['question_id']} red?"} for row in ids]
    answers = {"answers": [{"answer": "yes"}] * 10, "answer_type": "yes/no"}
    files = {
        f"v2_OpenEnded_mscoco_{part}_questions": {"questions": rows},
        f"v2_mscoco_{part}_annotations": {"annotations": [row | answers for row in ids]},
        part: {"ids": list(range(images)), "kind": "", "weights": "", "preprocessing": ""},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    rng = np.random.default_rng(0)
    shape = (images, 49, 96)
    features = np.lib.format.open_memmap(folder / f"{part}.npy", "w+", np.float16, shape)
    for row in features:
        row[:] = rng.standard_normal(shape[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--questions", type=int, default=200_000)
    parser.add_argument("--images", type=int, default=50_000)
    args = parser.parse_args()
    seen = []
    learning_rate = train.learning_rate

    def watch(settings, step, steps):
        """Note the process's own memory, that of mapped files, in MB, and the open files."""
        status = Path("/proc/self/status").read_text()
        memory = [int(size) / 1024 for size in re.findall(r"Rss(?:Anon|File):\s+(\d+)", status)]
        seen.append([step, *memory, len(os.listdir("/proc/self/fd"))])
        return learning_rate(settings, step, steps)

    train.learning_rate = watch
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), "train2014", args.questions, args.images)
        write_files(Path(folder), "val2014", 200, 50)
        options = f"--task vqa --protocol official --data-dir {folder} --features {folder}"
        length = f"--max-steps {args.steps} --eval-every {args.steps} --run {folder}/run"
        sys.argv = ["train.py", *options.split(), *length.split()]
        data.run(train.main)

    # In the first quarter, the allocator finds its size.
    steps, *columns = np.array(seen[len(seen) // 4 :]).T
    for name, values in zip(["own memory", "mapped files", "open files"], columns, strict=True):
        slope = 1000 * np.polyfit(steps, values, 1)[0]
        print(f"{name:14}{values.min():8.0f} to {values.max():8.0f}, {slope:+.1f} per 1,000 steps")


if __name__ == "__main__":
    main()
