"""What a command answers, held against what the command line promises."""


def refused(answer: tuple[int, str, str], *words: str) -> None:
    """Exit status 2 and one line of error, in which all of ``words`` stand."""
    status, _, error = answer
    assert status == 2, error
    assert len(error.splitlines()) == 1, error
    for word in words:
        assert word in error
