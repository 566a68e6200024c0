"""Schedules: pure functions of progress, from 0 at the start of a fit to 1 at its end."""

import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

#: What a schedule starts and ends at: a number, or a numpy array with one number per parameter group.
Value = Any
#: progress -> value
Schedule = Callable[[float], Value]


def sched_lin(start: Value, end: Value, pos: float) -> Value:
    """Goes from `start` to `end` in a straight line."""
    return _between(start, end, pos)


def sched_cos(start: Value, end: Value, pos: float) -> Value:
    """Goes from `start` to `end` along half a cosine: flat at both ends."""
    return _between(start, end, (1 + math.cos(math.pi * (1 - pos))) / 2)


def sched_no(start: Value, end: Value, pos: float) -> Value:
    """Stays at `start`."""
    return start


def sched_exp(start: Value, end: Value, pos: float) -> Value:
    """Goes from `start` to `end` by equal factors; neither may be 0, and both need the same sign."""
    return end * 1.0 if pos == 1 else start * (end / start) ** pos


def _sched_poly(start: Value, end: Value, power: float, pos: float) -> Value:
    return _between(start, end, pos**power)


def _between(start: Value, end: Value, share: float) -> Value:
    # From the nearer end, so that both ends come out exactly and equal ends give a constant.
    return start + share * (end - start) if share < 0.5 else end - (1 - share) * (end - start)


class CurveSchedule:
    """A curve between fixed ends: `SchedCos(0.1, 1.)(pos)`. Can be pickled if what made it stands at module level."""

    def __init__(self, made_by: Callable[..., "CurveSchedule"], curve: Callable[..., Value], *args: Any):
        self.made_by = made_by
        self.curve = curve
        self.args = args

    def __call__(self, pos: float) -> Value:
        return self.curve(*self.args, pos)

    def __repr__(self) -> str:
        return f"{self.made_by.__name__}({', '.join(map(repr, self.args))})"

    def __reduce__(self) -> tuple[Callable[..., "CurveSchedule"], tuple[Any, ...]]:
        # By its maker's name: a curve under `@annealer` cannot be found by its own, the maker took that.
        return self.made_by, self.args


def SchedLin(start: Value, end: Value) -> CurveSchedule:
    """A straight line from `start` to `end`."""
    return CurveSchedule(SchedLin, sched_lin, start, end)


def SchedCos(start: Value, end: Value) -> CurveSchedule:
    """Half a cosine from `start` to `end`."""
    return CurveSchedule(SchedCos, sched_cos, start, end)


def SchedNo(start: Value, end: Value) -> CurveSchedule:
    """Always `start`."""
    return CurveSchedule(SchedNo, sched_no, start, end)


def SchedExp(start: Value, end: Value) -> CurveSchedule:
    """Equal factors from `start` to `end`."""
    return CurveSchedule(SchedExp, sched_exp, start, end)


def SchedPoly(start: Value, end: Value, power: float) -> CurveSchedule:
    """From `start` to `end` by `pos ** power`."""
    return CurveSchedule(SchedPoly, _sched_poly, start, end, power)


def annealer(curve: Callable[[Value, Value, float], Value]) -> Callable[[Value, Value], CurveSchedule]:
    """Decorates a curve `f(start, end, pos)`, so that `f(start, end)` gives a schedule."""

    @functools.wraps(curve)
    def made(start: Value, end: Value) -> CurveSchedule:
        return CurveSchedule(made, curve, start, end)

    return made


class CombinedSchedule:
    """Schedules one after the other, each over its share of progress; made by `combine_scheds`."""

    def __init__(self, pcts: Sequence[float], scheds: Sequence[Schedule]):
        self.pcts = [float(pct) for pct in pcts]
        self.scheds = list(scheds)
        # The last bound is 1 and not the sum, which may miss it by a rounding error.
        self.bounds = [0.0, *accumulate(self.pcts[:-1]), 1.0]

    def __call__(self, pos: float) -> Value:
        if pos >= 1:
            return self.scheds[-1](1.0)
        i = max(bisect_right(self.bounds, pos) - 1, 0)
        start, end = self.bounds[i : i + 2]
        return self.scheds[i]((pos - start) / (end - start))

    def __repr__(self) -> str:
        return f"combine_scheds({self.pcts}, {self.scheds})"


def combine_scheds(pcts: Sequence[float], scheds: Sequence[Schedule]) -> CombinedSchedule:
    """Runs each of `scheds` over its part of `pcts`; at a join the later one holds.

    ValueError where the parts are negative, do not sum to 1 (within rounding) or are not one per schedule.
    """
    pcts = list(pcts)
    if len(pcts) != len(scheds):
        raise ValueError(
            f"combine_scheds got {len(pcts)} parts {pcts} for {len(scheds)} schedules; give one part each."
        )
    if not all(pct >= 0 for pct in pcts) or not math.isclose(math.fsum(pcts), 1, abs_tol=1e-6):
        raise ValueError(
            f"combine_scheds got the parts {pcts}, which sum to {math.fsum(pcts):g}; "
            "parts are shares of the fit: none below 0, together 1."
        )
    return CombinedSchedule(pcts, scheds)


def combined_cos(pct: float, start: Value, middle: Value, end: Value) -> CombinedSchedule:
    """Half a cosine from `start` to `middle` over the share `pct`, another to `end` over the rest."""
    return combine_scheds([pct, 1 - pct], [SchedCos(start, middle), SchedCos(middle, end)])


def one_cycle(
    lr_max: Value,
    moms: Sequence[float],  # at the start, the middle and the end
    div: float = 25.0,  # the first rate is lr_max / div
    div_final: float = 1e5,  # the last rate is lr_max / div_final
    pct_start: float = 0.25,  # share of the fit in which the rate goes up
) -> dict[str, Schedule]:
    """One cycle: the rate up and down, momentum the other way (Smith, arXiv 1803.09820)."""
    _check_shares(pct_start=pct_start)
    _check_divisors(div=div, div_final=div_final)
    if len(moms) != 3:
        raise ValueError(f"`moms={moms!r}`: pass three momenta, for the start, the middle and the end of the cycle.")
    lr = combined_cos(pct_start, lr_max / div, lr_max, lr_max / div_final)
    return {"lr": lr, "mom": combined_cos(pct_start, *moms)}


def flat_cos(
    lr: Value,
    div_final: float = 1e5,  # the last rate is lr / div_final
    pct_start: float = 0.75,  # share of the fit in which the rate stays
) -> CombinedSchedule:
    """Stays at `lr`, then goes down along half a cosine."""
    _check_shares(pct_start=pct_start)
    _check_divisors(div_final=div_final)
    return combine_scheds([pct_start, 1 - pct_start], [SchedNo(lr, lr), SchedCos(lr, lr / div_final)])


def cos_restarts(
    lr_max: Value,
    cycles: Sequence[int],  # how long each one is
) -> CombinedSchedule:
    """Half a cosine from `lr_max` to 0 in each of `cycles` (SGDR: Loshchilov and Hutter, arXiv 1608.03983)."""
    return combine_scheds([n / sum(cycles) for n in cycles], [SchedCos(lr_max, 0) for _ in cycles])


def cycle_lengths(n_cycles: int, cycle_len: int, cycle_mult: int) -> list[int]:
    """The lengths of cycles of which each is `cycle_mult` times as long as the one before."""
    for name, value in (("n_cycles", n_cycles), ("cycle_len", cycle_len), ("cycle_mult", cycle_mult)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{name}={value!r}`: pass a whole number.")
        if value < 1:
            raise ValueError(f"`{name}={value}`: pass 1 or more.")
    return [cycle_len * cycle_mult**i for i in range(n_cycles)]


def warmup_stable_decay(
    lr_max: Value,
    pct_warmup: float = 0.05,  # share of the fit in which the rate goes up
    pct_decay: float = 0.2,  # share in which it goes down
    div: float = 25.0,  # the first rate is lr_max / div
    div_final: float = 1e5,  # the last rate is lr_max / div_final
    decay: Callable[[Value, Value], Schedule] = SchedLin,  # (start, end) -> the schedule of the way down
) -> CombinedSchedule:
    """Up to `lr_max` in a straight line, on it for most of the fit, and down (Hägele et al., arXiv 2405.18392).

    `decay=partial(SchedPoly, power=0.5)` is the way down that they found best, "1-sqrt".
    """
    _check_shares(pct_warmup=pct_warmup, pct_decay=pct_decay)
    _check_divisors(div=div, div_final=div_final)
    parts = [pct_warmup, max(0.0, 1 - pct_warmup - pct_decay), pct_decay]
    up, stay, down = SchedLin(lr_max / div, lr_max), SchedNo(lr_max, lr_max), decay(lr_max, lr_max / div_final)
    return combine_scheds(parts, [up, stay, down])


def _check_shares(**shares: float) -> None:
    """ValueError for what is no share of a fit, or for shares that are more than the whole."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"`{name}={share!r}`: pass the share of the fit, from 0 to 1.")
    if math.fsum(shares.values()) > 1 + 1e-6:
        named = " and ".join(f"`{name}={share:g}`" for name, share in shares.items())
        raise ValueError(f"{named} are more than the whole fit together; make one smaller, their sum is at most 1.")


def _check_divisors(**divisors: float) -> None:
    for name, divisor in divisors.items():
        if not divisor > 0:
            raise ValueError(f"`{name}={divisor!r}`: the rate is divided by it; pass a number above 0.")


def even_mults(start: float, stop: float, n: int) -> Any:
    """`n` numbers from `start` to `stop`, each the same multiple of the one before; for `n == 1` the number `stop`."""
    if n == 1:
        return stop
    if start * stop <= 0:
        raise ValueError(
            f"even_mults({start}, {stop}, {n}): no factor leads from one to the other; use two of one sign."
        )
    return [start * (stop / start) ** (i / (n - 1)) for i in range(n - 1)] + [stop]
