"""In which format a cache holds keys and values: names, parameters, bytes."""

from dataclasses import dataclass

from sinkbench.errors import UserError


@dataclass(frozen=True)
class Format:
    """How the numbers of keys and values are stored.

    Attributes:
        name: as ``--kv-format`` has it.
    """

    name: str = "model"

    def bytes_of(self, head_dim: int, itemsize: int) -> float:
        """Bytes of one key or value of one head, scales included; ``itemsize`` is that of the model's dtype."""
        return head_dim * itemsize

    def __str__(self) -> str:
        return self.name


FORMATS = ("model",)


def parse(text: str) -> Format:
    """The format that ``--kv-format`` names.

    Raises:
        UserError: there is none of that name.
    """
    if text not in FORMATS:
        raise UserError(f"--kv-format {text!r} is not known; there are {', '.join(FORMATS)}")
    return Format(text)
