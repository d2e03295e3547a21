"""The statistics of a divergence: those of the rows, with intervals that hold what they say."""

import numpy as np
import pandas as pd
import pytest

from sinkbench.results.divergence import agreement, beyond_training, distribution, divergence_of
from sinkbench.results.intervals import Interval


def dependent(rng, n, memory=0.9):
    """Exponentials of a process whose neighbours are alike."""
    noise, values = rng.normal(size=n + 200), np.zeros(n + 200)
    for t in range(1, len(values)):
        values[t] = memory * values[t - 1] + noise[t]
    return np.exp(values[200:] * np.sqrt(1 - memory**2))


def frame(n=500, seed=0):
    rng = np.random.default_rng(seed)
    nll = rng.exponential(2.0, n)
    reference = nll - rng.normal(0.1, 0.3, n).clip(None, nll)
    same = (rng.uniform(size=n) < 0.8).astype(float)
    return pd.DataFrame({"kl": dependent(rng, n), "same_top": same, "nll": nll, "reference_nll": reference})


def test_they_are_those_of_the_rows():
    rows = frame()
    found = distribution(rows.kl.to_numpy())
    assert list(found) == ["mean", "median", "90 %", "99 %", "99.9 %", "largest"]
    values = [one.value if isinstance(one, Interval) else one for one in found.values()]
    assert values == pytest.approx([rows.kl.mean(), *np.quantile(rows.kl, [0.5, 0.9, 0.99, 0.999, 1.0])])
    more = np.exp(-rows.nll) - np.exp(-rows.reference_nll)
    alike = [one.value for one in agreement(rows).values()]
    wanted = [100 * rows.same_top.mean(), 100 * more.mean(), 100 * np.sqrt((more**2).mean())]
    assert alike == pytest.approx([*wanted, (rows.nll - rows.reference_nll).mean()])


def test_every_interval_holds_its_value():
    rows = frame()
    for one in (*distribution(rows.kl.to_numpy()).values(), *agreement(rows).values()):
        if isinstance(one, Interval):
            assert one.low <= one.value <= one.high
            assert one.low < one.high


@pytest.mark.parametrize("share", ["median", "90 %"])
def test_intervals_of_quantiles_hold_the_true_one_about_as_often_as_they_say(share):
    """Of dependent values; intervals that took them for independent would hold it in half of the cases."""
    true = float(np.exp({"median": 0.0, "90 %": 1.2815515655446004}[share]))
    rng = np.random.default_rng(1)
    trials = [distribution(dependent(rng, 2000))[share] for _ in range(60)]
    assert np.mean([one.low <= true <= one.high for one in trials]) >= 0.8


def test_of_a_run_without_a_reference_there_are_none():
    rows = frame()
    assert divergence_of({"windowed": rows.drop(columns="kl")}) == []
    tables = divergence_of({"windowed": rows, "transformers": rows.assign(kl=np.nan)})
    assert [list(by_run) for _, _, by_run in tables] == [["windowed"], ["windowed"]]


RECORD = {"reference": {"strategy": "transformers", "span": None}, "model": {"context_length": 100}}


@pytest.mark.parametrize(
    ("changes", "length", "none"),
    [
        ({}, 100, False),
        ({}, 101, True),
        ({"reference": {"strategy": "windowed", "span": 100}}, 900, False),
        ({"reference": {"strategy": "windowed", "span": 101}}, 900, True),
        ({"reference": {"strategy": "windowed", "span": 101}}, 100, False),
        ({"model": {"context_length": None}}, 900, False),
        ({"reference": None}, 900, False),
        ({"reference": "transformers", "model": 7}, 900, False),
    ],
)
def test_a_reference_that_reaches_beyond_what_the_model_was_trained_for_is_none(changes, length, none):
    assert (beyond_training({**RECORD, **changes}, length) is not None) is none
