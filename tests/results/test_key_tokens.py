"""LongPPL: the key tokens that a few plain lines find, and their perplexity."""

import json
import math

import numpy as np
import pandas as pd
import pytest

N = 4000


def saved(folder, name, nll, tokens=None, start=1):
    lengths = np.arange(start, start + len(nll))
    frame = pd.DataFrame({"input_length": lengths, "nll": nll, "ppl": np.exp(nll), "overall_ppl": 2.0})
    frame = frame.assign(cuda_vram_allocated=np.nan, latency=np.nan, token=lengths if tokens is None else tokens)
    frame.to_csv(folder / f"{name}.csv", index=False)


@pytest.fixture
def nlls(tmp_path):
    draw = np.random.default_rng(1)
    long = draw.gamma(1.5, 1.5, N)
    found = {"long": long, "short": long + draw.gamma(0.5, 2.0, N), "sinks": long + draw.gamma(0.3, 1.0, N)}
    found["short"][:3], found["long"][:3] = (4.0, 2.0, 4.5), (2.0, 0.0, 1.0)  # on the bounds, both of which are open
    for name, nll in found.items():
        saved(tmp_path, name, nll)
    return found


def compare(here, folder, *options):
    return here("compare", folder, "--key-tokens", "long", "short", *options)


def test_key_tokens_and_their_perplexity_are_those_of_a_few_plain_lines(nlls, here, tmp_path):
    key = [i for i in range(N) if nlls["short"][i] - nlls["long"][i] > 2 and nlls["long"][i] < 2]
    assert 0 not in key and 1 not in key and 2 in key
    document = json.loads(compare(here, tmp_path, "--format", "json")[1])
    rows = {row["run"]: row for row in document["key_tokens"]}
    for name, nll in nlls.items():
        assert rows[name]["long_ppl"] == pytest.approx(math.exp(sum(nll[i] for i in key) / len(key)))
        assert (rows[name]["key_tokens"], rows[name]["tokens"]) == (len(key), N)
        assert rows[name]["long_ppl_low"] < rows[name]["long_ppl"] < rows[name]["long_ppl_high"]
    assert (document["long"], document["short"]) == ("long", "short")


def test_the_table_says_what_a_key_token_is(nlls, here, tmp_path):
    status, out, _ = compare(here, tmp_path)
    assert status == 0
    assert "key tokens of long against short" in out
    assert "more than 2 nats below that in short" in out


def test_without_a_key_token_there_is_no_longppl(here, tmp_path):
    for name in ("long", "short"):
        saved(tmp_path, name, np.full(N, 3.0))
    row, _ = json.loads(compare(here, tmp_path, "--format", "json")[1])["key_tokens"]
    assert (row["key_tokens"], row["long_ppl"]) == (0, None)
    assert compare(here, tmp_path)[0] == 0


def test_runs_that_are_not_there_or_the_same_or_over_other_tokens_are_refused_in_one_line(nlls, here, tmp_path):
    for options, said in (
        (("long", "shorter"), "no run is called shorter: --key-tokens takes two of long, short, sinks"),
        (("long", "long"), "two runs"),
        (("long",), "--key-tokens"),
    ):
        status, out, error = here("compare", tmp_path, "--key-tokens", *options)
        assert (status, out, error.count("\n")) == (2, "", 1)
        assert said in error
    saved(tmp_path, "short", nlls["short"], tokens=np.zeros(N))
    assert "not over the same tokens" in compare(here, tmp_path)[2]
    saved(tmp_path, "short", nlls["short"], start=N + 1)
    status, _, error = compare(here, tmp_path)
    assert status == 2
    assert "share no row" in error
