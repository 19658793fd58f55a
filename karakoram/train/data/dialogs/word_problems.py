"""Small word problems: one or two steps of arithmetic about boxes, prices, distances and people."""

from random import Random

from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.names import Split, person, plural, thing

_COMMON = """apple pen book egg cookie ticket chair marble sticker coin card bottle cup pencil flower orange stamp toy box bag
page brick tile stone shirt sandwich balloon button bead shell candle letter cake muffin battery nail plant tree""".split()

# question | expression | unit of the answer (may be empty)
PROBLEMS = Phrases(
    "word_problems",
    """I have {a} boxes of {b} {x}, how many {x}?|{a}*{b}|{x}
    I have {a} boxes with {b} {x} each. How many {x} do I have?|{a}*{b}|{x}
    [There are|{p} has|I have|We have|A shop has] {a} [bags|boxes|packs|baskets|groups|jars|rows|bowls] [with|of|holding] {b} {x} [each|in each]. How many {x} [are there in total?|is that?|are there?|in total?|are there in all?]|{a}*{b}|{x}
    {p} [has|owns|had|starts with] {a} {x} and [buys|gets|finds|makes|wins|picks|receives] {b} more. [How many {x} does {p} have now?|How many {x} are there now?|How many {x} is that?|How many does {p} have in total?]|{a}+{b}|{x}
    {p} [has|owns|found|sold|ate|made] {a} {x} and {q} [has|owns|found|sold|ate|made] {b} {x}. How many {x} [do they have together?|is that together?|are there in all?|is that in total?]|{a}+{b}|{x}
    {p} had {m} {x} and [gave|sold|lent|sent] {n} to {q}. [How many {x} are left?|How many {x} does {p} have now?|How many are left?|How many {x} remain?]|{m}-{n}|{x}
    {p} has {m} {x}. {q} [takes|eats|breaks|steals|buys] {n} of them. How many {x} [does {p} still have?|are left?|does {p} have left?]|{m}-{n}|{x}
    [{p} has|There are|I have|We have] {m} {x} and [{n} are lost|{n} break|{n} are sold|{n} are eaten|{n} go away]. How many [remain?|are left?|{x} are left?]|{m}-{n}|{x}
    {m} {x} are [shared|divided|split] [equally by|equally among|among|between] {s} [people|children|friends|players|students|dogs|boxes]. How many {x} [does each get?|for each?|does each one get?]|{m}/{s}|{x}
    {p} wants to put {m} {x} into {s} boxes equally. How many go in each box?|{m}/{s}|{x}
    [One|A|Each] {o} [costs|is] {d} dollars. [How much do {a} {x} cost?|What do {a} {x} cost?|How much are {a} {x}?|How much for {a} {x}?|What is the price of {a}?]|{d}*{a}|dollars
    A {o} costs ${d}. How much are {a} {x}?|{d}*{a}|dollars
    If one {o} costs {d} dollars, what do {a} {x} cost?|{d}*{a}|dollars
    {p} [buys|gets|orders|wants] {a} {x} [at|for] {d} dollars each. [How much does {p} pay?|What does {p} pay?|How much is that?|What is the total?|How much money is that?]|{a}*{d}|dollars
    {p} pays {m} dollars for {s} {x}. What does one {o} cost?|{m}/{s}|dollars
    {p} buys {a} {x} for {d} dollars each and pays with {k} dollars. How much change?|{k}-{a}*{d}|dollars
    I buy {a} {x} for ${d} each and a {z} for ${e}. What is the total?|{a}*{d}+{e}|dollars
    {p} [earns|makes|gets] {b} dollars [an|per] hour and works {a} hours. [How much money is that?|How much does {p} earn?|What is the pay?]|{b}*{a}|dollars
    {p} earns {b} dollars per day. How much does {p} earn in {a} days?|{b}*{a}|dollars
    A [car|bus|bike|truck|ship|plane] [drives|goes|moves] [{b} km per hour|at {b} km per hour|{b} miles per hour]. [How far does it go in {a} hours?|How far in {a} hours?|How far does it get in {a} hours?]|{b}*{a}|km
    A train goes {b} km in one hour. How many km does it go in {a} hours?|{b}*{a}|km
    {p} walks {d} km every day. How many km in {a} days?|{d}*{a}|km
    {p} [reads|writes|prints] {b} pages [a|every|per] day. How many pages [in {a} days?|does {p} read in {a} days?|is that in {a} days?]|{b}*{a}|pages
    A book has {m} pages and {p} has read {n}. How many pages are left?|{m}-{n}|pages
    {p} saves {b} dollars each week. How much after {a} weeks?|{b}*{a}|dollars
    [{p} has|{p} had|I had|I have|We had] {k} dollars and [spends|spent|paid|lost] {n}. How much [money is left?|is left?|money do I have left?|money does {p} have left?]|{k}-{n}|dollars
    A room is {a} meters long and {b} meters wide. What is its area?|{a}*{b}|square meters
    A garden is {a} m by {b} m. What is the area?|{a}*{b}|square meters
    A field is {a} meters long and {b} meters wide. What is the perimeter?|2*({a}+{b})|meters
    A square has sides of {b} cm. What is its perimeter?|4*{b}|cm
    [There are|A hall has|A cinema has|We have] {a} rows with {b} [seats|chairs] each. How many [seats?|seats are there?|seats is that?|chairs are there?]|{a}*{b}|seats
    There are {a} shelves with {b} {x} on each, and {c} more on the floor. How many {x} in all?|{a}*{b}+{c}|{x}
    {p} has {a} bags of {b} {x} and gives away {n}. How many {x} are left?|{a}*{b}-{n}|{x}
    {p} bakes {m} {x} and sells {n}. The rest go into {s} boxes. How many per box?|({m}-{n})/{s}|{x}
    {p} has {a} red {x}, {b} blue {x} and {c} green {x}. How many {x} in total?|{a}+{b}+{c}|{x}
    How many {x} are in {a} packs of {b}?|{a}*{b}|{x}
    How many minutes are in {a} hours?|{a}*60|minutes
    How many hours are there in {a} days?|{a}*24|hours
    How many days are in {a} weeks?|{a}*7|days
    How many seconds are {a} minutes?|{a}*60|seconds
    How many months are in {a} years?|{a}*12|months
    How many eggs are {a} dozen?|{a}*12|eggs
    {p} is {a} years old. How old will {p} be in {b} years?|{a}+{b}|years
    {p} is {m} years old and {q} is {n} years younger. How old is {q}?|{m}-{n}|years
    {p} has {a} {x}. {q} has {s} times as many. How many does {q} have?|{a}*{s}|{x}
    {p} has twice as many {x} as {q}, who has {a}. How many does {p} have?|{a}*2|{x}
    A {o} costs {k} dollars[. It is|, and it is| and is] {t}% [off|cheaper]. How much [do I save?|is saved?|money do I save?]|{k}*{t}/100|dollars
    A {o} costs {k} dollars and is {t}% cheaper today. What is the new price?|{k}-{k}*{t}/100|dollars
    The price of a {o} is {k} dollars plus {t}% tax. What is the total price?|{k}+{k}*{t}/100|dollars
    The bill is {k} dollars. How much is a {t}% tip?|{k}*{t}/100|dollars
    {s} [friends|people|men|women] [split|share] a bill of {m} dollars. [How much does each pay?|What does each pay?|How much is it for each?]|{m}/{s}|dollars
    We are {s} people and the bill is {m} dollars. What does each of us pay?|{m}/{s}|dollars
    {p} runs {d} km on Monday and {e} km on Tuesday. How far is that in total?|{d}+{e}|km
    It was {m} degrees and it dropped by {n} degrees. What is the temperature now?|{m}-{n}|degrees
    {p} has {a} {x} and {b} {w}. How many things is that?|{a}+{b}|things
    A bus holds {b} people. How many people fit in {a} buses?|{b}*{a}|people
    A class has {a} girls and {b} boys. How many children?|{a}+{b}|children
    {m} people were on the bus and {n} got off. How many are still on it?|{m}-{n}|people
    A bottle holds {d} liters. How much do {a} bottles hold?|{d}*{a}|liters
    The scores are {a}, {b} and {c}. What is the average?|({a}+{b}+{c})/3|
    {p} scored {a}, {b} and {c} points. How many points is that?|{a}+{b}+{c}|points
    {p} bought {a} {x} and {b} {w}, then {n} broke. How many are left?|{a}+{b}-{n}|
    A box weighs {d} kg. What do {a} boxes weigh?|{d}*{a}|kg
    We need {m} {x} and have {n}. How many more do we need?|{m}-{n}|{x}
    {p} drove {m} km with {s} liters. How many km per liter?|{m}/{s}|km
    [Each of {a} children gets|There are {a} children and each gets|{a} people each need|We have {a} guests and each eats] {b} {x}. How many {x} [do we need?|are needed?|is that?]|{a}*{b}|{x}
    If {s} {x} cost {m} dollars, how much is one {o}?|{m}/{s}|dollars
    {p} types {b} words per minute. How many words in {a} minutes?|{b}*{a}|words
    My rent is {k} dollars a month. What do I pay in a year?|{k}*12|dollars
    I slept {a} hours a night for {b} nights. How many hours did I sleep?|{a}*{b}|hours
    There were {m} {x}. {n} were sold in the morning and {c} in the evening. How many were left?|{m}-{n}-{c}|{x}
    {p} [found|picked|made|saw] {a} {x} [yesterday|on Sunday|before lunch|last week] and {b} [more|{x}] [today|on Tuesday|after lunch|this week]. How many {x} [is that|are that|were there] [in all|in total|together]?|{a}+{b}|{x}
    [On Monday|Today|First] {p} [found|got|sold|saw] {a} {x}, [on Friday|later|then] {b}. [How many {x} together?|What is the number of {x} in all?]|{a}+{b}|{x}
    {p} [takes|chooses|gets|orders] {a} {x} [for|at] {d} dollars [each|a piece] and [one|a] {z} for {e} dollars. [What is it in total?|How much in total?|What must {p} pay in all?]|{a}*{d}+{e}|dollars
    [Each|One] {o} is {d} dollars and a {z} is {e} dollars. [What do {a} {x} and the {z} cost?|How much are {a} {x} with the {z}?]|{a}*{d}+{e}|dollars
    {a} {x} [cost|at] {d} dollars each[, plus|and] {e} dollars for [shipping|the box|a {z}]: [how much is that?|what is the sum?]|{a}*{d}+{e}|dollars
    [I need|We need|{p} needs] {a} {x}. [One costs|The price is] {d} dollars[ each|]. [How much is that?|How much money is it?|What is the cost?]|{a}*{d}|dollars
    [Share|Divide|Split] {m} {x} [between|among] {s} [children|friends|people][.|, please.] [How many for each?|What does each one get?]|{m}/{s}|{x}
    {s} [children|friends|players] share {m} {x}. How many {x} [for one of them?|does one get?|has each?]|{m}/{s}|{x}""",
    """{p} owns {a} boxes, each with {b} {x}. How many {x} is that in total?|{a}*{b}|{x}
    {p} found {a} {x} today and {b} {x} on Monday. How many {x} in all?|{a}+{b}|{x}
    There were {m} {x} on the table and {p} took {n}. How many {x} are still there?|{m}-{n}|{x}
    We share {m} {x} between {s} children. How many {x} does each child get?|{m}/{s}|{x}
    I want to buy {a} {x}. Each costs {d} dollars. How much money do I need?|{a}*{d}|dollars
    {p} works {a} hours for {b} dollars per hour. What does {p} earn?|{a}*{b}|dollars
    {p} drives {b} km per hour for {a} hours. How far is that?|{b}*{a}|km
    A table is {a} cm long and {b} cm wide. What is the area of the table?|{a}*{b}|square cm
    {p} had {k} dollars and paid {n} dollars. How much does {p} have left?|{k}-{n}|dollars
    {p} buys {a} {x} at {d} dollars each and a {z} at {e} dollars. How much is it in total?|{a}*{d}+{e}|dollars""",
)


def noun(rng: Random, split: Split) -> str:
    """Something that can be counted: one of the common things, or a name like any other."""
    return _COMMON[int(rng.random() * len(_COMMON))] if rng.random() < 0.6 else thing(rng, split)


def word_problem(rng: Random, split: Split) -> tuple[str, str, str]:
    """Question, expression, and an answer in which `{r}` stands for the result."""
    small = lambda top: 2 + int(rng.random() * top)  # noqa: E731
    item, other = noun(rng, split), noun(rng, split)
    each = small(11)
    more = 20 + small(400) if rng.random() < 0.8 else 20 + small(4000)
    price = (
        str(small(20))
        if rng.random() < 0.6
        else f"{1 + rng.random() * 20:.2f}"
        if rng.random() < 0.6
        else f"{small(9)}.5"
    )
    slots = {
        "p": person(rng, split), "q": person(rng, split),
        "o": item, "x": plural(item), "z": other, "w": plural(other),
        "a": small(30), "b": small(60), "c": small(18), "d": price, "e": small(50),
        "m": each * small(40) if rng.random() < 0.7 else more, "n": small(19), "s": each, "k": more,
        "t": rng.choice((5, 8, 10, 12, 15, 20, 25, 30, 40, 50)),
    }  # fmt: skip
    if slots["m"] < 22:
        slots["m"] += 40
    question, text, unit = PROBLEMS.pick(rng, split).format_map(slots).split("|")
    roll = rng.random()
    if unit and roll < 0.4:
        return question, text, f"That is {{r}} {unit}."
    if unit and roll < 0.6:
        return question, text, f"The answer is {{r}} {unit}."
    return question, text, "The answer is {r}." if roll < 0.8 else f"{text} is {{r}}."
