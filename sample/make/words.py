"""The word lists and the grammar that all text of the sample shares. Imported; nothing to run."""

import re

# Every word is a kind of the words above it: top, middle, and the leaves in a string.
KINDS = {
    "animal": {
        "dog": "poodle beagle terrier spaniel",
        "bird": "sparrow robin parrot eagle",
        "insect": "ant wasp beetle moth",
    },
    "person": {
        "musician": "pianist violinist drummer",
        "doctor": "surgeon dentist",
        "athlete": "swimmer boxer runner",
        "artist": "painter sculptor",
        "relative": "uncle aunt cousin nephew",
    },
    "vehicle": {
        "car": "taxi limousine sedan",
        "boat": "canoe ferry yacht",
        "plane": "jet glider",
    },
    "plant": {
        "tree": "oak pine maple willow",
        "flower": "rose tulip daisy orchid",
    },
    "garment": {
        "hat": "cap helmet bonnet",
        "shoe": "boot sandal slipper",
        "coat": "jacket raincoat",
    },
    "food": {
        "fruit": "apple pear lemon plum",
        "vegetable": "carrot onion turnip cabbage",
    },
}
PARENT = {}
for middles in KINDS.values():
    for middle, leaves in middles.items():
        PARENT |= {leaf: middle for leaf in leaves.split()}
for top_word, middles in KINDS.items():
    PARENT |= {middle: top_word for middle in middles}
NOUNS = [*KINDS, *PARENT]

# All verbs are regular. DEEDS are done to an animal or a person, HANDLING is done to a thing.
DEEDS = "chase follow watch help push touch ignore carry greet warn".split()
HANDLING = "clean move paint want drop borrow describe photograph deliver inspect".split()

# Each end of a scale is given in two words, so that there are synonyms and opposites.
SCALES = [
    (("big", "large"), ("small", "little")),
    (("quick", "fast"), ("slow", "sluggish")),
    (("quiet", "silent"), ("loud", "noisy")),
    (("happy", "cheerful"), ("sad", "unhappy")),
    (("rich", "wealthy"), ("poor", "penniless")),
    (("clean", "spotless"), ("dirty", "filthy")),
    (("sick", "ill"), ("healthy", "fit")),
    (("brave", "courageous"), ("timid", "cowardly")),
    (("clever", "smart"), ("stupid", "foolish")),
    (("angry", "furious"), ("calm", "peaceful")),
]
SYNONYMS = [end for scale in SCALES for end in scale]
ANTONYMS = [(a, b) for one, other in SCALES for a in one for b in other]

COLOURS = "red blue green yellow white black brown grey".split()
THING_ADJECTIVES = COLOURS + "big small large little clean dirty old".split()
BEING_ADJECTIVES = "big small quick slow quiet loud happy sad old young brave clever tall".split()
PLACES = [
    *("in the garden", "near the river", "at the station", "behind the house"),
    *("in the park", "on the bridge", "at the market", "by the lake"),
]
TIMES = [
    *("on monday", "after lunch", "before dawn", "in the morning"),
    *("last week", "at noon", "during the storm", "on friday"),
]
NUMBERS = "one two three four five six seven eight nine".split()

# What the opinions of SST-2 are about, and what they say.
ASPECTS = "film plot acting dialogue story music ending direction script cast humor pacing".split()
GOOD = """charming brilliant funny moving fresh clever gripping delightful sharp warm thrilling
    witty""".split()
BAD = """boring dull clumsy tedious stale silly lifeless awful bland shallow tiresome
    messy""".split()


def words_above(word):
    """The words that a noun is a kind of, the nearest first."""
    if word not in PARENT:
        return []
    return [PARENT[word], *words_above(PARENT[word])]


def words_below(word):
    return [other for other in NOUNS if word in words_above(other)]


def top(word):
    """The widest word above a noun: one of the six keys of KINDS."""
    return [word, *words_above(word)][-1]


def is_being(noun):
    return top(noun) in ("person", "animal")


BEINGS = [noun for noun in NOUNS if is_being(noun)]


def related(one, other):
    """Whether the nouns are the same, or one of them is a kind of the other."""
    return one == other or one in words_above(other) or other in words_above(one)


def spell(number):
    return NUMBERS[number - 1]


def plural(noun):
    if re.search("[^aeo]y$", noun):
        return noun[:-1] + "ies"
    if re.search("(ch|sh|s|x)$", noun):
        return noun + "es"
    return noun + "s"


def stem(verb):
    """What -ed and -ing are added to: chas(ed), dropp(ed)."""
    if re.search("[^aeiou][aeiou]p$", verb):
        return verb + "p"
    return verb.removesuffix("e")


def past(verb):
    return re.sub("([^aeou])y$", r"\1i", stem(verb)) + "ed"


def progressive(verb):
    return stem(verb) + "ing"
