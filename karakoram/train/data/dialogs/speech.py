"""How people type: a greeting before the question, no capital, no full stop, numbers as words or with thousands
commas."""

import re
from random import Random

from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.names import Split

_BEFORE = Phrases(
    "speech.before",
    """Hi!
    Hello!
    Hey,
    Hi,
    Hello,
    OK,
    Please help me:
    Question:
    I have a question.
    Can you help me?
    Please:
    So,
    Good morning!
    Next question:
    Now,
    One more:
    Could you help?""",
    """Hi nano,
    Hello, I have a question:
    Please help:
    Good afternoon!""",
)
_AFTER = Phrases(
    "speech.after",
    """Thanks!
    Thank you.
    Please.
    Be quick.
    Thanks
    Please answer.
    Use a tool.
    Answer briefly.
    I need it today.
    Thank you!""",
    """Thank you so much.
    Please be quick.
    Please use a tool.""",
)
_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty""".split()
_SMALL = re.compile(r"(?<![\w.,$/*+(-])(?:[2-9]|1\d|20)(?![\w.,%/*+)-]|\s*[-+*/x×÷=])")
_LARGE = re.compile(r"(?<![\w.,/-])\d{4,6}(?![\w./-])")


def say(question: str, rng: Random, split: Split) -> str:
    """The question, in one case of four with something before it, after it, or typed carelessly."""
    roll = rng.random()
    if roll > 0.28:
        return question
    if roll < 0.09:
        return f"{_BEFORE.pick(rng, split)} {question}"
    if roll < 0.14:
        return f"{question} {_AFTER.pick(rng, split)}" if question[-1] in ".?!" else question
    if roll < 0.20:
        return question[0].lower() + question[1:]
    if roll < 0.24:
        return question.rstrip(".?!")
    return (question[0].lower() + question[1:]).rstrip(".?!")


def spell_numbers(question: str, rng: Random) -> str:
    """Word problems: now and then a small number as a word or a large one with a comma. The values stay the same."""
    roll = rng.random()
    if roll < 0.1:
        return _SMALL.sub(lambda match: _WORDS[int(match[0])], question, count=1 + int(rng.random() * 2))
    if roll < 0.2:
        return _LARGE.sub(lambda match: f"{int(match[0]):,}", question)
    return question
