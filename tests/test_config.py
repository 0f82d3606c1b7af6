"""The configuration: what it refuses, with which words, and its round trip through a checkpoint."""

import dataclasses
import json

import pytest

from wush_compile import WushConfig
from wush_compile.config import ignored_by
from wush_compile.errors import ConfigError, WushError, one_of
from wush_compile.formats import FORMATS
from wush_compile.recipe import Recipe


@pytest.mark.parametrize(
    "settings, near",
    [
        (dict(format="mxpf4"), "did you mean 'mxfp4'"),
        (dict(format="NVFP4x"), "one of: mxfp4, nvfp4, int4"),
        (dict(transform="wuhs"), "did you mean 'wu"),
        (dict(transform="hadamrad"), "did you mean 'hadamard'"),
        (dict(solver="gptk"), "did you mean 'gptq'"),
        (dict(moments="marginals"), "did you mean 'marginal'"),
        (dict(weight_scale_rule="absmin"), "weight_scale_rule for mxfp4 'absmin'; did you mean 'absmax'"),
        (dict(activation_scale_rule="gaussian"), "activation_scale_rule for mxfp4"),
        (dict(format="nvfp4", weight_scale_rule="ocp"), "weight_scale_rule for nvfp4"),
        (dict(format="int4", activation_scale_rule="ocp"), "activation_scale_rule for int4"),
        (
            dict(activation_scale_rule="search"),
            "activation_scale_rule for mxfp4 'search'; did you mean 'mse'? (one of: absmax, mse, ocp, paper)",
        ),
        (dict(format=None), "unknown format None"),
        (dict(solver=["gptq"]), "unknown solver"),
        (dict(activation_rounding="near"), "unknown activation_rounding 'near'; did you mean 'nearest'?"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(settings, near):
    with pytest.raises(ConfigError) as error:
        WushConfig(**settings)
    assert near in str(error.value)


def test_an_error_does_not_list_every_module_of_a_model():
    with pytest.raises(ConfigError) as error:
        one_of("module in ignore", "layers.x", [f"layers.{i}" for i in range(1000)])
    assert "layers.23, and 976 more)" in str(error.value)


def test_unknown_settings_are_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown setting 'fromat'; did you mean 'format'"):
        WushConfig.from_dict({"fromat": "mxfp4"})
    with pytest.raises(ConfigError, match="did you mean 'transform'"):
        WushConfig.paper("nvfp4", transfrom="wus")


def test_nothing_near_gives_no_hint():
    with pytest.raises(ConfigError) as error:
        one_of("solver", "qqqqqqqq", ("rtn", "gptq"))
    assert str(error.value) == "unknown solver 'qqqqqqqq' (one of: rtn, gptq)"


@pytest.mark.parametrize(
    "format, block",
    [
        ("mxfp4", 16),
        ("mxfp4", 48),
        ("mxfp4", 0),
        ("mxfp4", -32),
        ("mxfp4", 32.0),
        ("mxfp4", "32"),
        ("mxfp4", True),
        ("nvfp4", 8),
        ("int4", 96),
    ],
)
def test_bad_transform_block_sizes(format, block):
    with pytest.raises(ConfigError, match=f"multiple of {FORMATS[format].group_size}, or None"):
        WushConfig(format=format, weight_scale_rule="mse", transform_block_size=block)


@pytest.mark.parametrize("format, block", [("mxfp4", 32), ("mxfp4", 256), ("nvfp4", 16), ("nvfp4", 32), ("int4", 64)])
def test_good_transform_block_sizes(format, block):
    assert WushConfig(format=format, transform_block_size=block).transform_block_size == block


def test_ignore_is_a_sequence_and_never_a_string():
    with pytest.raises(ConfigError, match=r"ignore=\('lm_head',\)"):
        WushConfig(ignore="lm_head")
    assert WushConfig(ignore=["lm_head", "*.down_proj"]).ignore == ("lm_head", "*.down_proj")


def test_ignore_adds_to_the_default_unless_it_says_otherwise():
    assert WushConfig(ignore=()).ignore == WushConfig().ignore == ("lm_head",)
    assert WushConfig(ignore=["*.down_proj"]).ignore == ("lm_head", "*.down_proj")
    quantized = WushConfig(ignore=["!lm_head", "a.*", "!a.b"])
    assert [ignored_by(n, quantized.ignore) for n in ("lm_head", "m.lm_head", "a.c", "a.b")] == [
        None,
        None,
        "a.*",
        None,
    ]
    assert WushConfig.from_dict(quantized.to_dict()) == quantized


def test_overrides_change_the_recipe_of_what_they_match_and_later_ones_win():
    config = WushConfig(
        overrides={"*.down_proj": {"format": "nvfp4"}, "a.*": {"solver": "rtn"}, "a.b.*": {"solver": "gptq"}}
    )
    assert config.recipe_of("x") == config.recipe == Recipe()
    assert config.recipe_of("x.down_proj") == Recipe(format="nvfp4")
    assert config.recipe_of("a.down_proj") == Recipe(format="nvfp4", solver="rtn")
    assert config.recipe_of("a.b.up_proj") == Recipe()
    assert config.recipe_of("a.down_proj").changes_from(config) == {"format": "nvfp4", "solver": "rtn"}
    again = WushConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True)))
    assert again == config and list(again.overrides) == list(config.overrides)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"*.q": {"fromat": "nvfp4"}}, r"setting in overrides\['\*.q'\] 'fromat'; did you mean 'format'"),
        ({"*.q": {"ignore": ()}}, "setting in overrides"),
        ({"*.q": {"format": "nvfp5"}}, r"overrides\['\*.q'\]: unknown format 'nvfp5'"),
        ({"*.q": {"weight_scale_rule": "gaussian"}}, r"overrides\['\*.q'\]: .*weight_scale_rule for mxfp4"),
        ({"*.q": "nvfp4"}, "overrides maps patterns of names to settings"),
        (["*.q"], "overrides maps patterns of names to settings"),
        (3, "overrides maps patterns of names to settings"),
        ({3: {}}, "overrides maps patterns of names to settings"),
    ],
)
def test_bad_overrides_name_their_pattern(overrides, words):
    with pytest.raises(ConfigError, match=words):
        WushConfig(overrides=overrides)


@pytest.mark.parametrize("damping", [-0.01, 1, 1.5, float("nan")])
def test_bad_damping(damping):
    with pytest.raises(ConfigError, match="damping"):
        WushConfig(damping=damping)


def test_errors_are_value_errors_and_ours():
    assert issubclass(ConfigError, ValueError) and issubclass(ConfigError, WushError)


@pytest.mark.parametrize("format", FORMATS)
def test_paper(format):
    config = WushConfig.paper(format)
    assert config == WushConfig(
        format=format,
        transform="wush",
        solver="gptq",
        moments="conditional",
        weight_scale_rule="paper",
        activation_scale_rule="paper",
        activation_rounding="nearest",
        sweeps=0,
        share_transform=False,
        correction=0.0,
        token_weights="uniform",
    )
    assert WushConfig.paper(format, solver="rtn", share_transform=True).solver == "rtn"
    assert WushConfig.paper(format, moments="marginal").moments == "marginal"


@pytest.mark.parametrize(
    "config",
    [
        WushConfig(),
        WushConfig.paper("nvfp4", seed=7),
        WushConfig(ignore=("a", "b.*"), transform_block_size=64, damping=0.0),
        WushConfig(format="int4", transform="random", solver="rtn", weight_scale_rule="gaussian", ignore=()),
    ],
)
def test_round_trip_through_json(config):
    again = WushConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)


def test_to_dict_has_every_field():
    assert list(WushConfig().to_dict()) == [field.name for field in dataclasses.fields(WushConfig)]


def test_frozen():
    config = WushConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.solver = "rtn"
    settings = config.to_dict()
    settings["ignore"].append("x")
    assert config.ignore == ("lm_head",)


def test_group_size_and_need_of_data():
    assert [WushConfig(format=f).group_size for f in ("mxfp4", "nvfp4", "int4")] == [32, 16, 32]
    plain = dict(solver="rtn", transform="hadamard")
    assert not WushConfig(**plain).needs_data and not WushConfig(format="int4", **plain).needs_data
    assert not WushConfig(format="nvfp4", activation_scale_rule="paper", **plain).needs_data
    for settings in (
        dict(solver="gptq", transform="identity"),
        dict(solver="rtn", transform="wus"),
        dict(solver="rtn", transform="wush"),
        dict(format="nvfp4", **plain),
        dict(format="nvfp4", activation_scale_rule="search", **plain),
    ):
        assert WushConfig(**settings).needs_data
