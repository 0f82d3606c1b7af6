"""`wush-compile quantize`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError, one_of
from .app import Bos, Device, Model, app, console, device_named, hide_bars, one_line_errors, read_text, say

log = logging.getLogger("wush_compile")


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory of the new checkpoint.")],
    calibration: Annotated[
        Path | None, typer.Option(help="Text file to calibrate on. Default: the model's own text.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    window: Annotated[int, typer.Option(min=1, help="Tokens in a calibration window.")] = 512,
    bos: Bos = True,
    format: Annotated[str, typer.Option(help="mxfp4, nvfp4, int4 or int8.")] = "mxfp4",
    transform: Annotated[str, typer.Option(help="identity, random, hadamard, wus or wush.")] = "wush",
    solver: Annotated[str, typer.Option(help="rtn or gptq.")] = "gptq",
    moments: Annotated[str, typer.Option(help="marginal or conditional.")] = "marginal",
    sweeps: Annotated[int, typer.Option(min=0, help="How often GPTQ goes over the weights again.")] = 2,
    weight_scale_rule: Annotated[
        str, typer.Option(help="best, loss, absmax, mse, paper; mxfp4: ocp; nvfp4: search; int4: gaussian.")
    ] = "best",
    activation_scale_rule: Annotated[
        str, typer.Option(help="mse, absmax, paper; nvfp4: search (four scales tried, not two); as the weights' rule.")
    ] = "mse",
    activation_format: Annotated[
        str,
        typer.Option(help="Activations: same (4 bits, as the weights), fp8 (e4m3, a scale a token) or none (16 bits)."),
    ] = "same",
    activation_rounding: Annotated[
        str,
        typer.Option(help="4-bit activations: feedback (with wush: a step takes up the errors before it) or nearest."),
    ] = "feedback",
    transform_block_size: Annotated[int | None, typer.Option(help="Default: the format's group.")] = None,
    share_transform: Annotated[bool, typer.Option(help="One transform for linears with the same input.")] = True,
    head: Annotated[str | None, typer.Option(show_default="16 bits", help="int8: lm_head's weight in 8 bits.")] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            show_default="lm_head",
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
    token_weights: Annotated[
        str, typer.Option(help="What a token counts in second moments: gradient (one more pass) or uniform.")
    ] = "gradient",
    correction: Annotated[
        float, typer.Option(help="How far weights make up for the layers in front: 0 (not at all, faster) to 1.")
    ] = 0.25,
    damping: Annotated[float, typer.Option(help="Share of the mean diagonal added to second moments.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    max_kl: Annotated[
        float | None,
        typer.Option(show_default="off", help="Choose each linear's bits: least cost, predicted KL at most this."),
    ] = None,
    max_share: Annotated[
        float | None,
        typer.Option(show_default="off", help="Choose each linear's bits: least KL, at a share of 16 bits' cost."),
    ] = None,
    cost: Annotated[
        str | None,
        typer.Option(
            metavar="GPU:ROWS",
            show_default="bytes",
            help="What that cost is: time on h200:16, rtx5090:1, mine.json:1 (benchmarks/rung_costs.py), ...",
        ),
    ] = None,
    recommend: Annotated[
        bool, typer.Option("--recommend", help="Print the choice (of --max-kl .1 by default), and stop.")
    ] = False,
    device: Device = "auto",
    stream: Annotated[
        bool, typer.Option("--stream", help="Read a local MODEL layer by layer, never all of it.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Windows in one forward. Default: what fits a GPU; 1 on a CPU.")
    ] = None,
    activations_dir: Annotated[Path | None, typer.Option(help="Keep values between layers in files there.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an earlier run left in DIR.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bar and no table.")] = False,
    log_file: Annotated[
        Path | None, typer.Option("--log", help="Append a JSON line for each step to this file.")
    ] = None,
) -> None:
    """Quantize MODEL's linears to 4 bits on both sides and write a checkpoint.

    The layers are written to --out as they are finished: after a kill or an error the same command goes on from there.
    """
    from ..calibration.progress import Progress
    from ..calibration.recommend import recommend as recommended
    from ..calibration.run import quantize as quantize_model
    from ..calibration.run import quantize_checkpoint
    from ..checkpoint.source import load_model, load_tokenizer, tokenizer_or_none
    from ..config import WushConfig
    from ..data import windows
    from ..reporting.explain import explain as explanation

    with one_line_errors(f"interrupted: the finished layers are kept in {out}; the same command goes on"):
        config = WushConfig(
            format=format,
            transform=transform,
            solver=solver,
            moments=moments,
            sweeps=sweeps,
            weight_scale_rule=weight_scale_rule,
            activation_scale_rule=activation_scale_rule,
            activation_format=None if activation_format == "none" else activation_format,
            activation_rounding=activation_rounding,
            transform_block_size=transform_block_size,
            share_transform=share_transform,
            head=head,
            ignore=tuple(ignore or ()),
            overrides=dict(map(_override, override or ())),
            correction=correction,
            damping=damping,
            token_weights=token_weights,
            seed=seed,
        )
        text, where = None if calibration is None else read_text(calibration), device_named(device)
        if stream and not Path(model).is_dir():
            raise ConfigError(
                f"--stream reads a local directory, and {model} is none: download it first, or leave it out"
            )
        hide_bars(quiet)
        net, tokenizer = (None, tokenizer_or_none(model)) if stream else load_model(model)
        data = None
        if text is not None:
            tokenizer = tokenizer or load_tokenizer(model)  # raises
            data = windows(text, tokenizer, window, special=bos)[:count]
            if len(data) < count:
                log.warning("%s has %d calibration windows of %d tokens, not %d", calibration, len(data), window, count)
        if recommend or max_kl is not None or max_share is not None:
            if net is None or data is None:
                raise ConfigError(
                    "a choice of bits needs all of the model and a text: give --calibration, not --stream"
                )
            target = {"max_kl": max_kl, "max_share": max_share} if max_kl or max_share else {"max_kl": 0.1}
            more = dict(device=where, batch_size=batch_size, activations_dir=activations_dir, progress=not quiet)
            found = recommended(net, data, config, **target, **_cost(cost), **more)
            config = replace(config, **found)
            if recommend or not quiet:
                say(str(found))
            if recommend:
                return
        progress = Progress(not quiet, log_file)
        settings = dict(
            tokenizer=tokenizer,
            progress=progress,
            device=where,
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
        say(f"{explanation(net, width=console.width)}\n\nsaved in {out}; shown by wush-compile explain {out}")


def _cost(text: str | None) -> dict:
    """`h200:16` -> the GPU and the rows of `recommend`."""
    gpu, _, rows = (text or "").partition(":")
    if rows and not rows.isdigit():
        raise ConfigError(f"--cost is GPU:ROWS, as in h200:16, not {text!r}")
    return {"gpu": gpu or None, "rows": int(rows or 1)}


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
    from ..recipe import RECIPE_FIELDS, Recipe

    default = getattr(Recipe, one_of("setting in --override", name, RECIPE_FIELDS))
    if isinstance(default, str):
        return None if text == "none" else text
    try:
        return json.loads(text.lower().replace("none", "null"))
    except ValueError:
        raise ConfigError(f"--override {name}={text}: the value is a number, true, false or none") from None
