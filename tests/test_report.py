"""The report's page: the same data as `explain`, harmless names, readable colours, bounded size, a run that goes on."""

import json
import math
import re
import socket
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser

import pytest
import torch
from helpers import quantize
from models import plain, quantized, tokens
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("matplotlib", reason="a report's charts need matplotlib: pip install 'wush-compile[report]'")

import wush_compile as wc
from wush_compile import cli, formats
from wush_compile.checkpoint.record import quantization_of
from wush_compile.errors import CheckpointError, ConfigError, WushError
from wush_compile.modules import named_groups
from wush_compile.reporting import follow
from wush_compile.reporting.contents import Contents, GroupFacts, read_contents, write_evaluation
from wush_compile.reporting.page import PACKAGE, render
from wush_compile.reporting.weights import weight_facts

EVIL = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    """A llama of two layers with the default settings."""
    return wc.quantize(plain("llama"), [tokens(2, 16)], progress=False)


class Elements(HTMLParser):
    """The elements, attributes and text of a page; script and style are text of their own."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


# -- one data --------------------------------------------------------------------------------------------------------


def test_the_page_agrees_with_explain(llama):
    text = " ".join(Elements(wc.report(llama, graphs=False)).text)
    table = wc.explain(llama, all=True, width=200).split("relative loss first\n")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        name, rows, _, width, *values = line.split()
        for value in (name, rows, width, *values):
            assert value in text
    order = [line.split()[0] for line in table.splitlines()[2:]]
    assert [g.name for g in read_contents(llama, graphs=False).groups] == order


def test_a_directory_gives_what_its_model_gives(llama, tmp_path):
    wc.save(llama, tmp_path / "m")
    mine, theirs = (read_contents(source, graphs=False) for source in (llama, tmp_path / "m"))
    assert mine.groups == theirs.groups and mine.head == theirs.head and mine.facts == theirs.facts
    assert mine.groups[0].weights is not None and mine.phases


def test_equal_checkpoints_give_equal_bytes(llama, tmp_path):
    wc.save(llama, tmp_path / "m")
    assert wc.report(tmp_path / "m", graphs=False) == wc.report(tmp_path / "m", graphs=False)


def test_graphs_are_those_of_explain(llama):
    steps = {step.name: step for step in read_contents(llama).steps}
    compiled = wc.explain(llama, view="compiled")
    assert steps["after merge_siblings"].text and steps["captured, after quantization"].picture["boxes"]
    last = [step for step in steps.values() if not step.same][-1]
    assert last.text in compiled
    labels = [box["label"] for box in last.picture["boxes"]]
    assert any(label.startswith("wush.") for label in labels)


def test_a_model_that_is_not_quantized(tmp_path):
    with pytest.raises(WushError, match="not quantized"):
        wc.report(plain("llama"))
    with pytest.raises(CheckpointError, match="not a directory"):
        wc.report(tmp_path / "none")


# -- what weights show -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4"])
def test_weight_facts_count_every_code_and_scale(format):
    [group] = [
        g for _, g in named_groups(quantize(nn.Sequential(nn.Linear(64, 48)), torch.randn(8, 64), format=format))
    ]
    facts = weight_facts(group)
    codes = formats.unpack(group.weight_packed).flatten()
    values = formats.decode(codes[:, None], torch.full((len(codes),), 127, dtype=torch.uint8), "mxfp4")[:, 0]
    if format == "int4":
        values = torch.where(codes >= 8, codes.float() - 16, codes.float()) + 0.5
    assert facts.codes == [(v, int((values == v).sum())) for v in sorted({value for value, _ in facts.codes})]
    assert sum(n for _, n in facts.codes) == 48 * 64 and sum(n for _, n in facts.scales) == group.weight_scale.numel()
    scales = formats.decode_scales(group.weight_scale, format).flatten()
    assert dict(facts.scales) == {k: int((scales.log2().floor() == k).sum()) for k, _ in facts.scales}
    assert facts.zero == float((values == 0).double().mean())
    assert facts.saturated == pytest.approx(float((values.abs() == values.abs().max()).double().mean()))


def test_power_before_the_transform_is_that_of_the_effective_weight(llama):
    path, group = next(named_groups(llama))
    weight = torch.cat([llama.get_submodule(m.name).dequantize() for m in group.members])
    power = weight.square().mean(0)
    want = (power / power.mean()).sort(descending=True).values
    facts = weight_facts(group)
    assert facts.before[0] == pytest.approx(float(want[0]), rel=1e-3)
    assert facts.before[-1] == pytest.approx(float(want[-1]), rel=1e-3)
    assert facts.before != facts.after and facts.spectrum[0] > facts.spectrum[-1] > 0


# -- untrusted checkpoints -------------------------------------------------------------------------------------------


def test_nothing_of_a_checkpoint_becomes_markup(tmp_path):
    model = quantized("llama")
    clean = Elements(wc.report(model, graphs=False))
    wc.save(model, tmp_path / "m")
    path = tmp_path / "m"
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["ignored"] = {EVIL: EVIL, f"{EVIL}2": "$x_{1}$"}
    (path / "config.json").write_text(json.dumps(config))
    stored = json.loads((path / "wush_report.json").read_text())
    for entry in stored["groups"].values():
        entry |= {"tokens": EVIL, "seconds": [EVIL], "loss": EVIL, EVIL: 3.0}
    stored["run"] = {"seconds": {EVIL: 2.0, "solve": EVIL}, "device": EVIL, "peak_memory": EVIL}
    (path / "wush_report.json").write_text(json.dumps(stored))
    evaluation = {"wush_sha256": config["wush_sha256"], "perplexity": 3.0, "text": EVIL, "kl": EVIL}
    (path / "wush_evaluation.json").write_text(json.dumps(evaluation))
    html = wc.report(path, graphs=False)
    page = Elements(html)
    assert EVIL not in html and "<img" not in html.lower()
    assert set(page.tags) <= set(clean.tags) and page.tags.count("script") == 1
    assert not any(name.startswith("on") or "javascript:" in (value or "") for name, value in page.attributes)
    assert any(EVIL in text for text in page.text)


def test_markup_in_names_of_groups_stays_text():
    name = f"layers.0.{EVIL}"
    page = Contents(
        EVIL, groups=[GroupFacts(name, 1, 2, relative_loss=0.1, seconds=1.0, notes=EVIL, members=[name, EVIL])]
    )
    html = render([page, page], [EVIL, EVIL])
    assert EVIL not in html and "<img" not in html.lower() and html.count("<script>") == 1


def test_the_policy_forbids_requests_and_foreign_script():
    html = render([Contents("x")], ["x"])
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]
    assert "default-src 'none'" in policy.replace("&#39;", "'") and "unsafe-inline" not in policy.split("script-src")[1]
    assert not re.findall(r'(?:src|href)="(?!data:,)', html)


# -- size and looks --------------------------------------------------------------------------------------------------


def test_an_8b_model_stays_below_5_mb():
    facts = read_contents(quantized("llama"), graphs=False).groups[0]
    groups = [
        GroupFacts(
            f"model.layers.{layer}.{kind}",
            4096,
            4096,
            65536,
            1e-3,
            0.01 + layer / 1e4,
            2.5,
            2**23,
            "",
            [kind] * 3,
            {"weight_error": 0.01},
            facts.weights,
        )  # fmt: skip
        for layer in range(32)
        for kind in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    page = Contents("Llama", groups=groups)
    html = render([page, page], ["a", "b"])
    assert html.count("<tbody>") == 224 and len(html.encode()) < 5_000_000


def luminance(color: str) -> float:
    """Relative luminance of `#rrggbb`, by WCAG 2.2."""
    values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_have_the_contrast_of_wcag_aa():
    css = PACKAGE.joinpath("page.css").read_text(encoding="utf-8")
    palette = {name: colors for name, *colors in re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", css)}
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    for theme in (0, 1):
        for ground in ("back", "panel"):
            for name in ("text", "muted", "first", "second"):
                assert contrast(palette[name][theme], palette[ground][theme]) >= 4.5, (name, ground, theme)
            assert contrast(palette["control"][theme], palette[ground][theme]) >= 3, (ground, theme)


def test_a_comparison_puts_the_largest_change_first():
    losses = {"a": (0.1, 0.11), "b": (0.1, 0.03), "c": (0.2, 0.2)}
    pages = [Contents("m", groups=[GroupFacts(n, relative_loss=both[k]) for n, both in losses.items()]) for k in (0, 1)]
    pages[1].groups.append(GroupFacts("new", relative_loss=math.nan))
    html = render(pages, ["one", "two"])
    assert re.findall(r"<tr><td>(\w+)", html) == ["new", "b", "a", "c"] and "only in B" in html


# -- evaluations -----------------------------------------------------------------------------------------------------


def test_an_evaluation_is_shown_while_it_is_of_these_weights(llama, tmp_path):
    wc.save(llama, tmp_path / "m")
    write_evaluation(tmp_path / "m", {"perplexity": 12.345, "text": "wiki"})
    file = tmp_path / "m" / "wush_evaluation.json"
    assert "Perplexity 12.345" in read_contents(tmp_path / "m", graphs=False).head[2][1]
    file.write_text(json.dumps({"wush_sha256": "other", "perplexity": 12.345}))
    assert "No evaluation is kept" in read_contents(tmp_path / "m", graphs=False).head[2][1]


# -- a run that goes on ----------------------------------------------------------------------------------------------


def log_lines(groups: int, loss: float, end: str | None = None) -> list[dict]:
    lines = [{"event": "run", "time": 0.1, "groups": 4, "device": "cpu", "config": {"format": "mxfp4"}}]
    for i in range(groups):
        lines.append(
            {"event": "group", "time": 10.0 * (i + 1), "group": f"layers.{i}.q", "rows": 8, "width": 32,
             "relative_loss": loss, "seconds": 1.0}
        )  # fmt: skip
    return lines + ([{"event": end, "time": 50.0, "seconds": {"solve": 4.0}}] if end else [])


def write_log(path, *runs, tail: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for run in runs for line in run) + tail)


def test_a_run_shows_how_far_it_is(tmp_path):
    log = tmp_path / "run.jsonl"
    write_log(log, log_lines(4, 0.02, "finished"), log_lines(2, 0.01), tail='{"event": "gro')
    html, goes_on = follow.follow_page(log)
    text = " ".join(Elements(html).text)
    assert goes_on and 'http-equiv="refresh"' in html
    assert "2 of 4 groups" in text and "20 s so far, about 20 s left" in text
    assert re.findall(r"<tr><td>([\w.]+)", html) == ["layers.0.q", "layers.1.q"] and 'data-value="2.0"' in html
    write_log(log, log_lines(4, 0.02, "finished"))
    html, goes_on = follow.follow_page(log)
    assert not goes_on and "refresh" not in html


def test_the_log_of_a_run_gives_its_losses(tmp_path):
    log = tmp_path / "run.jsonl"
    with_log = wc.Progress(False, log)
    model = wc.quantize(nn.Sequential(nn.Linear(64, 64)), [torch.randn(8, 64)], solver="rtn", progress=with_log)
    with_log.close()
    [event] = follow.read_log(log)
    page = follow.run_contents("run", event)
    reports = quantization_of(model).report
    assert {g.name: g.relative_loss for g in page.groups} == {n: r["relative_loss"] for n, r in reports.items()}
    assert page.progress == (1, 1) and page.phases


def test_the_server_answers_on_loopback_only(tmp_path):
    log = tmp_path / "run.jsonl"
    write_log(log, log_lines(1, 0.01))
    with follow.serving(log) as server:
        assert server.server_address[0] == "127.0.0.1" and server.socket.family == socket.AF_INET
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/"
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            assert "1 of 4 groups" in opener.open(url, timeout=30).read().decode()
            write_log(log, log_lines(3, 0.01))
            assert "3 of 4 groups" in opener.open(url, timeout=30).read().decode()
            for request in (f"{url}etc", urllib.request.Request(url, headers={"Host": "evil.example:80"})):
                with pytest.raises(urllib.error.HTTPError, match="404"):
                    opener.open(request, timeout=30)
        finally:
            server.shutdown()
            thread.join()


def test_a_missing_log_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="--log"):
        follow.follow_page(tmp_path / "none.jsonl")


def test_the_command_writes_pages(llama, tmp_path):
    wc.save(llama, tmp_path / "m")
    write_log(tmp_path / "run.jsonl", log_lines(2, 0.01))
    runner, out = CliRunner(), tmp_path / "x.html"
    done = runner.invoke(cli.app, ["report", str(tmp_path / "m"), "-o", str(out)])
    assert done.exit_code == 0 and "LlamaForCausalLM" in out.read_text() and "after merge_siblings" in out.read_text()
    done = runner.invoke(
        cli.app, ["report", str(tmp_path / "m"), "--follow", str(tmp_path / "run.jsonl"), "-o", str(out), "--once"]
    )
    assert done.exit_code == 0 and "2 of 4 groups" in out.read_text() and "The checkpoint m" in out.read_text()
    assert runner.invoke(cli.app, ["report"]).exit_code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "run.jsonl", "x.html"]
