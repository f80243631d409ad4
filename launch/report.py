"""Make a report from the files of finished runs.

`python launch/report.py --run runs/quickstart` writes report.html and report/*.png into the run folder and prints the
table; `python launch/report.py --compare runs/a-s0 runs/a-s1 runs/b-s0 --out comparison.md` writes one table over runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from wsss_dist.command import Parser, run_command
    from wsss_dist.report import build_comparison, build_report, load_result, results_text
except ModuleNotFoundError as error:
    sys.exit(f"error: '{error.name}' is not installed in {sys.executable}; run `make setup`, or `pip install -e .`")


def main() -> int:
    return run_command(_report)


def _report() -> int:
    parser = Parser(description="Make a report from the files of finished runs.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="a run folder")
    what.add_argument("--compare", type=Path, nargs="+", metavar="RUN", help="several run folders")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"), help="for --compare: a .html or .md file")
    args = parser.parse_args()
    if args.run:
        path = build_report(args.run)
        print(results_text(load_result(args.run)))
    else:
        path = build_comparison(args.compare, args.out)
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
