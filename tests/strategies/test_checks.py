"""What a strategy of one's own gets wrong is one line and status 2, and no row is written where it shows at first."""

import pandas as pd
import pytest
from resuming import run

from sinkbench.errors import UserError
from sinkbench.strategies import choose
from sinkbench.strategies.h2o import H2O

HEAD = """
import torch
from sinkbench.strategies import Eviction, Policy, Strategy

class Mine({base}):
    \"\"\"Mine.\"\"\"
"""
SCORE = """
    def score(self, held):
        {body}
"""
POLICY = """
    def policy(self, window, layer=0, layers=1):
        return {answer}
"""
WEIGHTS = "held.weights.sum(2)"


@pytest.fixture
def mine(tmp_path):
    """Writes a class into a file, and names it."""

    def write(body, base="Eviction"):
        path = tmp_path / "mine.py"
        path.write_text(HEAD.format(base=base) + body)
        return f"{path}:Mine"

    return write


@pytest.mark.parametrize(
    ("base", "body", "said"),
    [
        ("object", "    pass", "must be a class derived from"),
        ("Eviction", "", "must say, in score(self, held), what each entry is worth"),
        ("Strategy", "", "must say, in policy(self, window, layer, layers), what a layer keeps"),
        ("Eviction", "    choice = 'model'" + SCORE.format(body="return 0"), "choice must be one of head, layer"),
        ("Eviction", "    memory = 'total'" + SCORE.format(body="return 0"), "memory must be a tuple of names"),
        ("Strategy", "    positions = 'here'" + POLICY.format(answer="None"), "positions must be one of cache, text"),
        ("Strategy", POLICY.format(answer="None"), "policy must answer with a Policy (got None)"),
        ("Strategy", POLICY.format(answer="1 / 0"), "policy failed for a window of 16: ZeroDivisionError"),
        ("Strategy", POLICY.format(answer="Policy(window / 2)"), "whole numbers of tokens (got window=8.0)"),
        ("Strategy", POLICY.format(answer="Policy(window, block=0)"), "whole numbers of tokens (got block=0)"),
        ("Eviction", "    share: int" + SCORE.format(body="return 0"), "mine needs a value: --set share=..."),
        (
            "Eviction",
            "    what: object = object()" + SCORE.format(body="return 0"),
            "a parameter cannot be written down",
        ),
    ],
)
def test_what_a_class_lacks_is_one_line_before_anything_is_loaded(base, body, said, mine):
    with pytest.raises(UserError) as error:
        choose(mine(body, base), 16)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("engine", ["stepwise", "parallel"])
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("held.weights", "of shape (1, 2, 1) (got (1, 2, 2, 1))"),
        ("held.tokens", "of floating point (got int64)"),
        (f"{WEIGHTS} * float('nan')", "numbers that can be compared (got nan)"),
        ("None", "a number for each entry (got NoneType)"),
        ("held.memory['total']", "failed at token 0: KeyError: 'total'"),
    ],
)
def test_a_score_that_cannot_be_is_one_line_and_nothing_is_written(answer, said, engine, mine, here, tmp_path):
    name = mine(SCORE.format(body=f"return {answer}"))
    status, _, error = here(*run(tmp_path / "out", "--experiment", name, "--engine", engine, "--num-tokens", 60))
    assert (status, len(error.splitlines())) == (2, 1), error
    assert said in error
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('two\\nlines')", "the score of Mine failed at token 40: ValueError: two lines"),
        ("return {weights} * float('nan')", "at token 40 must be numbers that can be compared"),
        ("return {weights}[..., :3]", "at token 40 must be a number of each head for each entry"),
    ],
)
def test_one_that_fails_in_the_middle_keeps_its_rows(body, said, mine, here, tmp_path):
    late = "if held.now >= 40: " + body.format(weights=WEIGHTS) + f"\n        return {WEIGHTS}"
    options = run(tmp_path, "--experiment", mine(SCORE.format(body=late)), "--num-tokens", 60)
    status, _, error = here(*options)
    assert (status, len(error.splitlines())) == (2, 1), error
    assert said in error
    (csv,) = tmp_path.glob("*.csv")
    assert len(pd.read_csv(csv)) == 40


def test_a_score_derived_from_another_follows_no_pattern_of_that_one():
    class Least(H2O):
        """Those that were looked at least."""

        def score(self, held):
            return -super().score(held)

    class Same(H2O):
        """As it is."""

    assert tuple(kind().pattern for kind in (H2O, Same, Least)) == ("summed", "summed", None)
