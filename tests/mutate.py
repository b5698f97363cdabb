"""Does the suite catch what goes wrong? Break a line on purpose, run the suite, restore; report what it did not see.

    python tests/mutate.py traps             # the mistakes of public implementations, one line each, on purpose
    python tests/mutate.py random --count 100 --seed 0       # one token of one of the five files, drawn at random

It works on a copy of the project; a mutation that was judged is in --log and not judged again.
"""
import argparse
import ast
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIVE = ["data.py", "t5.py", "hyperpelt.py", "clip_features.py", "train.py"]
# The tests that a mutation of a file is first shown to; then all others.
FIRST = {"data.py": ["test_data.py", "test_vl_data.py"], "t5.py": ["test_t5.py", "test_hyperpelt.py"], "hyperpelt.py": ["test_hyperpelt.py", "test_paper.py"],
         "clip_features.py": ["test_clip_features.py"], "train.py": ["test_train.py", "test_people.py", "test_vl_train.py", "test_paper.py", "test_safety.py"]}
TRAPS = [  # what goes wrong, file, the line's text, what stands there instead
    ("1 prefix columns take part in the position bias", "t5.py", "mask = F.pad(mask, (prefix_length, 0)).to(dtype)", "mask = F.pad(mask, (0, prefix_length)).to(dtype)"),
    ("2 scores are divided by sqrt(d_kv)", "t5.py", "torch.softmax(q @ k.transpose(2, 3) + mask, -1)", "torch.softmax(q @ k.transpose(2, 3) * q.size(-1)**-0.5 + mask, -1)"),
    ("2 scores are divided by sqrt(d_kv) on other devices", "t5.py", "attn_mask=mask, scale=1.0,", "attn_mask=mask,"),
    ("3 a prefix is masked", "t5.py", "(prefix_length, 0))[:, None, None]", "(prefix_length, 0), value=MASKED)[:, None, None]"),
    ("4 a prefix is d_model wide", "hyperpelt.py", "            self.prefix_hypernetwork = PrefixHypernetwork(config, heads, d_kv)", "            self.prefix_hypernetwork = PrefixHypernetwork(config, heads, d_model // heads)"),
    ("5 the prefix is put in front at every step", "t5.py", "prefix if earlier is None else None)", "prefix)"),
    ("6 the stray bias of old files is an error", "t5.py", "lambda name: name == STRAY", "lambda name: False"),
    ("7 the encoder's buckets are causal", "t5.py", "relative_bucket(distance, not self.is_decoder,", "relative_bucket(distance, False,"),
    ("7 the decoder's buckets look both ways", "t5.py", "relative_bucket(distance, not self.is_decoder,", "relative_bucket(distance, True,"),
    ("8 the mask keeps its own dtype", "t5.py", "(prefix_length, 0)).to(dtype)    ", "(prefix_length, 0))    "),
    ("9 no scale before a tied head", "t5.py", "F.linear(x * self.config.d_model**-0.5, self", "F.linear(x, self"),
    ("9 GELU by erf", "t5.py", 'approximate="tanh"', 'approximate="none"'),
    ("10 aliases are not read", "data.py", "if name in found and other in wanted and other not in found}", "if False}"),
    ("10 an unknown tensor is passed by", "data.py", "            elif not passed_by(name):\n", "            elif False:\n"),
    ("11 only the first shard", "t5.py", "    return sorted(set(files))\n", "    return sorted(set(files))[:1]\n"),
    ("12 norm with a mean", "t5.py", "mean_square = torch.linalg.vector_norm(x, dim=-1,", "x = x - x.mean(-1, keepdim=True)\n        mean_square = torch.linalg.vector_norm(x, dim=-1,"),
    ("12 no dropout after the last norm", "t5.py", "return self.dropout(self.norm(x))", "return self.norm(x)"),
    ("12 no dropout after the embedding", "t5.py", "        x = self.dropout(x)\n        for i, block", "        for i, block"),
    ("12 no dropout in the FFN", "t5.py", "return self.wo(self.dropout(y))", "return self.wo(y)"),
    ("13 what is trained is held in bfloat16", "hyperpelt.py", "parameter.data.clone() if parameter.requires_grad else parameter.data.to(dtype)", "parameter.data.to(dtype)"),
    ("14 no eos after a cut", "data.py", "return sum(pieces, []) + ids[-1:]", "return sum(pieces, [])"),
    ("14 sentinels count upwards", "t5.py", "ids += [self.first_sentinel - int(part)]", "ids += [self.first_sentinel - 99 + int(part)]"),
    ("15 the decoder sees -100", "t5.py", "        shifted = shifted.masked_fill(shifted == -100, self.config.pad_token_id)\n", ""),
    ("15 labels are not shifted", "t5.py", "shifted = F.pad(labels, (1, -1), value=self.config.pad_token_id)", "shifted = labels"),
    ("16 the end is cut off", "data.py", "        longest = max(pieces[1::2], key=len, default=[])", "        longest = pieces[-1]"),
    ("17 a missing key means untied", "t5.py", "tie_word_embeddings: bool = True ", "tie_word_embeddings: bool = False "),
    ("18 validation rows stay in training", "data.py", 'return {**splits, "train": [train[i] for i in order[1000:]], "validation"', 'return {**splits, "validation"'),
    ("18 a row is lost", "data.py", "[validation[i] for i in order[half:]]", "[validation[i] for i in order[half:-1]]"),
    ("19 steps of 0.1", "data.py", "{round(score * 5) / 5:.1f}", "{score:.1f}"),
    ("20 a sum as loss", "t5.py", "ignore_index=-100,\n", 'ignore_index=-100, reduction="sum",\n'),
    ("21 p ~ n^T", "train.py", "weights = np.array(counts) ** (1 / temperature)", "weights = np.array(counts, float) ** temperature"),
    ("22 quotes and BOM", "data.py", '"utf-8-sig"', '"utf-8"'),
    ("22 CoLA has a header", "data.py", 'url=GLUE_URL + "CoLA.zip", header=False)', 'url=GLUE_URL + "CoLA.zip")'),
    ("23 another task on every process", "train.py", "np.random.default_rng([seed, 0]).choice", "np.random.default_rng([seed, RANK]).choice"),
    ("24 no label counts as negative", "data.py", "predicted = np.where(predicted < 0, 1 - gold, predicted)", "predicted = np.where(predicted < 0, 0, predicted)"),
    ("24 ties are ranked in order", "data.py", "(np.cumsum(counts) - (counts - 1) / 2)[inverse]", "np.cumsum(counts)[inverse]"),
    ("24 constants are NaN", "data.py", "    if np.ptp(predicted) == 0 or np.ptp(gold) == 0:", "    if False:"),
    ("25 min(1, n / 3)", "data.py", "return leave_one_out(answers.count(text), len(answers))", "return min(1, answers.count(text) / 3)"),
    ("26 always normalised", "data.py", "    if len(set(answers)) > 1:\n", "    if True:\n"),
    ("26 only the answer is normalised", "data.py", "text, *answers = map(normalise_answer, (text, *answers))", "text = normalise_answer(text)"),
    ("27 no length penalty", "data.py", "/ (2 * 6.0 ** 2))", "/ (2 * 6e9 ** 2))"),
    ("27 idf as of plain CIDEr", "data.py", "dot = sum(min(value, b[gram]) * b[gram]", "dot = sum(value * b[gram]"),
    ("28 squashed", "clip_features.py", "(size, size) if squash else", "(size, size) if True else"),
    ("28 another order of the colours' means", "clip_features.py", "MEAN, STD = (0.48145466, 0.4578275, 0.40821073)", "MEAN, STD = (0.40821073, 0.4578275, 0.48145466)"),
    ("29 GELU for OpenAI's weights", "clip_features.py", "lambda x: x * torch.sigmoid(1.702 * x)", "F.gelu"),
    ("30 layernorm, spelled right", "clip_features.py", '"pre_layrnorm."', '"pre_layernorm."'),
    ("31 the last patch is dropped, not the class token", "clip_features.py", "return self.tokens(pixels)[:, 1:]", "return self.tokens(pixels)[:, :-1]"),
    ("32 the class token's position is interpolated away", "clip_features.py", "torch.cat([self.positions[:1], grid])", "torch.cat([torch.zeros_like(self.positions[:1]), grid])"),
    ("33 float32 on disk", "clip_features.py", 'rows.astype("<f2")', 'rows.astype("<f4")'),
    ("34 the whole T5 is trained", "hyperpelt.py", "parameter.requires_grad = train_backbone or id(parameter) in norms", "parameter.requires_grad = True"),
    ("34 the norms are frozen too", "hyperpelt.py", "parameter.requires_grad = train_backbone or id(parameter) in norms", "parameter.requires_grad = train_backbone"),
    ("35 weights are made for every batch of an evaluation", "train.py", "injected = model.inject(sites, None", "injected = model.inject(model.generate_sites(task.name), None"),
    ("36 checkpoints hold the backbone", "train.py", 'save_tensors(out / "best.safetensors", model.trained(), dict(step=step))', 'save_tensors(out / "best.safetensors", dict(model.named_parameters()), dict(step=step))'),
    ("36 the generator is not restored", "train.py", '        torch.set_rng_state(found["generator.cpu"][RANK].clone())', "        pass"),
    ("37 requires_grad is set in forward", "hyperpelt.py", "        injected = self.inject(self.generate_sites(task), features)", "        self.t5.requires_grad_(False)\n        injected = self.inject(self.generate_sites(task), features)"),
]
SWAPS = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "**": "*", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "and": "or", "or": "and",
         "not": "", "True": "False", "False": "True", "in": "not in", "is": "is not", "|": "&", "&": "|", "%": "*", "min": "max", "max": "min", "any": "all", "all": "any",
         "continue": "break", "break": "continue", "sum": "max", "softmax": "log_softmax", "relu": "abs", "zeros": "ones", "ones": "zeros", "append": "extend", "@": "*"}


def candidates(file):
    """(offset, length, replacement) of every token that can be swapped, without docstrings, messages and the lines of --help."""
    text = (ROOT / file).read_text()
    starts = [0]
    for line in text.splitlines(True):
        starts.append(starts[-1] + len(line))
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        at, line = starts[token.start[0] - 1] + token.start[1], token.line
        if "add_argument" in line or "import" in line or "raise UserError" in line or re.match(r'    \("[a-z-]+", ', line):
            continue
        if token.type in (tokenize.OP, tokenize.NAME) and token.string in SWAPS:
            found.append((at, len(token.string), SWAPS[token.string]))
        elif token.type == tokenize.NUMBER:
            value = ast.literal_eval(token.string)
            found.append((at, len(token.string), repr(value + 1 if isinstance(value, int) else 2 * value or 1.0)))
    return found


def draw(count, seed):
    """-> list of (name, file, whole text) of as many mutations, all of which Python can read."""
    rng, out = random.Random(seed), []
    everything = [(file, *place) for file in FIVE for place in candidates(file)]
    rng.shuffle(everything)
    for file, at, length, new in everything:
        text = (ROOT / file).read_text()
        changed = text[:at] + new + text[at + length:]
        try:
            ast.parse(changed)
        except SyntaxError:
            continue
        line = text.count("\n", 0, at) + 1
        column = at - text.rfind("\n", 0, at)
        out.append((f"{file}:{line}:{column} {text[at:at + length]} -> {new or 'nothing'}", file, changed))
        if len(out) == count:
            return out


def traps():
    """-> list of (name, file, whole text)."""
    out = []
    for name, file, old, new in TRAPS:
        text = (ROOT / file).read_text()
        if text.count(old) != 1:
            sys.exit(f"{name}: {file} has {text.count(old)} times: {old}")
        out.append((name, file, text.replace(old, new)))
    return out


def judge(folder, file, changed):
    """The mutated file in a copy of the project -> the first test that fails, or ""."""
    (folder / file).write_text(changed)
    others = sorted(path.name for path in (folder / "tests").glob("test_*.py") if path.name not in FIRST[file])
    try:
        for tests in (FIRST[file], others):
            process = subprocess.Popen([sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--tb=no", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)],
                                       cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            try:
                stdout, _ = process.communicate(timeout=900)
            except subprocess.TimeoutExpired:
                return "a hang"
            finally:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if process.returncode:
                return next((line.split(" - ")[0] for line in stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "pytest itself")
        return ""
    finally:
        shutil.copy(ROOT / file, folder / file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["traps", "random"])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("mutations.jsonl"))
    args = parser.parse_args()
    mutations = traps() if args.what == "traps" else draw(args.count, args.seed)
    known = {}
    if args.log.exists():
        known = {row["name"]: row["caught"] for row in map(json.loads, args.log.read_text().splitlines())}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "project"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__"))
        if failed := judge(folder, "train.py", (ROOT / "train.py").read_text()):     # else every mutation would count as caught
            sys.exit(f"{failed}, with nothing changed")
        for name, file, changed in mutations:
            if name not in known:
                known[name] = judge(folder, file, changed)
                with open(args.log, "a") as log:
                    log.write(json.dumps(dict(name=name, caught=known[name])) + "\n")
                print(f"{name}: {known[name] or 'NOT SEEN'}", flush=True)
    missed = [name for name, *_ in mutations if not known[name]]
    print(f"{len(mutations) - len(missed)} of {len(mutations)} caught; not seen: {'; '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()
