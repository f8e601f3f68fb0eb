"""A job is a directory:

    job.json                   what is drawn; written once
    prompts.<hash>.txt         one prompt a line, if each image has its own
    shards/000012.<hash>.npy   the tokens of a shard, uint16 [m, H·W], named after their contents
    shards/000012.json         its record, written behind it: record present = committed
    claims/000012.json         who is drawing a shard now
    manifest.json              when all shards were read and found right: complete

The first record of a shard stays. Who draws a shard that somebody else has committed meanwhile throws his own away; on
the same kind of device they are equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastigpt.jobs.parameters import FILE, Parameters, lines
from fastigpt.jobs.records import Damaged, Drawer, Manifest, Record
from fastigpt.jobs.store import Store

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "manifest.json"
_IN_MANIFEST = ("shard", "first", "n", "file", "size", "sha256", "device")


class JobDirectory:
    """store: where it lies. parameters: of job.json. prompts: of its file, None without one."""

    def __init__(self, store: Store, parameters: Parameters) -> None:
        self.store, self.parameters = store, parameters
        self.prompts = None if parameters.prompts_sha256 is None else self._read_prompts()

    @classmethod
    def find(cls, store: Store) -> JobDirectory | None:
        """The job that lies there, if one does. Raises ValueError if its files are damaged."""
        try:
            text = store.read(FILE)
        except FileNotFoundError:
            return None
        return cls(store, Parameters.from_json(text, f"{store.name}/{FILE}"))

    @classmethod
    def open(cls, store: Store) -> JobDirectory:
        """Raises FileNotFoundError if no job lies there."""
        found = cls.find(store)
        if found is None:
            raise FileNotFoundError(f"{store.name} holds no job: there is no {FILE}")
        return found

    @classmethod
    def make(cls, store: Store, parameters: Parameters, prompts: str | None) -> JobDirectory:
        """Writes job.json, unless another process was faster: then its job is returned. prompts: the text of
        their file. Raises FileExistsError if the directory holds other files."""
        strangers = sorted(name for name in store.names("") if name != FILE and not name.startswith("prompts."))
        if strangers:
            raise FileExistsError(
                f"{store.name} holds {strangers[0]} and no job: name a directory that is empty or does not exist"
            )
        store.make()
        if prompts is not None:
            assert parameters.prompts_sha256 is not None
            store.put(_prompts_name(parameters.prompts_sha256), prompts.encode())
        store.create(FILE, parameters.to_json())
        return cls.open(store)

    def _read_prompts(self) -> tuple[str, ...]:
        digest = self.parameters.prompts_sha256
        assert digest is not None
        where = f"{self.store.name}/{_prompts_name(digest)}"
        try:
            text = self.store.read(_prompts_name(digest))
        except FileNotFoundError:
            raise ValueError(f"{where} is missing, and the job reads prompts") from None
        if hashlib.sha256(text).hexdigest() != digest:
            raise ValueError(f"{where} is not what the job was made with: its sha256 differs from that in {FILE}")
        return tuple(lines(text.decode()))

    def prompt(self, index: int) -> str | None:
        """What the image with this index reads."""
        return self.parameters.prompt if self.prompts is None else self.prompts[index % len(self.prompts)]

    # --- shards -----------------------------------------------------------------------------------------------

    def committed(self) -> set[int]:
        """The shards that have a record."""
        names = (name.removesuffix(".json") for name in self.store.names("shards") if name.endswith(".json"))
        return {int(name) for name in names if name.isdigit() and int(name) < self.parameters.n_shards}

    def done(self, committed: set[int]) -> int:
        """Images of these shards."""
        return sum(len(self.parameters.images(shard)) for shard in committed)

    def record(self, shard: int) -> Record:
        """Raises Damaged if it is not the record of that shard, or is missing."""
        name = _record_name(shard)
        where = f"{self.store.name}/{name}"
        try:
            found = Record.from_json(self.store.read(name), where)
        except FileNotFoundError:
            raise Damaged(f"{where} is missing") from None
        images = self.parameters.images(shard)
        if (found.shard, found.first, found.n) != (shard, images.start, len(images)):
            raise Damaged(f"{where} is the record of another shard: of {found.n} images from {found.first} on")
        if found.file != _data_name(shard, found.sha256):
            raise Damaged(f"{where} names a file that is not the shard's")
        return found

    def commit(self, shard: int, tokens: np.ndarray, drawer: Drawer, seconds: float) -> Record:
        """Writes the tokens of a shard, uint16 [m, H·W], then its record. Returns the record that stands, which is
        another process's if that was faster."""
        data = _npy(tokens)
        digest = hashlib.sha256(data).hexdigest()
        images = self.parameters.images(shard)
        assert tokens.shape == (len(images), self.parameters.n_positions)
        record = Record(
            shard=shard,
            first=images.start,
            n=len(images),
            file=_data_name(shard, digest),
            size=len(data),
            sha256=digest,
            seconds=seconds,
            finished=time.time(),
            **asdict(drawer),
        )
        self.store.put(f"shards/{record.file}", data)
        if self.store.create(_record_name(shard), record.to_json()):
            return record
        standing = self.record(shard)
        if standing.file != record.file:
            self.store.remove(f"shards/{record.file}")
        return standing

    def tokens(self, shard: int) -> tuple[Record, np.ndarray]:
        """A shard as its record has it, uint16 [m, H·W]. Raises Damaged."""
        record = self.record(shard)
        return record, self._checked(record.file, record.size, record.sha256, record.n)

    def _checked(self, file: str, size: int, digest: str, n: int) -> np.ndarray:
        import numpy as np

        where = f"{self.store.name}/shards/{file}"
        try:
            data = self.store.read(f"shards/{file}")
        except FileNotFoundError:
            raise Damaged(f"{where} is missing, and there is a record of it") from None
        if len(data) != size:
            raise Damaged(f"{where} has {len(data)} bytes, expected {size}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise Damaged(f"{where} has other contents than its record says: the sha256 differs")
        try:
            tokens = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise Damaged(f"{where} is no .npy file: {error}") from None
        expected = (n, self.parameters.n_positions)
        if not isinstance(tokens, np.ndarray) or tokens.dtype != np.uint16 or tokens.shape != expected:
            raise Damaged(f"{where} holds something else than uint16 {list(expected)}")
        if int(tokens.max()) >= self.parameters.n_tokens:
            raise Damaged(f"{where} holds token {int(tokens.max())}, and the model has {self.parameters.n_tokens}")
        return tokens

    def discard(self, shard: int, standing: Record | None) -> None:
        """Removes the record of a damaged shard, which is missing from then on. standing: the record that was found
        damaged; if another stands by now, it stays."""
        try:
            now = self.record(shard)
        except Damaged:
            now = None
        if now == standing:
            self.store.remove(_record_name(shard))

    # --- the whole ------------------------------------------------------------------------------------------------

    def manifest(self) -> Manifest | None:
        """None if the job is not complete. Raises ValueError if the file is damaged or of another job."""
        try:
            text = self.store.read(MANIFEST)
        except FileNotFoundError:
            return None
        where = f"{self.store.name}/{MANIFEST}"
        found = Manifest.from_json(text, where)
        if found.n != self.parameters.n or len(found.shards) != self.parameters.n_shards:
            raise ValueError(f"{where} is of {found.n} images in {len(found.shards)} shards, unlike {FILE}")
        return found

    def repair(self) -> list[str]:
        """Reads all committed shards and discards those that are damaged; what was wrong with them."""
        wrong = []
        for shard in sorted(self.committed()):
            standing = None
            try:
                standing = self.record(shard)
                self._checked(standing.file, standing.size, standing.sha256, standing.n)
            except Damaged as error:
                wrong.append(str(error))
                self.discard(shard, standing)
        return wrong

    def seal(self) -> Manifest:
        """Reads all shards and writes the manifest. Raises Damaged if a shard is missing or wrong."""
        total, shards = hashlib.sha256(), []
        for record, tokens in self.shards():
            total.update(tokens.tobytes())
            shards.append({name: getattr(record, name) for name in _IN_MANIFEST})
        manifest = Manifest(self.parameters.n, total.hexdigest(), tuple(shards))
        text = manifest.to_json()
        if not self.store.create(MANIFEST, text) and self.store.read(MANIFEST) != text:
            self.store.put(MANIFEST, text)  # of shards that were drawn anew since, or damaged
        for name in self.store.names("claims"):
            self.store.remove(f"claims/{name}")
        return manifest

    def shards(self) -> Iterator[tuple[Record, np.ndarray]]:
        """All shards in order, one at a time. Raises Damaged."""
        return (self.tokens(shard) for shard in range(self.parameters.n_shards))


def facts_of(manifest: Manifest) -> dict[str, Any]:
    """For people: of which devices how many images are."""
    devices: dict[str, int] = {}
    for shard in manifest.shards:
        devices[str(shard.get("device"))] = devices.get(str(shard.get("device")), 0) + int(shard.get("n", 0))
    return {"tokens_sha256": manifest.tokens_sha256, "devices": devices}


def _prompts_name(digest: str) -> str:
    return f"prompts.{digest[:16]}.txt"


def _data_name(shard: int, digest: str) -> str:
    return f"{shard:06d}.{digest[:16]}.npy"


def _record_name(shard: int) -> str:
    return f"shards/{shard:06d}.json"


def _npy(tokens: np.ndarray) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(tokens, dtype="<u2"), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
