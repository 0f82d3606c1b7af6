"""What a run shows and logs, and the clock of its phases; warnings that name a layer."""

import json
import logging
import sys
import time

import pytest
import torch
from models import plain
from test_journal import DATA, IDS, Words, net

import wush_compile as wc
from wush_compile.calibration import solve_group as solving
from wush_compile.calibration import variants
from wush_compile.calibration.progress import Progress, _Lines
from wush_compile.phases import phase, timing


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_bar_says_where_the_run_is(capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)
    wc.quantize(net(), DATA)
    shown = capsys.readouterr().err
    for part in ("layers.2, out, loss ", "solving a", "tokens/s", "GiB", "51/51"):  # 42 forwards, 9 groups
        assert part in shown, part
    assert shown.count("quantizing:") == shown.count("\r")  # one bar


def test_without_data_the_bar_counts_groups(capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)
    wc.quantize(plain("llama"), solver="rtn", transform="hadamard")
    assert "8/8" in capsys.readouterr().err


def test_where_there_is_no_terminal_there_are_lines(capsys, monkeypatch):
    wc.quantize(net(), DATA)
    shown = capsys.readouterr().err
    assert shown.count("quantizing: 51/51, ") == 1 and "\r" not in shown and "quantizing: 50/" not in shown
    monkeypatch.setattr(_Lines, "INTERVAL", 0.0)
    wc.quantize(net(), DATA)
    lines = [line for line in capsys.readouterr().err.splitlines() if "/51," in line]
    assert [line.split("/51,")[0] for line in lines] == [f"quantizing: {n}" for n in range(1, 52)]
    assert "loss " in lines[-1] and "so far" in lines[-1] and lines[-1].endswith("00:00 left")


def test_a_resumed_run_says_what_it_found(tmp_path, capsys):
    wc.quantize(net(Words), IDS, out=tmp_path / "out")
    capsys.readouterr()
    wc.quantize(net(Words), IDS, out=tmp_path / "out")
    assert f"found 5 of 5 stages finished in {tmp_path / 'out'}" in capsys.readouterr().err
    record = tmp_path / "out" / ".wush" / "stage-00002.json"
    record.unlink()
    wc.quantize(net(Words), IDS, out=tmp_path / "out")
    assert "found 2 of 5 stages" in (said := capsys.readouterr().err) and "going on with net.layers.1" in said


def test_quiet_is_quiet(capsys):
    wc.quantize(net(), DATA, progress=False, solver="rtn")  # no warning of few tokens either
    assert capsys.readouterr() == ("", "")


def test_the_log_is_of_json_lines(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    progress = Progress(False, path)
    model = wc.quantize(net(Words), IDS, progress=progress, out=tmp_path / "out", batch_size=2)
    progress.close()
    log = events(path)
    assert [e["event"] for e in log] == ["run", "stage", *["group", "group", "stage"] * 3, "group", "stage", "finished"]
    assert all(a["time"] <= b["time"] for a, b in zip(log, log[1:], strict=False))
    assert log[0]["config"] == wc.WushConfig().to_dict() and log[0]["groups"] == 7
    report = model.wush_quantization.report
    for event in log:
        if event["event"] == "group":
            assert report[event["group"]].items() <= event.items() and event["stage"]
    assert {"capture", "forwards", "journal"} <= log[-1]["seconds"].keys()

    progress = Progress(False, path)
    wc.quantize(net(Words), IDS, progress=progress, out=tmp_path / "out")
    assert [e["event"] for e in events(path)[len(log) :]] == ["run", "resumed", "finished"]
    monkeypatch.setattr(solving, "solve", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        wc.quantize(net(), DATA, progress=progress)
    assert events(path)[-1]["error"] == "ZeroDivisionError: division by zero"


def test_a_smaller_micro_batch_is_logged(tmp_path, monkeypatch):
    real, calls = variants.functional_call, []

    def short(*args):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("simulated")
        return real(*args)

    monkeypatch.setattr(variants, "functional_call", short)
    progress = Progress(False, tmp_path / "log.jsonl")
    wc.quantize(net(Words), IDS, progress=progress)
    [event] = [e for e in events(tmp_path / "log.jsonl") if e["event"] == "batch_size"]
    assert event["batch_size"] == 2 and event["reason"] == "out of memory"


def test_phases_nest_and_charge_the_innermost():
    with timing() as seconds:
        with phase("outer"):
            time.sleep(0.02)
            with phase("inner"):
                time.sleep(0.05)
        with phase("inner"):
            time.sleep(0.01)
    with phase("nobody asks"):
        pass
    assert seconds.keys() == {"outer", "inner"}
    assert 0.02 <= seconds["outer"] < 0.05 and seconds["inner"] >= 0.06


# -- faults ----------------------------------------------------------------------------------------------------------


def test_a_rank_deficient_moment_is_damped_and_reported(caplog):
    """Eight rows for 64 channels, and no damping asked for: some is added until the factor exists."""
    with caplog.at_level(logging.WARNING, "wush_compile"):
        model = wc.quantize(net(), [DATA[0][:8]], progress=False, damping=0.0)
    report = model.wush_quantization.report
    assert report["layers.0.a"]["damping_tries"] > 1
    assert "layers.0.a: its second moment was not positive definite; damping was added" in caplog.text
    assert "8 calibration tokens are fewer" in caplog.text


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_damaged_batch_is_named_before_anything_is_solved(bad, monkeypatch):
    solved = []
    monkeypatch.setattr(solving, "solve", lambda *a, **k: solved.append(1))
    data = [batch.clone() for batch in DATA]
    data[2][3, 4] = bad
    with pytest.raises(wc.WushError, match=r"layers\.0\.a: .* in batch 2, or overflow"):
        wc.quantize(net(), data, progress=False)
    assert not solved
