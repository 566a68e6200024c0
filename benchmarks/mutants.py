"""Changes `learnloop/loop/` in one place at a time, runs the tests that reach the place, and lists what they miss.

`mutations.py` says what is changed, `mutant_tests.py` runs the tests; `mutants.toml` says why some mutants may survive.
"""

import argparse
import json
import math
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from mutant_tests import PACKAGE, ROOT, Outcome, outcomes
from mutations import Mutant, changed_lines, mutants_of, sampled

RESULTS = ROOT / "benchmarks" / "results"
REASONS = ROOT / "benchmarks" / "mutants.toml"

Found = dict[str, Any]  # `what` was tried, `counts` by file of mutants and of those caught, and the `survivors`


def counted(results: Iterable[Outcome], counts: dict[str, list[int]]) -> Found:
    """Mutants and caught ones by file, added to those of `counts`; and the survivors."""
    survivors = []
    for mutant, caught_by, before, after in results:
        of_file = counts.setdefault(mutant.file, [0, 0])
        of_file[0] += 1
        of_file[1] += caught_by is not None
        if caught_by is None:
            place = {"file": mutant.file, "line": mutant.line, "operator": mutant.operator}
            survivors.append({**place, "before": before, "after": after})
    return {"counts": counts, "survivors": survivors}


def tried_again(former: Found, results: Callable[[list[Mutant]], Iterable[Outcome]]) -> Found:
    """An earlier run with the present end of what survived without a reason; one whose line has gone counts no more."""
    known = [s for s in former["survivors"] if reason_of(s)]
    new = [s for s in former["survivors"] if not reason_of(s)]
    files = [s["file"] for s in new]
    counts = {file: [n - files.count(file), caught] for file, (n, caught) in former["counts"].items()}
    found = counted(results(where_they_lie(new)), counts)
    survivors = sorted([*known, *found["survivors"]], key=lambda s: (s["file"], s["line"]))
    return {"what": former["what"], "counts": found["counts"], "survivors": survivors}


def where_they_lie(survivors: list[dict[str, Any]]) -> list[Mutant]:
    """Survivors of an earlier run as mutants of the present modules."""
    wanted = {(s["file"], s["operator"], s["before"], s["after"]) for s in survivors}
    now = []
    for file in sorted({s["file"] for s in survivors}):
        source = (ROOT / file).read_text()
        lines = [line.strip() for line in source.splitlines()]
        texts = {before for name, _, before, _ in wanted if name == file}
        near = [m for m in mutants_of(file, source) if texts.intersection(lines[m.line - 1 : m.last_line])]
        now += [m for m in near if (file, m.operator, *changed_lines(source, m.code(source))) in wanted]
    return now


def reasons() -> dict[tuple[str, str, str], str]:
    """Why a mutant may survive, by file, line and what it became: so that the reason stays where lines move."""
    entries = tomllib.loads(REASONS.read_text()).get("survivor", [])
    return {(f"{PACKAGE}/{e['file']}", e["line"], e["becomes"]): e["reason"] for e in entries}


def reason_of(survivor: dict[str, Any]) -> str | None:
    return reasons().get((survivor["file"], survivor["before"], survivor["after"]))


def page(found: Found, head: str) -> str:
    """Per module the rate, then each survivor with its reason."""
    counts = {file.removeprefix(f"{PACKAGE}/"): count for file, count in found["counts"].items()}
    counts["**all**"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows = [f"| {file} | {n} | {caught} | {100 * caught / n:.1f} % |" for file, (n, caught) in counts.items() if n]
    table = ["| module | mutants | caught | |", "|---|---:|---:|---:|", *rows]
    lines = ["# Mutants of learnloop/loop", "", head, "", *table, "", "## Those that survive", ""]
    for s in found["survivors"]:
        change = f"{_code(s['before'])} → {_code(s['after'])}"
        lines.append(f"- `{s['file']}:{s['line']}` {change}: {reason_of(s) or '**new**'}")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def written(found: Found, folder: Path) -> str:
    """Writes `mutants.json` and `mutants.md`; returns the latter."""
    from machine import cpu, versions  # imports learnloop, which the processes of the mutants must do by themselves

    used = ", ".join(f"{k} {v}" for k, v in versions("pytest", "cosmic-ray").items())
    text = page(found, f"{date.today()}; {cpu()}; {used}; {found['what']}.")
    (folder / "mutants.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "mutants.md").write_text(text)
    return text


def tried_anew(options: argparse.Namespace, results: Callable[[list[Mutant]], Iterable[Outcome]]) -> Found:
    """All mutants, or a sample of them."""
    began = time.perf_counter()
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / PACKAGE).glob(f"{options.module or '*'}.py"))
    every = {file: mutants for file in files if (mutants := mutants_of(file, (ROOT / file).read_text()))}
    chosen = sampled(every, options.sample, options.seed, options.beyond)
    found = counted(results(chosen), {})
    drawn = f"{len(chosen)} of {sum(map(len, every.values()))} mutants, seed {options.seed}"
    return {"what": f"{drawn}, {(time.perf_counter() - began) / 60:.0f} min", **found}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints each mutant as it comes, and writes the page; 1 if one survives without a reason."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="so many of all mutants, by chance; by default each")
    parser.add_argument("--beyond", type=int, default=0, help="leaves out what a sample of so many had")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", help="the mutants of one module, such as `spans`")
    parser.add_argument("--again", action="store_true", help="what the page has without a reason, anew")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of tests beside the mirror file")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    results = partial(outcomes, seconds=options.seconds, jobs=options.jobs)
    former = options.out / "mutants.json"
    found = tried_again(json.loads(former.read_text()), results) if options.again else tried_anew(options, results)
    text = written(found, options.out)
    print(text[: text.index("##")])
    new = [s for s in found["survivors"] if reason_of(s) is None]
    print(f"{len(found['survivors'])} survive, {len(new)} of them without a reason")
    return int(bool(new))


if __name__ == "__main__":
    sys.exit(main())
