"""Questions with answers, on which the small T5 is pretrained beside span corruption. Imported.

They tell how words relate, what differs between two texts, numbers, and who did what. None uses a
task of the sample, its templates or its sentences. The words are those of the sample's lists and
of WordNet.
"""

import re

from statements import (
    PEOPLE,
    SORTS,
    VERBS,
    agent,
    patient,
    random_sort,
    random_statement,
    random_where,
    say,
)
from words import (
    ANTONYMS,
    BAD,
    BEINGS,
    GOOD,
    NOUNS,
    NUMBERS,
    PARENT,
    SCALES,
    SYNONYMS,
    plural,
    related,
    spell,
    top,
    words_above,
)

DIFFERENCES = """same roles moved opposite alike wider narrower shorter longer more fewer denial
    part perhaps another""".split()
TASK_WORDS = ("sentence", "premise", "hypothesis", "entailment", "rte", "sst")
DENIALS = ["not", "by no means", "never", "hardly", "far from", "anything but"]
# What stands before the two texts of a pair. A mark is a word of the vocabulary.
LABELS = [
    ("one :", "two :"),
    *[("{mark}1:", "{mark}2:")] * 4,
    *(("a :", "b :"), ("first:", "second:"), ("", ""), ("said:", "then:")),
]


def find_sentences(paragraphs):
    """Sentences of 4 to 14 words."""
    sentences = []
    for paragraph in paragraphs:
        for sentence in re.findall(r'[A-Z"]?[^.;:"()]{20,90}(?=[.;"])', paragraph):
            if 4 <= len(sentence.split()) <= 14:
                sentences.append(sentence)
    return sentences


def vocabulary_words(pieces):
    """The lower-case words that are one piece of a SentencePiece model."""
    words = []
    for i in range(len(pieces)):
        if re.fullmatch("\u2581[a-z]{2,}", pieces.id_to_piece(i)):
            words.append(pieces.id_to_piece(i)[1:])
    return words


def compare(rng, words, number):
    """Whether a number is at least, at most, ... another."""
    bound = rng.randrange(1, 10)
    how = rng.choice(["at least", "at most", "more than", "fewer than", "exactly"])
    if rng.random() < 0.3:
        bound = number
    true = {
        "at least": number >= bound,
        "at most": number <= bound,
        "more than": number > bound,
        "fewer than": number < bound,
        "exactly": number == bound,
    }[how]
    return f"{words} {how} {spell(bound)} ?", "yes" if true else "no"


class Questions:
    """Every method that takes only `rng` returns a question and its answer, both texts.

    facts is the content of wordnet.json, words are the words of the vocabulary.
    """

    def __init__(self, facts, paragraphs, words):
        self.kinds = facts["kinds"]
        self.synonyms = facts["synonyms"]
        self.opposites = facts["opposites"]
        self.common = [[noun, words_above(noun)] for noun in NOUNS if words_above(noun)]
        self.names = [word for word, _ in self.kinds if " " not in word]
        self.sentences = find_sentences(paragraphs)
        self.words = words
        self.marks = [word for word in words if word not in TASK_WORDS]
        # How two statements may differ; what is listed more often is asked more often.
        self.differences = DIFFERENCES

    def one(self, rng, second_part=False):
        """A question of any sort. The second part of pretraining has more of the hardest pairs."""
        hardest = ["same", "moved", "roles"] * 2
        self.differences = DIFFERENCES + hardest if second_part else DIFFERENCES
        weights = {
            self.pair: 14,
            self.mood: 4,
            self.kind: 2,
            self.word: 1,
            self.difference: 2,
            self.number: 2,
            self.reading: 3,
            self.whether: 2,
            self.placed: 3,
            self.again: 2,
        }
        sort = rng.choices(list(weights), weights.values())[0]
        return sort(rng)

    # ---- words -----------------------------------------------------------------------------------

    def again(self, rng):
        """Words to be said again, so that each word of the vocabulary has been an answer."""
        words = rng.choices(self.words, k=rng.randrange(1, 9))
        text = " ".join(rng.choice(["", "", "not_"]) + word for word in words)
        return f"say again : {text}", text

    def noun(self, rng):
        """A noun and the words above it."""
        return rng.choice(self.kinds if rng.random() < 0.5 else self.common)

    def kind(self, rng):
        word, above = self.noun(rng)
        how = rng.random()
        if how < 0.3:
            return f"what is a {word} ?", f"a kind of {above[0]}"
        if how < 0.6:
            wider = rng.choice(above)
            one, two = rng.sample([word, wider], 2)
            return f"which is the wider word : {one} or {two} ?", wider

        other = rng.choice(self.noun(rng)[1] if rng.random() < 0.5 else above)
        return f"is every {word} a {other} ?", "yes" if other in above else "no"

    def related_words(self, rng, opposite):
        """Two synonyms or two opposites, of WordNet or of the sample's lists."""
        if opposite:
            pairs = self.opposites if rng.random() < 0.5 else ANTONYMS
        else:
            pairs = self.synonyms if rng.random() < 0.5 else SYNONYMS
        return rng.sample(rng.choice(pairs), 2)

    def word(self, rng):
        if rng.random() < 0.4:
            a, b = self.related_words(rng, opposite=False)
            return f"another word for {a}", b
        a, b = self.related_words(rng, opposite=True)
        return f"the opposite of {a}", b

    def number(self, rng):
        a, b = rng.sample(range(1, 10), 2)
        if rng.random() < 0.5:
            return compare(rng, f"is {spell(a)}", a)
        if rng.random() < 0.5:
            how = rng.choice(["more", "less"])
            answer = max(a, b) if how == "more" else min(a, b)
            return f"which is {how} : {spell(a)} or {spell(b)} ?", spell(answer)
        return f"count on from {spell(a)}", " ".join(NUMBERS[a : a + 3]) or "ten"

    # ---- one text --------------------------------------------------------------------------------

    def mood(self, rng):
        """Of what sort somebody is. A denial says the opposite; of two, one is asked for."""
        told = []
        people = rng.sample(PEOPLE, 2)
        for who in people[: rng.choice([1, 1, 2])]:
            ends = rng.choice(SCALES) if rng.random() < 0.5 else (GOOD, BAD)
            denied = rng.random() < 0.5
            said = rng.randrange(2)
            meant = 1 - said if denied else said
            denial = rng.choice(DENIALS) + " " if denied else ""
            text = f"the {who} seems {denial}{rng.choice(ends[said])}"
            told.append((text, who, ends, meant))

        _, who, ends, meant = rng.choice(told)
        text = rng.choice([" and ", " , but ", " although "]).join(one[0] for one in told)
        question = f"is the {who} {ends[0][0]} or {ends[1][0]} ?"
        return f"{text} . {question}", ends[meant][0]

    def reading(self, rng):
        """One to three statements, and a question on one of them."""
        facts = [random_statement(rng, self.names) for _ in range(rng.randrange(1, 4))]
        fact = rng.choice(facts)
        plain = fact | {"passive": False, "denied": False, "where": ""}
        who = say(plain | {"agent": "who", "who_count": 0})
        whom = say(plain | {"patient": "who", "whom_count": 0, "passive": True})
        denied = [agent(other) for other in facts if other["denied"]]
        rows = [
            (f"{who} ?", "nobody" if fact["denied"] else agent(fact)),
            (f"{whom} ?", "nobody" if fact["denied"] else patient(fact)),
            ("", say(fact | {"passive": not fact["passive"]})),
            ("is anything denied ?", " and ".join(denied) or "no"),
        ]
        if fact["whom_count"]:
            rows.append((f"how many {plural(fact['whom'])} ?", spell(fact["whom_count"])))
            rows.append(compare(rng, "are they", fact["whom_count"]))
        if fact["who_sort"]:
            rows.append((f"what is the {fact['who']} like ?", fact["who_sort"]))
        if fact["where"]:
            rows.append((f"where is the {fact['who']} ?", fact["where"]))
        if fact["whom_sort"]:
            rows.append((f"what is the {fact['whom']} like ?", fact["whom_sort"]))

        question, answer = rng.choice(rows)
        if not question:
            return f"say it in other words : {say(fact)}", answer
        return f"{' . '.join(map(say, facts))} . question: {question}", answer

    def whether(self, rng):
        """A statement about two people, or about one of two: who did it?"""
        fact = random_statement(rng, self.names) | {"passive": False, "who_count": 0}
        other = rng.choice(PEOPLE)
        if other in (fact["who"], fact["whom"]):
            return self.whether(rng)

        people = rng.sample([fact["who"], other], 2)
        asked = rng.randrange(2)
        form, answers = rng.choice(
            [
                ("the {} and the {}", "yes yes"),
                ("either the {} or the {}", "perhaps perhaps"),
                ("neither the {} nor the {}", "no no"),
                ("the {} but not the {}", "yes no"),
                ("not the {} but the {}", "no yes"),
                ("the {} or the {}", "perhaps perhaps"),
            ]
        )
        fact |= {"agent": form.format(*people), "denied": False}
        rows = [
            (f"is the {people[asked]} one of them ?", answers.split()[asked]),
            (f"is it the {people[asked]} ?", answers.split()[asked]),
            ("is it both ?", "yes" if answers == "yes yes" else "no"),
            ("is it any of the two ?", "no" if answers == "no no" else "yes"),
        ]
        question, answer = rng.choice(rows)
        return f"{say(fact)} . question: {question}", answer

    def placed(self, rng):
        """Things on a board, each with two coordinates: what is where, how many, which side."""
        all_names = rng.sample(BEINGS, rng.randrange(1, 4))
        all_sorts = rng.sample(SORTS, rng.randrange(1, 5))
        things = []
        for _ in range(rng.randrange(1, 6)):
            sort = rng.choice(all_sorts)
            name = rng.choice(all_names)
            things.append((sort, name, rng.randrange(1, 8), rng.randrange(1, 8)))
        sorts = [thing[0] for thing in things]
        names = [thing[1] for thing in things]
        sort, name, x, y = rng.choice(things)

        rows = [
            (f"count {name} :", spell(names.count(name))),
            (f"count {sort} :", spell(sorts.count(sort))),
            ("count all :", spell(len(things))),
        ]
        unseen = (rng.choice(all_sorts), rng.choice(all_names))
        pairs = [thing[:2] for thing in things]
        pair = rng.choice([*pairs, unseen])
        rows.append((f"any {pair[0]} {pair[1]} ?", "yes" if pair in pairs else "no"))
        if names.count(name) == 1:
            rows.append((f"sort of {name} :", sort))
            rows.append((f"place of {name} :", f"{spell(x)} {spell(y)}"))
            rows += self.sides(rng, things, names, name, (x, y))
        if sorts.count(sort) == 1:
            rows += [(f"who is {sort} :", name)] * 2

        question, answer = rng.choice(rows)
        board = " , ".join(f"{s} {n} {spell(a)} {spell(b)}" for s, n, a, b in things)
        return f"board: {board} . {question}", answer

    def sides(self, rng, things, names, name, place):
        """On which side of another thing a thing is. Both names occur once on the board."""
        others = [t for t in things if t[1] != name and names.count(t[1]) == 1]
        if not others:
            return []
        _, other, x, y = rng.choice(others)
        sides = {
            "west of": place[0] < x,
            "east of": place[0] > x,
            "higher than": place[1] < y,
            "lower than": place[1] > y,
        }
        return [(f"{name} {side} {other} ?", "yes" if sides[side] else "no") for side in sides]

    # ---- two texts -------------------------------------------------------------------------------

    def difference(self, rng):
        """What was done to a text: words left out, put in, changed, or two of them swapped."""
        if rng.random() < 0.6:
            words = say(random_statement(rng, self.names)).split()
        else:
            words = rng.choice(self.sentences).split()
        other = list(words)
        how = rng.choice(["left out", "put in", "changed", "swapped", "nothing"])
        i = rng.randrange(len(words))

        answer = "nothing"
        if how == "left out":
            answer = f"left out : {other.pop(i)}"
        elif how == "put in":
            new = rng.choice(rng.choice(self.sentences).split())
            other.insert(i, new)
            answer = f"put in : {new}"
        elif how == "changed":
            words[i], other[i], relation = self.changed_word(rng)
            answer = f"changed : {words[i]} to {other[i]} , {relation}"
        elif how == "swapped" and len(set(words)) > 3:
            j = rng.choice([j for j in range(len(words)) if words[j] != words[i]])
            other[i], other[j] = other[j], other[i]
            answer = f"swapped : {words[min(i, j)]} and {words[max(i, j)]}"
        texts = f"first text: {' '.join(words)} second text: {' '.join(other)}"
        return f"{texts} what was done ?", answer

    def changed_word(self, rng):
        """A word, another word, and how the second relates to the first."""
        relation = rng.choice(["same meaning", "opposite", "wider", "narrower"])
        if relation in ("same meaning", "opposite"):
            return *self.related_words(rng, opposite=relation == "opposite"), relation
        word, above = self.noun(rng)
        wider = rng.choice(above)
        if relation == "wider":
            return word, wider, relation
        return wider, word, relation

    def pair(self, rng):
        """How two short statements differ, in one word, but not what follows from them."""
        fact = random_statement(rng, self.names)
        other = dict(fact)
        if rng.random() < 0.4:
            other["passive"] = rng.random() < 0.5
        how = rng.choice(self.differences)
        # A third statement, with which two clauses can be made.
        third = random_statement(rng, self.names) | {"tense": fact["tense"]}

        texts = self.differ(rng, how, fact, other, third)
        if texts[0] == texts[1] and how != "same":
            return self.pair(rng)
        if rng.random() < 0.7:
            texts = [text[0].upper() + text[1:] + "." for text in texts]
        mark = rng.choice(self.marks)
        first, second = (label.format(mark=mark) for label in rng.choice(LABELS))
        pair = " ".join(f"{first} {texts[0]} {second} {texts[1]}".split())
        return self.ask_about(rng, how, texts, pair)

    def ask_about(self, rng, how, texts, pair):
        # One difference against all others.
        if rng.random() < 0.2:
            asked = how if rng.random() < 0.5 else rng.choice(DIFFERENCES)
            forms = [f"{asked} ? {pair}", f"{pair} {asked} ?", f"is it {asked} {pair}"]
            return rng.choice(forms), "yes" if asked == how else "no"

        # The words that only the first has, then those that only the second has.
        if rng.random() < 0.4:
            one, two = (re.findall("[a-z]+", text.lower()) for text in texts)
            only_one = " ".join(word for word in one if word not in two) or "nothing"
            only_two = " ".join(word for word in two if word not in one) or "nothing"
            return f"{pair} which words ?", f"{only_one} , {only_two} : {how}"

        forms = [
            f"{pair} how do they differ ?",
            f"differ {pair}",
            f"{rng.choice(self.marks)} {pair}",
            pair,
            f"{pair} {rng.choice(self.marks)}",
        ]
        return rng.choice(forms), how

    def differ(self, rng, how, fact, other, third):
        """Two texts that differ as `how` says. `fact` and `other` are alike and are changed."""
        end = rng.choice(["who", "whom"])
        if how == "roles":
            return self.swap_roles(rng, fact, other, third)
        if how in ("part", "perhaps") or (how == "same" and rng.random() < 0.3):
            return self.join_people(rng, how, fact, other, third)

        if how == "moved":
            one, two = rng.sample([random_sort(rng), ""], 2)
            fact |= {"who_sort": one, "whom_sort": two}
            other |= {"who_sort": two, "whom_sort": one}
        elif how in ("opposite", "alike"):
            words = rng.choice(SYNONYMS if how == "alike" else ANTONYMS)
            fact[f"{end}_sort"], other[f"{end}_sort"] = rng.sample(words, 2)
        elif how in ("wider", "narrower"):
            low, above = rng.choice(self.common if rng.random() < 0.8 else self.kinds)
            high = rng.choice(above)
            fact[end], other[end] = (low, high) if how == "wider" else (high, low)
            other["articles"] = [rng.choice(["a", article]) for article in other["articles"]]
        elif how in ("shorter", "longer"):
            slot = rng.choice(["who_sort", "whom_sort", "where"])
            fact[slot] = self.filling(rng, slot)
            other[slot] = ""
            if how == "longer":
                return say(other), say(fact)
        elif how in ("more", "fewer"):
            counts = sorted(rng.sample(range(1, 10), 2), reverse=how == "fewer")
            fact[f"{end}_count"], other[f"{end}_count"] = counts
        elif how == "denial":
            other["denied"] = not fact["denied"]
        elif how == "another":
            self.exchange(rng, fact, other, third)
        return say(fact), say(other)

    def filling(self, rng, slot):
        if slot == "verb":
            return rng.choice(VERBS)
        return random_where(rng) if slot == "where" else random_sort(rng)

    def swap_roles(self, rng, fact, other, third):
        """The other one did it: who and whom are exchanged, or the subjects of two clauses."""
        if rng.random() < 0.3:
            both = " and ".join(rng.sample([say(fact), say(third)], 2))
            doer = {key: fact[key] for key in ("who", "who_sort", "who_count")}
            return both, say(third | doer)
        for key in ("", "_sort", "_count"):
            other[f"who{key}"] = fact[f"whom{key}"]
            other[f"whom{key}"] = fact[f"who{key}"]
        return say(fact), say(other)

    def exchange(self, rng, fact, other, third):
        """Put another word in one place of `other`."""
        slot = rng.choice(["who", "whom", "who_sort", "whom_sort", "where", "verb"])
        if not fact[slot]:
            fact[slot] = third[slot] or self.filling(rng, slot)
        if slot not in ("who", "whom"):
            other[slot] = self.filling(rng, slot)
            return

        other[slot] = third[slot]
        # Half the time it is a noun of the same branch, but neither wider nor narrower.
        if rng.random() < 0.5:
            noun = rng.choice([*PARENT])
            alike = [word for word in NOUNS if top(word) == top(noun) and not related(word, noun)]
            fact[slot] = noun
            other[slot] = rng.choice(alike)

    def join_people(self, rng, how, fact, other, third):
        """Two people joined by "and" or "or", against one of them or both."""
        if how == "part" and rng.random() < 0.4:
            both = " and ".join(rng.sample([say(fact), say(third)], 2))
            return both, say(other)

        one_clause = fact | {"who_sort": "", "passive": False, "who_count": 0}
        a, b = rng.sample([fact["who"], third["who"]], 2)
        forms = {
            "part": [("the {} and the {}", "the {}")],
            "perhaps": [
                ("the {} or the {}", "the {}"),
                ("the {} or the {}", "the {1} and the {0}"),
            ],
            "same": [
                ("the {} and the {}", "the {1} and the {0}"),
                ("the {} or the {}", "the {1} or the {0}"),
            ],
        }[how]
        first, second = rng.choice(forms)
        texts = [first.format(a, b), second.format(*rng.choice([(a, b), (b, a)]))]
        said = []
        for text in texts:
            # Two people joined by "and" take a verb in the plural.
            count = 2 if " and " in text else 0
            said.append(say(one_clause | {"agent": text, "who_count": count}))
        return said
