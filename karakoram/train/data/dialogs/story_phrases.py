"""What happens in word problems of one to five steps: lines of `words|expression|what the value is` (`stories.py`).

`{v}` is the value so far. Slots: p, q persons; o, x one thing and several; a, b, c, d small numbers and a price; n less than
the value; s a divisor of it; k a small factor; t per cent.
"""

from dataclasses import dataclass

from karakoram.train.data.dialogs.phrases import Phrases


@dataclass(frozen=True, slots=True)
class Theme:
    """Openings, what may follow, and the question at the end."""

    unit: str
    openings: Phrases
    changes: Phrases
    asks: Phrases


def _theme(key: str, unit: str, *texts: tuple[str, str]) -> Theme:
    names = ("openings", "changes", "asks")
    made = [Phrases(f"stories.{key}.{name}", *text) for name, text in zip(names, texts, strict=True)]
    return Theme(unit, *made)


THINGS = _theme(
    "things",
    "{x}",
    (
        """{p} has {a} [boxes|bags|jars|packs|baskets] with {b} {x} in each.|{a}*{b}|{x} in all
        {p} [picks|makes|collects|bakes|paints] {b} {x} [a|every|each] day for {a} days.|{a}*{b}|{x} in all
        {p} had {a} {x} and [got|bought|found|won] {b} more.|{a}+{b}|{x} together
        {p} has {b} {x} and {q} has {k} times as many. They put them together.|{b}+{b}*{k}|{x} together
        {p} found {a} {x} on Monday and {b} on [Tuesday|Sunday].|{a}+{b}|{x} together
        [A|The] shop has {a} shelves with {b} {x} on each.|{a}*{b}|{x} on the shelves
        [There are|We have] {a} rows of {b} {x}.|{a}*{b}|{x} in the rows
        {p} needs {b} {x} for one [wall|game|cake|dress] and wants to make {a} of them.|{b}*{a}|{x} needed""",
        """{p} buys {a} packs of {x}, with {b} in each pack.|{a}*{b}|{x} in all
        {p} finds {a} {x} in the morning and {b} {x} in the evening.|{a}+{b}|{x} together
        Each of {a} children brings {b} {x}.|{a}*{b}|{x} in all""",
    ),
    (
        """[Then|Later|After that|The next day] {p} [gives|sells|sends|lends] {n} {x} to {q}.|{v}-{n}|what is left
        {n} of them [break|are lost|get eaten|are sold|are thrown away].|{v}-{n}|what is left
        [{q}|A friend] [takes|steals|eats|uses] {n} of them.|{v}-{n}|what is left
        [Then|On Friday|The next day|Later] {p} [buys|gets|finds|makes] {c} more {x}.|{v}+{c}|the new number
        {q} [brings|adds|gives {p}] {c} more.|{v}+{c}|the new number
        [Then|Later] {a} more boxes come, with {c} {x} in each.|{v}+{a}*{c}|the new number
        [{p} shares|They share|{q} divides] them [equally|evenly|fairly] among {s} [friends|children|people|classes].|{v}/{s}|for each
        They [are put|go|are packed] into {s} [boxes|bags|jars] in equal parts.|{v}/{s}|for each
        {q} then gets {k} times [as many as that|that number].|{v}*{k}|so many times
        The same [happens|is done] [every week|every day] for {k} [weeks|days].|{v}*{k}|so many times
        [The number|It] [doubles|is doubled].|{v}*2|twice as many
        {t}% of them are [bad|old|broken] and thrown away.|{v}-{v}*{t}/100|what is left""",
        """After lunch {n} {x} are gone.|{v}-{n}|what is left
        A neighbor brings another {c} {x}.|{v}+{c}|the new number
        They are split evenly between {s} teams.|{v}/{s}|for each
        For the school fair they need {k} times as many.|{v}*{k}|so many times""",
    ),
    (
        """How many {x} [is that|are that] [in the end|now|then|]?
        How many {x} are there [now|then|in the end|at last]?
        [What|Which] number of {x} is that [now|then]?""",
        """What number of {x} do we get?
        How many {x} does that make?""",
    ),
)
MONEY = _theme(
    "money",
    "dollars",
    (
        """{p} [earns|makes|gets] {b} dollars [an|per] hour and works {a} hours[ a week|].|{b}*{a}|the pay
        {p} saves {b} dollars [a|each|every] [week|month] for {a} [weeks|months].|{b}*{a}|the savings
        {p} sells {a} {x} for {d} dollars each.|{a}*{d}|the money for the {x}
        A {o} costs {d} dollars and {p} buys {a} of them.|{d}*{a}|the price of the {x}
        {p} buys {a} {x} for {d} dollars each and a [bag|hat|book] for {c} dollars.|{a}*{d}+{c}|the whole price
        {p} buys {a} {x} at ${d} each and one more thing for ${c}.|{a}*{d}+{c}|the whole price
        {p} has {b} dollars and {q} has {a} dollars more. They put it together.|{b}+{b}+{a}|the money together
        [A ticket|Lunch|A room] costs {b} dollars for [each|every] person. {a} people [come|go|pay].|{b}*{a}|the money in all""",
        """A shop sells {a} {x} at {d} dollars for each one.|{a}*{d}|the money for the {x}
        {p} is paid {b} dollars for each of {a} hours.|{b}*{a}|the pay
        {p} orders {a} {x} that cost {d} dollars each, and a lamp that costs {c} dollars.|{a}*{d}+{c}|the whole price""",
    ),
    (
        """[Then|Later|Of this] {p} [spends|pays|gives away|loses] {n} dollars.|{v}-{n}|what is left
        {n} dollars go [for rent|for food|to the bank|to {q}].|{v}-{n}|what is left
        {q} [gives {p}|adds|pays] {c} dollars [more|too|on top].|{v}+{c}|the new sum
        [Shipping|A bag|A drink] for {c} dollars [comes on top|is added].|{v}+{c}|the new sum
        [The same happens|{p} does this|It is so] [in each of|for] {k} weeks.|{v}*{k}|for all weeks
        [It|The money|All of it] is [shared|divided|split] [equally|evenly|] [by|among] {s} [people|friends|children].|{v}/{s}|for each
        [Half of it|One half] goes to {q}.|{v}/2|the other half
        [There is|{p} gets] {t}% off.|{v}-{v}*{t}/100|the lower price
        {t}% tax [is added|comes on top].|{v}+{v}*{t}/100|with tax
        {p} pays {t}% of it as tax.|{v}-{v}*{t}/100|without tax""",
        """From this {p} takes {n} dollars for a bus ticket.|{v}-{n}|what is left
        An aunt adds {c} dollars to it.|{v}+{c}|the new sum
        That goes on for {k} months in the same way.|{v}*{k}|for all months
        Now {s} sisters divide the money evenly.|{v}/{s}|for each""",
    ),
    (
        """How [much|many dollars] is [it|that] [in the end|now|then|]?
        [How much money|How many dollars] [is that|is there] [now|then|in the end|]?
        What is the [sum|money|amount] [now|then|in the end]?""",
        """How many dollars does that make?
        What amount of money do we get?""",
    ),
)
WAY = _theme(
    "way",
    "km",
    (
        """A [car|bus|train|bike|ship] goes {b} km [an|per|each] hour for {a} hours.|{b}*{a}|the way
        {p} [walks|runs|rides|rows] {d} km [a|every|each] day for {a} days.|{d}*{a}|the way
        {p} drives {a} km [on Monday|first] and {b} km [on Friday|after that].|{a}+{b}|the way
        A road has {a} parts of {b} km.|{a}*{b}|the road""",
        """For {a} hours {p} rides at {b} km per hour.|{a}*{b}|the way
        {p} runs {d} km on each of {a} days.|{d}*{a}|the way""",
    ),
    (
        """[Then|After a break|The next day] [it goes|come|follow] {c} km more.|{v}+{c}|the longer way
        [Then|After that] {n} km [are saved|are cut off|go away] [by a bridge|by a new road|].|{v}-{n}|the shorter way
        [There and back|With the way back] it is twice that.|{v}*2|both ways
        [This is done|The tour is made] {k} times.|{v}*{k}|all tours
        [The way|It] is [done|split] in {s} [equal parts|days of the same length].|{v}/{s}|one part""",
        """A last part of {c} km is added.|{v}+{c}|the longer way
        {p} does the whole way {k} times.|{v}*{k}|all tours
        It takes {s} days, each with the same part of the way.|{v}/{s}|one part""",
    ),
    (
        """How [far|many km] is that [in the end|now|then|]?
        How many km [are that|is it] [now|then|in the end|]?
        How long is [that|one such part|the way] [now|then|in km]?""",
        """What number of km does that make?
        How many km do we get?""",
    ),
)
WORK = _theme(
    "work",
    "pages",
    (
        """{p} [reads|writes|prints|copies] {b} pages [a|every|each] day for {a} days.|{b}*{a}|the pages
        A book has {a} chapters of {b} pages.|{a}*{b}|the pages
        {p} reads {a} pages in the morning and {b} in the evening.|{a}+{b}|the pages""",
        """Every day for {a} days {p} reads {b} pages.|{a}*{b}|the pages
        Each of {a} pupils writes {b} pages.|{a}*{b}|the pages""",
    ),
    (
        """{n} pages are [empty|lost|thrown away|pictures].|{v}-{n}|what is left
        [Then|Later|The next day] {p} [reads|writes|adds] {c} more.|{v}+{c}|the new number
        {q} does {k} times as many.|{v}*{k}|so many times
        They are [divided|shared] [evenly|equally] among {s} [readers|books|weeks].|{v}/{s}|for each
        [This is done|It is the same] in {k} [schools|months].|{v}*{k}|so many times""",
        """Of these {n} pages are without text.|{v}-{n}|what is left
        In the last week {c} pages come on top.|{v}+{c}|the new number
        {s} friends read the same number each.|{v}/{s}|for each""",
    ),
    (
        """How many pages [is that|are that|are there] [in the end|now|then|]?
        [What|Which] number of pages is that [now|then]?""",
        """What number of pages do we get?
        How many pages does that make?""",
    ),
)
THEMES = (THINGS, THINGS, MONEY, MONEY, WAY, WORK)
RELATIONS = Phrases(
    "stories.relations",
    """{q} has {k} times as many {x} as {p}.|{v}*{k}
    {q} has {n} {x} [less|fewer] than {p}.|{v}-{n}
    {q} has {c} {x} more than {p}.|{v}+{c}
    {q} has half as many {x} as {p}.|{v}/2
    {q} has {k} times the {x} that {p} has.|{v}*{k}
    {q} [owns|holds|got] {c} more {x} than {p}.|{v}+{c}""",
    """{q} owns {k} times as many {x} as {p}.|{v}*{k}
    {q} owns {n} fewer {x} than {p}.|{v}-{n}
    {q} owns {c} more {x} than {p} does.|{v}+{c}""",
)
RELATIONS_START = Phrases(
    "stories.relations.start",
    "{p} has {a} {x}.\n{p} [owns|holds|got] {a} {x}.",
    "The number of {x} that {p} owns is {a}.",
)
RELATIONS_ASK = Phrases(
    "stories.relations.ask",
    """How many {x} does {q} have?
    How many {x} [has|owns] {q}?
    [Tell me|Find|What is] [the number of|how many] {x} of {q}.""",
    """Find out how many {x} {q} owns.
    How many {x} are those of {q}?""",
)
RELATIONS_TOGETHER = Phrases(
    "stories.relations.together",
    """How many {x} do they have [together|in all|in total|altogether]?
    How many {x} is that [together|in all|in total]?
    What is the [total|sum] of their {x}?""",
    """Find out how many {x} they own together.
    How many {x} do all of them own?""",
)
