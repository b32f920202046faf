"""Run the zoo, and print it as a table.

    python -m benchmarks.zoo [names] [--backends xnnpack,inductor] [--file zoo.jsonl] [--profile] [--table]

A row (a net, a backend, a recipe) is one line of JSON in the file. Rows that are there are not run again, so a run that
was stopped goes on; delete a line to run it anew. A net that ended the process is noted, and left out the next time.
`--table` prints docs/zoo.md's tables from the file and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo import by_hand, from_configs  # noqa: F401  # they enter their nets
from benchmarks.zoo.net import NETS
from benchmarks.zoo.run import BACKENDS, rows
from benchmarks.zoo.table import tables


def stored(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def said(row: dict[str, Any]) -> str:
    head = f"{row['net']}, {row['backend']} {row['recipe']}: "
    if "error" in row:
        return f"{head}{'typed' if row.get('typed') else 'UNTYPED'} {row['error'][:160]}"
    speed = f", {row['speed']:.2f}x" if "speed" in row else ""
    return f"{head}{row['sqnr']:.1f} dB, program {row['verified']:.1f} dB, {row['passed']}{speed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="nets; all when left out")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--file", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="where the time of slow programs goes; takes longer")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(tables(stored(arguments.file)))
        return
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    started = {(row["net"], row["backend"]) for row in stored(arguments.file) if "started" in row}
    known = {(row["net"], row["backend"], row["recipe"]) for row in stored(arguments.file) if "recipe" in row}
    jobs = [(name, backend) for backend in arguments.backends.split(",") for name in arguments.names or NETS]
    for number, (name, backend) in enumerate(jobs, 1):
        left = [recipe for recipe in NETS[name].recipes if (name, backend, recipe) not in known]
        if not left:
            continue
        if (name, backend) in started and len(left) == len(NETS[name].recipes):
            for recipe in left:
                keep(arguments.file, {"net": name, "family": NETS[name].family, "backend": backend, "recipe": recipe,
                                      "error": "ended the process", "typed": False})  # fmt: skip
            continue
        keep(arguments.file, {"net": name, "backend": backend, "started": True})
        for row in rows(NETS[name], backend, left, arguments.profile):
            keep(arguments.file, row)
            print(f"[{number}/{len(jobs)}] {said(row)}", file=sys.stderr, flush=True)


main()
