"""Values that are checked, and one line for what is wrong with one."""

import json
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PlainSerializer, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from sinkbench.errors import UserError


def must(be: str, among: Iterable[str] = ()) -> WrapValidator:
    """One sentence for whatever is wrong with a value, which must also be ``among`` these, if any."""
    choice = tuple(among)

    def check(value: Any, handler: Any) -> Any:
        try:
            checked = handler(value)
        except ValidationError:
            checked = None
        if checked is None or (choice and checked not in choice):
            raise PydanticCustomError("must", "must be {be}", {"be": be})
        return checked

    return WrapValidator(check)


def one_of(names: Iterable[str]) -> WrapValidator:
    """Refuses what is not among ``names``, naming them."""
    return must(f"one of {', '.join(names)}", names)


MOST = 10**9  # tokens: more than any stream has, and few enough to be reckoned with
LONGEST = 2**63 - 1  # an integer that all libraries take


def _at_most(bound: int) -> AfterValidator:
    def check(value: int) -> int:
        if value > bound:
            raise PydanticCustomError("most", "must be at most {bound}", {"bound": f"{bound:,}"})
        return value

    return AfterValidator(check)


def _checked_text(text: str) -> str:
    try:
        return writable(text)
    except ValueError as error:
        raise PydanticCustomError("text", "must be text in UTF-8, without NUL") from error


def writable(value: Any) -> Any:
    """Refuse texts that neither a name nor a file in UTF-8 can hold: with NUL, or halves of characters."""
    if isinstance(value, str):
        value.encode()
        if "\0" in value:
            raise ValueError("it holds a NUL")
    return value


def _listed(value: Any) -> Any:
    if value == []:
        raise PydanticCustomError("empty", "must name at least one value")
    return value if isinstance(value, list) else [value]


def _distinct(values: list[Any]) -> list[Any]:
    return [value for place, value in enumerate(values) if value not in values[:place]]


T = TypeVar("T")


Model = TypeVar("Model", bound=BaseModel)


Axis = Annotated[list[T], BeforeValidator(_listed), AfterValidator(_distinct)]


Count = Annotated[int, Field(ge=1), must("an integer of at least 1"), _at_most(LONGEST)]


Whole = Annotated[int, Field(ge=0), must("an integer of at least 0"), _at_most(LONGEST)]


# Numbers of tokens, rows and entries.
Size = Annotated[int, Field(ge=1), must("an integer of at least 1"), _at_most(MOST)]


SizeOrZero = Annotated[int, Field(ge=0), must("an integer of at least 0"), _at_most(MOST)]


Text = Annotated[str, Field(min_length=1), must("a text that is not empty"), AfterValidator(_checked_text)]


def _computing(name: str) -> str:
    if name.partition(":")[0] in ("meta", "disk"):
        raise ValueError("it holds no numbers")
    return name


Device = Annotated[Text, AfterValidator(_computing), must("a device that computes, such as cpu or cuda:0, or auto")]


def _named(value: Any) -> Any:
    return writable(value) if value != "" else None  # nothing names no folder, though pathlib takes it for the own one


Folder = Annotated[Path, BeforeValidator(_named), must("the name of a folder"), PlainSerializer(str)]


File = Annotated[Path, BeforeValidator(_named), must("the name of a file")]


Heat = Annotated[float, Field(ge=0, allow_inf_nan=False), must("a number of at least 0")]


Share = Annotated[float, Field(ge=0, le=1), must("a number from 0 to 1")]


Flag = Annotated[bool, must("true or false")]


Settings = Annotated[dict[str, Any], must("a table")]


Entry = Annotated[Text | Settings, must("a name, or a table with a name")]


def checked(kind: type[Model], table: Any, where: Callable[[str], str], axes: Iterable[str] = ()) -> Model:
    """``table`` as ``kind``, strictly.

    Args:
        where: how a message begins that is about this key; the empty one where it is about several.
        axes: the only keys that may be lists, where some may.

    Raises:
        UserError: one line: the key, what it must be, and what it is.
    """
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        first, *others = sorted(error.errors(include_url=False), key=lambda one: one["type"] == "missing")
        more = f" (and {len(others)} more)" if others else ""
        raise UserError(_line(dict(first), kind, where, tuple(axes)) + more) from error


def _line(error: dict[str, Any], kind: type[BaseModel], where: Callable[[str], str], axes: tuple[str, ...]) -> str:
    """One error of pydantic's in our words."""
    key = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        return f"{where(key)}is not known{nearest(key, list(kind.model_fields))}"
    if error["type"] == "missing":
        return f"{where(key)}is missing"
    if not key:
        return f"{where(key)}{error['msg']}"
    single = isinstance(error["input"], list) and axes and key not in axes
    only = f"; only {', '.join(axes)} may be lists" if single else ""
    return f"{where(key)}{error['msg']} (got {shown(error['input'])}){only}"


def nearest(name: str, names: list[str]) -> str:
    """How a message about an unknown ``name`` ends: with the one of ``names`` that was meant, or with all."""
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(sorted(names))}"


def shown(value: Any) -> str:
    """A value for a message."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # keys that are no texts, or a list within itself
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
