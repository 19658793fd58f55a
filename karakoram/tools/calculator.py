"""Exact arithmetic on an expression such as `(27+3)*14/5`, and the one way in which this package writes numbers.

The expression is parsed by Python's own grammar and then walked node by node: only numbers, + - * / ** %, parentheses
and signs are admitted, so nothing can be executed. Everything is a Fraction, so 0.1+0.2 is 0.3; a result that no finite
decimal can express is rounded to 6 decimals. Bounds (below) keep `9**9**9` and giant inputs from costing anything.
"""

import ast
from fractions import Fraction

from karakoram.tools.tool import Tool, ToolError

MAX_EXPRESSION_CHARS = 300
MAX_EXPONENT = 64
MAX_BITS = 2_000  # of any numerator or denominator on the way; about 600 decimal digits
MAX_DECIMALS = 6


def format_number(value: Fraction | int) -> str:
    """`378`, `-2.5`, `0.333333`: an integer, an exact decimal of at most 10 places, or one rounded to 6 places."""
    value = Fraction(value)
    if value.denominator == 1:
        return str(value.numerator)
    exact = 10**10 % value.denominator == 0
    places = 10 if exact else MAX_DECIMALS
    scaled = round(value * 10**places)
    sign = "-" if scaled < 0 else ""
    whole, part = divmod(abs(scaled), 10**places)
    tail = str(part).rjust(places, "0").rstrip("0")
    return f"{sign}{whole}.{tail}" if tail else f"{sign}{whole}" if whole else "0"


def evaluate(expression: str) -> Fraction:
    """The exact value. Raises ToolError with a sentence that names what is not allowed."""
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise ToolError(f"expression longer than {MAX_EXPRESSION_CHARS} characters")
    text = expression.replace("×", "*").replace("÷", "/").replace("−", "-").replace("^", "**").strip()
    try:
        tree = ast.parse(text, mode="eval")
        return _value(tree.body, text)
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, ToolError):
            raise
        raise ToolError(f"cannot read the expression {expression[:60]!r}") from None


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        literal = (ast.get_source_segment(text, node) or "").lower()
        exponent = literal.partition("e")[2].lstrip("+-0")
        if len(exponent) > 2 or int(exponent or 0) > MAX_EXPONENT:  # before 1e99999999 becomes a number
            raise ToolError(f"exponents must be whole and at most {MAX_EXPONENT}")
        return _bounded(Fraction(literal.replace("_", "")))  # from the text, so that 0.1 is one tenth
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        return _bounded(_binary(node.op, _value(node.left, text), _value(node.right, text)))
    raise ToolError("only numbers, + - * / ** % and parentheses are allowed")


def _binary(operator: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    match operator:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.Mod():
            return left % right
        case ast.Pow():
            if right.denominator != 1 or abs(right) > MAX_EXPONENT:
                raise ToolError(f"exponents must be whole and at most {MAX_EXPONENT}")
            return left ** int(right)
        case _:
            raise ToolError("only + - * / ** % are allowed")


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise ToolError("the numbers grow too large")
    return value


CALCULATOR = Tool(
    name="calculator",
    description="Evaluate an arithmetic expression exactly.",
    parameters={
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "Arithmetic, e.g. (2+3)*4"}},
        "required": ["expression"],
    },
    run=lambda arguments: format_number(evaluate(arguments["expression"])),
)
