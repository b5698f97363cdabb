"""Statements about people and things, which the questions of pretraining are made of. Imported.

A statement is a dict. It is never in the simple past, which is the tense of the sample's own
sentences, so that pretraining sees none of them.
"""

import re

from words import (
    BEINGS,
    DEEDS,
    HANDLING,
    NOUNS,
    SYNONYMS,
    past,
    plural,
    progressive,
    spell,
)

TENSES = "now has had does will can must may".split()
PEOPLE = """farmer teacher boy girl king queen nurse driver baker sailor soldier lawyer student
    judge guest neighbor waiter cook hunter stranger""".split()
OTHER_VERBS = """call visit answer thank cover join pull fear kick praise blame trust miss admire
    lift wash mix use need count copy save open close guard obey wake face pass order mark sign
    like love hate reach serve spare test tie turn view welcome wrap""".split()
VERBS = DEEDS + HANDLING + OTHER_VERBS
SORTS = """old young tall short big small happy sad brave clever quiet loud rich poor slow quick
    angry calm red blue green white black""".split()
PREPOSITIONS = "in near behind on at by under beside".split()
ROOMS = """garden kitchen river school hall station wall house stairs park door bridge street
    market table lake field shop tower church""".split()
WHEN = [
    *("today", "at night", "this year", "every day", "after dinner", "in summer", "on sunday"),
    *("on monday", "at noon", "before lunch", "after dawn", "in the morning", "during the feast"),
    *("on friday", "next week", "last month", "during the storm", "in the evening"),
]


def random_sort(rng):
    """What sort somebody or something is of."""
    if rng.random() < 0.6:
        return rng.choice(SORTS)
    return rng.choice(rng.choice(SYNONYMS))


def random_where(rng):
    if rng.random() < 0.4:
        return rng.choice(WHEN)
    return f"{rng.choice(PREPOSITIONS)} the {rng.choice(ROOMS)}"


def random_count(rng):
    """0 stands for one without a number: "the dog"."""
    return rng.choice([0] * 5 + [*range(2, 10)])


def random_statement(rng, names):
    """Who does what to whom, and what is told besides. `names` are more nouns."""
    lists = [PEOPLE, BEINGS, NOUNS, names]
    who = rng.choice(rng.choices(lists, [4, 3, 2, 2])[0])
    whom = rng.choice(rng.choices(lists, [4, 3, 2, 2])[0])
    if who == whom:
        return random_statement(rng, names)
    return {
        "who": who,
        "whom": whom,
        "verb": rng.choice(VERBS),
        "who_count": random_count(rng),
        "whom_count": random_count(rng),
        "who_sort": rng.choice(["", random_sort(rng)]),
        "whom_sort": rng.choice(["", random_sort(rng)]),
        "where": rng.choice(["", random_where(rng)]),
        "passive": rng.random() < 0.4,
        "denied": rng.random() < 0.15,
        "tense": rng.choice(TENSES),
        "articles": rng.choices(["the", "a", "this"], [4, 2, 1], k=2),
    }


def noun_phrase(article, sort, noun, count):
    words = [spell(count) if count else article, sort, plural(noun) if count > 1 else noun]
    return " ".join(word for word in words if word)


def agent(statement):
    """Who does it, in words. A statement's "agent" stands as it is."""
    if "agent" in statement:
        return statement["agent"]
    article = statement["articles"][0]
    return noun_phrase(article, statement["who_sort"], statement["who"], statement["who_count"])


def patient(statement):
    """To whom it is done, in words."""
    if "patient" in statement:
        return statement["patient"]
    article = statement["articles"][1]
    return noun_phrase(article, statement["whom_sort"], statement["whom"], statement["whom_count"])


def verb_phrase(statement):
    verb = statement["verb"]
    passive = statement["passive"]
    tense = statement["tense"]
    several = statement["whom_count" if passive else "who_count"] > 1
    be, have, do = ("are", "have", "do") if several else ("is", "has", "does")

    # An auxiliary stands first, "not" follows it.
    if tense == "now":
        first = be
        rest = f"being {past(verb)}" if passive else progressive(verb)
    elif tense in ("has", "had"):
        first = have if tense == "has" else "had"
        rest = f"been {past(verb)}" if passive else past(verb)
    elif tense == "does":
        first = be if passive else do
        rest = past(verb) if passive else verb
    else:
        first = tense
        rest = f"be {past(verb)}" if passive else verb

    if statement["denied"]:
        return f"{first} not {rest}"
    if first == "do":
        return verb
    return plural(verb) if first == "does" else f"{first} {rest}"


def say(statement):
    """The statement as a clause."""
    if statement["passive"]:
        parts = [patient(statement), verb_phrase(statement), "by", agent(statement)]
    else:
        parts = [agent(statement), verb_phrase(statement), patient(statement)]
    text = " ".join([*parts, statement["where"]]).strip()
    return re.sub(r"\ba (?=[aeiou])", "an ", text)
