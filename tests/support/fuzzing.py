"""Input that nobody would write, and the command line that has to answer it: in one line, in time, changing nothing."""

import io
import json
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, currently_in_test_context, given, note, settings
from hypothesis import strategies as st

from sinkbench.cli import main

PATIENCE = 60  # seconds after which a command counts as hanging
STATUSES = {0, 1, 2}  # of what no signal ended; 70 is the last net, into which nothing known may fall

NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 7, -1, 16, 64, 300, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**11, 10**30, 10**400]
    + [0.0, -0.0, 0.5, 1.5, -1.5, 1e-320, 1e-300, 1e30, 1e300, 1.7e308, -1.7e308, float("inf"), float("nan")]
)
STRANGE = ["", " ", "\t", "é", "日本", "\U0001f600", "\0", "\ud800", "\r\n", "\x1b[31m", "e" * 300, "x" * 5000]
MARKED = ["[x]", "[/x]", "[red]", "[", "*", "?", "a[1]*", "::", "=", "%s", "{}", "$x$", "$\\frac", "\\", "\\n", "<b>"]
PLACES = [".", "..", "/", "~", "~nobody", "a/b", "/dev/zero", "/dev/full", "/dev/null", "http://x", "a.py:B"]
WORDS = ["a", "-", "--", "nan", "inf", "true", "none", "null", "meta", "cuda", "cpu", "auto", "=1", "nan=1"]
DIGITS = ["1", "-1", "0", "1e3", "1_000", "0x10", "9" * 5000]
TEXTS = st.sampled_from([*STRANGE, *MARKED, *PLACES, *WORDS, *DIGITS])
SCALARS = st.one_of(NUMBERS, TEXTS, st.booleans(), st.none(), st.text(max_size=8))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)


class Hung(BaseException):
    """A command took longer than :data:`PATIENCE`."""


@dataclass(frozen=True)
class Answer:
    """What a command came to: its exit status, and what it wrote."""

    status: int
    out: str
    error: str


def command(*arguments: Any, typed: str = "") -> Answer:
    """Carry out a command line in this process, with ``typed`` on its standard input; it must answer as promised.

    That is: no traceback, no warning of a library's, a known status, and, where it refuses, one line and no more.
    """
    line = [str(argument) for argument in arguments]
    if currently_in_test_context():
        note(f"sinkbench {line}")
    out, error, status, cause = _stream(), _stream(), 0, None
    with _standard(out, error, _stream(typed)), _in_time(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("ignore")
        for kind in (RuntimeWarning, UserWarning):
            warnings.simplefilter("always", kind)
        try:
            main(line)
        except SystemExit as stop:
            status, cause = int(stop.code or 0), stop.__context__
        except Exception as raised:
            status, cause = -1, raised
    said = [_text(error) for error in (out, error)]
    why = "".join(traceback.format_exception(cause)) if cause else ""
    assert status in STATUSES, f"sinkbench {line} ended with {status}: {said[1]}\n{why}"
    assert "Traceback" not in said[1], said[1]
    assert not warned, f"sinkbench {line}: {warned[0]}"
    if status == 2:
        lines = [x for x in said[1].splitlines() if x.startswith("sinkbench: ")]
        assert len(said[1].splitlines()) == len(lines) == 1, f"sinkbench {line}: {said[1]!r}\n{why}"
    return Answer(status, *said)


def _stream(text: str = "") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8", newline="", write_through=True)


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode()  # type: ignore[attr-defined]


@contextmanager
def _standard(out: io.TextIOWrapper, error: io.TextIOWrapper, typed: io.TextIOWrapper) -> Iterator[None]:
    before = sys.stdin, sys.stdout, sys.stderr
    error.reconfigure(errors="backslashreplace")  # as Python has it
    sys.stdin, sys.stdout, sys.stderr = typed, out, error
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


@contextmanager
def _in_time() -> Iterator[None]:
    def hung(number: int, frame: Any) -> None:
        raise Hung(f"no answer within {PATIENCE} s")

    before = signal.signal(signal.SIGUSR1, hung)
    me = threading.get_ident()
    timer = threading.Timer(PATIENCE, lambda: signal.pthread_kill(me, signal.SIGUSR1))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR1, before)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below ``folder`` but folders: the bytes of files, ``None`` for what is none."""
    found = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


def refused_or_done(folder: Path, *arguments: Any, typed: str = "") -> Answer:
    """As :func:`command`; where it is refused, nothing in ``folder`` has changed."""
    before = contents(folder)
    answer = command(*arguments, typed=typed)
    if answer.status == 2:
        assert contents(folder) == before, answer.error
    return answer


def tried(examples: int, cases: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Hold ``check`` against so many of ``cases``; the smallest that fails is printed."""

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases)
    def trial(case: Any) -> None:
        check(case)

    trial()


def edited(document: Any) -> st.SearchStrategy[Any]:
    """``document``, as JSON has it, with one to three of its values replaced, removed or put elsewhere."""

    @st.composite
    def edit(draw: st.DrawFn) -> Any:
        found = json.loads(json.dumps(document))
        for _ in range(draw(st.integers(1, 3))):
            places = list(_places(found))
            holder, key = draw(st.sampled_from(places)) if places else (None, None)
            how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
            if holder is None:
                return draw(VALUES)
            if how == "replace":
                holder[key] = draw(VALUES)
            elif how == "remove":
                del holder[key]
            elif isinstance(holder, dict):
                holder[draw(TEXTS)] = draw(VALUES)
        return found

    return edit()


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        yield document, key
        yield from _places(document[key])


def json_of(value: Any) -> bytes:
    """``value`` in JSON, lone surrogates as escapes, numbers that JSON has not as Python writes them."""
    return json.dumps(value).encode()


def bytes_edited(data: bytes) -> st.SearchStrategy[bytes]:
    """``data`` cut, doubled, or with other bytes somewhere."""
    places = st.integers(0, len(data))

    @st.composite
    def edit(draw: st.DrawFn) -> bytes:
        start, end = sorted([draw(places), draw(places)])
        how = draw(st.sampled_from(["cut", "take", "double", "put", "flip"]))
        put = draw(st.sampled_from([b"", b"\0", b"\xff", b"[" * 5000, b'{"a":' * 5000, b"9" * 6000, b"\n", b",", b'"']))
        if how == "flip":
            end = min(start + 1, len(data))
            put = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in data[start:end])
        return {
            "cut": data[:start],
            "take": data[:start] + data[end:],
            "double": data[:end] + data[start:],
            "put": data[:start] + put + data[start:],
            "flip": data[:start] + put + data[end:],
        }[how]

    return edit()


def cells_edited(table: bytes) -> st.SearchStrategy[bytes]:
    """A CSV with up to four of its cells replaced, or lines removed, doubled or exchanged."""
    lines = [line.split(",") for line in table.decode().splitlines()]
    cells = st.one_of(
        NUMBERS.map(repr), st.sampled_from(["", "x", "1e308", "-1e308", "1e309", "True", "0x1", "1_0", '"1"'])
    )

    @st.composite
    def edit(draw: st.DrawFn) -> bytes:
        found = [list(line) for line in lines]
        for _ in range(draw(st.integers(1, 4))):
            row = draw(st.integers(0, len(found) - 1))
            how = draw(st.sampled_from(["cell", "cell", "cell", "column", "remove", "double"]))
            place = draw(st.integers(0, len(found[row]) - 1))
            if how == "cell":
                found[row][place] = draw(cells)
            elif how == "column":
                value = draw(cells)
                for line in found[1:]:
                    line[place % len(line)] = value
            elif how == "double":
                found.insert(row, found[row])
            elif len(found) > 1:
                del found[row]
        return ("\n".join(",".join(line) for line in found) + "\n").encode()

    return edit()
