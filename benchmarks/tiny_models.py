"""Builds a tiny random model of any architecture of transformers, and inputs for it.

A configuration is shrunk by the names of its fields: widths become 64, stacks two layers deep, vocabularies short. The
same rule holds inside nested configurations. `EXCEPTIONS` has what the rules cannot know of an architecture.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

WIDTH, HEADS, HEAD, LAYERS, VOCABULARY, IMAGE, PATCH, LENGTH, QUESTION = 64, 4, 16, 2, 256, 64, 16, 16, 5

# Heads by the mapping of transformers that names them: a model type is walked with the first that it has.
TASKS = {
    "IMAGE_TEXT_TO_TEXT": "vision-language",
    "SPEECH_SEQ_2_SEQ": "audio",
    "SEQ_TO_SEQ_CAUSAL_LM": "seq2seq",
    "CAUSAL_LM": "causal",
    "MASKED_LM": "encoder",
    "CTC": "audio",
    "MULTIMODAL_LM": "multimodal",
    "TEXT_TO_WAVEFORM": "audio",
    "TEXT_TO_SPECTROGRAM": "audio",
    "VIDEO_CLASSIFICATION": "vision",
    "IMAGE_CLASSIFICATION": "vision",
    "OBJECT_DETECTION": "vision",
    "DEPTH_ESTIMATION": "vision",
    "SEMANTIC_SEGMENTATION": "vision",
    "UNIVERSAL_SEGMENTATION": "vision",
    "AUDIO_CLASSIFICATION": "audio",
    "SEQUENCE_CLASSIFICATION": "classifier",
    "TOKEN_CLASSIFICATION": "classifier",
    "PRETRAINING": "base",
    "": "base",
    "BACKBONE": "vision",
    "POSE_ESTIMATION": "vision",
    "KEYPOINT_DETECTION": "vision",
    "KEYPOINT_MATCHING": "vision",
    "IMAGE_MATTING": "vision",
    "TABLE_RECOGNITION": "vision",
}
TORCH = ("nn.TransformerEncoder", "nn.TransformerDecoder", "nn.Transformer", "nn.MultiheadAttention")


def architectures() -> dict[str, tuple[str, str]]:
    """Every model type of the installed transformers and torch's own transformers: name -> (class, kind)."""
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, tuple[str, str]] = {}
    for task, kind in TASKS.items():
        mapping = getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES", {})
        for name, classes in mapping.items():
            found.setdefault(name, (classes if isinstance(classes, str) else classes[0], kind))
    return dict(sorted(found.items())) | {name: (name, "torch") for name in TORCH}


# -- configurations --------------------------------------------------------------------------------------------------


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def _doubling(values: list) -> list:
    return [32 * 2**i for i in range(len(values))]


def _ids(value: int) -> int:
    # Different tokens stay different; the last ids are for special tokens.
    return value if value < 96 else VOCABULARY - 1 - value % 61


# Rules that leave a model as wide as it is.
DEPTHS = (_ids, _at_most(0), _at_most(1), _at_most(LAYERS), _at_most(VOCABULARY), _at_most(IMAGE))
# The first pattern that matches a field's whole name decides. The function gets the field's default.
NUMBERS: list[tuple[str, Callable[[int], int]]] = [
    (r".*token_(id|index)|.*_id|(boi|eoi)_token_index", _ids),
    (r"num_feat_extract_layers|.*(conv|upsampl|downsampl|adapter|fpn|residual|lstm|stages?)\w*layers", lambda v: v),
    (r"num_kv_shared_layers|num_nextn_predict_layers|first_k_dense_replace|num_hash_layers", DEPTHS[1]),
    (r"max_window_layers|insert_layer_id|decoder_sparse_step|moe_layer_freq|encoder_sparse_step", DEPTHS[2]),
    (r"(num_|n_)?(\w+_)?(layers?|depth)|(\w+_)?num_layers", DEPTHS[3]),
    (r"type_vocab_size", lambda v: v),
    (r"(\w+_)?vocab_size|vocab_size\w*", DEPTHS[4]),
    (r"qk_rope_head_dim|rotary_dim|index_head_dim", _at_most(16)),
    (r"qk_head_dim", _at_most(32)),
    (r"(\w+_)?(head_dim|head_size|d_kv|dim_head|headdim)", _at_most(16)),
    (r"(\w+_)?(num_)?(key_value|kv)_(attention_)?heads|multi_query_group_num|num_query_groups", _at_most(2)),
    (r"(\w+_)?(num_|n_)?(\w+_)?heads?", _at_most(HEADS)),
    (r"(kv|q|o)_lora_rank|lru_width|upsample_groups|condition_dim", _at_most(WIDTH)),
    (r"(\w+_)?(intermediate|ffn|ff|inner|feed_forward)_?(size|dim|hidden_size)\w*|n_inner|d_ff|mlp_dim",
     _at_most(2 * WIDTH)),
    (r"(\w+_)?(num_(\w+_)?experts|n_routed_experts)", _at_most(4)),
    (r"(\w+_)?experts_per_tok|moe_topk|top_?k(_experts)?|topk_group|n_group", _at_most(2)),
    (r"(pretrain_)?(image|img|input_image)_size", DEPTHS[5]),
    (r"mm_tokens_per_image", _at_most(4)),
    (r"window_size", lambda v: 2 if v <= 16 else v),
    (r"(mamba_)?n_groups|mamba_ngroups|moe_k|num_(expert_)?group|num_experts_per_token", _at_most(2)),
    (r"(\w+_)?num_queries|num_query_tokens|query_length|num_denoising", _at_most(10)),
    (r"patch_size", lambda v: v if v <= 8 else PATCH),
    (r"max_(source|target)_positions", _at_most(64)),
    (r"n_positions|max_(\w+_)?position(_embedding|_encoding)?s", _at_most(512)),
    (r"codebook_dim|codebook_size|num_mel_bins|num_channels|in_channels", lambda v: v),
    (r"(\w+_)?(hidden|embed|embedding|embd|model|proj|projection|projector|output|out|state|word_embed_proj|latent|text|"
     r"vision|context|cross_attention|pooler_output|bottleneck)(_hidden)?_(size|dim|width)|n_embd|d_model|dim|"
     r"hidden|width|embed_dim|(\w+_)?(d_model|hidden_dim|hidden_size|embed_dim)\w*|num_pos_feats|emb_dim",
     lambda v: v if v < WIDTH else WIDTH),
]  # fmt: skip
LISTS: list[tuple[str, Callable[[list], list]]] = [
    (r"depths|(layer|stage|encoder|decoder)\w*depths?|num_layers|blocks_per_stage|stage_num_blocks",
     lambda v: [min(n, 1) for n in v]),
    (r"num_(attention_)?heads(_per_stage)?", lambda v: [2**i for i in range(len(v))]),
    (r"embed_dim_per_stage", lambda v: [2 * n for n in _doubling(v)]),
    (r"(\w+_)?hidden_sizes|embed_dims?|neck_hidden_sizes", _doubling),
    (r"decoder_in_channels", lambda v: [WIDTH] * len(v)),
    (r"(fullatt|window)_block_index\w*|global_attn_indexes|global_attention_blocks|deepstack_visual_indexes|"
     r"cross_attention_layers", lambda v: [LAYERS - 1]),
    (r"eos_token_id", lambda v: [_ids(v[0])]),
    (r"(pretrain_)?image_size", lambda v: [min(n, IMAGE) for n in v]),
    (r"patch_size", lambda v: [n if n <= 8 else PATCH for n in v]),
]  # fmt: skip


def shrunk(config: object, own: dict | None = None, narrow: bool = True) -> dict:
    """Settings that make a small configuration of the same class, nested ones as dicts.

    narrow: also make it narrower, not only shallower.
    """
    from transformers import PretrainedConfig

    settings: dict = {}
    numbers = NUMBERS if narrow else [pair for pair in NUMBERS if pair[1] in DEPTHS]
    lists = LISTS if narrow else LISTS[:1] + LISTS[5:]
    for name, value in vars(config).items():
        if name.startswith("_") or name in ("transformers_version", "dtype"):
            continue
        if isinstance(value, PretrainedConfig):
            settings[name] = {**value.to_diff_dict(), **shrunk(value, None, narrow), "model_type": value.model_type}
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            rule = next((rule for pattern, rule in numbers if re.fullmatch(pattern, name)), None)
            if rule is not None and rule(value) != value:
                settings[name] = rule(value)
        elif isinstance(value, (list, tuple)) and value and all(type(n) is int for n in value):
            rule = next((rule for pattern, rule in lists if re.fullmatch(pattern, name)), None)
            if hasattr(config, "stage_out_channels") and name == "hidden_sizes":
                continue
            if rule is not None:
                settings[name] = type(value)(rule(list(value)))
        elif narrow and name == "rope_parameters" and isinstance(value, dict) and _has_sections(config, value):
            rotated = HEAD * (value.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", 1) or 1)
            settings[name] = {**value, "mrope_section": _sections(int(rotated) // 2)}
        elif name in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types") and value:
            # One of each kind, in their order: a hybrid stack stays one.
            settings[name] = list(dict.fromkeys(value))
            settings[name] += settings[name][-1:] * (LAYERS - len(settings[name]))
    heads, kv = (getattr(config, n, None) for n in ("num_attention_heads", "num_key_value_heads"))
    if narrow and "num_key_value_heads" in settings and (hasattr(config, "kv_lora_rank") or kv == heads):
        settings["num_key_value_heads"] = settings.get("num_attention_heads", heads)
    if "num_hidden_layers" in settings and len(getattr(config, "out_indices", None) or ()) > 1:
        count = len(config.out_indices)  # a backbone returns as many feature maps as its neck reads
        settings |= {"num_hidden_layers": count, "out_features": None, "out_indices": list(range(1, count + 1))}
    for kinds in ("layer_types", "layers_block_type"):
        if kinds in settings:
            count = len(settings[kinds])
            settings |= {n: count for n in ("num_hidden_layers", "num_layers", "n_layer") if n in settings}
            if "mlp_layer_types" in settings:
                given = settings["mlp_layer_types"]
                settings["mlp_layer_types"] = (given + given[-1:] * count)[:count]
    return _merged(settings, own or {})


def _has_sections(config: object, rope: dict) -> bool:
    """Whether the rotary embedding of a model has a section each for time, height and width."""
    return "mrope_section" in rope or bool(re.match(SECTIONED, config.model_type))


def _sections(total: int) -> list[int]:
    first = max(1, total // 4)
    return [first, (total - first) // 2, total - first - (total - first) // 2]


def _merged(settings: dict, own: dict) -> dict:
    merged = dict(settings)
    for name, value in own.items():
        merged[name] = _merged(merged[name], value) if isinstance(value, dict) and name in merged else value
    return merged


# Models whose code has a default for sections that their configuration does not name.
SECTIONED = r"(qwen2(_5)?_vl|glm4v|glm46v|glm_image|glm_ocr|paddleocr|qwen2_5_omni|colqwen).*"
# More parameters take too long to quantize.
MOST = 60_000_000
# Settings of EXCEPTIONS without which a default configuration cannot be made.
REQUIRED = ("prediction_length", "context_length", "lags_sequence", "is_decoder")
# What the rules cannot know: settings by model type. A value replaces the rule's.
_SERIES = dict(prediction_length=4, context_length=16, lags_sequence=[1, 2, 3])
EXCEPTIONS: dict[str, dict] = {
    "autoformer": _SERIES,
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "reformer": dict(is_decoder=True, axial_pos_shape=(4, 4), axial_pos_embds_dim=(32, 32)),
    "xlnet": dict(d_head=16),
    "esm": dict(vocab_size=128, mask_token_id=32, pad_token_id=1),
    "esmc": dict(num_key_value_heads=HEADS),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "mamba2": dict(num_heads=8, head_dim=16, n_groups=1, state_size=16),
    "falcon_h1": dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_ssm=128, mamba_d_state=16),
    "molmo2": dict(adapter_config=dict(vision_feature_layer=[-1, -2])),
    "muse_spark_audio": dict(num_hidden_layers=4),
    "muse_spark": dict(audio_config=dict(num_hidden_layers=4)),
    "fun_asr_nano": dict(adaptor_config=dict(intermediate_size=16)),
    "gemma4_assistant": dict(text_config=dict(hidden_size_per_layer_input=0)),
    "wavtokenizer": dict(codebook_dim=WIDTH),
    "wavtokenizer_encoder": dict(codebook_dim=WIDTH),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "bamba": dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, attn_layer_indices=[1]),
    "granitemoehybrid": dict(
        mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, layer_types=["mamba", "attention"], num_hidden_layers=2
    ),
    "zamba2": dict(n_mamba_heads=8),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "nemotron": dict(num_key_value_heads=2),
    "step3p7": dict(text_config=dict(sliding_window=8)),
    "wav2vec2-bert": dict(vocab_size=64),
    "wav2vec2-conformer": dict(vocab_size=64),
    **{name: dict(head_dim=HEAD) for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral")},
    "hunyuan_vl": dict(text_config=dict(head_dim=HEAD)),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=WIDTH),
    "patchtsmixer": dict(d_model=WIDTH, patch_length=32, patch_stride=32, context_length=2048),
    "dia": dict(decoder_config=dict(vocab_size=VOCABULARY + 64)),  # not the text's vocabulary
    "splinter": dict(question_token_id=QUESTION),
    "xmod": dict(default_language="en_XX"),
    "vits": dict(vocab_size=VOCABULARY),
    "glm5_next": dict(text_config=dict(num_key_value_heads=HEADS, index_topk=16)),
    "glm5_next_text": dict(num_key_value_heads=HEADS, index_topk=16),
    "chameleon": dict(vocabulary_map={"<image>": 200, **{f"IMGIMGBS{c}Z": 100 + i for i, c in enumerate("ABCDEFGH")}}),
    "emu3": dict(vocabulary_map={"<image>": 200, **{f"<|visual token {i:06d}|>": 100 + i for i in range(16)}}),
    "dpt": dict(num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[32, 32, 32, 32]),
}


def tiny_config(name: str, narrow: bool = True) -> object:
    """A small configuration of a model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class, own = CONFIG_MAPPING[name], EXCEPTIONS.get(name, {})
    return config_class(**shrunk(config_class(**{k: own[k] for k in REQUIRED if k in own}), own, narrow))


def tiny_model(name: str, class_name: str, narrow: bool = True) -> nn.Module:
    """A random model of a model type. A model of more than `MOST` parameters is a `ValueError`."""
    torch.manual_seed(0)
    if name in TORCH:
        return _torch_model(name).eval()
    config = tiny_config(name, narrow)
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    model_class = getattr(module, class_name, None) or getattr(importlib.import_module("transformers"), class_name)
    if not narrow:
        with torch.device("meta"):
            count = sum(p.numel() for p in model_class(config).parameters())
        if count > MOST:
            raise ValueError(f"a shallow model has {count} parameters")
        config = tiny_config(name, narrow)
    return model_class(config).eval()


def _torch_model(name: str) -> nn.Module:
    settings = dict(d_model=WIDTH, nhead=HEADS, dim_feedforward=2 * WIDTH, batch_first=True)
    if name == "nn.TransformerEncoder":
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(**settings), LAYERS)
    if name == "nn.TransformerDecoder":
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(**settings), LAYERS)
    if name == "nn.Transformer":
        return nn.Transformer(num_encoder_layers=LAYERS, num_decoder_layers=LAYERS, **settings)
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)


# -- inputs ----------------------------------------------------------------------------------------------------------


def _find(config: object, *names: str) -> int | None:
    """The first of these settings that a configuration, or one inside it, has."""
    from transformers import PretrainedConfig

    for name in names:
        if isinstance(value := getattr(config, name, None), int | list | tuple):
            return value
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig) and (found := _find(value, *names)) is not None:
            return found
    return None


def _tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    ids = torch.randint(QUESTION, 90, (batch, length))
    ids[:, 0] = QUESTION  # Splinter answers at such a token
    return ids


def _image(config: object, batch: int = 2) -> Tensor:
    size = _find(config, "image_size", "img_size") or IMAGE
    height, width = (size, size) if isinstance(size, int) else (size * 2)[:2]
    return torch.randn(batch, _find(config, "num_channels", "in_channels", "in_chans") or 3, height, width)


def _made(model: nn.Module, name: str, grid: bool) -> Iterator[Tensor]:
    """Values for one input, the likeliest first; `grid` tells a vision model that takes patches and their grid."""
    config, batch = model.config, 2
    if name in ("input_ids", "decoder_input_ids"):
        yield _tokens()
    elif name in ("pixel_values", "hidden_states", "image_grid_thw", "grid_thw", "merge_sizes") and grid:
        size, side = _find(config, "patch_size") or PATCH, 2 * (_find(config, "spatial_merge_size") or 2)
        depth = size * size * (_find(config, "temporal_patch_size") or 1)
        if name.endswith("grid_thw"):
            yield torch.tensor([[1, side, side]] * batch)
            yield torch.tensor([[side, side]] * batch)
        elif name == "merge_sizes":
            yield torch.full((batch,), side // 2)
        else:
            channels = _find(config, "in_channels", "num_channels", "in_chans", "in_channel") or 3
            yield torch.randn(batch * side * side, channels * depth)
            yield torch.randn(batch * side * side, channels, size, size)
    elif name == "image_sizes":
        yield torch.tensor([[IMAGE, IMAGE]] * batch)
    elif name == "spatial_shapes":
        yield torch.tensor([[4, 4]] * batch)
    elif name == "pixel_attention_mask":
        yield torch.ones(batch, 16, dtype=torch.int64)
    elif name == "pixel_values" and "spatial_shapes" in inspect.signature(model.forward).parameters:
        yield torch.randn(batch, 16, 3 * (_find(config, "patch_size") or PATCH) ** 2)
    elif name == "pixel_values":
        yield _image(config)
        frames = _find(config, "num_frames", "frames_per_clip") or 2
        yield torch.stack([_image(config) for _ in range(frames)], 1)
    elif name in ("prompt_pixel_values", "prompt_masks"):
        yield _image(config)
    elif name == "input_features_mask":
        yield torch.ones(batch, 2 * (_find(config, "max_source_positions") or 32), dtype=torch.int64)
    elif name == "audio_mel":
        yield torch.randn(batch, 64, _find(config, "input_feat_size") or 128)
    elif name == "audio_mel_mask":
        yield torch.zeros(batch, 64, dtype=torch.bool)
    elif name == "query_embeds":
        yield torch.randn(batch, 8, WIDTH)
    elif name == "encoder_hidden_states":
        yield torch.randn(batch, 8, _find(config, "encoder_hidden_size", "cross_attention_dim") or WIDTH)
    elif name == "qformer_input_ids":
        yield _tokens()
    elif name == "flattened_patches":
        yield torch.randn(batch, 16, 2 + 3 * 16 * 16).abs()
    elif name in ("pixel_values_videos", "video", "pixel_values_video"):
        frames = _find(config, "num_frames", "frames_per_clip") or 4
        yield torch.stack([_image(config) for _ in range(frames)], 1)
    elif name in ("input_features", "audio_features", "input_audio_features"):
        bins = (
            _find(
                config,
                "feature_projection_input_dim",
                "num_mel_bins",
                "feature_size",
                "input_dim",
                "input_feat_per_channel",
                "mel_dim",
            )
            or 80
        )
        frames = 2 * (_find(config, "max_source_positions") or 32)
        yield torch.randn(batch, frames, bins)
        yield torch.randn(batch, bins, frames)
    elif name == "decoder_input_values":
        yield torch.randn(batch, 8, _find(config, "num_mel_bins") or 80)
    elif name in ("input_values", "audio_values", "waveform"):
        yield torch.randn(batch, 4000)
        yield torch.randn(batch, 1, 4000)
        bins = _find(config, "num_mel_bins", "feature_size") or 80
        yield torch.randn(batch, _find(config, "max_length") or 64, bins)
    elif name == "bbox":
        yield torch.randint(0, 30, (batch, LENGTH, 4)).sort(-1).values
    elif name == "inputs_embeds":
        yield torch.randn(batch, LENGTH, _find(config, "hidden_size", "d_model") or WIDTH)
    elif name == "attention_mask":
        yield torch.ones(batch, LENGTH, dtype=torch.int64)
    elif name in ("past_values", "past_observed_mask"):
        length = (_find(config, "context_length") or 32) + max(_find(config, "lags_sequence") or (0,))
        channels = _find(config, "num_input_channels", "input_size") or 1
        shape = (batch, length) if channels == 1 and _find(config, "lags_sequence") else (batch, length, channels)
        yield torch.randn(shape) if name == "past_values" else torch.ones(shape)
    else:
        raise NotImplementedError(f"no rule makes the input {name!r}")


MAIN = (
    "input_ids",
    "pixel_values",
    "input_features",
    "input_values",
    "pixel_values_videos",
    "past_values",
    "flattened_patches",
)


def inputs_of(model: nn.Module) -> Iterator[dict[str, Tensor] | tuple[Tensor, ...]]:
    """Batches to try a model with, the likeliest first: what its forward must have, then its main input alone."""
    torch.manual_seed(1)
    if not hasattr(model, "config"):
        both = isinstance(model, nn.Transformer | nn.TransformerDecoder)
        count = 3 if isinstance(model, nn.MultiheadAttention) else 1 + both
        yield tuple(torch.randn(2, 8 + i % 2 * (count == 2), WIDTH) for i in range(count))
        return
    parameters = inspect.signature(model.forward).parameters
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    main = [n for n in dict.fromkeys((*MAIN, getattr(model, "main_input_name", "input_ids"))) if n in parameters]
    decoder = [n for n in ("decoder_input_ids", "decoder_input_values") if n in parameters][:1]
    tried, grid = [], any(name.endswith("grid_thw") for name in parameters)
    required += [n for n in ("bbox", "spatial_shapes") if n in parameters and n not in required]
    if "spatial_shapes" in required:
        required = list(dict.fromkeys((*required, "pixel_values", "pixel_attention_mask")))
    if "input_features" in required and "input_features_mask" in parameters:
        required += ["input_features_mask"]
    for names in ([], *[[name] for name in main], main[:2], main[:3]):
        names = list(dict.fromkeys((*required, *names)))
        for extra in ([], decoder, ["attention_mask"]) if names else ():
            wanted = list(dict.fromkeys((*names, *extra)))
            if wanted in tried:
                continue
            tried.append(wanted)
            try:
                choices = {name: list(_made(model, name, grid)) for name in wanted}
            except NotImplementedError:
                continue
            for i in range(max(map(len, choices.values()))):
                yield {name: values[min(i, len(values) - 1)] for name, values in choices.items()}


def with_images(model: nn.Module, call: Callable[[nn.Module, dict], object]) -> dict[str, Tensor] | None:
    """Text with an image in each row, for a vision-language model; None if no such batch runs.

    How many tokens an image takes is what the model says of a text without them.
    """
    torch.manual_seed(2)
    config, parameters = model.config, inspect.signature(model.forward).parameters
    token = _find(config, "image_token_id", "image_token_index")
    names = [n for n in ("pixel_values", "image_grid_thw", "spatial_shapes", "pixel_attention_mask") if n in parameters]
    if token is None or "pixel_values" not in names:
        return None
    grid = "image_grid_thw" in names
    names = names if grid or "spatial_shapes" in names else names[:1]
    names += [n for n in ("image_sizes",) if n in parameters]
    choices = {name: list(_made(model, name, grid)) for name in names}
    for i in range(max(map(len, choices.values()))):
        images = {n: values[min(i, len(values) - 1)] for n, values in choices.items()}
        counts = [0]  # image tokens in a row
        for count in counts:
            ids = _tokens()
            ids = torch.cat([ids[:, :2], torch.full((len(ids), count), token), ids[:, 2:]], 1)
            batch = {"input_ids": ids, **images}
            if "mm_token_type_ids" in parameters:
                batch["mm_token_type_ids"] = (ids == token).long()
            try:
                call(model, batch)
                if count:
                    return batch
            except Exception as error:
                said = re.search(r"features:? (\d+)", str(error))
                if said and count == 0:  # some models count tokens, some count numbers
                    found = int(said[1]) // len(ids)
                    counts += [n for n in (found, found // WIDTH) if 0 < n < 400]
    return None
