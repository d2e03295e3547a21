"""How long a step takes that is launched, and waited for later."""

import time

import torch


class Clock:
    """Times what is launched on the device between :meth:`begin` and :meth:`end`, from an idle device on.

    Where the step still runs when somebody comes to wait for it, its seconds are those of the clock on the wall, from
    before its launch until the device has finished. One that has ended before is timed by the device itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.began = device, 0.0
        # on CUDA, where the host goes on while a step runs
        self.marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []

    def begin(self) -> None:
        """To be called before the launch."""
        if self.marks:
            torch.cuda.synchronize(self.device)
            self.marks[0].record()
        self.began = time.perf_counter()

    def end(self) -> None:
        """To be called behind the launch."""
        if self.marks:
            self.marks[1].record()

    def wait(self) -> None:
        """Until what was launched has ended."""
        if self.marks:
            self.marks[1].synchronize()

    def waited(self) -> float:
        """The seconds of the step, once it has ended."""
        late = bool(self.marks) and self.marks[1].query()
        self.wait()
        seconds = time.perf_counter() - self.began
        return min(seconds, self.marks[0].elapsed_time(self.marks[1]) / 1e3) if late else seconds
