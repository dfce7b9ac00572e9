"""Feed the readers many damaged files: python tests/fuzz [--cases 100000] [--start 0]. Exit code 1 if one fell."""

import argparse
import faulthandler
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from fuzz.corpus import SLOW_SECONDS, TARGETS, try_case


def main() -> int:
    """Run every target's share of the cases, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", choices=TARGETS)
    arguments = parser.parse_args()
    faults: list[str] = []
    total = 0
    print(f"{'reader':<16}{'cases':>9}{'read':>9}{'refused':>9}{'faults':>8}{'seconds':>9}")
    scratch = Path(tempfile.mkdtemp(prefix="guardloop-fuzz-"))
    for name, target in TARGETS.items():
        if arguments.only not in (None, name):
            continue
        cases = arguments.cases if arguments.only else -(-arguments.cases * target.share // 1000)
        seen: Counter[str] = Counter()
        started = time.monotonic()
        for number in range(arguments.start, arguments.start + cases):
            faulthandler.dump_traceback_later(SLOW_SECONDS * 6, exit=True)  # a hang outside Python
            try:
                seen[try_case(name, number, scratch)] += 1
            except AssertionError as error:
                seen["fault"] += 1
                faults.append(str(error))
        faulthandler.cancel_dump_traceback_later()
        total += cases
        seconds = time.monotonic() - started
        row = f"{name:<16}{cases:>9,}{seen['read']:>9,}{seen['refused']:>9,}{seen['fault']:>8,}{seconds:>9.0f}"
        print(row, flush=True)
    print(f"{total:,} cases, {len(faults)} faults" + "".join(f"\n  {fault}" for fault in faults[:40]))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
