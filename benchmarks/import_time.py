"""What `import learnloop` takes over `import torch`: medians of fresh processes, one of each in turn."""

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

PROCESSES = 20
LATE = ("matplotlib", "fastprogress")  # imported by the function that needs them
TIMED = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
LOADED = "import sys, learnloop; print(*sys.modules)"


def seconds(module: str) -> float:
    """Of importing `module` in a fresh process; starting python is not in it."""
    return float(output_of(TIMED.format(module)))


def output_of(source: str) -> str:
    return subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True).stdout


def loaded_too_early() -> list[str]:
    """Which of LATE a plain `import learnloop` brings along."""
    loaded = output_of(LOADED).split()
    return [name for name in LATE if name in loaded]


def measure(processes: int) -> dict[str, Any]:
    """Medians in seconds, and the median of the ratios between neighbours with its quartiles."""
    seconds("torch"), seconds("learnloop")  # the first one of each reads from the disk and compiles
    pairs = [(seconds("torch"), seconds("learnloop")) for _ in range(processes)]
    ratios = [ours / theirs for theirs, ours in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "torch": statistics.median(theirs for theirs, _ in pairs),
        "learnloop": statistics.median(ours for _, ours in pairs),
        "ratio": statistics.median(ratios),
        "quartiles": [low, high],
        "processes": processes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Times `import learnloop` beside `import torch`.")
    parser.add_argument("--processes", type=int, default=PROCESSES, metavar="N", help="of each, default 20")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    early = loaded_too_early()
    if early:
        sys.exit(f"`import learnloop` imports {' and '.join(early)}, which only drawing should.")
    found = measure(options.processes)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    low, high = found["quartiles"]
    print(f"import torch      {found['torch']:.3f} s")
    print(f"import learnloop  {found['learnloop']:.3f} s")
    print(f"ratio             {found['ratio']:.3f}, quartiles {low:.3f} to {high:.3f}, {options.processes} of each")


if __name__ == "__main__":
    main()
