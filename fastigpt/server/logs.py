"""The server's log: one JSON object a line, on standard error. No line holds a prompt, a picture or an address."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

_USUAL = vars(logging.makeLogRecord({})).keys() | {"message", "asctime", "color_message", "taskName"}


class JsonLines(logging.Formatter):
    """time, level, event, and whatever else a record was given."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in _USUAL},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure() -> None:
    """Our lines, and what uvicorn warns of."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("fastigpt.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
