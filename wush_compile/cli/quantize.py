"""The command line: `wush-compile`, also `python -m wush_compile`. Every command's --help is enough to use it."""

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from . import __version__
from .calibration.progress import Progress
from .calibration.run import quantize as quantize_model
from .calibration.run import quantize_checkpoint
from .checkpoint.files import read_config
from .checkpoint.save_load import load, load_model, load_tokenizer
from .config import DEFAULT_IGNORE, WushConfig
from .data import windows
from .errors import ConfigError, WushError, one_of
from .evaluation import language as evaluation
from .recipe import RECIPE_FIELDS, Recipe
from .reporting.contents import write_evaluation
from .reporting.explain import explain as explanation
from .reporting.graphs import compiled_graph
from .reporting.page import report as html_report

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Accurate 4-bit inference of PyTorch models: weights and activations in MXFP4, NVFP4 or INT4 with WUSH.",
)
console = Console()

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local directory, a hub name, or a GGUF file.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint written by wush-compile.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"wush-compile {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done, not only warnings.")] = False,
):
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(
        level=level, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True))], force=True
    )


@contextlib.contextmanager
def _one_line_errors(interrupted: str = "interrupted: nothing was written") -> Iterator[None]:
    """Errors that the user can mend are one line and exit code 1, without a traceback."""
    try:
        yield
    except (WushError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        raise typer.Exit(130) from None


def _print(text: str) -> None:
    """Text as it is: no markup, no colour, no line broken."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _override(text: str) -> tuple[str, dict]:
    """`*.down_proj:format=nvfp4,transform_block_size=32` -> (pattern, settings)."""
    pattern, colon, settings = text.partition(":")
    pairs = [setting.partition("=") for setting in settings.split(",")]
    if not pattern or not colon or not all(name and value for name, _, value in pairs):
        raise ConfigError(
            f"--override is PATTERN:NAME=VALUE,NAME=VALUE, as in '*.down_proj:format=nvfp4', not {text!r}"
        )
    return pattern, {name.strip(): _value(name.strip(), value.strip()) for name, _, value in pairs}


def _value(name: str, text: str) -> object:
    """A setting from its text, in the type of its default."""
    default = getattr(Recipe, one_of("setting in --override", name, RECIPE_FIELDS))
    if isinstance(default, str):
        return None if text == "none" else text
    try:
        return json.loads(text.lower().replace("none", "null"))
    except ValueError:
        raise ConfigError(f"--override {name}={text}: the value is a number, true, false or none") from None


def _token_ids(text: str, tokenizer) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the quantized model is saved.")] = Path("out/smollm2-wush"),
    format: Annotated[str, typer.Option(help="mxfp4, nvfp4 or int4.")] = "mxfp4",
) -> None:
    """Quantize SmolLM2-135M-Instruct on this CPU and compare four ways to do it (some minutes, one download)."""
    from .demo.run import demo as run

    with _one_line_errors():
        run(out, format, console)


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory of the new checkpoint.")],
    calibration: Annotated[
        Path | None, typer.Option(help="Text file to calibrate on. Default: the model's own text.")
    ] = None,
    count: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    window: Annotated[int, typer.Option(help="Tokens in a calibration window.")] = 512,
    format: Annotated[str, typer.Option(help="mxfp4, nvfp4 or int4.")] = "mxfp4",
    transform: Annotated[str, typer.Option(help="identity, random, hadamard, wus or wush.")] = "wush",
    solver: Annotated[str, typer.Option(help="rtn or gptq.")] = "gptq",
    moments: Annotated[str, typer.Option(help="marginal or conditional.")] = WushConfig.moments,
    weight_scale_rule: Annotated[
        str, typer.Option(help="absmax, mse, paper; mxfp4: ocp; int4: gaussian.")
    ] = WushConfig.weight_scale_rule,
    activation_scale_rule: Annotated[
        str, typer.Option(help="As the weights' rule.")
    ] = WushConfig.activation_scale_rule,
    activation_format: Annotated[
        str,
        typer.Option(help="Activations: same (4 bits, as the weights), fp8 (e4m3, a scale a token) or none (16 bits)."),
    ] = "same",
    transform_block_size: Annotated[int | None, typer.Option(help="Default: the format's group.")] = None,
    share_transform: Annotated[bool, typer.Option(help="One transform for linears with the same input.")] = True,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            show_default=", ".join(DEFAULT_IGNORE),
            help="A module that stays in 16 bits, by name or pattern; repeatable. Adds to the default; "
            "'!lm_head' quantizes the head.",
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN:NAME=VALUE,...",
            help="Settings for the linears that a pattern matches: '*.down_proj:format=nvfp4'; repeatable, later "
            "ones win.",
        ),
    ] = None,
    damping: Annotated[float, typer.Option(help="Share of the mean diagonal added to second moments.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Device = "auto",
    stream: Annotated[
        bool, typer.Option("--stream", help="Read a local MODEL layer by layer, never all of it.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows in one forward. Default: what fits a GPU; 1 on a CPU.")
    ] = None,
    activations_dir: Annotated[Path | None, typer.Option(help="Keep values between layers in files there.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an earlier run left in DIR.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bar and no table.")] = False,
    log: Annotated[Path | None, typer.Option(help="Append a JSON line for each step to this file.")] = None,
) -> None:
    """Quantize MODEL's linears to 4 bits on both sides and write a checkpoint.

    The layers are written to --out as they are finished: after a kill or an error the same command goes on from there.
    """
    with _one_line_errors(f"interrupted: the finished layers are kept in {out}; the same command goes on"):
        config = WushConfig(
            format=format,
            transform=transform,
            solver=solver,
            moments=moments,
            weight_scale_rule=weight_scale_rule,
            activation_scale_rule=activation_scale_rule,
            activation_format=None if activation_format == "none" else activation_format,
            transform_block_size=transform_block_size,
            share_transform=share_transform,
            ignore=tuple(ignore or ()),
            overrides=dict(map(_override, override or ())),
            damping=damping,
            seed=seed,
        )
        text = None if calibration is None else calibration.read_text(encoding="utf-8")
        if quiet:
            transformers.utils.logging.disable_progress_bar()
        net, tokenizer = (None, load_tokenizer(model)) if stream else load_model(model)
        data = None if text is None else windows(text, tokenizer, window)[:count]
        progress = Progress(not quiet, log)
        settings = dict(
            tokenizer=tokenizer,
            progress=progress,
            device=_device(device),
            batch_size=batch_size,
            activations_dir=activations_dir,
            out=out,
            restart=restart,
        )
        with contextlib.closing(progress):
            net = (
                quantize_checkpoint(model, data, config, **settings)
                if stream
                else quantize_model(net, data, config, **settings)
            )
        if quiet or int(os.environ.get("RANK", 0)):  # of several processes the first one speaks
            return
        _print(f"{explanation(net, width=console.width)}\n\nsaved in {out}; shown by wush-compile explain {out}")


@app.command()
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text file.")],
    reference: Annotated[str | None, typer.Option(help="Model to measure KL and top-1 agreement against.")] = None,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    count: Annotated[int | None, typer.Option(help="Only the first windows.")] = None,
    device: Device = "auto",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in the checkpoint MODEL, for report.")] = False,
) -> None:
    """Perplexity of MODEL on a text; with --reference also KL divergence and top-1 agreement."""
    with _one_line_errors():
        if save:
            read_config(Path(model))  # before minutes of work
        contents = text.read_text(encoding="utf-8")
        net, tokenizer = load_model(model)
        net.to(_device(device))
        ids = _token_ids(contents, tokenizer)
        ids = ids if count is None else ids[: count * window]
        table = Table("", "perplexity", *(["KL to reference", "top-1 agreement"] if reference else []))
        if reference is None:
            result = {"perplexity": evaluation.perplexity(net, ids, window)}
            table.add_row(model, f"{result['perplexity']:.3f}")
        else:
            other, _ = load_model(reference)
            measured = evaluation.compare(other.to(_device(device)), net, ids, window)
            result = measured.to_dict()
            table.add_row(reference, f"{measured.reference_perplexity:.3f}", "", "")
            table.add_row(model, f"{measured.perplexity:.3f}", f"{measured.kl:.4f}", f"{100 * measured.top1:.1f} %")
        console.print(table)
        if save:
            write_evaluation(Path(model), {"text": text.name, "window": window, **result})


@app.command()
def explain(
    directory: Checkpoint,
    all: Annotated[
        bool, typer.Option("--all", help="All groups, all names, and a layer's graph before and after.")
    ] = False,
    graph: Annotated[
        str | None, typer.Option(help="Only the graph of this layer inside torch.compile: layer.0")
    ] = None,
    after: Annotated[str | None, typer.Option(help="With --graph: the graph after this pass: fuse_norm")] = None,
) -> None:
    """What a checkpoint holds: settings, memory, what was skipped and why, and the ten worst groups."""
    with _one_line_errors():
        model = load(directory)
        if graph is None and after is None:
            text = explanation(model, all=all, width=console.width)
        else:
            layer = re.fullmatch(r"layer\.(\d+)", graph or "layer.0")
            if layer is None:
                raise ConfigError(f"--graph is layer.0, layer.1 and so on, not {graph!r}")
            text = compiled_graph(model, int(layer[1]), after)
        _print(text)


@app.command()
def report(
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="A checkpoint; with --follow: the last run's, to compare with."),
    ] = None,
    other: Annotated[Path | None, typer.Argument(metavar="[OTHER]", help="A second checkpoint, side by side.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page. Default: report.html.")] = None,
    follow: Annotated[Path | None, typer.Option(help="Show a run that goes on, by the file of quantize --log.")] = None,
    port: Annotated[int, typer.Option(help="Of --follow without --out, on 127.0.0.1; 0: a free one.")] = 0,
    once: Annotated[bool, typer.Option("--once", help="With --follow and --out: write the page one time.")] = False,
) -> None:
    """Write a page (HTML, one file) about a checkpoint, about two of them, or about a run that goes on."""
    from .reporting import follow as following

    with _one_line_errors("stopped"):
        if follow is not None:
            if other is not None:
                raise ConfigError("--follow compares with one checkpoint: leave the second one out")
            if out is not None:
                following.rewrite(follow, out, directory, once)
                _print(f"written to {out}")
                return
            if once:
                raise ConfigError("--once writes one page: say where with --out")
            with following.serving(follow, directory, port) as server:
                _print(f"http://127.0.0.1:{server.server_port}/ shows {follow}; Ctrl-C ends it")
                server.serve_forever()
        if directory is None:
            raise ConfigError("give the directory of a checkpoint, or --follow FILE")
        out = out or Path("report.html")
        following.write_page(out, html_report(directory, other))
        _print(f"written to {out}")


@app.command()
def generate(
    directory: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    device: Device = "auto",
) -> None:
    """Continue a prompt with a quantized model (greedy)."""
    with _one_line_errors():
        net, tokenizer = load_model(str(directory))
        net.to(_device(device))
        ids = tokenizer(prompt, return_tensors="pt").to(net.device)
        out = net.generate(**ids, max_new_tokens=tokens, do_sample=False)
        _print(tokenizer.decode(out[0], skip_special_tokens=True))


@app.command()
def doctor(
    device: Device = "auto",
    deep: Annotated[
        bool, typer.Option("--deep", help="Also compare and time every provider, minutes; needs a GPU.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where --deep writes its report.")] = Path("wush-doctor.json"),
) -> None:
    """What runs where: versions, providers, native and emulated arithmetic, and a short self-test of every op."""
    from .diagnostics.doctor import examine

    with _one_line_errors():
        where = _device(device)
        if deep and where.type != "cuda":
            raise ConfigError(f"--deep compares the kernels of a GPU; the device is {where.type}: leave --deep out")
        report = examine(where)
        capability = report["capability"]
        title = report["device"] + (
            "" if capability is None else f", compute capability {capability[0]}.{capability[1]}"
        )
        facts = Table("", title)
        facts.add_row(
            "versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
        )
        for name, state in report["providers"].items():
            facts.add_row(f"provider {name}", state)
        for format, words in report["arithmetic"].items():
            facts.add_row(format, words)
        console.print(facts)
        tests = Table("op", "asked in this order", "self-test", "seconds")
        for op, providers in report["ops"].items():
            checks = [check for check in report["self_test"] if check.op == op]
            bad = [f"{c.format} {c.case}: error {c.error:.2g}" for c in checks if not c.ok]
            tests.add_row(
                op,
                ", ".join(providers),
                "; ".join(bad) or f"{len(checks)} checks passed",
                f"{sum(c.seconds for c in checks):.1f}",
            )
        console.print(tests)
        good = all(check.ok for check in report["self_test"])
        if deep:
            good = _deep(where, report, out) and good
        if not good:
            raise typer.Exit(1)


def _deep(device: torch.device, report: dict, out: Path) -> bool:
    """The conformance of every provider and its times, as tables and in one file; whether all conforms."""
    from .diagnostics import deep

    results, times = deep.run(device, report, out)
    table = Table("provider", "op", "format", "cases", "refused", "failed", "largest error")
    for row in deep.summary(results):
        table.add_row(*map(str, row))
    console.print(table)
    for result in results:
        if not result.ok:
            console.print(
                f"{result.provider} {result.op} {result.format} {result.case}: error {result.error:.2g}", markup=False
            )
    speed = Table("op", "format", "shape", "baseline µs", *dict.fromkeys(t.provider for t in times))
    for row in deep.side_by_side(times):
        speed.add_row(*row)
    console.print(speed)
    console.print(f"report: {out}", markup=False)
    return all(result.ok for result in results)
