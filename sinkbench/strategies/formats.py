"""In which format a cache holds keys and values: names, parameters, bytes.

How numbers are encoded and what is read back is in :mod:`sinkbench.cache.formats`.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from sinkbench.errors import UserError
from sinkbench.strategies.policy import Count, Policy
from sinkbench.validation import nearest, shown

if TYPE_CHECKING:
    import numpy as np

BLOCKS = {"q8_0": (32, 34), "q4_0": (32, 18), "fp8_e4m3": (1, 1)}  # numbers of a block, and the bytes they take
BITS = {"kivi2": 2, "kivi4": 4}
FORMATS = ("model", *BLOCKS, *BITS)


@dataclass(frozen=True)
class Format:
    """How the numbers of keys and values are stored: as computed, or in blocks along the head dimension.

    Attributes:
        name: as ``--kv-format`` has it.
        recoded: whether entries are stored anew after the steps that first read them, so that they have two versions.
    """

    name: str = "model"
    recoded: ClassVar[bool] = False

    def bytes_of(self, held: "np.ndarray", head_dim: int, itemsize: int) -> "np.ndarray":
        """Bytes of keys and values of one head, scales included, where ``held`` tokens are held.

        ``itemsize`` is that of the model's dtype.
        """
        block, size = BLOCKS.get(self.name, (1, itemsize))
        return 2 * held * head_dim * size / block

    def refuses_dim(self, head_dim: int) -> str | None:
        """Why heads of this many features cannot be stored so; ``None`` where they can."""
        return _multiple(head_dim, BLOCKS.get(self.name, (1,))[0])

    def refuses_policy(self, policy: Policy) -> str | None:
        """Why this does not go with what a layer keeps; ``None`` where it does."""
        return None

    def __str__(self) -> str:
        mine = [(field.name, getattr(self, field.name), field.default) for field in _parameters(type(self))]
        changed = ",".join(f"{name}={value}" for name, value, default in mine if value != default)
        return f"{self.name}:{changed}" if changed else self.name


@dataclass(frozen=True)
class Kivi(Format):
    """KIVI (arXiv 2402.02750): keys a channel, values a token, in few bits; the last ones as computed.

    Attributes:
        group: numbers that share a minimum and a scale: of consecutive tokens for keys, of channels for values.
        residual: keys are quantised when so many have come, and values when they are so many tokens old.
    """

    group: int = 32
    residual: int = 128
    recoded: ClassVar[bool] = True

    @property
    def bits(self) -> int:
        """Of a number."""
        return BITS[self.name]

    def keys_quantised(self, fed: Count) -> Count:
        """How many of the first keys are quantised once ``fed`` tokens have been fed."""
        return fed // self.residual * self.residual

    def values_quantised(self, fed: Count) -> Count:
        """How many of the first values are quantised once ``fed`` tokens have been fed."""
        over = fed - self.residual
        return (over > 0) * over

    def bytes_of(self, held: "np.ndarray", head_dim: int, itemsize: int) -> "np.ndarray":
        few = self.keys_quantised(held) + self.values_quantised(held)
        code = self.bits / 8 + 2 * itemsize / self.group  # of a number, with its share in a minimum and a scale
        return head_dim * (few * code + (2 * held - few) * itemsize)

    def refuses_dim(self, head_dim: int) -> str | None:
        return _multiple(head_dim, self.group)

    def refuses_policy(self, policy: Policy) -> str | None:
        only = "it goes with --experiment transformers alone, where nothing is ever evicted"
        return None if policy.window is None else only


def _multiple(head_dim: int, of: int) -> str | None:
    return f"heads of {head_dim} features cannot be stored in groups of {of}" if head_dim % of else None


def _parameters(kind: type[Format]) -> list[Any]:
    return [field for field in fields(kind) if field.name != "name"]


def parse(text: str) -> Format:
    """The format that ``--kv-format`` names: ``q8_0``, or with parameters ``kivi2:group=16,residual=32``.

    Raises:
        UserError: there is none of that name, or a parameter that it does not have or that cannot be.
    """
    name, colon, settings = text.partition(":")
    if name not in FORMATS:
        raise UserError(f"--kv-format {shown(text)} is not known; there are {', '.join(FORMATS)}")
    kind = Kivi if name in BITS else Format
    known = [parameter.name for parameter in _parameters(kind)]
    given: dict[str, int] = {}
    for setting in settings.split(",") if colon else ():
        key, _, value = (part.strip() for part in setting.partition("="))
        if key not in known:
            more = nearest(key, known) if known else "; it has none"
            raise UserError(f"--kv-format {text}: {name} has no parameter {shown(key)}{more}")
        if key in given:
            raise UserError(f"--kv-format {text}: {key} is given twice")
        if not (value.isascii() and value.isdigit() and int(value) > 0):
            raise UserError(f"--kv-format {text}: {key} must be an integer of at least 1 (got {shown(value)})")
        given[key] = int(value)
    found = kind(name, **given)
    if isinstance(found, Kivi) and found.residual % found.group:
        raise UserError(
            f"--kv-format {text}: residual must be a multiple of group (got {found.residual} and {found.group})"
        )
    return found
