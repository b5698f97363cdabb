"""Write glue/RTE/train.tsv and dev.tsv: pairs of sentences, of which one follows or does not.

    python sample/make/rte.py

There are six sorts of pairs. Each sort comes with both labels, and its hypotheses look alike under
both, so that the words alone give little away.
"""

import argparse
import random
from pathlib import Path

from words import (
    ANTONYMS,
    BEING_ADJECTIVES,
    BEINGS,
    DEEDS,
    HANDLING,
    KINDS,
    NOUNS,
    PLACES,
    SYNONYMS,
    THING_ADJECTIVES,
    TIMES,
    is_being,
    past,
    plural,
    related,
    spell,
    top,
    words_above,
    words_below,
)

SAMPLE = Path(__file__).resolve().parent.parent
MODIFIERS = ["subject_adjective", "object_adjective", "where"]
BOTH_DEFINITE = {"articles": ["the", "the"]}


# ---- facts and sentences -------------------------------------------------------------------------
# A fact is a dict: who (subject) did what (verb) to whom (object), and where or when.


def random_fact(rng, **given):
    """A fact without modifiers. A given subject or object is kept."""
    subject = given.get("subject") or rng.choice(BEINGS)

    # Animals only deal with beings, people also handle things.
    if "object" in given:
        to_a_being = is_being(given["object"])
    else:
        to_a_being = top(subject) == "animal" or rng.random() < 0.5
    if "subject" not in given and not to_a_being:
        subject = rng.choice([noun for noun in NOUNS if top(noun) == "person"])

    fitting = [noun for noun in NOUNS if is_being(noun) == to_a_being and noun != subject]
    return {
        "subject": subject,
        "object": given.get("object") or rng.choice(fitting),
        "verb": rng.choice(DEEDS if to_a_being else HANDLING),
        "subject_adjective": "",
        "object_adjective": "",
        "subject_number": 1,
        "object_number": 1,
        "where": "",
        "articles": rng.choices(["a", "the"], k=2),
    }


def add_modifiers(rng, fact, count):
    """The fact with `count` of the three modifiers filled in."""
    found = {}
    for slot in rng.sample(MODIFIERS, count):
        if slot == "where":
            found[slot] = rng.choice(PLACES + TIMES)
        else:
            noun = fact[slot.removesuffix("_adjective")]
            found[slot] = rng.choice(BEING_ADJECTIVES if is_being(noun) else THING_ADJECTIVES)
    return fact | found


def noun_phrase(noun, adjective, number, article):
    words = [noun if number == 1 else plural(noun)]
    if adjective:
        words.insert(0, adjective)
    if number > 1:
        article = spell(number)
    elif article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join([article, *words])


def say(fact, passive=False, negated=False):
    """The fact as a clause. A fact's "subject_text" or "object_text" stands as it is."""
    phrases = []
    for role, article in zip(("subject", "object"), fact["articles"], strict=True):
        parts = fact[role], fact[f"{role}_adjective"], fact[f"{role}_number"]
        phrases.append(fact.get(f"{role}_text") or noun_phrase(*parts, article))

    denial = "not " if negated else ""
    if passive:
        phrases.reverse()
        be = "was" if fact["object_number"] == 1 else "were"
        verb = f"{be} {denial}{past(fact['verb'])} by"
    elif negated:
        verb = f"did not {fact['verb']}"
    else:
        verb = past(fact["verb"])
    return f"{phrases[0]} {verb} {phrases[1]} {fact['where']}".strip()


# ---- six sorts of pairs --------------------------------------------------------------------------
# Each function returns a premise and a hypothesis.


def by_kind(rng, entailed):
    """Entailed: a wider word for a narrower one. Not: a narrower word, or one of another branch."""
    role = rng.choice(["subject", "object"])
    nouns = BEINGS if role == "subject" else NOUNS
    word = rng.choice([noun for noun in nouns if words_below(noun)])

    if entailed:
        source = rng.choice(words_below(word))
    else:
        unrelated = [
            noun
            for noun in NOUNS
            if not related(noun, word)
            and is_being(noun) == is_being(word)
            and (word in KINDS or top(noun) == top(word))
        ]
        source = rng.choice(rng.choice([words_above(word), unrelated]) or unrelated)

    fact = random_fact(rng, **{role: source})
    fact = add_modifiers(rng, fact, rng.randrange(3))

    # "The dog" of a premise may be spoken of as "an animal", whatever the article was.
    articles = list(fact["articles"])
    articles[0 if role == "subject" else 1] = "a"
    return say(fact), say(fact | {role: word, "articles": articles})


def by_modifier(rng, entailed):
    """Entailed: a modifier is dropped. Not: it is added, exchanged, or at the other noun."""
    bare = random_fact(rng)
    some = add_modifiers(rng, bare, rng.randrange(1, 3))
    full = add_modifiers(rng, bare, 3)
    filled = [slot for slot in MODIFIERS if some[slot]]
    free = rng.choice([slot for slot in MODIFIERS if not some[slot]])
    more = some | {free: full[free]}
    if entailed:
        return say(more), say(some)

    if filled != ["where"] and rng.random() < 0.5:
        moved = {
            "subject_adjective": some["object_adjective"],
            "object_adjective": some["subject_adjective"],
        }
        return say(some | moved), say(some)
    return say(more | {rng.choice(filled): ""}), say(some)


def by_conjunction(rng, entailed):
    """Entailed: one of two who both did it. Not: one of two of whom we do not know which."""
    fact = random_fact(rng)
    fact = add_modifiers(rng, fact, rng.randrange(2)) | BOTH_DEFINITE
    taken = fact["subject"], fact["object"]
    alike = [noun for noun in NOUNS if top(noun) == top(fact["subject"]) and noun not in taken]
    other = rng.choice(alike)

    # Two clauses: each keeps its own subject.
    if rng.random() < 0.5:
        second = random_fact(rng, subject=other) | BOTH_DEFINITE
        if second["object"] in taken:
            return by_conjunction(rng, entailed)
        one, two = rng.sample([fact, second], 2)
        premise = " and ".join(say(clause) for clause in rng.sample([fact, second], 2))
        exchanged = {slot: one[slot] for slot in ("subject", "subject_adjective")}
        return premise, say(one if entailed else two | exchanged)

    # Two subjects of one clause.
    names = [f"the {noun}" for noun in rng.sample([fact["subject"], other], 2)]
    if entailed:
        forms = [("{} and {}", "{}"), ("{} or {}", "{1} or {0}"), ("{} and {}", "{1} and {0}")]
    else:
        forms = [("{} or {}", "{}"), ("{} or {}", "{1} and {0}")]
    premise, hypothesis = rng.choice(forms)
    return (
        say(fact | {"subject_text": premise.format(*names)}),
        say(fact | {"subject_text": hypothesis.format(*names)}),
    )


def by_number(rng, entailed):
    """At least, at most, exactly. A second number in the premise counts something else."""
    fact = random_fact(rng)
    fact = add_modifiers(rng, fact, rng.randrange(2))
    how = rng.choice(["at least", "at most", "exactly"])
    number, distractor = rng.sample(range(2, 10), 2)
    if how == "at least":
        true = range(2, number)
    elif how == "at most":
        true = range(number + 1, 10)
    else:
        true = [number]
    false = [k for k in range(2, 10) if k not in true and k != number]
    allowed = [k for k in (true if entailed else false) if abs(k - number) <= 3]
    if not allowed:
        return by_number(rng, entailed)

    if distractor in allowed and rng.random() < 0.6:
        bound = distractor
    else:
        bound = rng.choice(allowed)
    one, two = rng.sample(["subject", "object"], 2)
    fact = fact | {f"{one}_number": number, f"{two}_number": distractor}
    bounded = noun_phrase(fact[one], fact[f"{one}_adjective"], bound, "")
    return say(fact), say(fact | {f"{one}_text": f"{how} {bounded}"})


def by_role(rng, entailed):
    """Active and passive. Entailed: the same roles. Not: the roles swapped."""
    fact = random_fact(rng, object=rng.choice(BEINGS))
    if fact["subject"] == fact["object"]:
        return by_role(rng, entailed)
    fact = add_modifiers(rng, fact, rng.randrange(2)) | BOTH_DEFINITE
    swapped = {
        "subject": fact["object"],
        "subject_adjective": fact["object_adjective"],
        "object": fact["subject"],
        "object_adjective": fact["subject_adjective"],
    }
    premise = say(fact, passive=rng.random() < 0.5)
    return premise, say(fact if entailed else fact | swapped, passive=rng.random() < 0.5)


def by_opposite(rng, entailed):
    """Entailed: a synonym, or the same denial. Not: an antonym, or a denial put in or left out."""
    fact = random_fact(rng)
    if rng.random() < 0.6:
        pair = rng.choice(SYNONYMS if entailed else ANTONYMS)
        role = "subject"
        if is_being(fact["object"]) and rng.random() >= 0.5:
            role = "object"
        one, two = rng.sample(pair, 2)
        return say(fact | {f"{role}_adjective": one}), say(fact | {f"{role}_adjective": two})

    fact = fact | BOTH_DEFINITE
    denied = rng.random() < 0.5
    premise = say(fact, passive=rng.random() < 0.5, negated=denied)
    return premise, say(fact, passive=rng.random() < 0.5, negated=denied == entailed)


SORTS = [by_kind, by_modifier, by_conjunction, by_number, by_role, by_opposite]


# ---- the files -----------------------------------------------------------------------------------


def make_pairs(count):
    """(premise, hypothesis, label) without repetition, half of each label."""
    rng = random.Random("RTE 0")
    pairs = []
    seen = set()
    while len(pairs) < count:
        entailed = len(pairs) % 2 == 0
        sort = SORTS[len(pairs) // 2 % len(SORTS)]
        texts = tuple(text[0].upper() + text[1:] + "." for text in sort(rng, entailed))
        if texts[0] != texts[1] and texts not in seen:
            seen.add(texts)
            pairs.append((*texts, "entailment" if entailed else "not_entailment"))
    rng.shuffle(pairs)
    return pairs


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=SAMPLE, help="folder that holds glue/")
    args = parser.parse_args()

    pairs = make_pairs(4400)
    folder = args.out / "glue" / "RTE"
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", pairs[:4000]), ("dev", pairs[4000:])):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for index, pair in enumerate(part):
            lines.append("\t".join([str(index), *pair]))
        (folder / f"{name}.tsv").write_bytes("\n".join([*lines, ""]).encode())


if __name__ == "__main__":
    main()
