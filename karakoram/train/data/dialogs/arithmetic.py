"""Arithmetic for a calculator: bare expressions, spoken ones, and small word problems.

The tool takes an expression; the model writes it, the tool computes. Numbers are mostly small integers, some larger,
some with one or two decimals. A second calculator takes two numbers and the name of an operation.
"""

from fractions import Fraction
from random import Random
from typing import Any

from karakoram.tools import ToolError
from karakoram.tools.calculator import evaluate, format_number
from karakoram.train.data.dialogs.capability import Capability, Role
from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.dialogs.task import Task, Use
from karakoram.train.data.dialogs.word_problems import word_problem
from karakoram.train.data.names import Split

CALCULATE = Capability(
    "calculate",
    Phrases(
        "calculate.about",
        """Evaluate an arithmetic expression.
        Evaluate a math expression and return the value.
        Computes the value of an arithmetic expression.
        A calculator for arithmetic.
        Do arithmetic with +, -, * and /.
        Calculates an expression.
        Work out a calculation.
        Calculator: evaluates an expression with numbers.
        Returns the result of a calculation.
        Solve arithmetic.
        Compute a mathematical expression.
        [Does|Do|Performs|For] [sums|arithmetic|math|calculations] [with numbers|like 3*4+5|with brackets].
        [Work out|Works out|Give|Gives] [the value|the result] of [an expression|a formula|a sum].""",
        """Calculates the value of a math expression.
        Use this calculator to evaluate arithmetic.
        Return the value of an arithmetic calculation.
        Computes a calculation with numbers.""",
    ),
    (
        Role(
            "expression",
            "string",
            Phrases(
                "calculate.expression",
                """The expression, e.g. (2+3)*4
                Arithmetic expression
                Expression to evaluate
                What to compute, e.g. 3*7
                The calculation
                Math expression with + - * /
                Expression such as 12/4+1
                [Formula|Sum|Arithmetic] [to work out|to solve|such as 5*6-2|with numbers]
                What to [calculate|work out|evaluate]""",
                """Expression to compute
                The arithmetic expression, e.g. 8-3
                Calculation to evaluate""",
            ),
        ),
    ),
    lambda values: format_number(evaluate(values["expression"])),
    group="numbers",
)

OPERATIONS = ("add", "subtract", "multiply", "divide")
_SIGNS = dict(zip(OPERATIONS, "+-*/", strict=True))


def _operate(values: dict[str, Any]) -> str:
    first, second = Fraction(str(values["first"])), Fraction(str(values["second"]))
    if values["operation"] == "divide" and second == 0:
        raise ToolError("division by zero")
    sign = _SIGNS[values["operation"]]
    return format_number(evaluate(f"({format_number(first)}){sign}({format_number(second)})"))


OPERATE = Capability(
    "operate",
    Phrases(
        "operate.about",
        """Add, subtract, multiply or divide two numbers.
        Arithmetic on two numbers.
        Combine two numbers with an operation.
        Computes one operation on two numbers.
        [Add|Sum], subtract, multiply, divide: [two numbers|one number and another].
        [Calculates|Works] with two numbers and [an operation|a sign].""",
        """Add, subtract, multiply or divide a pair of numbers.
        One arithmetic operation on two numbers.""",
    ),
    (
        Role(
            "first",
            "number",
            Phrases(
                "operate.first",
                "First number\nThe first number\nLeft number\nNumber on the left\n[One|The one] on the left\nNumber before the sign\nNumber [one|1]\nLeft [side|operand]",
                "The left number",
            ),
        ),
        Role(
            "second",
            "number",
            Phrases(
                "operate.second",
                "Second number\nThe second number\nRight number\nNumber on the right\n[One|The one] on the right\nNumber after the sign\nNumber [two|2]\nRight [side|operand]",
                "The right number",
            ),
        ),
        Role(
            "operation",
            "enum",
            Phrases("operate.operation", "The operation\nWhat to do\nOperation", "Operation to do"),
            OPERATIONS,
        ),
    ),
    _operate,
    group="numbers",
)

ASK = Phrases(
    "arithmetic.ask",
    """What is {e}?
    What's {e}?
    what is {e}
    How much is {e}?
    Calculate {e}.
    Calculate {e}
    Compute {e}
    Compute {e}.
    {e}
    {e} = ?
    {e}=?
    {e}?
    Please compute {e}.
    Can you work out {e}?
    Work out {e}.
    Tell me {e}.
    I need to know {e}.
    Evaluate {e}
    Could you calculate {e} for me?
    How much do I get for {e}?
    What do you get for {e}?
    Give me the result of {e}.
    Find {e}.
    Solve {e}
    What does {e} equal?
    What does {e} come to?
    Hey, what is {e}?
    Quick question: what is {e}?
    Use a tool to compute {e}.
    what's {e}
    how much is {e}
    Do you know {e}?
    Help me with {e}.""",
    """Please tell me what {e} is.
    I want to know how much {e} is.
    Can you compute {e}?
    What is the result of {e}?
    Hi, could you work out {e}?
    Please solve {e}.
    {e}, please.
    Tell me the value of {e}.
    Hello! How much is {e}?""",
)
_SPOKEN = {
    "+": Phrases(
        "arithmetic.add",
        "{a} plus {b}\n{a}+{b}\n{a} + {b}\nthe sum of {a} and {b}\n{a} and {b} together\n{a} added to {b}\nthe total of {a} and {b}",
        "{a} and {b} added together\nthe sum {a} + {b}\nthe sum of the numbers {a} and {b}",
    ),
    "-": Phrases(
        "arithmetic.subtract",
        "{a} minus {b}\n{a}-{b}\n{a} - {b}\n{a} take away {b}\nthe difference of {a} and {b}\n{a} less {b}\nthe difference between {a} and {b}",
        "the number {a} minus {b}\nthe difference {a} - {b}\n{a} minus the number {b}",
    ),
    "*": Phrases(
        "arithmetic.multiply",
        "{a} times {b}\n{a}*{b}\n{a} * {b}\nthe product of {a} and {b}\n{a} multiplied by {b}\n{a} x {b}\n{a} × {b}",
        "the product {a} * {b}\nthe number {a} times {b}\n{a} times the number {b}",
    ),
    "/": Phrases(
        "arithmetic.divide",
        "{a} divided by {b}\n{a}/{b}\n{a} / {b}\n{a} over {b}\nthe quotient of {a} and {b}\n{a} ÷ {b}",
        "the quotient {a} / {b}\nthe number {a} divided by {b}",
    ),
}
_COMMANDS = Phrases(
    "arithmetic.commands",
    """Add {a} and {b}.|{a}+{b}
    Add {a} to {b}|{b}+{a}
    Add {a}, {b} and {c}.|{a}+{b}+{c}
    Add up {a}, {b} and {c}|{a}+{b}+{c}
    Sum {a} and {b}|{a}+{b}
    Subtract {a} from {b}.|{b}-{a}
    Take {a} away from {b}|{b}-{a}
    Take {a} from {b}.|{b}-{a}
    Multiply {a} by {b}.|{a}*{b}
    Multiply {a} and {b}|{a}*{b}
    Divide {a} by {b}.|{a}/{b}
    Divide {a} by {b}|{a}/{b}
    Double {a}.|{a}*2
    What is half of {a}?|{a}/2
    What is twice {a}?|{a}*2
    Triple {a}|{a}*3
    What is {a} squared?|{a}*{a}
    What is the square of {a}?|{a}*{a}
    What is a third of {a}?|{a}/3
    What is a quarter of {a}?|{a}/4
    What is {p}% of {a}?|{a}*{p}/100
    What is {p} percent of {a}?|{a}*{p}/100
    How much is {p}% of {a}?|{a}*{p}/100
    How much is {p} percent of {a}?|{a}*{p}/100
    Calculate {p}% of {a}.|{a}*{p}/100
    Take {p}% off {a}.|{a}-{a}*{p}/100
    Add {p}% to {a}.|{a}+{a}*{p}/100
    What is the average of {a} and {b}?|({a}+{b})/2
    Average of {a}, {b} and {c}?|({a}+{b}+{c})/3
    What is the average of {a}, {b} and {c}?|({a}+{b}+{c})/3
    What is the mean of {a} and {b}?|({a}+{b})/2
    How many times does {b} go into {a}?|{a}/{b}
    How much more is {a} than {b}?|{a}-{b}
    What do I get if I add {a} and {b}?|{a}+{b}
    What do I get when I multiply {a} by {b}?|{a}*{b}
    If I subtract {a} from {b}, what is left?|{b}-{a}
    What is left of {a} after taking away {b}?|{a}-{b}
    Add {a} and {b}, then multiply by {c}.|({a}+{b})*{c}
    Subtract {b} from {a} and multiply by {c}.|({a}-{b})*{c}
    Multiply {a} by {b} and add {c}.|{a}*{b}+{c}
    Multiply {a} by {b} and subtract {c}.|{a}*{b}-{c}
    Divide {a} by {b} and add {c}.|{a}/{b}+{c}
    What is {a} plus {b} minus {c}?|{a}+{b}-{c}
    What is {a} plus {b} plus {c}?|{a}+{b}+{c}
    What is {a} times {b} times {c}?|{a}*{b}*{c}
    What is {a} times {b} plus {c}?|{a}*{b}+{c}
    What is {a} minus {b} minus {c}?|{a}-{b}-{c}
    What is {a} times {b} minus {c}?|{a}*{b}-{c}
    What is {a} plus {b} times {c}?|{a}+{b}*{c}
    What is {a} to the power of 2?|{a}**2
    What is {a} to the power of 3?|{a}**3
    What is {a} cubed?|{a}**3
    [Compute|Calculate|Give me] {a} squared.|{a}*{a}
    [{a} squared|The square of {a}]?|{a}*{a}
    [Compute|Say] [half|one half] of {a}.|{a}/2
    {a} and {b}, what is [the|their] average?|({a}+{b})/2
    [Compute|Give] the [average|mean] of {a}, {b} and {c}.|({a}+{b}+{c})/3
    What is {s} to the power of {t}?|{s}**{t}""",
    """Please add {a} and {b}.|{a}+{b}
    Please add {a}, {b} and {c} together.|{a}+{b}+{c}
    Please subtract {a} from {b}.|{b}-{a}
    I need {a} multiplied by {b}.|{a}*{b}
    Please divide {a} by {b} for me.|{a}/{b}
    Tell me half of {a}.|{a}/2
    Tell me what {p}% of {a} is.|{a}*{p}/100
    Find the average of {a}, {b} and {c}.|({a}+{b}+{c})/3
    Find {a} squared.|{a}*{a}
    Compute {a} times {b} plus {c}.|{a}*{b}+{c}
    Compute {a} plus {b} minus {c}.|{a}+{b}-{c}""",
)
ANSWERS = ("{e} is {r}.", "{e} = {r}.", "The answer is {r}.", "The result is {r}.", "{e} is {r}.")


def number(rng: Random, largest: int = 0) -> str:
    """An operand: mostly up to three digits, one in seven with decimals."""
    roll = rng.random()
    if largest:
        return str(1 + int(rng.random() * largest))
    if roll < 0.3:
        return str(2 + int(rng.random() * 19))
    if roll < 0.65:
        return str(10 + int(rng.random() * 90))
    if roll < 0.8:
        return str(100 + int(rng.random() * 900))
    if roll < 0.86:
        return str(1000 + int(rng.random() * 99000))
    if roll < 0.95:
        return f"{rng.random() * 99:.1f}"
    return f"{rng.random() * 99:.2f}"


def expression(rng: Random) -> tuple[str, bool]:
    """An expression of two to five numbers, and whether it is written with spaces."""
    sign = lambda: "+-*/"[int(rng.random() * 4)]  # noqa: E731
    a, b, c, d = (number(rng) for _ in range(4))
    shapes = (
        f"{a} {sign()} {b}",
        f"{a} {sign()} {b} {sign()} {c}",
        f"({a} {sign()} {b}) {sign()} {c}",
        f"{a} {sign()} ({b} + {c})",
        f"{a} {sign()} {b} {sign()} {c} {sign()} {d}",
        f"({a} {sign()} {b}) * ({c} {sign()} {d})",
        f"({a} + {b}) / {c}",
    )
    return shapes[int(rng.random() * len(shapes))], rng.random() < 0.4


def _spoken(rng: Random, split: Split) -> tuple[str, str]:
    roll = rng.random()
    if roll < 0.35:
        text, spaced = expression(rng)
        return ASK.pick(rng, split, e=text if spaced else text.replace(" ", "")), text.replace(" ", "")
    a, b = number(rng), number(rng)
    if roll < 0.65:
        sign = "+-*/"[int(rng.random() * 4)]
        phrase = _SPOKEN[sign].pick(rng, split, a=a, b=b)
        question = ASK.pick(rng, split, e=phrase)
        swapped = " added to " in phrase
        return question[0].upper() + question[1:], f"{b}+{a}" if swapped else f"{a}{sign}{b}"
    template = _COMMANDS.pick(rng, split)
    slots = {
        "a": a,
        "b": b,
        "c": number(rng),
        "p": number(rng, 19) + "05"[rng.random() < 0.5],
        "s": number(rng, 12),
        "t": number(rng, 6),
    }
    if rng.random() < 0.5:
        slots["p"] = rng.choice(("5", "10", "12", "15", "20", "25", "30", "40", "50", "60", "75", "80", "90"))
    question, _, text = template.format_map(slots).partition("|")
    return question, text


def _value(text: str) -> str | None:
    try:
        return format_number(evaluate(text))
    except ToolError:
        return None


def calculation(rng: Random, split: Split) -> Task:
    """One calculation: spoken, written or a word problem."""
    while True:
        if rng.random() < 0.45:
            question, text, answer = word_problem(rng, split)
        else:
            question, text = _spoken(rng, split)
            answer = ANSWERS[int(rng.random() * len(ANSWERS))]
        result = _value(text)
        if result is None:
            continue
        use = Use(CALCULATE, {"expression": text}, f"Need {text}.")
        return Task("calculator", question, [[use]], answer.replace("{e}", text).replace("{r}", result), (result,))


def operation(rng: Random, split: Split) -> Task:
    """One operation for the calculator that takes two numbers and an operation."""
    name = OPERATIONS[int(rng.random() * 4)]
    a, b = number(rng), number(rng)
    while name == "divide" and float(b) == 0:
        b = number(rng)
    phrase = _SPOKEN[_SIGNS[name]].pick(rng, split, a=a, b=b)
    if " added to " in phrase:
        a, b = b, a
    question = ASK.pick(rng, split, e=phrase)
    values = {"first": json_number(a), "second": json_number(b), "operation": name}
    result = _operate(values)
    text = f"{a}{_SIGNS[name]}{b}"
    use = Use(OPERATE, values, f"Need {text}.")
    return Task("calculator", question[0].upper() + question[1:], [[use]], f"{text} is {result}.", (result,))


def json_number(text: str) -> int | float:
    """The number as JSON would write it with the same digits."""
    return float(text) if "." in text else int(text)
