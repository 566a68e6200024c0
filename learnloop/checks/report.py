"""What a check found, as text: a line per promise with a verdict; below a broken one where, and what to do."""

from dataclasses import dataclass, field

KEPT, BROKEN, LEFT_OUT = "kept", "BROKEN", "-"
SHOWN = 3  # places where a promise is broken
LONGEST = 240  # letters of a message
_INDENT = " " * 10

#: Begin of what is broken -> what to do. The first that fits counts.
REMEDIES = {
    "leaves the hooks on the model": "Remove them in `cleanup_fit`: `after_fit` does not come after an error.",
    "leaves `learn.cbs`": "Take off in `cleanup_fit` what it adds; or `learn.added_cbs(…)`.",
    "leaves the number of open files": "Close them in the cleanup of the span in which they are opened.",
    "leaves the number of threads": "End them in the cleanup of the span in which they begin.",
    "leaves no `learn.": "Keep it on the callback (`self.x = …`), or delete it in `cleanup_fit`.",
    "leaves the model in the mode": "Put the mode back in the cleanup of the span in which it is changed.",
    "leaves ": "Put it back in the cleanup of the span in which it is changed: `after_…` does not come after an error.",
    "keeps no ": "Let go of it in `cleanup_batch`; keep a detached copy of what is needed longer.",
    "raises nothing in a cleanup": "A cleanup comes also where `before_…` did not run: ask whether anything is open.",
    "raises nothing where others cancel": "Do not rely on events that a cancel leaves out.",
    "lets an error of someone else pass": "Let exceptions through; close what is open in a cleanup.",
    "trains again": "Begin anew in `before_fit`, and put back in a cleanup what it changes.",
    "can be fitted again": "Begin anew in `before_fit`.",
    "can be removed": "Its cleanups come when it is taken off, in the middle of a batch too.",
    "has every attribute": "Correct the name, or set it in `before_fit`.",
    "its state can be stored": "Keep numbers, tensors, strings, lists and dicts, or write `state_dict()`.",
    "its state survives": "`load_state_dict` puts back what `state_dict` returned.",
    "can be resumed": "`before_fit` comes in a resumed fit too, before the state is loaded.",
    "ends with the same numbers": (
        "Name in `_stateattrs` what it counts or keeps; what `before_fit` reads from the model is not yet that of the "
        "state."
    ),
    "stands in one place": "Give it an `order` of its own, or a law: `run_after = …`.",
    "gives the same numbers wherever": "Give it an `order` of its own, or a law: `run_after = …`.",
    "trains beside": "Refuse it in `before_fit` with a ValueError, if the two cannot go together.",
    "moves no": "It says `reads_only = True`: change nothing, draw within `preserved_randomness()`; or do not say so.",
}


@dataclass(frozen=True)
class Verdict:
    """What was found about one promise."""

    promise: str
    broken: dict[str, list[str]] = field(default_factory=dict)  # what -> where
    left_out: str | None = None  # why it was not checked

    @property
    def mark(self) -> str:
        """`kept`, `BROKEN` or `-`."""
        return BROKEN if self.broken else KEPT if self.left_out is None else LEFT_OUT

    def __str__(self) -> str:
        reason = "" if self.left_out is None else f": {self.left_out}"
        lines = [f"  {self.mark:<6}  {self.promise}{reason}"]
        for what, places in self.broken.items():
            lines.append(f"{_INDENT}{what}: {shortened(places)}")
            lines += [f"{_INDENT}→ {remedy}" for remedy in remedies_for(what)]
        return "\n".join(lines)


def remedies_for(what: str) -> list[str]:
    """What to do about it, if that is known."""
    return [remedy for begin, remedy in REMEDIES.items() if what.startswith(begin)][:1]


def said(error: BaseException | None) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= LONGEST else text[:LONGEST] + ' …'}"


def shortened(places: list[str]) -> str:
    """The first few, and how many there are besides."""
    more = f"; and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return "; ".join(places[:SHOWN]) + more


@dataclass(frozen=True, repr=False)
class CallbackReport:
    """What `check_callback` found."""

    callback: str  # its class
    n_runs: int  # fits and validations that were run
    seconds: float
    verdicts: tuple[Verdict, ...]
    host_reads: float | None = None  # times per training batch that it waits for the device; None: not counted

    @property
    def broken(self) -> dict[str, list[str]]:
        """What is broken, and where."""
        return {what: places for verdict in self.verdicts for what, places in verdict.broken.items()}

    def __str__(self) -> str:
        broken = sum(bool(verdict.broken) for verdict in self.verdicts)
        many = f"breaks {broken} of {len(self.verdicts)} promises" if broken else "keeps every promise"
        lines = [f"{self.callback} {many} ({self.n_runs} runs, {self.seconds:.1f} s)", *map(str, self.verdicts)]
        if self.host_reads is not None:
            lines.append(f"  {self.host_reads:<6g}  host reads per training batch")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)
