"""python -m benchmarks.acceptance: see the package."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import benchmarks.acceptance
from benchmarks.acceptance import dry
from benchmarks.acceptance.building import ROOT
from benchmarks.acceptance.report import report, summary
from benchmarks.acceptance.results import Results, Rows
from benchmarks.acceptance.stages import DRY_LIMIT, LIMIT, RUNS, STAGES, run_stage, why_no_extension, why_not
from benchmarks.acceptance.tables import carry_over, why_no_table

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "baselines")]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.acceptance",
        description=benchmarks.acceptance.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="?", choices=RUNS, default="first")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chosen", type=Path, help="what the first run wrote; default: --out")
    parser.add_argument("--only", nargs="+", choices=STAGES, help="stages to run in place of a run's")
    parser.add_argument("--dry-run", action="store_true", help="on a stand-in for a GPU, with small sizes")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--compile", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    if options.compile:
        compiled = STAGES[options.compile].compiled
        assert compiled is not None
        with dry.rehearsal():
            compiled(*options.share)
        return 0
    if options.stage:
        with dry.rehearsal():
            STAGES[options.stage].run(out, Rows(out, options.stage))
        return 0
    if options.dry_run:
        dry.begin()
    wanted = list(options.only or RUNS[options.run])
    chosen = (options.chosen or out).resolve()
    reason = why_not()
    if reason is None and options.run == "second":
        reason = why_no_table(family(), chosen)
    if reason is not None:
        print(f"nothing was run: {reason}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)

    def prepare(site: Path) -> None:
        folder = dry.prepared_folder(site)
        if options.run != "first" and why_no_table(family(), chosen) is None:
            carry_over(family(), chosen, out, folder)

    return run(out, wanted, prepare)


def family() -> str:
    import torch

    from fastigpt.kernels import launch

    return dry.FAMILY if dry.dry() else launch.family(torch.device("cpu" if launch.interpreting() else "cuda"))


def run(out: Path, wanted: list[str], prepare: Callable[[Path], None] = lambda site: None) -> int:
    """Runs these stages one after another; 0 if all were well. prepare: called first, with the folder where "build"
    puts what it cannot install."""
    from fastigpt.kernels import launch

    begun, found = time.monotonic(), Results(out)
    limit = DRY_LIMIT if dry.dry() else LIMIT
    if launch.interpreting() and not dry.dry():
        wanted = [name for name in wanted if STAGES[name].interpreted]
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        prepare(site)
        missing: str | None = None
        for name in wanted:
            left = limit - (time.monotonic() - begun)
            if missing is None and name != "build":
                missing = why_no_extension(site) or ""
            if left < 10:
                result: dict[str, object] = not_run(name, "no time was left")
            elif name != "build" and missing:
                result = not_run(name, f"not run, the extension is missing ({missing}): --only build")
            else:
                result = run_stage(name, out, site, left if dry.dry() else min(STAGES[name].seconds, left))
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
