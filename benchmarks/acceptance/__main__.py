"""python -m benchmarks.acceptance: see the package."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import benchmarks.acceptance
from benchmarks.acceptance.building import ROOT
from benchmarks.acceptance.report import report, summary
from benchmarks.acceptance.results import Results, Rows
from benchmarks.acceptance.stages import LIMIT, STAGES, run_stage, why_no_extension, why_not

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "baselines")]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.acceptance",
        description=benchmarks.acceptance.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run; all report")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--compile", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    if options.compile:
        compiled = STAGES[options.compile].compiled
        assert compiled is not None
        compiled(*options.share)
        return 0
    if options.stage:
        STAGES[options.stage].run(out, Rows(out, options.stage))
        return 0
    reason = why_not()
    if reason is not None:
        print(f"nothing was run: {reason}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    return run(out, options.only)


def run(out: Path, wanted: list[str]) -> int:
    """Runs these stages one after another; 0 if all were well."""
    from fastigpt.kernels import launch

    begun, found = time.monotonic(), Results(out)
    if launch.interpreting():
        wanted = [name for name in wanted if STAGES[name].interpreted]
    with tempfile.TemporaryDirectory() as site:
        missing: str | None = None
        for name in wanted:
            left = LIMIT - (time.monotonic() - begun)
            if missing is None and name != "build":
                missing = why_no_extension(Path(site)) or ""
            if left < 10:
                result: dict[str, object] = not_run(name, "no time was left")
            elif name != "build" and missing:
                result = not_run(name, f"not run, the extension is missing ({missing}): --only build")
            else:
                result = run_stage(name, out, Path(site), min(STAGES[name].seconds, left))
            print({key: value for key, value in result.items() if key != "log"}, flush=True)
            # A stage that is run again takes the place of its last run.
            found.set("stages", [*(row for row in found.of("stages") if row["stage"] != name), result])
            report(out, found.of("stages"))
    rows = [row for row in found.of("stages") if row["stage"] in wanted]
    print("\n" + summary(out, rows))
    return 0 if all(row["ok"] for row in rows) else 1


def not_run(stage: str, reason: str) -> dict[str, object]:
    return {"stage": stage, "ok": False, "seconds": 0.0, "result": reason}


if __name__ == "__main__":
    sys.exit(main())
