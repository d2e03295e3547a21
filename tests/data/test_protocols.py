"""How protocols cut a text: against the loops that they are known from."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinkbench.data.protocols import Window, scored_by, windows_of
from sinkbench.errors import UserError


def counted(windows):
    """Index of each token whose prediction counts, in order, and the indices that are fed before it."""
    return [(token, list(range(w.begin, token))) for w in windows for token in range(w.scored, w.end + 1)]


def gptq(n, length):
    """Of GPTQ's ``opt_eval`` and ``llama_eval``: ``nsamples = n // seqlen``, shifted within each."""
    for i in range(n // length):
        batch = list(range(i * length, (i + 1) * length))
        for place in range(length - 1):
            yield batch[place + 1], batch[: place + 1]


def transformers_page(n, length, stride):
    """Of transformers' page *Perplexity of fixed-length models*."""
    prev_end = 0
    for begin in range(0, n, stride):
        end = min(begin + length, n)
        target = end - prev_end
        ids = list(range(begin, end))
        labels = [-100] * (len(ids) - target) + ids[len(ids) - target :]
        for place, label in enumerate(labels[1:]):
            if label != -100:
                yield label, ids[: place + 1]
        prev_end = end
        if end == n:
            break


def llama_perplexity(n, length):
    """Of llama.cpp's ``perplexity``: ``first = n_ctx / 2``, ``n_ctx - 1 - first`` predictions a chunk."""
    first = length // 2
    for chunk in range(n // length):
        tokens = list(range(chunk * length, (chunk + 1) * length))
        for j in range(length - 1 - first):
            yield tokens[first + j + 1], tokens[: first + j + 1]


def rolling_windows(tokens, prefix, max_seq_len, context_len=1):
    """``lm_eval.utils.get_rolling_token_windows`` and ``make_disjoint_window``."""
    pred_len, predicted = max_seq_len - context_len + 1, 0
    first = min(max_seq_len, len(tokens))
    pairs = [([prefix, *tokens[: first - 1]], tokens[:first])]
    predicted += first
    while predicted < len(tokens):
        window_pred_len = min(len(tokens) - predicted, pred_len)
        end = predicted + window_pred_len
        pairs.append((tokens[end - max_seq_len - 1 : end - 1], tokens[end - window_pred_len : end]))
        predicted += window_pred_len
    for a, b in pairs:
        yield a[: len(a) - (len(b) - 1)], b


def lm_eval(n, length):
    for context, continuation in rolling_windows(list(range(n)), -1, length):
        inputs = (context + continuation)[-(length + 1) :][:-1]
        for place, token in enumerate(continuation):
            yield token, inputs[: len(inputs) - len(continuation) + 1 + place]


KNOWN = {
    "windows": lambda n, length, stride: gptq(n, length),
    "strided": transformers_page,
    "llamacpp": lambda n, length, stride: llama_perplexity(n, length),
    "rolling": lambda n, length, stride: lm_eval(n, length),
}


@pytest.mark.parametrize("protocol", KNOWN)
@given(n=st.integers(2, 90), length=st.integers(3, 40), stride=st.integers(1, 40))
def test_what_is_fed_and_what_counts_is_what_the_known_loop_does(protocol, n, length, stride):
    stride = min(stride, length)
    wanted = list(KNOWN[protocol](n, length, stride))
    if not wanted:
        with pytest.raises(UserError, match="shorter --context-length"):
            windows_of(protocol, n, length, stride)
        return
    windows = windows_of(protocol, n, length, stride)
    assert counted(windows) == wanted
    assert len(wanted) == sum(window.predictions for window in windows)
    assert max(window.fed for window in windows) <= length
    for rows in {0, 1, len(wanted) // 2, len(wanted)}:
        stretches = scored_by(windows, rows)
        assert [token for stretch in stretches for token in range(*stretch)] == [token for token, _ in wanted][:rows]
        assert all(end < begin for (_, end), (begin, _) in pairwise(stretches))


@given(n=st.integers(2, 90), length=st.integers(2, 40), stride=st.integers(1, 40))
def test_no_token_counts_twice_and_strided_and_rolling_leave_none_out(n, length, stride):
    for protocol, first in (("strided", 1), ("rolling", 0)):
        tokens = [token for token, _ in counted(windows_of(protocol, n, length, min(stride, length - 1)))]
        assert tokens == list(range(first, n))


def test_what_stands_first_is_replaced_where_a_text_begins_only():
    assert [window.lead for window in windows_of("rolling", 10, 4)] == [True, False, False]
    assert [window.lead for window in windows_of("llamacpp", 10, 4)] == [True, True]
    assert not any(window.lead for p in ("windows", "strided") for window in windows_of(p, 10, 4, 2))
    assert windows_of("windows", 10, 4) == [Window(0, 3, 1), Window(4, 7, 5)]
