"""The small-scale experiments: what is run, recorded and printed."""
import sys

import safetensors.torch
from conftest import SAMPLE, run_cli

sys.path.append(str(SAMPLE))
import experiments

TINY = "--max-steps 2 --max-train-examples 40 --max-eval-examples 8"


def test_the_tables_of_the_page_come_from_the_results():
    page = (SAMPLE / "RESULTS.md").read_text()
    assert "| `hyperpelt` | " in page and experiments.fill(page) == page


def test_a_job_is_run_and_recorded_once(tmp_path, monkeypatch, capsys):
    header = experiments.RESULTS.read_text().splitlines()[0]
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results.tsv")
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    jobs = [experiments.Job("tiny", "norms", "rte", seed, f"--method norms {TINY}")
            for seed in range(2)]
    jobs.append(experiments.Job("tiny", "wrong", "rte", 0, "--method wrong"))
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"tiny": lambda: jobs})
    (tmp_path / "results.tsv").write_text(header + "\n")
    experiments.run(["tiny"], [], 2)
    recorded = experiments.read_results()
    experiments.run(["tiny"], [], 2)
    assert experiments.read_results() == recorded
    assert [row["seed"] for row in recorded] in (["0", "1"], ["1", "0"])
    assert all(row["step"] == "2" and row["metric"] == "rte accuracy" for row in recorded)
    printed = capsys.readouterr().out
    assert "tiny: 3 jobs" in printed and "tiny: 1 jobs" in printed and "wrong-0: failed" in printed


def test_an_embedding_can_be_zero_or_frozen(tmp_path):
    options = f"--zero task --freeze layer --run {tmp_path / 'run'} {TINY}".split()
    done = run_cli(SAMPLE / "experiments.py", "train", *options)
    assert done.returncode == 0, done.stderr
    trained = safetensors.torch.load_file(tmp_path / "run" / "best.safetensors")
    assert "block" in trained and not {"task.rte", "layer"} & trained.keys()


def test_differences_are_paired():
    steps = {0: {10: 0.1, 20: 0.5}, 1: {10: 0.2, 20: 0.7}}
    others = {1: {20: 0.6}, 0: {20: 0.4}}
    values = experiments.last_values(steps)
    assert experiments.difference(values, experiments.last_values(others)) == "+10.0 ± 0.0"
    assert experiments.spread(values) == "60.0 ± 14.1"
    assert experiments.first_steps(steps, 0.15) == "20 10"
    assert experiments.first_steps(steps, 0.6) == "- 20"


def test_an_unknown_experiment_is_a_short_error():
    done = run_cli(SAMPLE / "experiments.py", "run", "slow")
    assert done.returncode == 2 and "found slow, expected some of speed" in done.stderr
