"""Names for tools, arguments and things: large pools, divided by construction between training and evaluation.

A model that has seen `get_weather` a thousand times calls `get_weather` whatever is declared. So names are composed at
random, from English words and from random syllables, in five casings. Every word, English or not, belongs to exactly
one split: a checksum of its letters decides (one word in four is kept for evaluation). No evaluation name therefore
shares a single word with a training name, while the statistics of letters are the same, which is what a tokenizer
needs.
"""

from functools import cache
from random import Random
from typing import Literal
from zlib import crc32

Split = Literal["train", "eval"]
SPLITS: tuple[Split, Split] = ("train", "eval")

VERBS = """get fetch find look search read load pull query check show give tell list view scan pick grab seek trace
compute calc work solve eval count sum total measure derive figure process run do make build create render draw write store
save put set add append insert update edit change modify convert turn shift move swap map cast translate parse decode encode
pack unpack open close start stop begin finish launch send post push submit publish share notify alert call ring ask invoke
apply use handle manage track watch monitor observe sort order rank group split join merge combine filter select choose
match compare verify validate test inspect review audit resolve locate detect sense probe sample collect gather harvest mine
extract pluck take borrow lend return reset clear drop remove delete purge clean trim cut slice crop scale resize rotate flip
mix blend bake cook brew pour fill drain heat cool lock unlock hide reveal print copy paste sync backup restore import export
guess predict estimate judge score grade rate vote book reserve cancel schedule plan arrange assign grant deny allow block""".split()
NOUNS = """price cost value amount number figure result answer record entry row item object thing product stock order invoice
bill account customer client user member person contact phone address city town place region country map route path road
street house room office shop store market bank school library museum station airport port harbor bridge tower garden farm
field forest river lake sea island mountain valley desert weather rain snow wind storm cloud sun moon star planet sky light
shadow color shape size length width height weight depth speed time date day week month year hour minute moment season event
meeting task job project plan goal note memo letter message mail post page book chapter story poem song track album movie
film game sport team player score match round level stage step phase part piece unit block box bag basket bottle cup plate
table chair desk lamp door window wall floor roof key lock wheel engine motor car bus train plane boat ship bike truck tool
hammer nail screw wire cable switch button panel screen camera sensor meter gauge clock watch ring coin card ticket pass
token badge label tag sign flag banner ribbon thread rope chain net web link node edge graph tree leaf branch root seed
flower rose tulip lily fern moss oak pine maple cedar apple pear plum cherry grape lemon lime mango peach berry melon bean
corn rice wheat bread cake cookie honey sugar salt pepper butter cheese milk cream tea coffee juice soup salad stew dog cat
horse cow sheep goat pig duck goose hen fox wolf bear deer rabbit mouse rat bat bird hawk eagle owl crow robin fish shark
whale seal crab snail bee ant fly moth spider frog toad snake turtle lizard stone rock sand clay metal iron steel copper
silver gold brass tin zinc glass paper wood leather cloth cotton silk wool paint ink brush pen pencil chalk canvas frame
picture photo image video audio sound voice noise signal code data file folder archive index catalog register ledger diary
journal report summary table chart queue stack buffer cache memory disk drive server host client agent broker vendor dealer
driver pilot captain doctor nurse teacher student pupil writer reader singer actor painter baker farmer miner sailor guard
crystal lantern compass anchor saddle barrel kettle mirror candle pillow blanket curtain carpet drawer cabinet ladder shovel
bucket helmet jacket scarf glove boot sandal button zipper pocket wallet purse necklace bracelet marble pebble feather""".split()
ADJECTIVES = """red blue green yellow purple orange pink brown black white gray golden silver bright dark pale deep light heavy
soft hard smooth rough sharp blunt warm cold hot cool dry wet fresh old new young ancient modern quick slow fast calm wild
quiet loud tall short long wide narrow thick thin small large tiny giant round flat square plain fancy simple complex rare
common cheap costly clean dirty empty full open hidden secret public private local global main spare extra basic super
smart clever brave kind gentle proud humble lucky noble royal rustic misty sunny rainy windy frosty dusty sandy rocky""".split()
PEOPLE = """Anna Ben Carla David Elena Felix Grace Hugo Iris Jonas Karin Leo Maria Nora Oscar Paula Quinn Rosa Sam Tina Uma
Victor Wendy Xavier Yara Zoe Alice Bruno Clara Daniel Emma Frank Gloria Henry Ida Jack Kate Liam Mila Noah Olga Peter Rita
Simon Tara Ulrich Vera Walter Yusuf Zara Amir Bella Cyrus Diana Edgar Fiona Gavin Hanna Ivan Julia Kevin Lara Marco Nina""".split()

# Words of ordinary questions and descriptions. As names they are for training only, whatever the checksum says: a held-out
# name must be a new word, and these stand in every prompt.
PROSE = """date list number tell add do day days unit units file files total find convert compute week folder order value get sort
sum read take look count put data use show price message cost book work turn start send long hour hours change call weather
table song search result path city solve small set return open give bill answer write user tool thing record product print post
person measure make large new old first second expression text numbers words word name names between from to of item calculate
calculator weekday difference operation reminder email query web news map light door picture draw translate delete flight records average
maximum minimum question quantity different model boxes years people language content directory details times costs pages title
subject language array boolean string type function functions tools dates evaluate conversion population degrees dollars source
target left right largest smallest biggest lowest highest question answer listed contains machine social media alphabet
sentence spelling alarm food with this that each some more have need know when where what who how many much which than until
after before later earlier today tomorrow good help brief fact facts live born buys eggs rows seats children""".split()
_PROSE = frozenset(PROSE)

# A small inventory, so that a syllable is about one token and every such token is seen often; one syllable in eight is
# drawn from the wide one, which keeps rarer letter pairs in practice.
_ONSETS = "b d f g h k l m n p r s t v z br dr gr kr pl st tr sh ch".split()
_VOWELS = "a e i o u".split()
_CODAS = ("", "", "", *"n r l s k m x".split())
_WIDE_ONSETS = (
    "b c d f g h j k l m n p r s t v w y z bl ch cl cr fl fr gl kn ph pr qu sc sk sl sm sn sp st sw th tw wh wr".split()
)
_WIDE_VOWELS = "a e i o u y ai ay au ea ee ei ie io oa oo ou ow ue".split()
_WIDE_CODAS = (
    "",
    *"b ck d ct ft g gh ld ll lt m mp n nd ng nk nt p pt r rd rk rm rn rt s sh ss st t th tion ty w x z".split(),
)


def split_of(word: str) -> Split:
    """Which split a word belongs to; casing does not matter."""
    word = word.lower()
    return "eval" if crc32(word.encode()) % 4 == 0 and word not in _PROSE else "train"


@cache
def _pool(kind: str, split: Split) -> tuple[str, ...]:
    words = {"verb": VERBS, "noun": NOUNS, "adjective": ADJECTIVES, "person": PEOPLE}[kind]
    return tuple(sorted({word for word in words if split_of(word) == split and word not in _PROSE}))


def english(rng: Random, split: Split, kind: str) -> str:
    """An English word of the split: kind is verb, noun, adjective or person."""
    pool = _pool(kind, split)
    return pool[int(rng.random() * len(pool))]


def syllables(rng: Random, split: Split, count: int = 2) -> str:
    """A pronounceable word that means nothing, such as `brolnek`, of `count` syllables."""
    while True:
        word = "".join([_syllable(rng) for _ in range(count)])
        if split_of(word) == split:
            return word


def _syllable(rng: Random) -> str:
    roll = rng.random
    if roll() < 0.125:
        onset, vowel, coda = _WIDE_ONSETS, _WIDE_VOWELS, _WIDE_CODAS
    else:
        onset, vowel, coda = _ONSETS, _VOWELS, _CODAS
    return onset[int(roll() * len(onset))] + vowel[int(roll() * len(vowel))] + coda[int(roll() * len(coda))]


def word(rng: Random, split: Split) -> str:
    """One lower-case word for use inside names: English or syllables, half and half."""
    roll = rng.random()
    if split == "train" and roll > 0.85:
        return PROSE[int(rng.random() * len(PROSE))]
    if roll < 0.4:
        return syllables(rng, split, 2 if rng.random() < 0.75 else 1 + int(rng.random() * 3))
    return english(rng, split, "noun" if roll < 0.7 else "verb" if roll < 0.78 else "adjective")


def _cased(rng: Random, words: list[str]) -> str:
    roll = rng.random()
    if roll < 0.6:
        return "_".join(words)
    if roll < 0.8:
        return words[0] + "".join(part.capitalize() for part in words[1:])
    if roll < 0.9:
        return "".join(part.capitalize() for part in words)
    if roll < 0.96:
        return "-".join(words)
    return "".join(words[:1])


def words_of(name: str) -> list[str]:
    """The lower-case words of a composed name: the inverse of the casings above."""
    spaced = "".join(f" {letter}" if letter.isupper() else letter for letter in name)
    return [part for part in "".join(c if c.isalpha() else " " for c in spaced).lower().split() if part]


def tool_name(rng: Random, split: Split, taken: set[str]) -> str:
    """A new tool name, 3 to 40 characters, that is not in `taken`; it is added there."""
    while True:
        count = 1 if rng.random() < 0.2 else 2 if rng.random() < 0.8 else 3
        first = english(rng, split, "verb") if rng.random() < 0.55 else word(rng, split)
        name = _cased(rng, [first] + [word(rng, split) for _ in range(count - 1)])
        if 3 <= len(name) <= 40 and name not in taken:
            taken.add(name)
            return name


def argument_name(rng: Random, split: Split, taken: set[str]) -> str:
    """A new argument name of one or two words that is not in `taken`; it is added there."""
    while True:
        name = word(rng, split)
        if rng.random() < 0.3:
            other = word(rng, split)
            name = name + "_" + other if rng.random() < 0.6 else name + other.capitalize()
        if len(name) > 1 and name not in taken:
            taken.add(name)
            return name


def thing(rng: Random, split: Split) -> str:
    """Something one can have, such as `brass lamp` or `zorvel`: for look-ups and word problems (singular)."""
    roll = rng.random()
    if roll < 0.35:
        return syllables(rng, split)
    noun = english(rng, split, "noun")
    if roll < 0.7:
        return noun
    return f"{english(rng, split, 'adjective') if roll < 0.9 else syllables(rng, split)} {noun}"


def person(rng: Random, split: Split) -> str:
    """A first name, known or invented."""
    return english(rng, split, "person") if rng.random() < 0.5 else syllables(rng, split).capitalize()


def place(rng: Random, split: Split) -> str:
    """An invented town."""
    return syllables(rng, split, 2 + (rng.random() < 0.3)).capitalize()


def plural(noun: str) -> str:
    """Good enough for word problems: `lamps`, `boxes`, `berries`."""
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s")
