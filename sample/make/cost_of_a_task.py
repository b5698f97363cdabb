"""What a task costs: parameters for 1 to 64 tasks on T5-base, counted without weights.

    python sample/make/cost_of_a_task.py            # prints a table, draws figures/tasks.png

Trained is what a run trains for all tasks together, deployed what is left when the generated
weights are written out. Needs matplotlib.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from hyperpelt import METHODS, HyperPELT, HyperPELTConfig, count, deployed
from t5 import T5, T5Config

FIGURES = Path(__file__).resolve().parent.parent / "figures"
TASKS = (1, 2, 4, 5, 8, 16, 32, 64)


def list_forms():
    """-> (method, sharing) of every method that adds weights; hypernetworks have no sharing."""
    forms = []
    for method, (_, _, source) in METHODS.items():
        if source == "hypernetworks":
            forms.append((method, ""))
        elif source:
            forms += [(method, "shared"), (method, "per-task")]
    return forms


def counts(method, sharing, tasks):
    """-> trained and deployed parameters."""
    config = HyperPELTConfig(method, sharing=sharing or "default")
    with torch.device("meta"):
        model = HyperPELT(T5(T5Config()), [f"task {i}" for i in range(tasks)], config)
    return count(model.trained().values()), deployed(model)


def name_of(method, sharing):
    return f"{method}, {sharing}" if sharing else method


def draw(found):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    chosen = (("adapter", "per-task"), ("prefix", "shared"), ("hyperpelt", ""), ("hyperprefix", ""))
    for form in chosen:
        trained = [found[*form, tasks][0] / 1e6 for tasks in TASKS]
        axes.plot(TASKS, trained, marker=".", label=name_of(*form))
    axes.set(xscale="log", yscale="log", xlabel="tasks in one model",
             ylabel="trained parameters, millions")
    axes.set_xticks(TASKS, TASKS)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(FIGURES / "tasks.png", dpi=100)


def main():
    forms = list_forms()
    found = {(*form, tasks): counts(*form, tasks) for form in forms for tasks in TASKS}
    header = ["method", *map(str, TASKS), "deployed, 64"]
    lines = [header, ["---"] * len(header)]
    for form in forms:
        millions = [f"{found[*form, tasks][0] / 1e6:.2f}" for tasks in TASKS]
        lines.append([name_of(*form), *millions, f"{found[*form, 64][1] / 1e6:.1f}"])
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    draw(found)


if __name__ == "__main__":
    main()
