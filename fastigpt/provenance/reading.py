"""Reads what a picture says of its origin, from files that anyone may have made: nothing is fetched, and nothing in
them counts for more than was checked. A signature by somebody unknown proves that nothing was changed since, not who
signed."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any, BinaryIO

import c2pa

from fastigpt.provenance.facts import PARAMETER
from fastigpt.provenance.settings import context

_CHANGED = {"assertion.dataHash.mismatch", "assertion.hashedURI.mismatch", "assertion.boxesHash.mismatch"}
_UNKNOWN_ISSUER = "signingCredential.untrusted"
_LONGEST = 200  # characters of anything that a file says


class State(StrEnum):
    """TRUSTED: unchanged, by an issuer whose root was given. VALID: unchanged, the issuer unknown. CHANGED: since it
    was signed. INVALID: the record is against the rules, `reason` says how. NONE: no record. UNREADABLE: no picture, or
    a damaged one."""

    TRUSTED = "trusted"
    VALID = "valid"
    CHANGED = "changed"
    INVALID = "invalid"
    NONE = "none"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Report:
    """issuer: what the certificate calls its holder. facts: what the picture says, of these: made ("created" or
    "edited"), by, model, seed, index, count, parent. Both are empty unless the record is valid: else nobody vouches
    for them. All text is printable, and short."""

    state: State
    reason: str = ""
    issuer: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


def read(picture: bytes | BinaryIO, *, trust: str | None = None) -> Report:
    """What a picture's file says of its origin, and whether that holds. trust: certificates of roots, PEM."""
    stream = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    try:
        with c2pa.Reader(None, stream, context=_context(trust)) as reader:
            return _report(json.loads(reader.json()))
    except c2pa.C2paError.ManifestNotFound:
        return Report(State.NONE)
    except c2pa.C2paError as error:
        message = printable(str(error))
        if message.startswith("Remote:"):
            return Report(State.NONE, "the file names a record elsewhere, and nothing is fetched")
        return Report(State.UNREADABLE, message)


@lru_cache(maxsize=4)
def _context(trust: str | None) -> Any:
    return context(trust=trust)


def _report(store: Mapping[str, Any]) -> Report:
    state = str(store.get("validation_state"))
    if state not in ("Valid", "Trusted"):
        results = store.get("validation_results") or {}
        failures = [failure for failure in _failures(results) if failure.get("code") != _UNKNOWN_ISSUER]
        if any(failure.get("code") in _CHANGED for failure in failures):
            return Report(State.CHANGED)
        told = [f"{failure.get('code')} ({failure.get('explanation')})" for failure in failures]
        return Report(State.INVALID, printable("; ".join(told) or f"its state is {state}"))
    manifest = store["manifests"][store["active_manifest"]]
    issuer = printable(manifest.get("signature_info", {}).get("issuer") or "")
    return Report(State.TRUSTED if state == "Trusted" else State.VALID, issuer=issuer, facts=_facts(manifest))


def _failures(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = list((results.get("activeManifest") or {}).get("failure") or [])
    for delta in results.get("ingredientDeltas") or []:
        found += (delta.get("validationDeltas") or {}).get("failure") or []
    return found


def _facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    generator: Mapping[str, Any] = next(iter(manifest.get("claim_generator_info") or []), {})
    found["by"] = printable(f"{generator.get('name') or ''} {generator.get('version') or ''}".strip())
    for action in _actions(manifest):
        kind = str(action.get("action"))
        if kind in ("c2pa.created", "c2pa.edited"):
            found["made"] = kind.removeprefix("c2pa.")
            parameters = action.get("parameters")
            for name in ("model", "seed", "index", "count"):
                value = parameters.get(PARAMETER + name) if isinstance(parameters, dict) else None
                if isinstance(value, (str, int)):
                    found[name] = printable(str(value))
    parents = [_parent(i) for i in manifest.get("ingredients") or [] if isinstance(i, dict)]
    if parents:
        found["parent"] = parents[0] if len(parents) == 1 else f"{len(parents)} pictures"
    return {name: value for name, value in found.items() if value}


def _actions(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    assertions = manifest.get("assertions") or []
    data = [a.get("data") for a in assertions if str(a.get("label")).startswith("c2pa.actions")]
    actions = [d.get("actions") for d in data if isinstance(d, dict)]
    return [action for some in actions if isinstance(some, list) for action in some if isinstance(action, dict)]


def _parent(ingredient: Mapping[str, Any]) -> str:
    what = printable(str(ingredient.get("format") or "a picture"))
    return f"{what} {'with' if ingredient.get('active_manifest') else 'without'} a record of its own"


def printable(text: str) -> str:
    """One line of what a stranger wrote, at most so long, that does nothing to a terminal."""
    shown = "".join(c if c.isprintable() else " " if c.isspace() else f"\\x{ord(c):02x}" for c in text)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 3] + "..."
