"""`python -m tests.mutation`: break lines of the package one at a time, and report which faults the tests find.

The mutants are chosen by a seed, so that a run can be repeated and continued: a mutant whose result is in the file of
results is not run again. Mutants that change nothing are listed in equivalents.json with a reason.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from tests.mutation.run import chosen, run


def main() -> None:
    """Run mutants and print a summary as JSON; the exit code is 1 if one survived or timed out."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="number of mutants (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="trtllm_ct/", help="beginning of the path of the files to mutate")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no mutant after this time")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for the tests of one mutant")
    parser.add_argument("--results", type=Path, default=Path("mutation-results.jsonl"))
    options = parser.parse_args()
    mutants = chosen(options.count, options.seed, options.only)
    entries = run(mutants, seconds=options.seconds, timeout=options.timeout, results=options.results)
    open_ones = [entry["key"] for entry in entries if entry["status"] in {"survived", "timeout"}]
    counts = Counter(entry["status"] for entry in entries) | Counter(left=len(mutants) - len(entries))
    print(json.dumps({"counts": counts, "survived or timed out": open_ones}, indent=2))
    raise SystemExit(bool(open_ones))


if __name__ == "__main__":
    main()
