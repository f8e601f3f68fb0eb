"""Load on `fastigpt serve` from another process, over loopback, with the bundled model.

    python benchmarks/serve_load.py                # figures: throughput, first rows, idle latency, joining a full batch
    python benchmarks/serve_load.py --soak 10000   # and then everything clients do wrong, at once

The server is started here, with one connection for each request. Times of first rows are the server's own, out of its
log: from the request's arrival in the batch to its first final row. Every picture is held to `sample`'s.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import re
import signal
import statistics
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
from PIL import Image

import fastigpt

SEED, IMAGES = 11, 256  # of the pictures that requests ask for
ROWS = 32
WAIT = 300  # seconds after which an answer counts as lost


@dataclass
class Server:
    process: subprocess.Popen[str]
    host: str
    port: int
    log: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def start(cls) -> Server:
        command = [sys.executable, "-m", "fastigpt", "serve", "--port", "0", "--max-body", "1", "--max-queue", "4096"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        found = re.search(r"http://([\d.]+):(\d+)", process.stdout.readline())
        assert found is not None, "the server did not start"
        server = cls(process, found[1], int(found[2]))
        threading.Thread(target=server._read, daemon=True).start()
        return server

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(json.loads(line))

    def logged(self, count: int, since: int) -> list[dict[str, Any]]:
        """What is told of the images of `count` requests, from line `since` on."""
        while len(found := [line for line in self.log[since:] if "first_row_seconds" in line]) < count:
            time.sleep(0.01)
        return found

    def memory(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    async def post(
        self, route: str, body: bytes, kind: str = "application/json", *, pieces: int = 1, leave: int | None = None
    ) -> tuple[int, bytes]:
        """Status and body of an answer. pieces: the body is sent in so many, a tenth of a second between them. leave:
        bytes of the answer after which the client is gone; 0: at once."""
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=2**24)
        try:
            head = f"POST /v1/images/{route} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: {kind}\r\n"
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode())
            size = -(-len(body) // pieces) or 1
            for first in range(0, len(body), size):
                writer.write(body[first : first + size])
                await writer.drain()
                if first + size < len(body):
                    await asyncio.sleep(0.1)
            if leave == 0:
                return 0, b""
            answer = await asyncio.wait_for(reader.read(-1 if leave is None else leave), WAIT)
            status = int(answer[9:12]) if leave is None else 0
            return status, answer.partition(b"\r\n\r\n")[2]
        finally:
            writer.close()

    async def images(self, index: int, n: int = 1, **more: Any) -> tuple[int, bytes]:
        """Asks for images index … index + n − 1."""
        leave = more.pop("leave", None)
        asked = {"prompt": "", "seed": SEED, "first_index": index, "n": n, **more}
        return await self.post("generations", json.dumps(asked).encode(), leave=leave)

    def metric(self, name: str) -> float:
        import urllib.request

        with urllib.request.urlopen(f"http://{self.host}:{self.port}/metrics") as answer:
            told = answer.read().decode()
        return sum(float(line.split()[-1]) for line in told.splitlines() if line.startswith(f"{name}{{"))


def pixels(b64_json: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))


def right(expected: np.ndarray, index: int, n: int, body: bytes) -> bool:
    found = [pixels(image["b64_json"]) for image in json.loads(body)["data"]]
    return np.array_equal(found, expected[index : index + n])


# --- figures -----------------------------------------------------------------------------------------------------


async def together(server: Server, expected: np.ndarray, count: int) -> float:
    """Seconds from the first request to the last answer."""
    started = time.perf_counter()
    answers = await asyncio.gather(*(server.images(k) for k in range(count)))
    seconds = time.perf_counter() - started
    assert all(status == 200 and right(expected, k, 1, body) for k, (status, body) in enumerate(answers))
    return seconds


async def joining(server: Server) -> tuple[float, float]:
    """Seconds to the first row of a request that joins 62 images in 64 slots, and seconds that a row of those takes. It
    asks for two images: that tells it from the others in the log."""
    since = len(server.log)
    others = [asyncio.ensure_future(server.images(k)) for k in range(62)]
    while server.metric("fastigpt_images_running") < 62:
        await asyncio.sleep(0.005)
    await server.images(100, 2)
    await asyncio.gather(*others)
    lines = server.logged(63, since)
    (first,) = (line["first_row_seconds"] for line in lines if line["images"] == 2)
    return first, statistics.median(line["draw_seconds"] for line in lines if line["images"] == 1) / ROWS


def median_of(rounds: int, work: Any) -> float:
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


async def figures(server: Server, model: fastigpt.ImageGPT, expected: np.ndarray, rounds: int) -> None:
    model.sample(64, seed=1)
    await together(server, expected, 64)
    ratios, firsts = [], []
    for _ in range(rounds):  # in turn: machines drift
        own = median_of(1, lambda: model.sample(64, seed=SEED))
        since = len(server.log)
        ratios.append(own / await together(server, expected, 64))
        firsts.append(statistics.median(line["first_row_seconds"] for line in server.logged(64, since)))
    print(f"64 requests at once: {100 * statistics.median(ratios):.0f} % of the throughput of sample(64)")
    print(f"  first row, p50: {statistics.median(firsts):.3f} s")
    own, served = [], []
    for k in range(8 * rounds):
        own.append(median_of(1, lambda k=k: model.sample(1, seed=SEED, first_index=k)))
        started = time.perf_counter()
        await server.images(k)
        served.append(time.perf_counter() - started)
    one, answer = statistics.median(own), statistics.median(served)
    limit = 1.3 * one + 0.005
    print(f"one request, idle: {1e3 * answer:.1f} ms; sample(1): {1e3 * one:.1f} ms; limit: {1e3 * limit:.1f} ms")
    joins = [await joining(server) for _ in range(rounds)]
    print(
        f"joining 62 others: first row within {statistics.median(first / row for first, row in joins):.2f} rows' time"
    )


# --- everything that clients do wrong ----------------------------------------------------------------------------


def bomb() -> bytes:
    """A form with a small PNG that declares 30,000² pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return form(png + chunk(b"IEND", b""))


def form(image: bytes) -> bytes:
    part = b"--b\r\ncontent-disposition: form-data; name="
    return part + b'"prompt"\r\n\r\n\r\n' + part + b'"image"; filename="a"\r\n\r\n' + image + b"\r\n--b--\r\n"


async def one(server: Server, expected: np.ndarray, rng: random.Random) -> str:
    """One request of some kind, and how it went: "ok …" as it should, else what was wrong."""
    kind = rng.choices(
        ["images", "stream", "leave", "vanish", "large", "bomb", "nonsense", "slow"], [50, 10, 12, 5, 5, 5, 8, 5]
    )[0]
    n = rng.choice([1, 1, 1, 2, 4])
    index = rng.randrange(IMAGES - n)
    multipart = "multipart/form-data; boundary=b"
    if kind == "images":
        status, body = await server.images(index, n)
        good = status == 200 and right(expected, index, n, body)
    elif kind == "stream":
        status, body = await server.images(index, n, stream=True, partial_images=rng.randrange(4))
        events = [json.loads(line) for line in re.findall(rb"data: (\{.*\})", body)]
        found = [pixels(event["b64_json"]) for event in events if event["type"] == "image_generation.completed"]
        good = status == 200 and np.array_equal(found, expected[index : index + n])
    elif kind in ("leave", "vanish"):
        status, _ = await server.images(
            index, n, stream=True, partial_images=3, leave=0 if kind == "vanish" else rng.choice([1, 300, 2000])
        )
        good = True
    elif kind == "slow":
        asked = json.dumps({"prompt": "", "seed": SEED, "first_index": index}).encode()
        status, body = await server.post("generations", asked, pieces=rng.choice([2, 5, 20]))
        good = status == 200 and right(expected, index, 1, body)
    else:
        status, body = await {
            "large": lambda: server.post("edits", form(bytes(1_500_000)), multipart),
            "bomb": lambda: server.post("edits", bomb(), multipart),
            "nonsense": lambda: server.post("generations", rng.choice([b"{", b"[1]", b'{"prompt": 3}', b"\xff"])),
        }[kind]()
        good = status == (413 if kind == "large" else 400)
    return f"ok {kind}" if good else f"WRONG {kind}: {status}"


async def soak(server: Server, expected: np.ndarray, count: int, side_by_side: int) -> None:
    rng, found, numbers = random.Random(1), Counter[str](), iter(range(count))
    memory = []

    async def client() -> None:
        for number in numbers:
            try:
                found[await one(server, expected, rng)] += 1
            except (TimeoutError, OSError, ValueError) as error:
                found[f"LOST: {type(error).__name__}"] += 1
            if number * 10 % count < 10:
                memory.append(server.memory())

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(side_by_side)))
    print(f"{count} requests in {time.perf_counter() - started:.0f} s:")
    for kind, times in sorted(found.items()):
        print(f"  {kind}: {times}")
    until = time.monotonic() + 60
    while (left := server.metric("fastigpt_images_running") + server.metric("fastigpt_images_waiting")) > 0:
        if time.monotonic() > until:
            break
        await asyncio.sleep(0.1)
    failed = sum(line.get("status") == 500 for line in server.log)
    print(f"lost or wrong: {sum(times for kind, times in found.items() if not kind.startswith('ok'))}; 500s: {failed}")
    print(f"slots leaked: {left:.0f}; resident memory, MiB: {', '.join(f'{mib:.0f}' for mib in memory)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each figure; 0: none")
    parser.add_argument("--soak", type=int, default=0, help="requests of all kinds")
    parser.add_argument("--side-by-side", type=int, default=48, help="clients of the soak")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is ended as well
    model = fastigpt.load()
    expected = model.sample(IMAGES, seed=SEED, output_type="np", progress=False)
    server = Server.start()
    try:
        if arguments.rounds:
            asyncio.run(figures(server, model, expected, arguments.rounds))
        if arguments.soak:
            asyncio.run(soak(server, expected, arguments.soak, arguments.side_by_side))
    finally:
        server.process.terminate()
        print(f"the server ended with status {server.process.wait(60)}")


if __name__ == "__main__":
    main()
