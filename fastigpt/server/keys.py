"""API keys. The server holds their SHA-256 digests only: a file of them, one a line, gives nobody a key."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from pathlib import Path

_LINE = re.compile(r"([0-9a-fA-F]{64})(?:\s.*)?")
_LIMIT = 1 << 20  # bytes of a file of digests


class Keys:
    """digests: SHA-256 of each key."""

    def __init__(self, digests: frozenset[bytes]) -> None:
        self._digests = digests

    @classmethod
    def read(cls, path: Path) -> Keys:
        """A file of 64 hexadecimal digits a line, behind which a name may stand; lines that are empty or begin with #
        count for nothing. Raises ValueError naming the line that is something else."""
        try:
            if path.stat().st_size > _LIMIT:
                raise ValueError(f"it is larger than {_LIMIT} bytes")
            lines = path.read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ValueError(f"--keys {path}: {getattr(error, 'strerror', None) or error}") from None
        digests = set()
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            found = _LINE.fullmatch(line.strip())
            if found is None:
                raise ValueError(
                    f"--keys {path}, line {number}: expected the SHA-256 of a key, 64 hexadecimal digits, and a name "
                    "behind it if you like (`fastigpt serve --make-key` prints such a line)"
                )
            digests.add(bytes.fromhex(found[1]))
        if not digests:
            raise ValueError(f"--keys {path} holds no digest")
        return cls(frozenset(digests))

    def allow(self, authorization: str | None) -> bool:
        """Whether an Authorization header holds one of the keys. Takes the same time whichever it is."""
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def make_key() -> tuple[str, str]:
    """A new key, and its digest."""
    key = f"fg-{secrets.token_urlsafe(32)}"
    return key, hashlib.sha256(key.encode()).hexdigest()
