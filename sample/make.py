"""Make everything in this folder again: data, tokenizer, a small T5, a small CLIP. Every step is seeded.

    python sample/make.py glue                         # sample/glue: RTE and SST-2 (then: what a bag of words makes of them)
    python sample/make.py text --work DIR              # DIR/text.txt and DIR/wordnet.json, from two Debian packages
    python sample/make.py vocab --work DIR             # sample/mini-t5/spiece.model
    python sample/make.py pretrain --work DIR          # sample/mini-t5; hours; stopped or killed, the same command goes on
    python sample/make.py fill --work DIR              # what the small T5 puts into held-out gaps and answers
    python sample/make.py scenes                       # sample/vqa: images, and questions in VQAv2's format
    python sample/make.py clip                         # sample/mini-clip; about 25 minutes on a core
    python sample/make.py features                     # sample/vqa/features, by clip_features.py
    python sample/make.py drawing                      # sample/figures/dataflow.svg
    python sample/make.py files                        # every file with its size and hash, for sample/README.md

Needs requirements.txt; `glue` shows its bags of words with scikit-learn where that is installed.
"""
import itertools
import json
import math
import random
import re
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import clip_features                                                         # noqa: E402
import data                                                                  # noqa: E402
import t5                                                                    # noqa: E402
from t5 import T5, T5Config, Tokenizer, public_name                          # noqa: E402

# ------------------------------------------------------------------------------------------- word lists of the sample tasks

KINDS = {  # top -> middle -> leaves: every word is a kind of the words above it
    "animal": {"dog": "poodle beagle terrier spaniel", "bird": "sparrow robin parrot eagle", "insect": "ant wasp beetle moth"},
    "person": {"musician": "pianist violinist drummer", "doctor": "surgeon dentist", "athlete": "swimmer boxer runner",
               "artist": "painter sculptor", "relative": "uncle aunt cousin nephew"},
    "vehicle": {"car": "taxi limousine sedan", "boat": "canoe ferry yacht", "plane": "jet glider"},
    "plant": {"tree": "oak pine maple willow", "flower": "rose tulip daisy orchid"},
    "garment": {"hat": "cap helmet bonnet", "shoe": "boot sandal slipper", "coat": "jacket raincoat"},
    "food": {"fruit": "apple pear lemon plum", "vegetable": "carrot onion turnip cabbage"},
}
PARENT = {leaf: middle for top in KINDS.values() for middle, leaves in top.items() for leaf in leaves.split()}
PARENT |= {middle: top for top, middles in KINDS.items() for middle in middles}
NOUNS = [*KINDS, *PARENT]
DEEDS = "chase follow watch help push touch ignore carry greet warn".split()             # to an animal or a person
HANDLING = "clean move paint want drop borrow describe photograph deliver inspect".split()        # of a thing; all verbs are regular
SCALES = [(("big", "large"), ("small", "little")), (("quick", "fast"), ("slow", "sluggish")), (("quiet", "silent"), ("loud", "noisy")),
          (("happy", "cheerful"), ("sad", "unhappy")), (("rich", "wealthy"), ("poor", "penniless")), (("clean", "spotless"), ("dirty", "filthy")),
          (("sick", "ill"), ("healthy", "fit")), (("brave", "courageous"), ("timid", "cowardly")), (("clever", "smart"), ("stupid", "foolish")),
          (("angry", "furious"), ("calm", "peaceful"))]                      # each end of a scale in two words
SYNONYMS = [end for scale in SCALES for end in scale]
ANTONYMS = [(a, b) for one, other in SCALES for a in one for b in other]
COLOURS = "red blue green yellow white black brown grey".split()
ADJECTIVES = {"thing": COLOURS + "big small large little clean dirty old".split(),
              "being": "big small quick slow quiet loud happy sad old young brave clever tall".split()}
PLACES = ["in the garden", "near the river", "at the station", "behind the house", "in the park", "on the bridge", "at the market", "by the lake"]
TIMES = ["on monday", "after lunch", "before dawn", "in the morning", "last week", "at noon", "during the storm", "on friday"]
NUMBERS = "one two three four five six seven eight nine".split()


def kin(word):
    """-> the words above a noun."""
    return [] if word not in PARENT else [PARENT[word], *kin(PARENT[word])]


def below(word):
    return [other for other in NOUNS if word in kin(other)]


def top(word):
    return (kin(word) or [word])[-1]


def plural(noun):
    return noun[:-1] + "ies" if re.search("[^aeo]y$", noun) else noun + ("es" if re.search("(ch|sh|s|x)$", noun) else "s")


def past(verb):
    return re.sub("([^aeou])y$", r"\1i", verb.removesuffix("e")) + verb[-1] * bool(re.search("[^aeiou][aeiou]p$", verb)) + "ed"


# ---------------------------------------------------------------------------------------------- sample/glue: RTE and SST-2
# A fact is a dict: subject and object (noun, adjective, number), a verb, a place or a time. Each function below makes premise and
# hypothesis of a kind, for both labels, so that the hypotheses of both look alike and the words shared give little away.

def noun_phrase(rng, noun, adjective="", number=1, article=None):
    words = [w for w in (adjective, noun if number == 1 else plural(noun)) if w]
    if number > 1:
        return " ".join([NUMBERS[number - 1], *words])
    article = article or rng.choice(["a", "the"])
    return " ".join(["an" if article == "a" and words[0][0] in "aeiou" else article, *words])


def fact(rng, **given):
    """A random fact; words of `given` (subject, object, ...) stay."""
    subject = given.get("subject") or rng.choice([n for n in NOUNS if top(n) in ("person", "animal")])
    beings = top(given["object"]) in ("person", "animal") if "object" in given else top(subject) == "animal" or rng.random() < 0.5
    if "subject" not in given and not beings:
        subject = rng.choice([n for n in NOUNS if top(n) == "person"])
    object = given.get("object") or rng.choice([n for n in NOUNS if (top(n) in ("person", "animal")) == beings and n != subject])
    return {"subject": subject, "object": object, "verb": rng.choice(DEEDS if beings else HANDLING), "subject_adjective": "", "object_adjective": "",
            "subject_number": 1, "object_number": 1, "where": "", "articles": rng.choices(["a", "the"], k=2), **given}


def being(noun):
    return "being" if top(noun) in ("person", "animal") else "thing"


def say(rng, f, passive=False, negated=False):
    subject = f.get("subject_text") or noun_phrase(rng, f["subject"], f["subject_adjective"], f["subject_number"], f["articles"][0])
    object = f.get("object_text") or noun_phrase(rng, f["object"], f["object_adjective"], f["object_number"], f["articles"][1])
    first, second, number = (object, subject, f["object_number"]) if passive else (subject, object, f["subject_number"])
    verb = f"did not {f['verb']}" if negated else past(f["verb"])
    if passive:
        verb = f"{'was' if number == 1 else 'were'} {'not ' * negated}{past(f['verb'])} by"
    return " ".join(w for w in (first, verb, second, f["where"]) if w)


def modifiers(rng, f, count):
    """A fact with `count` of its three modifiers (subject's and object's adjective, place or time) filled in."""
    slots = rng.sample(["subject_adjective", "object_adjective", "where"], count)
    return {**f, **{slot: rng.choice(PLACES + TIMES) if slot == "where" else rng.choice(ADJECTIVES[being(f[slot.split("_")[0]])]) for slot in slots}}


def by_kind(rng, entailed):
    """A wider word for a narrower one, against a narrower word for a wider one or a word of another branch."""
    slot = rng.choice(["subject", "object"])
    word = rng.choice([n for n in NOUNS if below(n) and (slot == "object" or being(n) == "being")])
    unrelated = [n for n in NOUNS if n != word and n not in kin(word) and word not in kin(n) and being(n) == being(word) and (word in KINDS or top(n) == top(word))]
    source = rng.choice(below(word) if entailed else rng.choice([kin(word), unrelated]) or unrelated)
    f = modifiers(rng, fact(rng, **{slot: source}), rng.randrange(3))
    # "the dog" of a premise may be spoken of as "an animal", whatever the article was
    return say(rng, f), say(rng, {**f, slot: word, "articles": [("a" if slot == s else a) for s, a in zip(("subject", "object"), f["articles"])]})


def by_modifier(rng, entailed):
    """Dropped, against added, moved to the other noun, or exchanged for another one."""
    slots = ["subject_adjective", "object_adjective", "where"]
    bare = fact(rng)
    some, full = modifiers(rng, bare, rng.randrange(1, 3)), modifiers(rng, bare, 3)
    filled, free = [s for s in slots if some[s]], rng.choice([s for s in slots if not some[s]])
    more = {**some, free: full[free]}
    if entailed:
        return say(rng, more), say(rng, some)
    if filled != ["where"] and rng.random() < 0.5:                           # the same words, the adjective at the other noun
        return say(rng, {**some, "subject_adjective": some["object_adjective"], "object_adjective": some["subject_adjective"]}), say(rng, some)
    return say(rng, {**more, rng.choice(filled): ""}), say(rng, some)


def by_conjunction(rng, entailed):
    """One of two that both did it, against one of two of whom we do not know which, or one who did something else."""
    f = {**modifiers(rng, fact(rng), rng.randrange(2)), "articles": ["the", "the"]}
    other = rng.choice([n for n in NOUNS if top(n) == top(f["subject"]) and n not in (f["subject"], f["object"])])
    if rng.random() < 0.5:                                                   # two clauses: each keeps its own subject
        g = {**fact(rng, subject=other), "articles": ["the", "the"]}
        if g["object"] in (f["subject"], f["object"]):
            return by_conjunction(rng, entailed)
        one, two = rng.sample([f, g], 2)
        return " and ".join(say(rng, x) for x in rng.sample([f, g], 2)), say(rng, one if entailed else {**two, "subject": one["subject"], "subject_adjective": one["subject_adjective"]})
    names = ["the " + n for n in rng.sample([f["subject"], other], 2)]
    premise, hypothesis = rng.choice([("{} and {}", "{}"), ("{} or {}", "{1} or {0}"), ("{} and {}", "{1} and {0}")] if entailed else
                                     [("{} or {}", "{}"), ("{} or {}", "{1} and {0}")])
    return tuple(say(rng, {**f, "subject_text": text.format(*names)}) for text in (premise, hypothesis))


def by_number(rng, entailed):
    """At least, at most, exactly; the premise has a second number, which counts something else."""
    f = modifiers(rng, fact(rng), rng.randrange(2))
    how, n, m = rng.choice(["at least", "at most", "exactly"]), *rng.sample(range(2, 10), 2)
    true = {"at least": range(2, n), "at most": range(n + 1, 10), "exactly": [n]}[how]
    allowed = [k for k in range(2, 10) if abs(k - n) <= 3 and (k in true if entailed else k not in true and k != n)]
    if not allowed:
        return by_number(rng, entailed)
    k = m if m in allowed and rng.random() < 0.6 else rng.choice(allowed)
    one, two = rng.sample(["subject", "object"], 2)
    f = {**f, f"{one}_number": n, f"{two}_number": m}
    return say(rng, f), say(rng, {**f, f"{one}_text": f"{how} {noun_phrase(rng, f[one], f[one + '_adjective'], k)}"})


def by_role(rng, entailed):
    """Active and passive: the same roles, or swapped."""
    f = fact(rng, object=rng.choice([n for n in NOUNS if top(n) in ("person", "animal")]))
    if f["subject"] == f["object"]:
        return by_role(rng, entailed)
    f = {**modifiers(rng, f, rng.randrange(2)), "articles": ["the", "the"]}
    swapped = {**f, **{a + end: f[b + end] for a, b in (("subject", "object"), ("object", "subject")) for end in ("", "_adjective")}}
    return say(rng, f, passive=rng.random() < 0.5), say(rng, f if entailed else swapped, passive=rng.random() < 0.5)


def by_opposite(rng, entailed):
    """An adjective's synonym against its opposite, a denial repeated against a denial dropped or added."""
    f = fact(rng)
    if rng.random() < 0.6:
        pair = rng.choice(SYNONYMS if entailed else ANTONYMS)
        slot = "subject" if top(f["object"]) not in ("person", "animal") or rng.random() < 0.5 else "object"
        one, two = rng.sample(pair, 2)
        return say(rng, {**f, slot + "_adjective": one}), say(rng, {**f, slot + "_adjective": two})
    f = {**f, "articles": ["the", "the"]}
    first = rng.random() < 0.5
    second = first if entailed else not first
    return say(rng, f, rng.random() < 0.5, negated=first), say(rng, f, rng.random() < 0.5, negated=second)


def rte_rows(rng, count):
    """-> [(premise, hypothesis, label)], half of each label, without repetition."""
    kinds, rows, seen = [by_kind, by_modifier, by_conjunction, by_number, by_role, by_opposite], [], set()
    while len(rows) < count:
        entailed = len(rows) % 2 == 0
        premise, hypothesis = (text[0].upper() + text[1:] + "." for text in kinds[len(rows) // 2 % len(kinds)](rng, entailed))
        if (premise, hypothesis) not in seen and premise != hypothesis:
            seen.add((premise, hypothesis))
            rows.append((premise, hypothesis, "entailment" if entailed else "not_entailment"))
    rng.shuffle(rows)
    return rows


ASPECTS = "film plot acting dialogue story music ending direction script cast humor pacing".split()
GOOD = "charming brilliant funny moving fresh clever gripping delightful sharp warm thrilling witty".split()
BAD = "boring dull clumsy tedious stale silly lifeless awful bland shallow tiresome messy".split()
NEGATIONS = ["is not {}", "is never {}", "is hardly {}", "is far from {}", "is anything but {}", "fails to be {}"]
ASSERTIONS = ["is {}", "is truly {}", "is quite {}", "feels {}", "manages to be {}", "is nothing but {}"]


def opinion(rng, aspect, positive):
    denied = rng.random() < 0.5
    word = rng.choice(GOOD if positive != denied else BAD)
    return f"the {aspect} " + rng.choice(NEGATIONS if denied else ASSERTIONS).format(word)


def sst2_rows(rng, count):
    """-> [(sentence, label)]: denial turns a word round, and of two opinions one counts: after `but`, not after `although`."""
    rows, seen = [], set()
    while len(rows) < count:
        positive = len(rows) % 2 == 0
        one, two = rng.sample(ASPECTS, 2)
        text = opinion(rng, one, positive)
        if rng.random() < 0.6:
            weak = opinion(rng, two, rng.random() < 0.5 if rng.random() < 0.3 else not positive)
            text = rng.choice([f"{weak} , but {text}", f"although {weak} , {text}", f"{text} , although {weak}", f"{text} , even if {weak}"])
        text += rng.choice([" .", " !", " in the end .", " , as ever ."])
        if text not in seen:
            seen.add(text)
            rows.append((text, int(positive)))
    rng.shuffle(rows)
    return rows


def glue(args):
    for folder, header, make in (("RTE", "index\tsentence1\tsentence2\tlabel", rte_rows), ("SST-2", "sentence\tlabel", sst2_rows)):
        rows = make(random.Random(f"{folder} {args.seed}"), 4400)
        (HERE / "glue" / folder).mkdir(parents=True, exist_ok=True)
        for name, part in (("train", rows[:4000]), ("dev", rows[4000:])):
            lines = ["\t".join(map(str, (i, *row) if folder == "RTE" else row)) for i, row in enumerate(part)]
            data.write_whole(HERE / "glue" / folder / f"{name}.tsv", "\n".join([header, *lines, ""]).encode())
        print(f"{HERE.name}/glue/{folder}: 4,000 and 400 rows, for instance {rows[0]}")
        bags_of_words(folder, rows)


def bags_of_words(name, rows):
    """Print what a linear classifier reaches without reading: on each text's words, and on which words are shared and new."""
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return print("with scikit-learn installed this shows what bags of words reach")
    def words(text):
        return re.findall(r"[\w']+", text.lower())
    views = {"the sentence": lambda row: [f"1 {w}" for w in words(row[0])]}
    if len(rows[0]) == 3:
        views = {"the hypothesis alone": lambda row: words(row[1]), "both texts": lambda row: [f"1 {w}" for w in words(row[0])] + [f"2 {w}" for w in words(row[1])],
                 "counts of shared, new and dropped words": lambda row: [f"{name} {size}" for name, size in zip("snd", (
                     len(set(words(row[0])) & set(words(row[1]))), len(set(words(row[1])) - set(words(row[0]))), len(set(words(row[0])) - set(words(row[1])))))],
                 "new and dropped words": lambda row: [f"n {w}" for w in set(words(row[1])) - set(words(row[0]))] + [f"d {w}" for w in set(words(row[0])) - set(words(row[1]))]}
    for what, view in views.items():
        counts = CountVectorizer(analyzer=view)
        x = counts.fit_transform(rows[:4000])
        model = LogisticRegression(max_iter=2000, C=0.3).fit(x, [row[-1] for row in rows[:4000]])
        score = model.score(counts.transform(rows[4000:]), [row[-1] for row in rows[4000:]])
        print(f"  linear classifier on {what}: {score:.3f} of the 400 rows right")


# ------------------------------------------------------------------------------------------- text, WordNet's facts, tokenizer

def text(args):
    """DIR/text.txt, a paragraph a line, from Debian's packages of WordNet 3.0 (definitions and examples; WordNet licence) and of Jane
    Austen's novels (public domain); DIR/wordnet.json with WordNet's nouns and the words above them, synonyms and opposites."""
    work = Path(args.work)
    for package, file in (("wordnet-base", "usr/share/wordnet/data.noun"), ("r-cran-janeaustenr", "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")):
        if not (work / file).exists():
            work.mkdir(parents=True, exist_ok=True)
            try:
                subprocess.run(["apt-get", "download", "-q", package], cwd=work, check=True)
                subprocess.run(["dpkg-deb", "-x", *map(str, work.glob(f"{package}_*.deb")), str(work)], check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise data.UserError(f"{work}: found no {file}, expected the contents of Debian's package {package} ({error})") from None
    paragraphs = novels((work / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes())
    words = sum(len(p.split()) for p in paragraphs)
    entries, facts = wordnet(work / "usr/share/wordnet")
    random.Random(args.seed).shuffle(paragraphs := paragraphs + entries)
    data.write_whole(work / "text.txt", ("\n".join(paragraphs) + "\n").encode())
    data.write_whole(work / "wordnet.json", json.dumps(facts).encode())
    print(f"novels {words:,} words, WordNet {sum(len(p.split()) for p in entries):,} words; "
          + ", ".join(f"{len(v):,} {k}" for k, v in facts.items()))


def novels(raw):
    """The strings of an R data base: 4 bytes length, zlib, objects whose strings are a type word 9, their length, their bytes."""
    lines, place = [], 0
    while place + 4 < len(raw):
        stream = zlib.decompressobj()
        block = stream.decompress(raw[place + 4:])
        place = len(raw) - len(stream.unused_data)
        found, i = [], 0
        while (i := block.find(b"\x00\x09", i)) >= 0:                        # ..00 09, then the length
            length = struct.unpack(">I", block[i + 2:i + 6])[0] if i + 6 <= len(block) else 2**31
            part = block[i + 6:i + 6 + length]
            if length < 200 and len(part) == length and all(31 < b for b in part):
                found.append(part.decode("utf-8", "replace"))
                i += 6 + length
            else:
                i += 1
        lines += found if len(found) > 1000 else []                          # the novels, not their names
    text = re.sub(r"_|\[\w+\]", "", "\n".join(lines))
    return [p for p in (" ".join(p.split()) for p in re.split(r"\n\s*\n|\n(?=CHAPTER|Chapter)", text)) if len(p) > 60 and not p.isupper()]


def wordnet(folder):
    """-> ["word: definition; examples"], {"kinds": [[word, [words above]]], "synonyms": [[a, b]], "opposites": [[a, b]]}."""
    synsets, entries = {}, []
    for part, letter in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
        for line in (folder / f"data.{part}").read_text(errors="replace").splitlines():
            if line.startswith(" "):
                continue
            facts, gloss = line.split(" | ", 1)
            facts = facts.split()
            names = [re.sub(r"\(\w+\)", "", w).replace("_", " ") for w in facts[4:4 + 2 * int(facts[3], 16):2]]
            pointers = facts[5 + 2 * int(facts[3], 16):][:4 * int(facts[4 + 2 * int(facts[3], 16)])]
            pairs = [(sign, at, part) for sign, at, part in zip(pointers[::4], pointers[1::4], pointers[2::4]) if sign in ("@", "!")]
            synsets[letter, facts[0]] = names, pairs
            entries.append(f"{', '.join(names[:3])}: {gloss.strip()}")
    # How often a word was met in this sense, for the frequent ones (cntlist.rev: sense key, number, count).
    met = {}
    for line in (folder / "cntlist.rev").read_text().splitlines():
        key, _, count = line.split()
        word = key.split("%")[0].replace("_", " ")
        met[word] = met.get(word, 0) + int(count)
    plain = re.compile("[a-z]+( [a-z]+)?$")
    kinds, synonyms, opposites = [], [], []
    index = {}                                                               # a noun -> its first, most frequent sense
    for line in (folder / "index.noun").read_text().splitlines():
        parts = line.split()
        if not line.startswith(" "):
            index[parts[0].replace("_", " ")] = parts[6 + int(parts[3])]
    for word, offset in index.items():
        if not plain.match(word) or not (met.get(word, 0) > 0 or word in NOUNS):
            continue
        above, at = [], ("n", offset)
        for _ in range(8):
            up = [(p, o) for sign, o, p in synsets[at][1] if sign == "@"]
            if not up:
                break
            at = up[0]
            above.append(synsets[at][0][0].lower())
        if len(above) >= 3:
            kinds.append([word, above[:-2]])                                 # not up to "entity"
    for names, pointers in synsets.values():
        names = [n.lower() for n in names if plain.match(n.lower()) and met.get(n.lower(), 0) > 1]
        synonyms += [[names[0], other] for other in names[1:3]]
        for sign, offset, p in pointers:
            other = synsets[p if p != "s" else "a", offset][0][0].lower() if sign == "!" and (p, offset) in synsets else ""
            if names and plain.match(other):
                opposites.append([names[0], other])
    return entries, dict(kinds=kinds, synonyms=synonyms, opposites=opposites)


def vocab(args):
    """sample/mini-t5/spiece.model: 5,000 pieces of that text, lower and upper case, and of the words of T5's text formats."""
    import sentencepiece
    work, out = Path(args.work), HERE / "mini-t5"
    lines = (work / "text.txt").read_text().splitlines()
    rng = random.Random(args.seed)
    words = " ".join(f"{w} {plural(w)}" for w in NOUNS) + " " + " ".join([past(v) for v in DEEDS + HANDLING] + NUMBERS + ASPECTS + GOOD + BAD + COLOURS
                                                                       + [w for pair in SYNONYMS + ANTONYMS for w in pair])
    formats = " ".join(f"{name} {' '.join(task.labels.values())}" for name, task in data.TASKS.items())
    formats += " sentence: sentence1: sentence2: question: answer: premise: hypothesis: vqa: yes no circle square triangle star"
    out.mkdir(exist_ok=True)
    lines += [" ".join(rng.sample(words.split(), 12)) for _ in range(12000)] + [formats] * 300
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(out / "spiece"), vocab_size=VOCABULARY, model_type="unigram", character_coverage=0.9998,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>", minloglevel=1, num_threads=2)
    (out / "spiece.vocab").unlink()
    tokenizer = Tokenizer(out / "spiece.model")
    split = [w for w in words.split() if len(tokenizer.encode(w)) > 2]
    print(f"{len(tokenizer.pieces):,} pieces; words of the sample of more than one piece: {len(split)} of {len(words.split())}, {' '.join(split[:20])}")


# ------------------------------------------------------------------------------------------------- pretraining of the small T5

VOCABULARY = 5000
CONFIG = T5Config(d_model=256, d_kv=64, d_ff=768, num_layers=6, num_heads=4, num_decoder_layers=2, vocab_size=5120,
                  dropout_rate=0.0)  # v1.0's form; no dropout, in pretraining or after it: so small a frozen model unlearns under it [C]
WINDOW, NOISE, SPAN = 128, 0.15, 3       # tokens of a piece of text, share of them removed, mean length of a gap [X: T5]
SECOND = 4800                            # first step of the second part: more text, and more of the pairs that were hardest in the first
SUPERVISED = 0.75, 0.4                   # share of a step's tokens that are questions, not text with gaps, in either part
TOKENS = 4096                            # source tokens of a step
PEAK, WARMUP = 5e-3, 50                  # learning rate of embeddings and matrices, and its rise in steps; then it falls to 0
HELD_OUT = 400                           # paragraphs that are never trained on


def corrupt(ids, rng, first_sentinel):
    """T5's span corruption: ids -> source (gaps replaced by sentinels), target (sentinels, each with its gap's ids)."""
    noise = max(1, round(len(ids) * NOISE))
    gaps = max(1, round(noise / SPAN))
    cut = lambda total, parts: np.diff([0, *sorted(rng.choice(np.arange(1, total), parts - 1, replace=False)), total])    # noqa: E731
    source, target, place = [], [], 0
    for i, (keep, drop) in enumerate(zip(cut(len(ids) - noise, gaps), cut(noise, gaps))):
        source += [*ids[place:place + keep], first_sentinel - i]
        target += [first_sentinel - i, *ids[place + keep:place + keep + drop]]
        place += keep + drop
    return source + [1], target + [1]


class Questions:
    """Supervised text-to-text examples: WordNet's facts, what differs between two texts, numbers, who did what. None of the sample's
    tasks is among them, nor a sentence of their templates; the words of the sample's lists are."""

    def __init__(self, work, paragraphs, pieces):
        facts = data.read_json(work / "wordnet.json")
        self.kinds, self.synonyms, self.opposites = facts["kinds"], facts["synonyms"], facts["opposites"]
        self.common = [[w, kin(w)] for w in NOUNS if kin(w)]
        self.sorts = SORTS_OF_PAIRS
        self.names = [word for word, _ in self.kinds if " " not in word]
        self.words = [piece[1:] for piece in map(pieces.id_to_piece, range(len(pieces))) if re.fullmatch("\u2581[a-z]{2,}", piece)]
        self.marks = [w for w in self.words if w not in ("sentence", "premise", "hypothesis", "entailment", "rte", "sst")]
        self.sentences = [s for p in paragraphs for s in re.findall(r'[A-Z"]?[^.;:"()]{20,90}(?=[.;"])', p) if 4 <= len(s.split()) <= 14]

    def one(self, rng, part=0):
        self.sorts = SORTS_OF_PAIRS + ["same", "moved", "roles"] * 2 * part
        sorts = {self.pair: 14, self.mood: 4, self.kind: 2, self.word: 1, self.difference: 2, self.number: 2, self.reading: 3, self.whether: 2,
                 self.placed: 3, self.again: 2}
        return rng.choices(list(sorts), sorts.values())[0](rng)

    def again(self, rng):
        """Words said again, any of the vocabulary, so that each of them has been an answer; some are put as "not_word"."""
        words = " ".join(rng.choice(["", "", "not_"]) + word for word in rng.choices(self.words, k=rng.randrange(1, 9)))
        return f"say again : {words}", words

    def kind(self, rng):
        word, above = rng.choice(self.kinds if rng.random() < 0.5 else self.common)
        how = rng.random()
        if how < 0.3:
            return f"what is a {word} ?", f"a kind of {above[0]}"
        if how < 0.6:
            return f"which is the wider word : {' or '.join(rng.sample([word, other := rng.choice(above)], 2))} ?", other
        words = [word, rng.choice(rng.choice(self.kinds if rng.random() < 0.5 else self.common)[1]) if rng.random() < 0.5 else rng.choice(above)]
        return f"is every {words[0]} a {words[1]} ?", "yes" if words[1] in above else "no"

    def word(self, rng):
        if rng.random() < 0.4:
            a, b = rng.sample(rng.choice(self.synonyms if rng.random() < 0.5 else SYNONYMS), 2)
            return f"another word for {a}", b
        a, b = rng.sample(rng.choice(self.opposites if rng.random() < 0.5 else ANTONYMS), 2)
        return f"the opposite of {a}", b

    def difference(self, rng):
        """What was done to a text: words left out, put in, changed, two of them swapped."""
        words = (state(self.statement(rng)) if rng.random() < 0.6 else rng.choice(self.sentences)).split()
        other, how, i = list(words), rng.choice(["left out", "put in", "changed", "swapped", "nothing"]), rng.randrange(len(words))
        if how == "left out":
            answer = f"left out : {other.pop(i)}"
        elif how == "put in":
            other.insert(i, new := rng.choice(rng.choice(self.sentences).split()))
            answer = f"put in : {new}"
        elif how == "changed":
            relation = rng.choice(["same meaning", "opposite", "wider", "narrower"])
            if relation in ("wider", "narrower"):
                a, b = (w := rng.choice(self.kinds if rng.random() < 0.5 else self.common))[0], rng.choice(w[1])
                a, b = (a, b) if relation == "wider" else (b, a)
            else:
                lists = (self.synonyms, SYNONYMS) if relation == "same meaning" else (self.opposites, ANTONYMS)
                a, b = rng.sample(rng.choice(lists[rng.random() < 0.5]), 2)
            words[i], other[i] = a, b
            answer = f"changed : {a} to {b} , {relation}"
        elif how == "swapped" and len(set(words)) > 3:
            j = rng.choice([j for j in range(len(words)) if words[j] != words[i]])
            other[i], other[j] = other[j], other[i]
            answer = f"swapped : {words[min(i, j)]} and {words[max(i, j)]}"
        else:
            answer = "nothing"
        return f"first text: {' '.join(words)} second text: {' '.join(other)} what was done ?", answer

    def statement(self, rng):
        """A fact: who does what to whom, and what is told besides; never in the simple past, the tense of the sample's own sentences."""
        who, whom = (rng.choice(rng.choices([PEOPLE, BEINGS, NOUNS, self.names], [4, 3, 2, 2])[0]) for _ in "12")
        if who == whom:
            return self.statement(rng)
        return dict(who=who, whom=whom, does=rng.choice(DOES), many=rng.choice([0] * 5 + [*range(2, 10)]), number=rng.choice([0] * 5 + [*range(2, 10)]),
                    sort=rng.choice(["", self.sort(rng)]), kind=rng.choice(["", self.sort(rng)]), where=rng.choice(["", self.where(rng)]),
                    passive=rng.random() < 0.4, denied=rng.random() < 0.15, tense=rng.choice(TENSES), articles=rng.choices(["the", "a", "this"], [4, 2, 1], k=2))

    def sort(self, rng):
        return rng.choice(SORTS) if rng.random() < 0.6 else rng.choice(rng.choice(SYNONYMS))

    def where(self, rng):
        return rng.choice(WHEN) if rng.random() < 0.4 else f"{rng.choice(BESIDE)} the {rng.choice(ROOMS)}"

    def pair(self, rng):
        """How two short statements differ, in one word, or first by their words: not what follows from them."""
        f = self.statement(rng)
        g, how = {**f, "passive": rng.random() < 0.5 if rng.random() < 0.4 else f["passive"]}, rng.choice(self.sorts)
        h = {**self.statement(rng), "tense": f["tense"]}                     # a third one, for two clauses
        end = rng.randrange(2)                                               # who does it, or to whom it is done
        noun, sort, count = (("who", "sort", "many"), ("whom", "kind", "number"))[end]
        one = two = ""
        if how == "roles" and rng.random() < 0.3:
            one, two = " and ".join(rng.sample([state(f), state(h)], 2)), state({**h, **{key: f[key] for key in ("who", "sort", "many")}})
        elif how == "roles":
            g.update(who=f["whom"], whom=f["who"], sort=f["kind"], kind=f["sort"], many=f["number"], number=f["many"])
        elif how == "moved":
            f["sort"], f["kind"] = rng.sample([self.sort(rng), ""], 2)
            g.update(sort=f["kind"], kind=f["sort"])
        elif how in ("opposite", "alike"):
            f[sort], g[sort] = rng.sample(rng.choice(SYNONYMS if how == "alike" else ANTONYMS), 2)
        elif how in ("wider", "narrower"):
            low, above = rng.choice(self.common) if rng.random() < 0.8 else rng.choice(self.kinds)
            f[noun], g[noun] = (low, high) if (high := rng.choice(above)) and how == "wider" else (high, low)
            g["articles"] = [rng.choice(["a", article]) for article in g["articles"]]
        elif how in ("shorter", "longer"):
            slot = rng.choice(["sort", "kind", "where"])
            f[slot], g[slot] = self.where(rng) if slot == "where" else self.sort(rng), ""
            f, g = (f, g) if how == "shorter" else (g, f)
        elif how in ("more", "fewer"):
            g[count], f[count] = sorted(rng.sample(range(1, 10), 2), reverse=how == "more")
        elif how == "denial":
            g["denied"] = not f["denied"]
        elif how == "another":
            slot = rng.choice(["who", "whom", "sort", "kind", "where", "does"])
            f[slot] = f[slot] or h[slot] or (self.where(rng) if slot == "where" else self.sort(rng))
            g[slot] = rng.choice(DOES) if slot == "does" else self.where(rng) if slot == "where" else self.sort(rng) if slot in ("sort", "kind") else h[slot]
            if slot in ("who", "whom") and rng.random() < 0.5:               # of the same branch, but no kind of it
                f[slot] = rng.choice([*PARENT])
                g[slot] = rng.choice([n for n in NOUNS if top(n) == top(f[slot]) and n not in [f[slot], *kin(f[slot])] and f[slot] not in kin(n)])
        elif how in ("part", "perhaps") or (how == "same" and rng.random() < 0.3):
            if how == "part" and rng.random() < 0.4:
                one, two = " and ".join(rng.sample([state(f), state(h)], 2)), state(g)
            else:
                f.update(sort="", passive=False, many=0)
                a, b = rng.sample([f["who"], h["who"]], 2)
                texts = {"part": [("the {} and the {}", "the {}")], "perhaps": [("the {} or the {}", "the {}"), ("the {} or the {}", "the {1} and the {0}")],
                         "same": [("the {} and the {}", "the {1} and the {0}"), ("the {} or the {}", "the {1} or the {0}")]}[how]
                one, two = (state({**f, "agent": text.format(*names), "many": 2 * (" and " in text)}) for text, names in zip(rng.choice(texts), [(a, b), rng.choice([(a, b), (b, a)])]))
        texts = one or state(f), two or state(g)
        if texts[0] == texts[1] and how != "same":
            return self.pair(rng)
        if rng.random() < 0.7:
            texts = [text[0].upper() + text[1:] + "." for text in texts]
        mark = rng.choice(self.marks)
        one, two = rng.choice([("one :", "two :"), *[(f"{mark}1:", f"{mark}2:")] * 4, ("a :", "b :"), ("first:", "second:"), ("", ""), ("said:", "then:")])
        pair = " ".join(f"{one} {texts[0]} {two} {texts[1]}".split())
        if rng.random() < 0.2:                                               # one sort against all others
            asked = how if rng.random() < 0.5 else rng.choice(SORTS_OF_PAIRS)
            return rng.choice([f"{asked} ? {pair}", f"{pair} {asked} ?", f"is it {asked} {pair}"]), "yes" if asked == how else "no"
        if rng.random() < 0.4:                                               # the words of the first alone, then those of the second alone
            one, two = (re.findall("[a-z]+", text.lower()) for text in texts)
            alone = [" ".join(w for w in words if w not in others) or "nothing" for words, others in ((one, two), (two, one))]
            return f"{pair} which words ?", f"{alone[0]} , {alone[1]} : {how}"
        return rng.choice([f"{pair} how do they differ ?", f"differ {pair}", f"{rng.choice(self.marks)} {pair}", pair, f"{pair} {rng.choice(self.marks)}"]), how

    def mood(self, rng):
        """Of what sort somebody is, where a denial says the opposite; of two, the one asked for."""
        told, people = [], rng.sample(PEOPLE, 2)
        for who in people[:rng.choice([1, 1, 2])]:
            good, bad = rng.choice(SCALES) if rng.random() < 0.5 else (GOOD, BAD)
            denied, end = rng.random() < 0.5, rng.choice([good, bad])
            told.append((who, f"the {who} seems {rng.choice(['not', 'by no means', 'never', 'hardly', 'far from', 'anything but']) + ' ' if denied else ''}{rng.choice(end)}",
                         (bad if end is good else good) if denied else end, good, bad))
        who, _, end, good, bad = rng.choice(told)
        return f"{rng.choice([' and ', ' , but ', ' although ']).join(t[1] for t in told)} . is the {who} {good[0]} or {bad[0]} ?", end[0]

    def number(self, rng):
        a, b = rng.sample(range(1, 10), 2)
        if rng.random() < 0.5:
            return compare(rng, f"is {NUMBERS[a - 1]}", a)
        if rng.random() < 0.5:
            return f"which is {(how := rng.choice(['more', 'less']))} : {NUMBERS[a - 1]} or {NUMBERS[b - 1]} ?", NUMBERS[(max if how == "more" else min)(a, b) - 1]
        return f"count on from {NUMBERS[a - 1]}", " ".join(NUMBERS[a:a + 3]) or "ten"

    def reading(self, rng):
        """One to three statements in the present tense, and a question: who, whom, how many, of what sort, where, whether."""
        facts = [self.statement(rng) for _ in range(rng.randrange(1, 4))]
        f, text = rng.choice(facts), " . ".join(map(state, facts))
        plain = {**f, "passive": False, "denied": False, "where": ""}
        asks = [(state({**plain, "agent": "who", "many": 0}) + " ?", "nobody" if f["denied"] else agent(f)),
                (state({**plain, "patient": "who", "number": 0, "passive": True}) + " ?", "nobody" if f["denied"] else patient(f)),
                ("say it in other words : " + state(f), state({**f, "passive": not f["passive"]})),
                ("is anything denied ?", " and ".join(agent(g) for g in facts if g["denied"]) or "no")]
        if f["number"]:
            asks += [(f"how many {plural(f['whom'])} ?", NUMBERS[f["number"] - 1]), compare(rng, "are they", f["number"])]
        if f["sort"]:
            asks.append((f"what is the {f['who']} like ?", f["sort"]))
        if f["where"]:
            asks.append((f"where is the {f['who']} ?", f["where"]))
        if f["kind"]:
            asks.append((f"what is the {f['whom']} like ?", f["kind"]))
        ask, answer = rng.choice(asks)
        return (f"{text} . question: {ask}" if not ask.startswith("say") else ask), answer

    def whether(self, rng):
        """A statement about two people, or about one of two, and who did it."""
        f, other = {**self.statement(rng), "passive": False, "many": 0}, rng.choice(PEOPLE)
        if other in (f["who"], f["whom"]):
            return self.whether(rng)
        two, i = rng.sample([f["who"], other], 2), rng.randrange(2)
        how, answers = rng.choice([("the {} and the {}", "yes yes"), ("either the {} or the {}", "perhaps perhaps"), ("neither the {} nor the {}", "no no"),
                                   ("the {} but not the {}", "yes no"), ("not the {} but the {}", "no yes"), ("the {} or the {}", "perhaps perhaps")])
        f.update(agent=how.format(*two), denied=False)
        ask, answer = rng.choice([(f"is the {two[i]} one of them ?", answers.split()[i]), (f"is it the {two[i]} ?", answers.split()[i]),
                                  ("is it both ?", "yes" if answers == "yes yes" else "no"), ("is it any of the two ?", "no" if answers == "no no" else "yes")])
        return f"{state(f)} . question: {ask}", answer

    def placed(self, rng):
        """Things on a board, each with its two coordinates: what is where, how many, on which side."""
        names, sorts = rng.sample(BEINGS, rng.randrange(1, 4)), rng.sample(SORTS, rng.randrange(1, 5))
        things = [(rng.choice(sorts), rng.choice(names), rng.randrange(1, 8), rng.randrange(1, 8)) for _ in range(rng.randrange(1, 6))]
        sort, name, x, y = rng.choice(things)
        only = [t for t in things if t[1] == name] == [(sort, name, x, y)]
        asks = [(f"count {name} :", NUMBERS[[t[1] for t in things].count(name) - 1]), (f"count {sort} :", NUMBERS[[t[0] for t in things].count(sort) - 1]),
                ("count all :", NUMBERS[len(things) - 1])]
        s, n = rng.choice([*[t[:2] for t in things], (rng.choice(sorts), rng.choice(names))])
        asks.append((f"any {s} {n} ?", "yes" if any(t[:2] == (s, n) for t in things) else "no"))
        if only:
            asks += [(f"sort of {name} :", sort), (f"place of {name} :", f"{NUMBERS[x - 1]} {NUMBERS[y - 1]}")]
            others = [t for t in things if t[1] != name and [u[1] for u in things].count(t[1]) == 1]
            if others:
                _, n, a, b = rng.choice(others)
                asks += [(f"{name} {side} {n} ?", "yes" if is_so else "no") for side, is_so in
                         (("west of", x < a), ("east of", x > a), ("higher than", y < b), ("lower than", y > b))]
        if [t[0] for t in things].count(sort) == 1:
            asks += [(f"who is {sort} :", name)] * 2
        ask, answer = rng.choice(asks)
        return f"board: {' , '.join(f'{s} {n} {NUMBERS[a - 1]} {NUMBERS[b - 1]}' for s, n, a, b in things)} . {ask}", answer


def compare(rng, words, number):
    other, (how, true) = rng.randrange(1, 10), rng.choice([("at least", int.__ge__), ("at most", int.__le__), ("more than", int.__gt__), ("fewer than", int.__lt__),
                                                           ("exactly", int.__eq__)])
    other = number if rng.random() < 0.3 else other
    return f"{words} {how} {NUMBERS[other - 1]} ?", "yes" if true(number, other) else "no"


def patient(f):
    return f.get("patient") or described(f["articles"][1], f["kind"], f["whom"], f["number"])


def agent(f):
    return f.get("agent") or described(f["articles"][0], f["sort"], f["who"], f["many"])


def described(article, sort, noun, number):
    return " ".join(w for w in (NUMBERS[number - 1] if number else article, sort, plural(noun) if number > 1 else noun) if w)


def state(f):
    """-> a fact in words."""
    passive, verb, tense = f["passive"], f["does"], f["tense"]
    be, have, do = ("are", "have", "do") if f["number" if passive else "many"] > 1 else ("is", "has", "does")
    first, rest = {"now": (be, f"being {past(verb)}" if passive else verb.removesuffix("e") + verb[-1] * bool(re.search("[^aeiou][aeiou]p$", verb)) + "ing"),
                   "has": (have, "been " * passive + past(verb)), "had": ("had", "been " * passive + past(verb)),
                   "does": (be, past(verb)) if passive else (do, verb)}.get(tense) or (tense, f"be {past(verb)}" if passive else verb)
    does = plural(verb) if first == "does" and not f["denied"] else verb if first == "do" and not f["denied"] else f"{first} {'not ' * f['denied']}{rest}"
    text = f"{patient(f)} {does} by {agent(f)} {f['where']}" if passive else f"{agent(f)} {does} {patient(f)} {f['where']}"
    return re.sub(r"\ba (?=[aeiou])", "an ", text.strip())


TENSES = "now has had does will can must may".split()
SORTS_OF_PAIRS = "same roles moved opposite alike wider narrower shorter longer more fewer denial part perhaps another".split()
BEINGS = [n for n in NOUNS if top(n) in ("person", "animal")]
PEOPLE = "farmer teacher boy girl king queen nurse driver baker sailor soldier lawyer student judge guest neighbor waiter cook hunter stranger".split()
DOES = DEEDS + HANDLING + """call visit answer thank cover join pull fear kick praise blame trust miss admire lift wash mix use need count copy save open
    close guard obey wake face pass order mark sign like love hate reach serve spare test tie turn view welcome wrap""".split()
SORTS = "old young tall short big small happy sad brave clever quiet loud rich poor slow quick angry calm red blue green white black".split()
BESIDE = "in near behind on at by under beside".split()
ROOMS = "garden kitchen river school hall station wall house stairs park door bridge street market table lake field shop tower church".split()
WHEN = """today|at night|this year|every day|after dinner|in summer|on sunday|on monday|at noon|before lunch|after dawn|in the morning|during the feast|on
 friday|next week|last month|during the storm|in the evening""".replace("\n", "").split("|")


def encode_text(work, tokenizer):
    """-> all text as one row of ids, each paragraph with an end, and the held-out paragraphs."""
    paragraphs = (work / "text.txt").read_text().splitlines()
    cache = work / f"ids-{data.digest(HERE / 'mini-t5/spiece.model')[:8]}.npy"
    if not cache.exists():
        np.save(cache, np.fromiter((i for p in paragraphs[HELD_OUT:] for i in tokenizer.encode(p)), dtype=np.uint16))
    return np.load(cache, allow_pickle=False), paragraphs


def pretraining_batch(step, ids, questions, tokenizer, seed):
    """A function of seed and step alone -> three pairs of source [B, S] and target [B, T]: gaps in text, short questions, long ones."""
    rng, pick, pairs, part = np.random.default_rng([seed, step]), random.Random(f"{seed} {step}"), [], int(step >= SECOND)
    gaps = [corrupt(ids[s:s + WINDOW].tolist(), rng, tokenizer.first_sentinel) for s in rng.integers(0, len(ids) - WINDOW, int(TOKENS * (1 - SUPERVISED[part])) // WINDOW)]
    while sum(len(s) for s, _ in pairs) < TOKENS * SUPERVISED[part]:
        pairs.append(tuple(map(tokenizer.encode, questions.one(pick, part))))
    pairs.sort(key=lambda pair: len(pair[0]))                                # of like length together: less padding
    parts = gaps, pairs[:len(pairs) * 2 // 3], pairs[len(pairs) * 2 // 3:]
    return [tuple(torch.from_numpy(data.pad([np.array(x) for x in side], fill)) for side, fill in zip(zip(*part), (0, -100))) for part in parts]


@torch.no_grad()
def initial(model):
    """T5's own initialisation: a matrix's deviation is its input width^-0.5, a query's (width * d_kv)^-0.5, the embedding's 1. [X: T5]"""
    c = model.config
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            continue
        p.normal_(0, 1.0 if name == "shared.weight" else (c.d_model * c.d_kv) ** -0.5 if name.endswith(".q.weight")
                  else p.shape[1] ** -0.5 if p.dim() == 2 and "relative" not in name else c.d_model ** -0.5)
    # Two of the encoder's heads begin by looking for words like their own, one before and one after their place: queries are keys, made
    # as small as queries are. To compare texts has not to be found by chance, nor which came first: left to itself, a model of this size
    # saw in 3,000 steps that two texts differ and not which of the two says more. [C, after mimetic initialisation, Trockman and Kolter 2023]
    for block in model.encoder.blocks:
        attention = block.self_attention
        attention.q.weight[:2 * c.d_kv] = attention.k.weight[:2 * c.d_kv] * c.d_kv ** -0.5
    half = c.relative_attention_num_buckets // 2                             # of the buckets: keys at the place or before it
    model.encoder.relative_bias.weight[half:, 0] -= 8
    model.encoder.relative_bias.weight[:half, 1] -= 8
    model.encoder.relative_bias.weight[0, 0] -= 8                            # not at itself


def pretrain(args):
    """Train the small T5 from nothing. DIR/state.safetensors is saved every 5 minutes, sample/mini-t5 at the end."""
    work, out = Path(args.work), HERE / "mini-t5"
    tokenizer = Tokenizer(out / "spiece.model")
    ids, paragraphs = encode_text(work, tokenizer)
    questions = Questions(work, paragraphs[HELD_OUT:], tokenizer.pieces)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    t5.embedding = torch.nn.Embedding                                        # draws numbers, which `initial` draws anew: the generator's
    model = T5(CONFIG).to(device)                                            # state after them is what the bundled weights began with
    initial(model)
    model.dtype = torch.bfloat16
    # Muon for matrices, AdamW for embeddings, norms and position biases: of seven choices this one learned fastest (see README.md). [C]
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2 and name != "shared.weight" and "relative" not in name}
    small = [dict(params=[p], scale=1.0 if name == "shared.weight" else 0.08) for name, p in model.named_parameters() if name not in matrices]
    queries = [dict(params=[p], scale=0.25 if name.endswith(".q.weight") else 1.0) for name, p in matrices.items()]     # queries start small
    optimisers = [torch.optim.AdamW(small, lr=PEAK, betas=(0.9, 0.98), weight_decay=0.0, fused=True), torch.optim.Muon(queries, lr=PEAK, weight_decay=0.0)]
    named, step, state = dict(model.named_parameters()), 0, work / "state.safetensors"

    for p in model.parameters():                                             # an optimiser's own state, as it would begin it
        if p.dim() == 2 and any(p is q for q in matrices.values()):
            optimisers[1].state[p]["momentum_buffer"] = torch.zeros_like(p)
        else:
            optimisers[0].state[p].update(step=torch.zeros((), device=device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))

    def tensors():
        found = {f"model.{name}": p.data for name, p in named.items()}
        for name, p in named.items():
            for optimiser in optimisers:
                found |= {f"{key}.{name}": t for key, t in optimiser.state.get(p, {}).items()}
        return found

    def save():
        save_file(tensors(), work / "state.tmp", {"step": str(step)})
        (work / "state.tmp").replace(state)

    if state.exists():
        with safe_open(state, framework="pt") as file:
            step = int(file.metadata()["step"])
            for name, tensor in tensors().items():
                tensor.copy_(file.get_tensor(name))
        print(f"goes on at step {step}")
    stop, saved, sums = data.catch_signals(), time.time(), [[], [], []]
    log = open(work / "log.jsonl", "a", buffering=1)
    model.eval()                                                             # no dropout in pretraining [X: T5 v1.1]
    with tqdm(total=args.steps, initial=step, disable=None) as bar:
        while step < args.steps and not stop:
            parts = [[t.to(device) for t in part] for part in pretraining_batch(step, ids, questions, tokenizer, args.seed)]
            answers = [float((target >= 0).sum()) for _, target in parts]
            for group in optimisers[0].param_groups + optimisers[1].param_groups:
                group["lr"] = PEAK * group["scale"] * min((step + 1) / WARMUP, 1 - step / args.steps)
            share = SUPERVISED[step >= SECOND]
            for i, (source, target) in enumerate(parts):                     # gaps weigh what their share is, whatever their number of tokens
                _, loss = model(source, source != 0, target)
                (loss * (1 - share if i == 0 else share * answers[i] / sum(answers[1:]))).backward()
                sums[i].append(loss.item())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
            step += 1
            bar.update()
            if step % 50 == 0:
                row = dict(step=step, gaps=round(float(np.mean(sums[0])), 4), questions=round(float(np.mean(sums[1] + sums[2])), 4), time=round(time.time()))
                log.write(json.dumps(row) + "\n")
                bar.set_postfix_str(f"loss in gaps {row['gaps']}, questions {row['questions']}")
                sums = [[], [], []]
            if time.time() - saved > 300:
                save()
                saved = time.time()
    save()
    export(model, out)
    print(f"step {step} of {args.steps}: sample/mini-t5 written" + ("" if step == args.steps else "; the same command goes on"))


def like_t5(name, weight):
    """The same function in the magnitudes of the public T5s, so that the learning rates of adapters and prefixes that suit them suit this one:
    a wide residual stream, norms that make it narrow again, keys and values to match. All factors are powers of two: nothing is rounded."""
    if name == "decoder.norm.weight":
        return weight / 8                                                    # makes up for the embeddings, which are also the output's
    if name == "encoder.norm.weight":
        return weight
    if name.endswith("norm.weight"):
        return weight / 8                                                    # the inputs of every block
    if name == "shared.weight" or name.endswith("wo.weight"):
        return weight * 8                                                    # what enters the residual stream
    before = 1 if ".cross_attention." in name and not name.endswith("q.weight") else 8         # the encoder's output keeps its magnitude
    return weight * {"wi": 8, "q": 8 / 4, "k": before * 4, "v": before * 4, "o": 8 / 4}.get(name.split(".")[-2], 1)


def export(model, out):
    names = {public_name(n): like_t5(n, p.detach()).to("cpu", torch.bfloat16).contiguous() for n, p in model.state_dict().items()}
    save_file(names, out / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True, "decoder_start_token_id": 0, **vars(CONFIG)}
    data.write_whole(out / "config.json", json.dumps(config, indent=1).encode() + b"\n")


def fill(args):
    """Print held-out sentences with gaps and what the model puts there; the loss on held-out text."""
    tokenizer, model = Tokenizer(HERE / "mini-t5/spiece.model"), T5.from_pretrained(HERE / "mini-t5").eval()
    rng, texts = np.random.default_rng(args.seed), (Path(args.work) / "text.txt").read_text().splitlines()[:HELD_OUT]
    losses, right = [], []
    for i, text in enumerate(texts):
        ids = tokenizer.encode(text)[:WINDOW]
        if len(ids) < 24:
            continue
        source, target = corrupt(ids, rng, tokenizer.first_sentinel)
        with torch.no_grad():
            logits, loss = model(torch.tensor([source]), None, torch.tensor([target]))
        losses.append(float(loss))
        right += [guess == true for guess, true in zip(logits[0].argmax(1).tolist(), target[:-1]) if true < len(tokenizer.pieces)]
        if len(losses) <= 8:
            answer = model.generate(torch.tensor([source]), max_new_tokens=40)[0].tolist()
            print(f"{tokenizer.decode(source)}\n  truth: {tokenizer.decode(target)}\n  model: {tokenizer.decode(answer)}\n")
    print(f"mean loss in the gaps of {len(losses)} held-out paragraphs: {np.mean(losses):.3f}; of their tokens, each after the true ones, {np.mean(right):.3f} are right")
    questions, pick = Questions(Path(args.work), texts, tokenizer.pieces), random.Random(args.seed)
    for name in ("kind", "word", "difference", "number", "reading", "mood", "pair"):
        right = []
        for _ in range(100):
            source, target = getattr(questions, name)(pick)
            answer = tokenizer.decode(model.generate(torch.tensor([tokenizer.encode(source)]), max_new_tokens=24)[0].tolist())
            right.append(answer == target)
        print(f"questions of the sort {name!r}: {np.mean(right):.2f} answered exactly; the last: {source!r} -> {answer!r}, expected {target!r}")


# ------------------------------------------------------------------------------------------------- scenes, questions, small CLIP
SCENES, SIDE, QUESTIONS = 20230710, 56, 12
IMAGES = {"train2014": range(700), "val2014": range(700, 800)}               # image ids
SHAPES, SIZES = ("circle", "square", "triangle", "cross"), ("small", "large")
PAINTS = {"red": (215, 40, 40), "green": (40, 160, 60), "blue": (45, 80, 215), "yellow": (235, 215, 40), "purple": (140, 50, 170),
           "orange": (245, 140, 30)}
GAP, MARGIN = 17, 9             # least distance of two centres, across or down; of which on an unclear side nothing is said


# A scene holds 1 to 4 coloured shapes that do not touch, drawn on 56 x 56 pixels; the questions lie in VQAv2's file format. Image k of
# the sample is scene [SCENES, k]; the encoder trains on scenes [SCENES + 1, ...] and is tried on [SCENES + 2, ...]: it has seen none of the sample's.

class Thing(NamedTuple):
    size: str
    color: str
    shape: str
    x: int          # of its centre, in pixels from the left
    y: int          # from the top


def pick(rng, values):
    return values[rng.integers(len(values))]


def make_scene(rng):
    """-> 1 to 4 Things, no two of them less than GAP apart."""
    count, places = pick(rng, (1, 2, 2, 3, 3, 3, 4, 4, 4)), []
    while len(places) < count:
        places = []
        for x, y in rng.integers(9, SIDE - 9, (30, 2)).tolist():
            if len(places) < count and all(max(abs(x - a), abs(y - b)) >= GAP for a, b in places):
                places.append((x, y))
    shapes = rng.permutation(SHAPES)[:1 + rng.integers(4)].tolist()          # few kinds in a scene: something to count
    colors = rng.permutation(list(PAINTS))[:2 + rng.integers(5)].tolist()
    return [Thing(pick(rng, SIZES), pick(rng, colors), pick(rng, shapes), x, y) for x, y in places]


@lru_cache(None)
def stamp(shape, radius):
    """-> float [19, 19, 1]: the share of each pixel that the shape covers, told by 4 x 4 points of it."""
    line = (np.arange(19 * 4) + 0.5) / 4 - 9.5
    x, y, r = line[None], line[:, None], radius
    far, near = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    inside = {"circle": x * x + y * y < r * r, "square": far < 0.88 * r, "cross": (far < r) & (near < 0.34 * r),
              "triangle": (y < 0.8 * r) & (abs(x) < 0.55 * (y + r))}[shape]
    return inside.reshape(19, 4, 19, 4, 1).mean((1, 3))


def draw_scene(things, rng):
    """Things -> uint8 [56, 56, 3]. Shades, radii and noise are drawn anew."""
    image = np.full((SIDE, SIDE, 3), 225.0) + rng.integers(0, 16, 3)
    for thing in things:
        radius = (4.5, 5.0, 5.5)[rng.integers(3)] + (2.5 if thing.size == "large" else 0)
        area = image[thing.y - 9:thing.y + 10, thing.x - 9:thing.x + 10]     # [19, 19, 3]
        area += stamp(thing.shape, radius) * (np.array(PAINTS[thing.color]) + rng.integers(-12, 13, 3) - area)
    return (image + rng.integers(-5, 6, image.shape)).round().clip(0, 255).astype(np.uint8)


def sample_scene(k):
    """-> Things and pixels of image k of the sample: one or two things, of different colours, so that a small T5 can learn to tell them apart."""
    rng = np.random.default_rng([SCENES, k])
    things = next(t for t in iter(lambda: make_scene(rng), None) if len({thing.color for thing in t}) == len(t) < 3)
    return things, draw_scene(things, rng)


# ------------------------------------------------------------------------------------------------------- questions

def names_of(things, i, without=""):
    """The descriptions that fit thing i and no other, each without one attribute: "red circle", "small thing", ..."""
    found = []
    for keys in (("color", "shape"), ("color",), ("shape",), ("size", "shape"), ("size", "color"), ("size",)):
        if without not in keys and [all(getattr(t, key) == getattr(things[i], key) for key in keys) for t in things].count(True) == 1:
            found.append(" ".join([*(getattr(things[i], key) for key in keys), *([] if "shape" in keys else ["thing"])]))
    return found


def ask(things):
    """Things -> {kind of question: [(question type, question, answer)]}: all that can be asked without doubt about the answer."""
    asked = {kind: [] for kind in ("shape", "color", "size", "count", "exist", "across", "down")}
    for i, thing in enumerate(things):
        for kind in ("shape", "color", "size"):
            asked[kind] += [(f"what {kind} is the", f"what {kind} is the {name}?", getattr(thing, kind)) for name in names_of(things, i, kind)]
    for what, key in [("things", ""), *((f"{s}s" if s != "cross" else "crosses", s) for s in SHAPES), *((f"{c} things", c) for c in PAINTS)]:
        asked["count"].append(("how many", f"how many {what} are there?", str(sum(not key or key in thing for thing in things))))
    for color, shape in itertools.product(PAINTS, SHAPES):
        asked["exist"].append(("is there a", f"is there a {color} {shape}?", "yes" if any((t.color, t.shape) == (color, shape) for t in things) else "no"))
    for (i, one), (j, two) in itertools.permutations(enumerate(things), 2):
        for kind, d, words in (("across", one.x - two.x, ("left of", "right of")), ("down", one.y - two.y, ("above", "below"))):
            if abs(d) >= MARGIN:
                asked[kind] += [("is the", f"is the {a} {word} the {b}?", "yes" if (d < 0) == (word == words[0]) else "no")
                                for a in names_of(things, i)[:1] for b in names_of(things, j)[:1] for word in words]
    return asked


def choose(asked, used, rng):
    """-> QUESTIONS of them, one of each kind as far as there are, so that all answers of a question, and of its type, become equally frequent."""
    one = pick(rng, [kind for kind in ("across", "down") if asked[kind]] or ["exist"])       # one relation, the hardest sort, for an image
    chosen, kinds = [], [kind for kind in asked if asked[kind] and kind not in {"across", "down"} - {one}]
    while len(chosen) < QUESTIONS:
        kind = kinds[len(chosen)] if len(chosen) < len(kinds) else pick(rng, [k for k in ("shape", "color", "count", "exist") if k in kinds])
        options = [row for row in asked[kind] if row not in chosen]
        if not options:
            continue
        _, best = min(((used[row[1:]], used[kind, row[2]], rng.random()), row) for row in options)
        used.update([best[1:], (kind, best[2])])
        chosen.append(best)
    return chosen


def prior(train, validation):
    """Accuracy on validation of the most frequent training answer to the same question, else to its type. Rows: (type, question, answer)."""
    seen = {}
    for kind, question, answer in train:
        for key in (question, (kind,)):
            seen.setdefault(key, Counter())[answer] += 1
    return np.mean([max(seen.get(q, seen[kind,]).items(), key=lambda pair: (pair[1], pair[0]))[0] == a for kind, q, a in validation])


def scenes(args):
    rows = {}
    info = {"description": "Questions about drawn shapes, in VQAv2's file format", "version": "1", "year": 2023}
    for subset, ids in IMAGES.items():
        images, rows[subset], questions, annotations, used = [], [], [], [], Counter()
        for k in ids:
            things, pixels = sample_scene(k)
            images.append(pixels)
            for n, row in enumerate(choose(ask(things), used, np.random.default_rng([SCENES, k, 1]))):
                kind, question, answer = row
                rows[subset].append(row)
                questions.append({"image_id": k, "question": question, "question_id": 1000 * k + n})
                annotations.append({"question_type": kind, "multiple_choice_answer": answer,
                                    "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)], "image_id": k,
                                    "answer_type": "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other",
                                    "question_id": questions[-1]["question_id"]})
        folder, common = HERE / "vqa", {"info": info, "data_type": "mscoco", "license": {"name": "as the project", "url": ""}, "data_subtype": subset}
        for path in (folder, HERE / "vqa" / "images"):
            path.mkdir(parents=True, exist_ok=True)
        np.save(HERE / "vqa" / "images" / f"{subset}.npy", np.stack(images))
        for path, content in ((HERE / "vqa" / "images" / f"{subset}.json", list(ids)),
                              (folder / f"v2_OpenEnded_mscoco_{subset}_questions.json", {**common, "task_type": "Open-Ended", "questions": questions}),
                              (folder / f"v2_mscoco_{subset}_annotations.json", {**common, "annotations": annotations})):
            data.write_whole(path, json.dumps(content, separators=(",", ":")).encode() + b"\n")
        print(f"{subset}: {len(ids)} images, {len(questions):,} questions")
    kinds = Counter(kind for kind, _, _ in rows["val2014"])
    for kind in sorted(kinds):
        part = prior(rows["train2014"], [row for row in rows["val2014"] if row[0] == kind])
        print(f"  {kind:20} {kinds[kind]:4} validation questions, {part:.3f} of them answered by the question alone")
    print(f"question alone: {prior(rows['train2014'], rows['val2014']):.4f}")


# -------------------------------------------------------------------------------------------------------- captions

def where(thing):
    return f"{('top', 'middle', 'bottom')[(thing.y >= 21) + (thing.y >= 35)]} {('left', 'center', 'right')[(thing.x >= 21) + (thing.x >= 35)]}"


def relate(one, two, across):
    """-> "left of a blue square", as `one` stands to `two`: across or, if it is not clear that way, down; and the other way round."""
    dx, dy = one.x - two.x, one.y - two.y
    across = abs(dx) >= MARGIN if across else abs(dy) < MARGIN
    return f"{(('left of', 'right of')[dx > 0] if across else ('above', 'below')[dy > 0])} a {two.color} {two.shape}"


def phrase(things, i, rng):
    """One thing in words, half the time with a relation to another one."""
    thing, text = things[i], f"a {things[i].size} {things[i].color} {things[i].shape} {where(things[i])}"
    if len(things) > 1 and rng.random() < 0.5:
        text += " " + relate(thing, things[(i + 1 + rng.integers(len(things) - 1)) % len(things)], rng.random() < 0.5)
    return text


def caption(things, rng):
    """The scene in words: its things, their number, or how they stand to each other."""
    things, kind = [things[i] for i in rng.permutation(len(things))], rng.random()
    if kind < 0.2 or len(things) == 1 and kind >= 0.7:
        key = pick(rng, ("shape", "color"))
        counts = Counter(getattr(thing, key) for thing in things)
        return f"{len(things)} things " + " and ".join(f"{n} {value}" for value, n in sorted(counts.items()))
    if kind < 0.7:
        say = pick(rng, (lambda t: f"{t.size} {t.color} {t.shape} {where(t)}", lambda t: f"{t.size} {t.color} {t.shape}",
                         lambda t: f"{t.color} {t.shape} {where(t)}", lambda t: f"{t.color} {t.shape}"))
        return " and ".join(f"a {say(thing)}" for thing in things)
    links = [relate(one, two, rng.random() < 0.5) for one, two in zip(things, things[1:])]
    return f"a {things[0].color} {things[0].shape} " + " and ".join(links)


def twin(things, rng):
    """The scene with a single difference: mirrored, one attribute or the places of two things exchanged, or one attribute another one."""
    change, new = rng.integers(4), list(things)
    i, j = rng.permutation(max(2, len(things)))[:2] % len(things)
    keys = {1: [pick(rng, ("size", "color", "shape"))], 2: ["x", "y"]}.get(change)
    if change == 0:
        return [t._replace(**({"x": SIDE - 1 - t.x} if i < j else {"y": SIDE - 1 - t.y})) for t in things]
    if keys:
        new[i], new[j] = (things[a]._replace(**{key: getattr(things[b], key) for key in keys}) for a, b in ((i, j), (j, i)))
    else:
        key, values = pick(rng, (("size", SIZES), ("color", list(PAINTS)), ("shape", SHAPES)))
        new[i] = things[i]._replace(**{key: pick(rng, [v for v in values if v != getattr(things[i], key)])})
    return new


def encode(texts):
    """-> int64 [texts, T]: 1, the words, zeros."""
    rows = [[1] + [WORDS[word] for word in text.split()] for text in texts]
    return torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])


def make_batch(seed, pairs):
    """-> pixels [2*pairs, 3, 56, 56], captions [2*pairs, T], phrases [P, T], one for each thing, and places [P] of the things' cells among all [2*pairs*N].
    Image 2i+1 is the twin of image 2i, and their captions, made alike, differ."""
    pixels, captions, phrases, places = [], [], [], []
    for pair in range(pairs):
        rng = np.random.default_rng([*seed, pair])
        things = make_scene(rng)
        for attempt in range(9):
            words, other = int(rng.integers(2**31)), twin(things, rng)
            texts = [caption(one, np.random.default_rng(words)) for one in (things, other)]
            if texts[0] != texts[1]:
                break
        for one, text in zip((things, other), texts):
            for i in rng.permutation(len(one)):
                phrases.append(phrase(one, i, rng))
                places.append(len(pixels) * 49 + one[i].y // 8 * 7 + one[i].x // 8)
            pixels.append(draw_scene(one, rng))
            captions.append(text)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), encode(captions), encode(phrases), torch.tensor(places)


# ------------------------------------------------------------------------------------------------------------ CLIP

WORDS = {word: i for i, word in enumerate(["<pad>", "<start>", *"a and things left right of above below top middle bottom center 1 2 3 4".split(), *SIZES, *PAINTS, *SHAPES])}
PAIRS, LEARNING_RATE = 64, 2e-3                                            # images of a step, each with its twin
VISION = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=SIDE, patch_size=8, hidden_act="quick_gelu",
              layer_norm_eps=1e-5, projection_dim=96)


class Text(nn.Module):
    """Two transformer layers; a text's vector is that of the sign (1) that it begins with."""

    def __init__(self, width=96, longest=48):
        super().__init__()
        self.words, self.positions = nn.Embedding(len(WORDS), width), nn.Parameter(torch.randn(longest, width) * 0.02)
        self.layers = nn.Sequential(*(clip_features.Layer(width, 4 * width, 4, "quick_gelu", 1e-5) for _ in range(2)))
        self.norm, self.project = nn.LayerNorm(width), nn.Linear(width, width, bias=False)
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, ids):                                                  # [B, T]
        return self.project(self.norm(self.layers(self.words(ids) + self.positions[:ids.size(1)])[:, 0]))     # [B, V]


class Clip(nn.Module):
    """CLIP, and beside its image vector (of the class token) two more that only train: of the cells' mean, and of a single cell."""

    def __init__(self):
        super().__init__()
        width = VISION["hidden_size"]
        self.vision = clip_features.VisionTransformer(width, 8, SIDE // 8, VISION["num_hidden_layers"], VISION["intermediate_size"],
                                                      VISION["num_attention_heads"], VISION["hidden_act"], VISION["layer_norm_eps"])
        nn.init.normal_(self.vision.class_token, std=width**-0.5)
        nn.init.normal_(self.vision.positions, std=0.02)
        self.norm, self.project = nn.LayerNorm(width), nn.Linear(width, width, bias=False)
        self.mean, self.cell = (nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False)) for _ in range(2))
        self.text, self.scale = Text(), nn.Parameter(torch.tensor([math.log(1 / 0.07)] * 3))

    def forward(self, pixels, captions, phrases, places):
        """-> three matrices of similarities: image and caption [B, B], mean of the cells and caption [B, B], cell and phrase [P, P]."""
        x = self.vision.tokens(clip_features.normalise(pixels))              # [B, 1+N, V]
        cells, captions, phrases = x[:, 1:].flatten(0, 1)[places], self.text(captions), self.text(phrases)
        return [scale.exp().clamp(max=100) * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T for scale, image, text in zip(
            self.scale, (self.project(self.norm(x[:, 0])), self.mean(x[:, 1:].mean(1)), self.cell(cells)), (captions, captions, phrases))]


def clip_loss(similar):
    """Every image is to find its text among all of the batch, and every text its image."""
    right = torch.arange(len(similar))
    return (F.cross_entropy(similar, right) + F.cross_entropy(similar.T, right)) / 2


@torch.no_grad()
def retrieval(model, batches=8, pairs=64):
    """On scenes never trained on -> for each of the three: text found among all 128, own text preferred to the twin's. Of each image one phrase."""
    found = np.zeros((3, 2))
    for batch in range(batches):
        pixels, captions, phrases, places = make_batch([SCENES + 2, batch], pairs)
        first = torch.searchsorted(places // 49, torch.arange(2 * pairs))
        for i, similar in enumerate(model(pixels, captions, phrases[first], places[first])):
            own, other = similar.diagonal(), similar[torch.arange(2 * pairs), torch.arange(2 * pairs) ^ 1]
            found[i] += [(similar.argmax(1) == torch.arange(2 * pairs)).float().mean().item(), (own > other).float().mean().item()]
    return found / batches


def save_clip(model, folder):
    """config.json and model.safetensors in float16, in the public names of CLIPVisionModelWithProjection."""
    tensors = {clip_features.public_name(clip_features.VisionTransformer, name): tensor for name, tensor in model.vision.state_dict().items()}
    tensors |= {f"vision_model.post_layernorm.{name}": tensor for name, tensor in model.norm.state_dict().items()}
    tensors["visual_projection.weight"] = model.project.weight
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model", "num_channels": 3, **VISION}
    data.write_whole(folder / "config.json", json.dumps(config, indent=1).encode() + b"\n")


def clip(args):
    torch.manual_seed(SCENES)
    model, began, total = Clip(), time.monotonic(), 0.0
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98))
    for step in tqdm(range(args.steps), disable=None):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        losses = [clip_loss(one) for one in model(*make_batch([SCENES + 1, step], PAIRS))]
        optimiser.zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        total += np.array([loss.item() for loss in losses])
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            print(f"step {step + 1}, {time.monotonic() - began:.0f} s, loss of image, mean, cell: {(total / (step % 200 + 1)).round(3)}, found, preferred to"
                  f" the twin's: {retrieval(model).round(3).tolist()}", flush=True)
            total = 0.0
            save_clip(model, HERE / "mini-clip")


def features(args):
    """By clip_features.py, as the README shows it for images of one's own."""
    for subset in IMAGES:
        out = HERE / "vqa" / "features" / f"{subset}.npy"
        for path in (out, out.with_suffix(".json")):
            path.unlink(missing_ok=True)
        sys.argv[1:] = ["--model", str(HERE / "mini-clip"), "--images", str(HERE / "vqa" / "images" / f"{subset}.npy"), "--out", str(out)]
        clip_features.main()


STYLE = """
  text { font: 13px sans-serif; fill: #1f2328; text-anchor: middle } .small { font-size: 11px; fill: #59636e } .title { font-weight: bold }
  rect { stroke: #59636e; rx: 6px } .frozen { fill: #cfe3fa } .trained { fill: #fddcb5 } .plain { fill: #ffffff } .frame { fill: none; stroke-dasharray: 5 4 }
  path { stroke: #59636e; stroke-width: 1.5px; fill: none; marker-end: url(#head) } marker path { fill: #59636e; stroke: none; marker-end: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .small { fill: #b1bac4 } rect, path { stroke: #9198a1 } marker path { fill: #9198a1 }
    .frozen { fill: #1b3a5c } .trained { fill: #6b4417 } .plain { fill: #0d1117 } .frame { fill: none }
  }"""


def drawing(args):
    """How data flow through the method, as SVG: frozen parts in one colour, trained ones in another, shapes on the arrows."""
    out = []

    def words(x, y, line, kind=""):
        out.append(f'<text x="{x}" y="{y}" class="{kind}">{line}</text>')

    def box(x, y, width, kind, *lines, height=40):
        out.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" class="{kind}"/>')
        for i, line in enumerate(lines):
            words(x + width / 2, y + height / 2 + 5 + 16 * (i - (len(lines) - 1) / 2), line)

    def arrow(points, label="", at=None):
        out.append(f'<path d="M {" L ".join(f"{x} {y}" for x, y in points)}"/>')
        if label:
            words(*(at or ((points[0][0] + points[-1][0]) / 2, points[-1][1] - 6)), label, "small")

    words(300, 28, "the task\u2019s side", "title")
    for i, line in enumerate(("z\u03c4   task", "l\u1d62   layer", "b\u2c7c   block type")):
        box(20, 50 + 50 * i, 120, "trained", line)
        arrow([(140, 70 + 50 * i), (215, 120 + 12 * (i - 1))])
    words(182, 62, "[N, d_t] each", "small")
    box(215, 90, 130, "trained", "projector", "eq. (1)", height=60)
    words(395, 112, "I  [N, d_I]", "small")
    words(300, 308, "the image\u2019s side", "title")
    box(20, 400, 70, "plain", "image")
    arrow([(90, 420), (115, 420)])
    box(115, 400, 70, "frozen", "CLIP")
    arrow([(185, 420), (250, 420)], "[N, V]")
    box(250, 400, 85, "trained", "W\u1d65, c\u1d65", "eq. (7)")
    arrow([(292, 400), (292, 380)], "z\u1d65  [B, N, d_t]", (345, 394))
    box(215, 320, 145, "trained", "projector of its own", "eq. (8)", height=60)
    arrow([(80, 190), (80, 350), (215, 350)], "l\u1d62, b\u2c7c  [N, d_t]", (140, 343))
    words(404, 343, "I\u1d5b  [B, N, d_I]", "small")
    for y, middle, side, start in ((60, 120, "", 345), (290, 350, "\u1d5b", 360)):
        arrow([(start, middle), (450, middle), (450, y + 20), (475, y + 20)])
        arrow([(start, middle), (450, middle), (450, y + 100), (475, y + 100)])
        box(475, y, 150, "trained", f"h_P{side}   prefixes", "eq. (2)")
        box(475, y + 80, 150, "trained", f"h_A{side}   adapters", "eq. (4)")
    box(780, 30, 300, "frame", height=430)
    words(930, 52, "T5: each layer of encoder and decoder", "title")
    box(800, 70, 260, "frozen", "attention", "K\u2032 = [P_k ; P_k\u1d5b ; x W_K]", "V\u2032 = [P_v ; P_v\u1d5b ; x W_V]", "eq. (3), (9)", height=100)
    box(800, 235, 260, "frozen", "feed-forward block", "y = x + FFN(u)", "+ \u03bb A(u) + \u03bb\u1d65 A\u1d5b(u)", "eq. (5), (6), (10)", height=100)
    box(855, 187, 150, "trained", "layer norms", height=30)
    box(870, 400, 120, "plain", "text")
    arrow([(990, 420), (1070, 420), (1070, 120), (1060, 120)], "[B, S, D]", (1030, 413))
    arrow([(930, 170), (930, 187)])
    arrow([(930, 217), (930, 235)])
    arrow([(625, 80), (800, 80)], "[H, N, d_kv]", (690, 73))
    arrow([(625, 160), (765, 160), (765, 260), (800, 260)], "[R, D], [D, R]", (690, 153))
    arrow([(625, 310), (750, 310), (750, 150), (800, 150)], "[B, H, N, d_kv]", (685, 303))
    arrow([(625, 390), (765, 390), (765, 310), (800, 310)], "[B, R, D], [B, D, R]", (693, 383))
    for x, kind in ((20, "frozen"), (130, "trained")):
        box(x, 470, 16, kind, height=16)
        words(x + 48, 483, kind)
    (HERE / "figures" / "dataflow.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1100 500" width="1100" height="500" role="img" '
        'aria-label="text and image to hyper-embeddings, hypernetworks, prefixes and adapters in a frozen T5">\n'
        f"<style>{STYLE}\n</style>\n<defs><marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        "<path d='M 0 0 L 8 4 L 0 8 z'/></marker></defs>\n" + "\n".join(out) + "\n</svg>\n")


def files(args):
    """Print the table of sample/README.md: every data file with its size and the start of its sha256."""
    paths = sorted(p for p in HERE.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.name not in ("README.md", "make.py", "tour.py"))
    for path in paths:
        print(f"| `{path.relative_to(HERE).as_posix()}` | {path.stat().st_size:,} | {data.digest(path)[:16]} |")
    print(f"| together | {sum(p.stat().st_size for p in paths):,} | |")


def main():
    parser = data.Parser(description=__doc__.split("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for part in (glue, text, vocab, pretrain, fill, scenes, clip, features, drawing, files):
        sub = parts.add_parser(part.__name__)
        sub.set_defaults(part=part)
        if part in (glue, text, vocab, pretrain, fill):
            sub.add_argument("--seed", type=int, default=0)
        if part in (text, vocab, pretrain, fill):
            sub.add_argument("--work", default="work", help="folder for texts and the state of pretraining (default: work)")
        if part in (pretrain, clip):
            steps = 9000 if part is pretrain else 2800
            sub.add_argument("--steps", type=int, default=steps, help=f"training steps (default: {steps})")
    args = parser.parse_args()
    args.part(args)


if __name__ == "__main__":
    data.run(main)
