"""A page about a run that goes on, from the log that `--log FILE.jsonl` writes: as a file, or served on 127.0.0.1."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..checkpoint.atomic import recover
from ..checkpoint.files import read_config
from ..checkpoint.layout import read_record
from ..checkpoint.record import Quantization, read_report
from ..errors import ConfigError
from .contents import Contents, GroupFacts, number, report_facts
from .page import render

REFRESH = 3  # seconds between two versions of the page


def read_log(path: Path) -> list[list[dict]]:
    """The events of each run in a log, oldest run first. A line that is not whole yet, or no event, is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there: give the file of wush-compile quantize --log") from None
    runs: list[list[dict]] = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            continue
        if event["event"] == "run" or not runs:
            runs.append([])
        runs[-1].append(event)
    return runs


def run_contents(name: str, events: list[dict]) -> Contents:
    """What a page shows of one run: how far it is, the losses so far, and the time left."""
    page, groups, stages = Contents(name), {}, []
    run, state, resumed = {}, "running", 0
    now = 0.0
    for event in events:
        now = max(now, number(event.get("time")) or 0.0)
        match event["event"]:
            case "run":
                run = event
            case "resumed":
                resumed = int(number(event.get("stages")) or 0)
            case "stage":
                stages.append(str(event.get("stage")))
            case "group":
                facts = report_facts({k: v for k, v in event.items() if k not in ("event", "time", "stage", "group")})
                rows, width = (None if (n := number(event.get(key))) is None else int(n) for key in ("rows", "width"))
                group = str(event.get("group"))
                groups[group] = GroupFacts(group, rows, width, members=[group], **facts)
            case "finished":
                state = "finished"
                seconds = event.get("seconds")
                if isinstance(seconds, dict):
                    page.phases = {str(k): v for k, v in seconds.items() if number(v) is not None}
            case "failed":
                state = f"failed: {event.get('error')}"
    page.groups = sorted(groups.values(), key=lambda g: g.badness, reverse=True)
    total = max(int(number(run.get("groups")) or 0), len(groups))
    page.progress = (total if state == "finished" else len(groups), max(total, 1))
    config = run.get("config") if isinstance(run.get("config"), dict) else {}
    what = ", ".join(f"{key} {config[key]}" for key in ("format", "transform", "solver") if key in config)
    page.head = [
        ("What it is", f"A run of wush-compile quantize{f' ({what})' if what else ''}, {state}."),
        (
            "How far",
            f"{len(groups)} of {total or 'an unknown number of'} groups, {len(stages)} stages; "
            f"{_left(page, now, state, resumed)}",
        ),
        ("How much is lost", _losses(page.groups)),
    ]
    page.facts = [(key, str(run[key])) for key in ("device", "processes", "batches") if key in run]
    if stages:
        page.facts.append(("last stage", stages[-1]))
    if resumed:
        page.facts.append(("resumed", f"{resumed} stages were finished before"))
    page.refresh = REFRESH if state == "running" else None
    return page


def _left(page: Contents, now: float, state: str, resumed: int) -> str:
    done, total = page.progress
    if state != "running":
        return f"{now:.0f} s in all."
    if not done or resumed:
        return f"{now:.0f} s so far."
    return f"{now:.0f} s so far, about {now / done * (total - done):.0f} s left."


def _losses(groups: list[GroupFacts]) -> str:
    losses = [g.relative_loss for g in groups if g.relative_loss is not None and math.isfinite(g.relative_loss)]
    if not losses:
        return "No losses yet."
    mean = 100 * sum(losses) / len(losses)
    return f"The {len(losses)} groups so far lose {mean:.2f} % of their output's energy on average."


def checkpoint_contents(directory: Path) -> Contents:
    """The losses of an earlier run's checkpoint, from its report alone, by the names that a log gives its groups."""
    path = recover(directory)
    record: Quantization = read_record(read_config(path)["quantization_config"])
    read_report(record, path)
    groups = [
        GroupFacts(str(name), members=[str(name)], **report_facts(report)) for name, report in record.report.items()
    ]
    page = Contents(path.name, groups=sorted(groups, key=lambda g: g.badness, reverse=True))
    page.head = [
        ("What it is", f"The checkpoint {path.name}, of an earlier run."),
        ("How much is lost", _losses(groups)),
    ]
    return page


def follow_page(log: Path, last: Path | None = None) -> tuple[str, bool]:
    """(page, whether the run goes on). `last`: a checkpoint to compare with, else the run before in the same log."""
    runs = read_log(log)
    now = run_contents(log.name, runs[-1] if runs else [])
    pages, names = [now], ["the run"]
    if last is not None:
        pages.append(checkpoint_contents(last))
    elif len(runs) > 1:
        pages.append(run_contents(log.name, runs[-2]))
    if len(pages) == 2:
        names.append("the run before")
        # Groups that are not solved yet would all be listed as changed.
        known = {g.name for g in now.groups}
        pages[1].groups = [g for g in pages[1].groups if g.name in known]
    return render(pages, names), now.refresh is not None


def write_page(path: Path, text: str) -> None:
    """Replaces a file in one step, so that a browser never reads half a page."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def rewrite(log: Path, out: Path, last: Path | None = None, once: bool = False) -> None:
    """Writes the page every few seconds until the run ends; `once` writes it one time."""
    while True:
        text, goes_on = follow_page(log, last)
        write_page(out, text)
        if once or not goes_on:
            return
        time.sleep(REFRESH)


@contextlib.contextmanager
def serving(log: Path, last: Path | None = None, port: int = 0) -> Iterator[ThreadingHTTPServer]:
    """A server of the page on 127.0.0.1; `port` 0 takes a free one. Each request reads the log anew."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            # A page elsewhere whose name resolves to 127.0.0.1 must not read the log.
            if host not in ("127.0.0.1", "localhost") or self.path != "/":
                self.send_error(404)
                return
            body = follow_page(log, last)[0].encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args) -> None:
            pass

    follow_page(log, last)  # errors are raised here, not in a thread
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads = True
        yield server
