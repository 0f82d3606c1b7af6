"""`wush-compile serve` under load on the loopback: nothing but what was asked for fails, and nothing piles up."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: `make test-vllm`")
import httpx
import psutil
from served import checkpoint, tokenizer

REQUESTS, AT_ONCE = 300, 16
KEY = "secret"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    def __init__(self, folder):
        self.directory = checkpoint(folder / "checkpoint", kind="llama")
        tokenizer(self.directory)
        self.port, self.log = free_port(), folder / "log"
        self.url = f"http://127.0.0.1:{self.port}"
        command = ["-m", "wush_compile", "serve", self.directory, "--port", self.port, "--api-key", KEY]
        options = ["--enforce-eager", "--max-model-len", 128, "--max-num-seqs", AT_ONCE, "--no-enable-log-requests"]
        env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command + options)], env=env, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self) -> None:
        for _ in range(300):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(1)
        raise AssertionError(self.log.read_text()[-3000:])

    def memory(self) -> int:
        """Bytes that the processes hold alone."""
        tree = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        return sum(psutil.Process(p.pid).memory_full_info().uss for p in tree)

    def engine(self) -> psutil.Process:
        tree = psutil.Process(self.process.pid).children(recursive=True)
        return next(p for p in tree if "EngineCore" in p.name() or "EngineCore" in " ".join(p.cmdline()))

    def stop(self) -> None:
        if self.process.poll() is None:
            tree = psutil.Process(self.process.pid).children(recursive=True)
            for process in reversed(tree):
                process.terminate()
            self.process.terminate()
            _, alive = psutil.wait_procs(tree, timeout=30)
            for process in alive:
                process.kill()
            self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


HEADERS = {"Authorization": f"Bearer {KEY}"}
MALFORMED = (  # "": the model's own name
    {"model": "another", "prompt": "x"},
    {"model": "", "prompt": "x", "max_tokens": -1},
    {"model": "", "prompt": "x" * 1000},  # longer than the context
    {"model": "", "prompt": "x", "temperature": "hot"},
)


def ask(server: Server, **settings) -> dict:
    body = {"model": str(server.directory), "prompt": "abc", "max_tokens": 8, "temperature": 0} | settings
    answer = httpx.post(f"{server.url}/v1/completions", headers=HEADERS, json=body, timeout=120)
    answer.raise_for_status()
    return answer.json()


async def one(client: httpx.AsyncClient, server: Server, number: int) -> str:
    """Sends one request; how it ended."""
    rng = random.Random(number)
    body = {
        "model": str(server.directory),
        "prompt": "".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 60))),
        "max_tokens": rng.randint(1, 24),
        "ignore_eos": True,
        "stream": number % 2 == 0 or number % 10 == 1,
    }
    if number % 10 == 3:
        wrong = dict(rng.choice(MALFORMED))
        if wrong.get("model") == "":
            wrong["model"] = str(server.directory)
        answer = await client.post("/v1/completions", json=wrong)
        return "refused" if 400 <= answer.status_code < 500 else f"malformed, and {answer.status_code}"
    if not body["stream"]:
        answer = await client.post("/v1/completions", json=body)
        done = answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == body["max_tokens"]
        return "answered" if done else f"{answer.status_code}"
    events = 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if number % 10 == 1:
                return "cancelled"
            if line.startswith("data: ") and line != "data: [DONE]":
                events += bool(json.loads(line[6:])["choices"][0])
    return "answered" if events >= 1 else "an empty stream"


async def load(server: Server, first: int, count: int) -> dict[str, int]:
    gate, ends = asyncio.Semaphore(AT_ONCE), {}
    async with httpx.AsyncClient(base_url=server.url, headers=HEADERS, timeout=300) as client:

        async def gated(number: int) -> None:
            async with gate:
                end = await one(client, server, number)
                ends[end] = ends.get(end, 0) + 1

        await asyncio.gather(*map(gated, range(first, first + count)))
    return ends


def test_a_key_is_needed(server):
    body = {"model": str(server.directory), "prompt": "abc"}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 401
    assert ask(server)["choices"][0]["finish_reason"] in ("length", "stop")
    text = server.log.read_text()
    assert f"serves {server.directory} at {server.url}/v1" in text and f"curl {server.url}/v1/completions" in text


def test_the_example(server):
    example = Path(__file__).parents[2] / "examples" / "serve_openai.py"
    command = [sys.executable, example, server.directory, f"{server.url}/v1", KEY]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("Once upon a time") and len(done.stdout) > len("Once upon a time\n")


def test_load(server):
    before_answer = ask(server)["choices"][0]["text"]
    asyncio.run(load(server, 0, 100))  # buffers and caches grow to what they need
    before = server.memory()
    ends = asyncio.run(load(server, 100, REQUESTS))
    assert ends == {"answered": REQUESTS * 8 // 10, "cancelled": REQUESTS // 10, "refused": REQUESTS // 10}
    assert server.memory() < before + 50 * 2**20
    assert ask(server)["choices"][0]["text"] == before_answer


def test_a_killed_worker_ends_the_server_with_one_line(server):
    server.engine().send_signal(signal.SIGKILL)
    assert server.process.wait(timeout=120) == 1
    lines = server.log.read_text().splitlines()
    assert sum(line.startswith("error: the server ended by itself") for line in lines) == 1
