"""Long work stays small: 200,000 questions about 50,000 images, made up; resident memory and open files over the steps of a run.

    python tests/long.py --steps 3000          # Linux; some 10 minutes on two cores
"""
import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

import data
import train

COLOURS, THINGS = "red green blue yellow white black".split(), "circle square triangle cross".split()


def make(folder, questions, images, width):
    """VQAv2's official files and features of noise."""
    rng = np.random.default_rng(0)
    (folder / "VQAv2").mkdir(parents=True)
    (folder / "features").mkdir()
    for part, count, pictures in (("train2014", questions, images), ("val2014", 200, 50)):
        rows = [dict(question_id=i, image_id=int(rng.integers(pictures)), question=f"what colour is the {rng.choice(THINGS)} number {i}?") for i in range(count)]
        answers = [dict(question_id=row["question_id"], image_id=row["image_id"], answer_type="other",
                        answers=[dict(answer=str(rng.choice(COLOURS)), answer_confidence="yes", answer_id=k) for k in range(10)]) for row in rows]
        (folder / "VQAv2" / f"v2_OpenEnded_mscoco_{part}_questions.json").write_text(json.dumps(dict(data_subtype=part, questions=rows)))
        (folder / "VQAv2" / f"v2_mscoco_{part}_annotations.json").write_text(json.dumps(dict(annotations=answers)))
        array = np.lib.format.open_memmap(folder / "features" / f"{part}.npy", "w+", np.float16, (pictures, 49, width))
        for start in range(0, pictures, 1000):
            array[start:start + 1000] = rng.standard_normal((min(1000, pictures - start), 49, width))
        (folder / "features" / f"{part}.json").write_text(json.dumps(dict(ids=[str(i) for i in range(pictures)], kind="noise")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--questions", type=int, default=200_000)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=96)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.questions, args.images, args.width)
        seen, rate = [], train.learning_rate

        def watch(step, *more):
            if step % 20 == 0:
                lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
                anonymous, mapped = (int(lines[name].split()[0]) / 2**10 for name in ("RssAnon", "RssFile"))
                seen.append((step, anonymous, mapped, len(os.listdir("/proc/self/fd"))))
                if step % 200 == 0:
                    print("step %5d   own memory %6.0f MB   of files %6.0f MB   open files %d" % seen[-1], flush=True)
            return rate(step, *more)

        train.learning_rate = watch
        sys.argv = ["train.py", "--task", "vqa", "--model", str(train.SAMPLE / "mini-t5"), "--data-dir", folder, "--features", f"{folder}/features", "--split", "official",
                    "--steps", str(args.steps), "--eval-every", str(args.steps), "--out", f"{folder}/run"]
        data.run(train.main)
    steps, anonymous, mapped, files = np.array(seen)[len(seen) // 4:].T      # without the first quarter, in which the allocator finds its size
    for name, values in (("own memory", anonymous), ("memory of mapped files", mapped)):
        slope, _ = np.polyfit(steps, values, 1)
        print(f"{name}: {values.min():.0f} to {values.max():.0f} MB, slope {1000 * slope:+.1f} MB in 1,000 steps")
    print(f"open files: {files.min():.0f} to {files.max():.0f}")


if __name__ == "__main__":
    main()
