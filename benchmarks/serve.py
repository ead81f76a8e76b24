"""A server under load: many clients, some of them hostile, revisions that come and go.

    python -m benchmarks.serve --workdir=W --load_seconds=300 --swaps=100

Copies W, starts `launch.serve` on the copy as a process of its own, and is its clients. In turn:

    alone      every case (prompt, settings, retrieval) is asked for with nothing else under way
    clients    p50 and p99 of a completion's time, and of the first event of a stream, at 1, 8 and 32
               clients that ask again at once
    hostile    64 clients, a tenth of them hostile; memory of the server's process every second
    swaps      8 clients, first undisturbed, then while a revision is put in place and taken away

An answer counts as equal when its text is the one that was given alone at the revision that it names.
Hostile clients send bad JSON, prompts of 3 MB, wrong types and half a request, vanish in mid-stream,
or read a byte at a time.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx2
import numpy as np
from absl import flags

from benchmarks.timing import machine, table, write_json
from launch.common import app
from retro_jax.errors import UserError
from tests.ports import free_port

LOAD_SECONDS = flags.DEFINE_integer("load_seconds", 60, "Of the hostile load.", lower_bound=1)
SWAPS = flags.DEFINE_integer("swaps", 20, "Changes of revision under load.", lower_bound=0)
CLIENTS = flags.DEFINE_integer("load_clients", 64, "Clients of the load.", lower_bound=2)
AT_ONCE = flags.DEFINE_list("clients", ["1", "8", "32"], "Numbers of clients that are timed.")
REQUESTS = flags.DEFINE_integer("timed_requests", 100, "Requests at each number.", lower_bound=1)
LENGTH = flags.DEFINE_integer("answer_tokens", 48, "Tokens of an answer.", lower_bound=1)
RESULT = flags.DEFINE_string("serve_output", None, "Write the figures to this JSON file.")

_PROMPTS = (
    "The history of the city",
    "import os\n\n\ndef main(",
    "The river flows",
    "class Reader:\n    def __init__(self, path):\n" * 4,
    "In the nineteenth century, the town was known for its harbour and its markets. " * 5,
)
_DOCUMENT = {"id": "of the benchmark", "text": "A document that comes and goes. " * 60}
_RAN_OUT = 600.0


class Server:
    """launch.serve as a process of its own."""

    def __init__(self, workdir: pathlib.Path) -> None:
        self._workdir, self._port = workdir, free_port()
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> "Server":
        """Starts it, and waits until it answers."""
        command = [sys.executable, "-m", "launch.serve", f"--workdir={self._workdir}"]
        arguments = [f"--port={self._port}", "--documents", "--max_queue=256"]
        self._process = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL)
        end = time.monotonic() + _RAN_OUT
        while True:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return self
            if self._process.poll() is not None or time.monotonic() > end:
                raise UserError("launch.serve did not start: expected it to answer")
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        """Asks it to stop, and waits for the end."""
        self._process.send_signal(signal.SIGTERM)
        self.status = self._process.wait(_RAN_OUT)

    def memory(self) -> float:
        """Resident memory in MB."""
        pages = int(pathlib.Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def cases() -> list[dict[str, Any]]:
    """The honest requests."""
    settings: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "retrieval": False},
        {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    ]
    tokens = {"max_tokens": LENGTH.value}
    return [{"prompt": prompt, **each, **tokens} for prompt in _PROMPTS for each in settings]


class Clients:
    """Honest clients; they count what they get.

    Attributes:
      counts: answers by kind. seconds, first: of each answer, and of a stream's first event.
    """

    def __init__(self, http: httpx2.AsyncClient, expected: dict[tuple[int, int | None], str]):
        self._http, self._expected = http, expected
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.first: list[float] = []

    async def ask(self, number: int, *, stream: bool) -> None:
        """Asks for one case, and compares the answer with that alone."""
        start = time.perf_counter()
        try:
            text, revision, first = await answer(self._http, number, stream=stream)
        except Exception as error:
            self.counts[f"failed: {type(error).__name__} {error}"[:90]] += 1
            return
        self.seconds.append(time.perf_counter() - start)
        if stream:
            self.first.append(first - start)
        key = (number, revision)
        known = self._expected.setdefault(key, text)
        self.counts["equal" if text == known else "different"] += 1

    async def run(self, until: Callable[[], bool], seed: int) -> None:
        """Asks again and again."""
        draw = random.Random(seed)
        while not until():
            await self.ask(draw.randrange(len(cases())), stream=draw.random() < 0.5)


async def answer(
    http: httpx2.AsyncClient, number: int, *, stream: bool
) -> tuple[str, int | None, float]:
    """The text of a case, the revision that it names, and when its first event came."""
    body = cases()[number] | {"stream": stream}
    first = 0.0
    if not stream:
        response = await http.post("/v1/completions", json=body)
        response.raise_for_status()
        whole = response.json()
        return whole["choices"][0]["text"], _revision(whole), first
    text, revision = "", None
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter()
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            text += event["choices"][0]["text"]
            revision = _revision(event)
    return text, revision, first


def _revision(answer: dict[str, Any]) -> int | None:
    """The revision that an answer names."""
    return answer["retrieval"] and answer["retrieval"]["revision"]


class Hostile:
    """A client that harms where it can.

    Attributes:
      counts: what it did, and the statuses that it got.
    """

    def __init__(self, http: httpx2.AsyncClient, url: str) -> None:
        self._http, self._port = http, int(url.rpartition(":")[2])
        self.counts: Counter[str] = Counter()

    async def run(self, until: Callable[[], bool], seed: int) -> None:
        """Does one thing after the other."""
        draw = random.Random(seed)
        kinds = [
            self._bad_json,
            self._huge,
            self._wrong_types,
            self._vanish,
            self._slow,
            self._half,
        ]
        while not until():
            kind = draw.choice(kinds)
            try:
                status = await kind()
            except (httpx2.HTTPError, OSError) as error:
                status = type(error).__name__
            self.counts[f"{kind.__name__.strip('_')}: {status}"] += 1
            await asyncio.sleep(0.05)

    async def _bad_json(self) -> str:
        headers = {"Content-Type": "application/json"}
        content = b'{"prompt": "a", ' + os.urandom(50)
        response = await self._http.post("/v1/completions", content=content, headers=headers)
        return str(response.status_code)

    async def _huge(self) -> str:
        response = await self._http.post("/v1/completions", json={"prompt": "word " * 600_000})
        return str(response.status_code)

    async def _wrong_types(self) -> str:
        body = {"prompt": {"a": [1]}, "max_tokens": "many", "n": None, "stop": 5}
        response = await self._http.post("/v1/completions", json=body)
        return str(response.status_code)

    async def _vanish(self) -> str:
        body = {"prompt": "The", "max_tokens": 200, "stream": True}
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                return str(response.status_code)
        return "no event"

    async def _slow(self) -> str:
        body = json.dumps({"prompt": "The", "max_tokens": 200, "stream": True}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1024)
        writer.write(_head(len(body)) + body)
        for _ in range(20):
            await reader.read(1)
            await asyncio.sleep(0.1)
        writer.close()
        return "left"

    async def _half(self) -> str:
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(_head(1000) + b'{"prompt": "The')
        await asyncio.sleep(1)
        writer.close()
        return "left"


def _head(length: int) -> bytes:
    """The head of a request of so many bytes."""
    lines = ("POST /v1/completions HTTP/1.1", "Host: server", "Content-Type: application/json")
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


async def measure(workdir: pathlib.Path, server: Server) -> dict[str, Any]:
    """All turns."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=server.url, timeout=_RAN_OUT, limits=limits) as http:
        expected: dict[tuple[int, int | None], str] = {}
        for number in range(len(cases())):
            text, revision, _ = await answer(http, number, stream=False)
            expected[number, revision] = text
        timed = [await at_once(http, expected, int(count)) for count in AT_ONCE.value]
        load = await hostile(http, server, expected)
        swaps = await swap(http, workdir, expected) if SWAPS.value else {}
    return {"clients": timed, "hostile": load, "swaps": swaps}


async def at_once(http: httpx2.AsyncClient, expected: Any, count: int) -> dict[str, Any]:
    """Times of some clients."""
    clients, left = Clients(http, expected), iter(range(REQUESTS.value))
    start = time.perf_counter()
    done: Callable[[], bool] = lambda: next(left, None) is None  # noqa: E731
    await asyncio.gather(*(clients.run(done, seed) for seed in range(count)))
    seconds = time.perf_counter() - start
    return {
        "clients": count,
        **_times(clients),
        "tokens a second": len(clients.seconds) * LENGTH.value / seconds,
        **_counted(clients),
    }


async def hostile(http: httpx2.AsyncClient, server: Server, expected: Any) -> dict[str, Any]:
    """Many clients, a tenth of them hostile, and the server's memory."""
    end = time.monotonic() + LOAD_SECONDS.value
    until: Callable[[], bool] = lambda: time.monotonic() > end  # noqa: E731
    number = max(1, CLIENTS.value // 10)
    honest, enemies = Clients(http, expected), Hostile(http, server.url)
    memory: list[float] = []

    async def watch() -> None:
        while not until():
            memory.append(server.memory())
            await asyncio.sleep(1)

    runs: list[Coroutine[Any, Any, None]] = [watch()]
    runs += [honest.run(until, seed) for seed in range(CLIENTS.value - number)]
    runs += [enemies.run(until, seed) for seed in range(number)]
    await asyncio.gather(*runs)
    parts = np.array_split(np.array(memory), 4)
    return {
        "clients": CLIENTS.value,
        "hostile": number,
        "seconds": LOAD_SECONDS.value,
        **_times(honest),
        **_counted(honest),
        "MB by quarter": [round(float(part.max()), 1) for part in parts if len(part)],
        "hostile acts": dict(sorted(enemies.counts.items())),
    }


async def swap(http: httpx2.AsyncClient, workdir: pathlib.Path, expected: Any) -> dict[str, Any]:
    """A load without changes, then one of as many seconds with them."""
    made = await http.post("/documents", json={"append": [_DOCUMENT]})
    made.raise_for_status()
    folder = workdir / "revisions" / f"{made.json()['revision']:05d}"
    aside = folder.with_name("aside")
    results = []
    for swapping in (False, True):
        clients, stop = Clients(http, expected), asyncio.Event()
        start = time.monotonic()
        async with load(clients, stop):
            if swapping:
                for number in range(SWAPS.value):
                    here, there = (folder, aside) if number % 2 == 0 else (aside, folder)
                    here.rename(there)
                    await _taken_up(http, made.json()["revision"] - (number + 1) % 2)
            else:
                await asyncio.sleep(max(10.0, SWAPS.value / 3))
        what = f"{SWAPS.value} swaps" if swapping else "no swap"
        seconds = time.monotonic() - start
        results.append({"turn": what, "seconds": seconds, **_times(clients), **_counted(clients)})
    ratio = results[1]["p99 s"] / results[0]["p99 s"]
    return {"turns": results, "p99 with over without": ratio}


@contextlib.asynccontextmanager
async def load(clients: Clients, stop: asyncio.Event) -> AsyncIterator[None]:
    """Eight clients meanwhile."""
    runs = [asyncio.create_task(clients.run(stop.is_set, seed)) for seed in range(8)]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*runs)


async def _taken_up(http: httpx2.AsyncClient, revision: int) -> None:
    """Waits until the server's newest revision is this one."""
    end = time.monotonic() + _RAN_OUT
    while True:
        models = (await http.get("/v1/models")).json()
        if models["data"][0]["retrieval"]["revision"] == revision:
            return
        if time.monotonic() > end:
            raise UserError(f"revision {revision} was not taken up: expected it within seconds")
        await asyncio.sleep(0.1)


def _times(clients: Clients) -> dict[str, Any]:
    """Percentiles of answers, and of first events."""
    whole, first = (clients.seconds or [float("nan")]), (clients.first or [float("nan")])
    return {
        "requests": len(clients.seconds),
        "p50 s": float(np.percentile(whole, 50)),
        "p99 s": float(np.percentile(whole, 99)),
        "first p50 s": float(np.percentile(first, 50)),
        "first p99 s": float(np.percentile(first, 99)),
    }


def _counted(clients: Clients) -> dict[str, Any]:
    """How many answers were equal, different or none."""
    failed = {name: n for name, n in clients.counts.items() if name.startswith("failed")}
    for name, count in failed.items():
        print(f"{name}: {count}")
    return {
        "equal": clients.counts["equal"],
        "different": clients.counts["different"],
        "failed": sum(failed.values()),
    }


def main() -> None:
    """Measures and prints."""
    workdir = pathlib.Path(app.required(app.WORKDIR, "a trained run with its data"))
    with tempfile.TemporaryDirectory() as scratch:
        copy = pathlib.Path(scratch) / workdir.name
        shutil.copytree(workdir, copy, symlinks=True)
        with Server(copy) as server:
            result = asyncio.run(measure(copy, server))
    print(table(result["clients"]))
    hostile_ = dict(result["hostile"])
    acts, memory = hostile_.pop("hostile acts"), hostile_.pop("MB by quarter")
    print("\n" + table([hostile_]))
    print(f"memory by quarter of the time, MB: {', '.join(f'{mb:,.0f}' for mb in memory)}")
    print("hostile: " + ", ".join(f"{name} x {count}" for name, count in acts.items()))
    if result["swaps"]:
        print("\n" + table(result["swaps"]["turns"]))
        print(f"p99 with swaps over without: {result['swaps']['p99 with over without']:.2f}")
    print(f"the server ended with status {server.status}")
    if RESULT.value:
        write_json(pathlib.Path(RESULT.value), {"machine": machine(), **result})


if __name__ == "__main__":
    app.run(main)
