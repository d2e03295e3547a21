"""What a piece of code asks of a device."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Asked(TorchDispatchMode):
    """Counts operations that ask something of a device: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return out
