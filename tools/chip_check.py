"""Checks the chip that is attached: is it right, how fast, the same to the last bit? The same as CHECK in 02.

    uv run tools/chip_check.py                       --quick: 5 minutes on a chip, 12 the first time; a laptop one
    uv run tools/chip_check.py --all                 all sizes and microbatches, as long as it takes
    uv run tools/chip_check.py --only attention,bits
    uv run tools/chip_check.py --table               what others have measured: docs/chips/

Prints a table and leaves chip_check.json, which holds nothing private. Ctrl-C at any point leaves what is done.
"""

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import onechip  # noqa: F401  (before jax)

# isort: split
import jax

from onechip.check import PARTS, check_chip, choose_parts_of, resume_in_child
from onechip.check_report import FAILED, STOPPED, WRONG
from onechip.check_sizes import sizes_for
from onechip.machine import prepare
from onechip.measured import CHIP_FILES, describe_measured, read_measured


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="one microbatch a model, within the time (the default)")
    which.add_argument("--all", action="store_true", help="every size, without a limit of time")
    which.add_argument(
        "--table", nargs="?", const=str(CHIP_FILES), metavar="FOLDER", help="print docs/chips as a table"
    )
    which.add_argument("--resume", nargs=2, help=argparse.SUPPRESS)  # what a new process does: checkpoint, attention
    parser.add_argument("--only", default="", metavar="PARTS", help=f"any of {', '.join(PARTS)}")
    parser.add_argument("--out", default="chip_check.json", help="the file to write (default: chip_check.json)")
    return parser.parse_args()


def main():
    prepare()
    asked = parse()
    if asked.table:
        return print(describe_measured(read_measured(asked.table)))
    choose_parts_of(asked.only)  # a wrong name is refused before anything is loaded
    train = importlib.import_module("02_train")
    sizes = sizes_for(jax.local_devices()[0].platform, asked.all)
    given = train.what_to_check(sizes.preset)
    if asked.resume:
        return resume_in_child(given, sizes, *asked.resume)
    found = check_chip(given, sizes, asked.only, asked.out)
    statuses = {row["status"] for row in found["rows"]}
    sys.exit(130 if STOPPED in statuses else bool(statuses & {WRONG, FAILED}))


if __name__ == "__main__":
    main()
