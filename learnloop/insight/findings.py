"""What checks found: a verdict, a number and what to do, each by its name."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from textwrap import wrap

from learnloop import html

#: Verdicts. A fault makes the training wrong, a warning makes it worse; what could not run ended with an error.
OK, WARNING, FAULT, NOT_APPLICABLE, FAILED = "ok", "warning", "fault", "not applicable", "could not run"

WIDTH, INDENT = 100, 22  # characters of a line of text, and before what was found


class NotApplicable(Exception):
    """Raised by a check that has nothing to look at; its text says why."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    verdict: str  # 'ok', 'warning', 'fault', 'not applicable' or 'could not run'
    text: str  # what was seen
    number: float | None = None  # the number behind the verdict; None where there is none
    advice: str = ""  # what to do; empty where there is nothing to do
    error: Exception | None = field(default=None, repr=False)  # why it could not run

    @property
    def is_good(self) -> bool:
        return self.verdict in (OK, NOT_APPLICABLE)


class CheckReport:
    """What `learn.check()` found; True as a bool where nothing is wrong. `report["loss at start"].verdict`."""

    def __init__(self, findings: dict[str, Finding], seconds: float = 0.0):
        self.findings, self.seconds = findings, seconds

    @property
    def problems(self) -> dict[str, Finding]:
        """Faults, warnings and what could not run, by name."""
        return {name: f for name, f in self.findings.items() if not f.is_good}

    def __bool__(self) -> bool:
        return not self.problems

    def __getitem__(self, name: str) -> Finding:
        if name not in self.findings:
            near = get_close_matches(name, self.findings, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise KeyError(f"no check {name!r} in this report; there is {', '.join(self.findings)}.{hint}")
        return self.findings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def _title(self) -> str:
        n = len(self.problems)
        found = f"{n} of {len(self)} checks found something" if n else f"{len(self)} checks, nothing found"
        return f"{found}, in {self.seconds:.1f} s"

    def __str__(self) -> str:
        indent = " " * INDENT
        lines = [self._title()]
        for name, found in self.findings.items():
            first, *rest = wrap(f"{found.verdict}: {found.text}", WIDTH - INDENT) or [found.verdict]
            lines += [f"{name:<{INDENT}}{first}", *(indent + line for line in rest)]
            lines += [f"{indent}→ {line}" if i == 0 else f"{indent}  {line}" for i, line in enumerate(_advice(found))]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(name, f.verdict, f.number, f.text, f.advice) for name, f in self.findings.items()]
        return html.table(rows, ("Check", "Verdict", "Number", "Found", "What to do"), self._title())


def _advice(found: Finding) -> list[str]:
    return wrap(found.advice, WIDTH - INDENT - 2)
