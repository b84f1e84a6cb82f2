"""Seconds of `looseleaf --help` and `looseleaf list`, next to a Python that does nothing. Interleaved, medians."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {"python -c pass": ["-c", "pass"], "looseleaf --help": ["-m", "looseleaf.cli.main", "--help"],
            "looseleaf list": ["-m", "looseleaf.cli.main", "list"]}


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(12):
        for name, options in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *options], stdout=subprocess.DEVNULL, check=True)
            if turn:  # the first turn fills the file cache and the remembered import checks
                seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        print(f"{name:20} median {statistics.median(values):.3f} s, highest {max(values):.3f} s")


if __name__ == "__main__":
    main()
