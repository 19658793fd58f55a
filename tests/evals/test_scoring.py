"""What counts as an exact answer, and Wilson's interval."""

import pytest

from karakoram.evals.scoring import Share, is_exact, numbers, wilson


@pytest.mark.parametrize(
    ("content", "expected", "known", "exact"),
    [
        ("27*14 is 378.", ["378"], "What is 27*14?", True),
        ("It is 378 boxes", ["378"], "", True),
        ("378", ["378"], "", True),
        ("378.0", ["378"], "", True),
        ("1,234 it is", ["1234"], "", True),
        ("378 or 380", ["378"], "", False),
        ("3780", ["378"], "", False),
        ("37 8", ["378"], "37 8", False),
        ("-378", ["378"], "", False),
        ("11-35 is -24.", ["-24"], "difference of 11 and 35", True),
        ("11-35 is 24.", ["-24"], "difference of 11 and 35", False),
        ("4*2 = 8.", ["8"], 'Double 4. {"expression": "4*2"}', True),
        ("", ["8"], "", False),
        ("The city is Paris.", ["Paris"], "", True),
        ("The city is Parisa.", ["Paris"], "", False),
        ("The city is paris.", ["Paris"], "", False),
        ("Paris<|im_end|>", ["Paris"], "", False),
        ("functions.a:0 Paris", ["Paris"], "", False),
        ("It is 2024-03-05.", ["2024-03-05"], "", True),
        ("It is 2024-03-06.", ["2024-03-05"], "", False),
        ("It is 2024-03-05 or 2024-03-09.", ["2024-03-05"], "", False),
        ("It is a Tuesday.", ["Tuesday"], "", True),
        ("It is a Tuesday or Monday.", ["Tuesday"], "", False),
        ("It is a Tuesday, not a Monday.", ["Tuesday"], "Is it a Monday?", True),
        ("3 is 4 and 5 is 6.", ["4", "6"], "3 5", True),
        ("3 is 4 and 5 is 7.", ["4", "6"], "3 5", False),
        ("The phone is 555-1234.", ["555-1234"], "", True),
        ("a.txt, b.md", ["a.txt, b.md"], "", True),
    ],
)
def test_exactness(content: str, expected: list[str], known: str, exact: bool) -> None:
    assert is_exact(content, expected, known) is exact


def test_numbers_in_text() -> None:
    assert numbers("3, -4 and 5.5; x7 is none, 8.") == {3, -4, 5.5, 8}


def test_wilson() -> None:
    low, high = wilson(450, 500)
    assert low == pytest.approx(0.8706, abs=1e-4)  # R: binom.confint(450, 500, methods = "wilson")
    assert high == pytest.approx(0.9233, abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(5, 5)[1] == 1.0
    assert "450/500" in str(Share(450, 500))
