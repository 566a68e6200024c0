"""What `import learnloop` takes over `import torch`, and what the peers take: medians of fresh processes, in turn."""

import argparse
import os
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import overhead
import peers
from machine import cpu, versions

PROCESSES = 20
LATE = ("matplotlib", "fastprogress")  # imported by the function that needs them
TIMED = """
import time
start = time.perf_counter()
import {}
print(time.perf_counter() - start)
try:
    lines = open("/proc/self/status").read().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmRSS")))
except (OSError, StopIteration):
    print("nan")
"""
LOADED = "import sys, learnloop; print(*sys.modules)"


class Import(NamedTuple):
    """Of one module in a fresh process: seconds, without the start of python, and the MB of the process after it."""

    seconds: float
    memory: float


def imported(module: str) -> Import:
    seconds, kb = output_of(TIMED.format(module)).split()[-2:]
    return Import(float(seconds), float(kb) / 1024)


def output_of(source: str) -> str:
    """What a fresh process prints, which finds modules compiled from the second time on, as users do."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-W", "ignore", "-c", source]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


def loaded_too_early() -> list[str]:
    """Which of LATE a plain `import learnloop` brings along."""
    loaded = output_of(LOADED).split()
    return [name for name in LATE if name in loaded]


def modules(with_peers: bool) -> tuple[dict[str, str], list[str]]:
    """What is imported, by name; and the peers that do not import by themselves. All are read from the disk once."""
    found = {"torch": "torch", "learnloop": "learnloop"}
    found |= {peer.name: peer.module for peer in peers.PEERS} if with_peers else {}
    failing = []
    for name, module in found.items():
        try:
            imported(module)
        except subprocess.CalledProcessError:
            failing.append(name)
    return {name: module for name, module in found.items() if name not in failing}, failing


def measure(processes: int, with_peers: bool = True) -> dict[str, Any]:
    """Medians, and the median of the ratios to torch beside it with its quartiles."""
    found, failing = modules(with_peers)
    runs: dict[str, list[Import]] = {name: [] for name in found}
    for _ in range(processes):
        for name, module in found.items():
            runs[name].append(imported(module))
    return {
        "date": date.today().isoformat(),
        "cpu": cpu(),
        "versions": {**versions("learnloop"), **_versions(runs)},
        "processes": processes,
        "rows": [row_of(name, runs[name], runs["torch"]) for name in runs],
        "not measured": failing,
    }


def _versions(names: Any) -> dict[str, str]:
    return {peer.package: peer.version for peer in peers.PEERS if peer.name in names}


def row_of(name: str, own: list[Import], torch: list[Import]) -> dict[str, Any]:
    ratios = [a.seconds / b.seconds for a, b in zip(own, torch, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "name": name,
        "seconds": statistics.median(one.seconds for one in own),
        "ratio": middle,
        "quartiles": [low, high],
        "memory": statistics.median(one.memory for one in own),
    }


def as_markdown(found: dict[str, Any]) -> str:
    names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    processes = f"{found['processes']} processes of each"
    lines = ["# What imports take", "", f"{found['date']}; {found['cpu']}; {names}; {processes}."]
    lines += ["", "| import | seconds | ratio to torch | quartiles | MB |", "|---|---:|---:|---:|---:|"]
    for row in found["rows"]:
        quartiles = f"{row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f}"
        lines.append(
            f"| {row['name']} | {row['seconds']:.2f} | {row['ratio']:.2f} | {quartiles} | {row['memory']:.0f} |"
        )
    lines += [f"\nNot measured: {name}, which does not import here by itself." for name in found["not measured"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Times `import learnloop` beside `import torch` and the peers.")
    parser.add_argument("--processes", type=int, default=PROCESSES, metavar="N", help="of each, 2 or more; default 20")
    parser.add_argument("--quick", action="store_true", help="no peers, no files unless --out says where")
    parser.add_argument("--json", action="store_true", help="print JSON, no table")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the page and the JSON go")
    options = parser.parse_args()
    early = loaded_too_early()
    if early:
        sys.exit(f"`import learnloop` imports {' and '.join(early)}, which only drawing should.")
    found = measure(options.processes, with_peers=not options.quick)
    overhead.publish("import_time", found, as_markdown(found), options)


if __name__ == "__main__":
    main()
