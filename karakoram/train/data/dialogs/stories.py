"""Word problems in GSM8K's manner: one to five calculations that follow one another, each a call of the calculator.

A story opens with a quantity, changes it sentence by sentence, and asks for what comes out; or it tells how much several
people have, each compared with the one before. Every number is exact and short, no quantity is negative, and what is
divided comes out even. The first thought lists the calculations, each further one quotes the result it goes on with.
"""

from random import Random

from karakoram.tools.calculator import evaluate, format_number
from karakoram.train.data.dialogs import story_phrases as say
from karakoram.train.data.dialogs.arithmetic import CALCULATE
from karakoram.train.data.dialogs.growing import PLAN, planned, readable
from karakoram.train.data.dialogs.task import Task, Use
from karakoram.train.data.dialogs.word_problems import noun
from karakoram.train.data.names import Split, person, plural

RELATIONS_SHARE = 0.25
_Calculations = list[tuple[str, str, str]]  # what it gives, the expression, the expression in the plan


def story(rng: Random, split: Split) -> Task:
    """One to five calculations, two and three most often."""
    return story_of(rng, split, (1, 2, 2, 2, 3, 3, 3, 4, 4, 5)[int(rng.random() * 10)])


def short_story(rng: Random, split: Split) -> Task:
    """One to three calculations: what the first stage of training sees."""
    return story_of(rng, split, 1 + int(rng.random() * 3))


def story_of(rng: Random, split: Split, calls: int) -> Task:
    """A story of exactly so many calculations."""
    if calls > 1 and rng.random() < RELATIONS_SHARE:
        return _relations(rng, split, calls)
    theme = say.THEMES[int(rng.random() * len(say.THEMES))]
    while True:
        slots = _slots(rng, split)
        words, text, label = theme.openings.pick(rng, split).format_map(slots).split("|")
        if readable(text):
            break
    sentences, done = [words], [(label, text, text)]
    while len(done) < calls:
        value = format_number(evaluate(done[-1][1]))
        words, text, label, plan = _change(theme.changes, rng, split, slots, value)
        sentences.append(words)
        done.append((label, text, plan))
    sentences.append(theme.asks.pick(rng, split, **slots))
    return _task(sentences, done, theme.unit.format_map(slots), rng)


def _slots(rng: Random, split: Split) -> dict[str, object]:
    item = noun(rng, split)
    who, other = person(rng, split), person(rng, split)
    while other == who:
        other = person(rng, split)
    price = (
        str(2 + int(rng.random() * 20))
        if rng.random() < 0.7
        else f"{1 + int(rng.random() * 20)}.{rng.choice((5, 25, 75, 2))}"
    )
    return {
        "p": who, "q": other, "o": item, "x": plural(item), "d": price, "a": 2 + int(rng.random() * 14),
        "b": 2 + int(rng.random() * 49),
    } | _fresh(rng)  # fmt: skip


def _fresh(rng: Random) -> dict[str, object]:
    """Numbers that are drawn anew for each sentence."""
    return {"c": 2 + int(rng.random() * 48), "k": 2 + int(rng.random() * 7), "t": rng.choice((5, 10, 20, 25, 40, 50))}


def _change(phrases: say.Phrases, rng: Random, split: Split, slots: dict, value: str) -> tuple[str, str, str, str]:
    """A sentence that changes the value: words, expression, what it gives, how the plan writes it."""
    while True:
        words, change, label = (phrases.pick(rng, split) + "|").split("|")[:3]
        now = slots | _fresh(rng) | {"v": value}
        number = evaluate(value)
        if "{a}" in words and "{c}" in words:
            now["a"] = 2 + int(rng.random() * 8)
        if "{n}" in words:
            now["n"] = 1 + int(rng.random() * min(60, max(1, int(number) - 1)))
        if "{s}" in words:
            divisors = [divisor for divisor in range(2, 13) if number % divisor == 0]
            if not divisors:
                continue
            now["s"] = divisors[int(rng.random() * len(divisors))]
        text = change.format_map(now)
        whole = number.denominator > 1 or evaluate(text).denominator == 1  # a story of things stays one of whole things
        if readable(text) and whole and evaluate(text) > 0:
            return words.format_map(now), text, label.format_map(now), planned(change).format_map(now)


def _relations(rng: Random, split: Split, calls: int) -> Task:
    """Several people, each with more or less than the one before; what the last one has, or all together."""
    slots = _slots(rng, split)
    slots["a"] = 4 + int(rng.random() * 40)
    together = rng.random() < 0.5
    people = [str(slots["p"])]
    sentences = [say.RELATIONS_START.pick(rng, split, **slots)]
    values, done = [str(slots["a"])], []
    for _ in range(calls - together):
        who = person(rng, split)
        while who in people:
            who = person(rng, split)
        words, text, _, plan = _change(say.RELATIONS, rng, split, slots | {"p": people[-1], "q": who}, values[-1])
        people.append(who)
        sentences.append(words)
        done.append((f"{who}", text, f"{who} {plan}"))
        values.append(format_number(evaluate(text)))
    if together:
        done.append(("all", "+".join(values), "sum"))
    ask = say.RELATIONS_TOGETHER if together else say.RELATIONS_ASK
    sentences.append(ask.pick(rng, split, x=slots["x"], q=people[-1]))
    return _task(sentences, done, str(slots["x"]), rng)


def _task(sentences: list[str], done: _Calculations, unit: str, rng: Random) -> Task:
    question = " ".join(" ".join(sentences).split()).replace(" ?", "?")
    steps: list[list[Use]] = []
    result = ""
    for label, text, _ in done:
        before = f"The result is {result}. Now" if steps else "First"
        steps.append([Use(CALCULATE, {"expression": text}, f"{before} {label}: {text}.")])
        result = format_number(evaluate(text))
    if len(done) > 1:
        steps[0][0].thought = f"{PLAN}{', '.join(plan for *_, plan in done)}. {steps[0][0].thought}"
    answer = f"The answer is {result}." if rng.random() < 0.3 else f"That is {result} {unit}."
    return Task("word_problem", question[0].upper() + question[1:], steps, answer, (result,), company=2)
