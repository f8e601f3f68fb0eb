"""What a run found, on disk after every row, so that whoever is stopped loses none."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path


class Results:
    """DIR/results.json: {stage: rows}, written whole whenever a row is added."""

    def __init__(self, out: Path) -> None:
        self.path = out / "results.json"

    def read(self) -> dict[str, list[dict]]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def of(self, stage: str) -> list[dict]:
        return self.read().get(stage, [])

    def set(self, stage: str, rows: list[dict]) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**self.read(), stage: rows}, indent=1) + "\n")
        temporary.replace(self.path)

    def machine(self) -> dict:
        """The limits this run is measured against."""
        rows = self.of("machine")
        if not rows:
            raise RuntimeError("the stage 'machine' must run first: every figure stands beside its limits")
        return rows[0]


class Rows:
    """What one stage found."""

    def __init__(self, out: Path, stage: str) -> None:
        self.out, self.stage, self.results = out, stage, Results(out)
        self.rows: list[dict] = []
        self.failed: list[str] = []
        self.results.set(stage, [])

    def add(self, **row: object) -> None:
        self.put([*self.rows, row])
        print(row, flush=True)

    def put(self, rows: list[dict]) -> None:
        self.rows = rows
        self.results.set(self.stage, rows)

    def attempt(self, work: str, measure: Callable[[], object]) -> None:
        """Runs what adds rows; if it fails that becomes a row, and the rest of the stage still runs."""
        try:
            measure()
        except Exception:
            self.failed.append(traceback.format_exc())
            self.add(work=work, error=self.failed[-1][-1500:])

    def finish(self) -> None:
        if self.failed:
            raise RuntimeError(f"{len(self.failed)} parts of {self.stage} failed:\n" + "\n".join(self.failed))
