"""Kill a training run at random moments and resume it: its result is that of a run left alone.

python tests/stress/kill.py --kills 50
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# It saves and evaluates in every second step, so that many moments of a save are met.
OPTIONS = ["--max-steps", "16", "--eval-every", "2", "--batch-size", "4"]


def train(folder, seconds=None):
    """Begin or resume a run -> whether it ended within `seconds`. SIGKILL ends it otherwise."""
    options = ["--resume"] if (folder / "config.json").exists() else OPTIONS
    command = [sys.executable, "train.py", "--run", str(folder), *options]
    try:
        subprocess.run(command, cwd=ROOT, timeout=seconds, check=True, stdout=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="at least so many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as parent:
        alone, killed = Path(parent, "alone"), Path(parent, "killed")
        start = time.monotonic()
        train(alone)
        longest = time.monotonic() - start

        kills = 0
        while kills < args.kills:
            while not train(killed, rng.uniform(0, longest)):
                kills += 1
            for name in ("best.safetensors", "metrics.json"):
                if (killed / name).read_bytes() != (alone / name).read_bytes():
                    sys.exit(f"after {kills} kills, {name} differs from that of a run left alone")
            print(f"{kills} kills: equal files", flush=True)
            shutil.rmtree(killed)


if __name__ == "__main__":
    main()
