"""What whole nodes are billed, beside what their GPUs are leased for.

Invariants: a billing period begins with a hold on an unbilled node, lasts while the node is held, at least the minimum
billing time, and nothing cuts it; consecutive windows add up to the window they cover.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from verl_rlhfless.types import Window


@dataclass
class NodeBill:
    """The billing periods of one node.

    Holds are reported in the order of time. One that ends at the instant at which it began is not billed.
    """

    min_s: float
    _periods: list[Window] = field(default_factory=list)
    _num_held: int = 0

    def hold(self, now_s: float) -> None:
        """A GPU of the node is leased."""
        if not self._num_held and not (self._periods and now_s <= self._periods[-1].end_s):
            self._periods.append(Window(now_s, now_s + self.min_s))
        self._num_held += 1

    def free(self, now_s: float) -> None:
        """A GPU of the node comes back."""
        self._num_held -= 1
        if self._num_held:
            return
        begin_s = self._periods[-1].start_s
        if begin_s == now_s:
            self._periods.pop()
        else:
            self._periods[-1] = Window(begin_s, max(self._periods[-1].end_s, now_s))

    def seconds(self, window: Window) -> float:
        """Return the billed seconds of a window that has passed."""
        total = 0.0
        for period in reversed(self._periods):
            is_held = self._num_held > 0 and period is self._periods[-1]
            end_s = window.end_s if is_held else min(period.end_s, window.end_s)
            if end_s <= window.start_s:
                break
            total += max(0.0, end_s - max(period.start_s, window.start_s))
        return total

    def total_s(self, now_s: float) -> float:
        """Return the seconds of every period until now, and what the last one bills beyond."""
        last_s = self._periods[-1].end_s if self._periods else now_s
        return self.seconds(Window(0.0, now_s)) + max(0.0, last_s - now_s)
