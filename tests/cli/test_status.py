"""A process says what ended its work."""

import pytest

from sinkbench.cli.status import status_of


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("finished", 0),
        ("dataset ended", 0),
        ("out of memory", 0),
        ("interrupted (SIGINT)", 130),
        ("interrupted (SIGTERM)", 143),
    ],
)
def test_the_status_is_that_of_the_signal(reason, status):
    assert status_of(reason) == status


def test_strategies_are_listed_at_80_columns(sinkbench):
    shown = sinkbench("strategies")
    assert shown.returncode == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80
    for name in ("attention_sinks", "pyramid", "h2o", "random"):
        assert name in shown.stdout
    assert "beta=20" in shown.stdout
