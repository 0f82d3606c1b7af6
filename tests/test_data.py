"""The data that users give becomes batches without padding, or one clear error."""

import logging

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wush_compile import data
from wush_compile.data import check_token_ids, normalize, python_topics, sample_calibration_text, windows
from wush_compile.errors import DataError

VOCABULARY = 67


@pytest.fixture(scope="module")
def tokenizer():
    words = {"[UNK]": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]")


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def ids(*shape):
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(sum(shape)))


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- windows ---------------------------------------------------------------------------------------------------------


def test_windows_cut_without_overlap_and_without_special_tokens(tokenizer):
    text = " ".join(f"w{i}" for i in range(1, 12))
    cut = windows(text, tokenizer, 3)
    assert [w.tolist() for w in cut] == [[[1, 2, 3]], [[4, 5, 6]], [[7, 8, 9]]]
    assert [w.tolist() for w in windows(text, tokenizer, 3, count=2)] == [[[1, 2, 3]], [[4, 5, 6]]]
    assert [w.tolist() for w in windows(["w1 w2", "w3 w4"], tokenizer, 3)] == [[[1, 2, 3]]]


def test_windows_says_how_much_text_is_missing(tokenizer):
    with pytest.raises(DataError, match="5 tokens, 1 windows of 4; 2 are wanted"):
        windows("w1 w2 w3 w4 w5", tokenizer, 4, count=2)
    with pytest.raises(DataError, match="0 tokens"):
        windows("", tokenizer, 4)


def test_python_topics_is_long_english_text_and_always_the_same():
    text = python_topics()
    assert len(text) > 300_000 and text.count(" the ") > 3000
    assert text == python_topics()


# -- normalize -------------------------------------------------------------------------------------------------------


def test_tensors_become_input_ids():
    row, rows = ids(5), ids(2, 7).to(torch.int32)
    first, second = normalize([row, rows])
    assert equal(first, {"input_ids": row[None]})
    assert equal(second, {"input_ids": rows.to(torch.int64)})
    assert [b["input_ids"].tolist() for b in normalize(ids(2, 3))] == [[r.tolist()] for r in ids(2, 3)]
    assert len(normalize(iter([row, row]))) == 2


def test_a_model_without_input_ids_gets_its_inputs_in_place():
    linear = nn.Linear(5, 3)
    x = torch.randn(4, 5)
    assert equal(normalize([x], model=linear)[0], (x,))
    assert equal(normalize([(x, ids(4))])[0], (x, ids(4)))
    assert equal(normalize([ids(4, 5)], model=nn.Embedding(VOCABULARY, 3))[0], (ids(4, 5),))


def test_strings_are_tokenized_and_long_ones_cut(tokenizer):
    batches = normalize(["w1 w2 w3", "", "w4 " * 2100], tokenizer)
    assert [b["input_ids"].shape[1] for b in batches] == [3, 2048, 52]
    assert batches[0]["input_ids"].tolist() == [[1, 2, 3]]


def test_model_inputs_keep_their_names_and_lose_labels():
    batch = BatchEncoding({"input_ids": ids(2, 5), "position_ids": ids(2, 5), "labels": ids(2, 5)})
    assert equal(normalize([batch])[0], {"input_ids": ids(2, 5), "position_ids": ids(2, 5)})


def test_padding_leaves_exactly_the_unpadded_rows():
    a, b, c = ids(3), ids(5), ids(4)
    pad = torch.zeros(5, dtype=torch.int64)
    padded = torch.stack((torch.cat((a, pad[:2])), b, torch.cat((pad[:1], c))))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    positions = torch.arange(15).view(3, 5)
    batches = normalize([{"input_ids": padded, "attention_mask": mask, "position_ids": positions}])
    assert [b["input_ids"].tolist() for b in batches] == [[a.tolist()], [b.tolist()], [c.tolist()]]
    assert [b["position_ids"].tolist() for b in batches] == [[[0, 1, 2]], [[5, 6, 7, 8, 9]], [[11, 12, 13, 14]]]
    assert all("attention_mask" not in b for b in batches)


def test_moments_of_padded_input_are_those_of_unpadded_input(llama):
    rows = [ids(6), ids(9), ids(4)]
    padded = torch.full((3, 9), 13)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    for i, row in enumerate(rows):
        padded[i, 9 - len(row) :] = row
        mask[i, 9 - len(row) :] = True

    def moment(batches):
        state = torch.zeros(64, 64), torch.zeros((), dtype=torch.int64), torch.zeros(8, 64)
        layer = llama.model.layers[1].mlp.down_proj
        handle = layer.register_forward_pre_hook(lambda _, args: torch.ops.wush.observe(args[0], None, *state))
        with torch.no_grad():
            for batch in batches:
                llama(**batch)
        handle.remove()
        return state

    import wush_compile.ops  # noqa: F401

    plain, split = moment(normalize(rows)), moment(normalize([{"input_ids": padded, "attention_mask": mask}]))
    assert all(torch.equal(a, b) for a, b in zip(plain, split, strict=True)) and plain[1] == 19


def test_a_mask_of_ones_is_dropped_and_the_batch_kept_whole():
    batch = {"input_ids": ids(3, 4), "attention_mask": torch.ones(3, 4)}
    assert equal(normalize([batch])[0], {"input_ids": ids(3, 4)})


def test_a_mask_with_holes_stays_and_the_other_batches_get_one():
    mask = torch.tensor([[1, 0, 1, 1]])
    whole, holes = normalize([ids(2, 3), {"input_ids": ids(1, 4), "attention_mask": mask}])
    assert torch.equal(holes["attention_mask"], mask)
    assert torch.equal(whole["attention_mask"], torch.ones(2, 3, dtype=torch.int64))


def test_a_mask_stays_where_another_input_has_no_positions():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = {"input_ids": ids(2, 3), "attention_mask": mask, "pixel_values": torch.randn(2, 3, 8)[:, 0]}
    assert "attention_mask" in normalize([batch])[0]


def test_rows_without_a_token_are_left_out():
    batch = {"input_ids": ids(2, 3), "attention_mask": torch.tensor([[0, 0, 0], [1, 1, 0]])}
    assert [b["input_ids"].tolist() for b in normalize([batch])] == [ids(2, 3)[1:, :2].tolist()]


def used_up():
    generator = (t for t in [ids(3)])
    list(generator)
    return generator


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "data is empty"),
        (used_up(), "can be used only once"),
        (["w1"], "batch 0 of data is a string: pass tokenizer="),
        ("w1", r"single str; .* write \[data\]"),
        ({"input_ids": ids(1, 3)}, r"single dict; .* write \[data\]"),
        (ids(3), "single 1-D tensor"),
        (7, "data is int"),
        ([ids(3), 7], "batch 1 of data is int"),
        ([ids(3), ids(0)], r"batch 1 of data is an empty tensor, shape \[0\]"),
        ([{"input_ids": [1, 2]}], "input_ids of batch 0 of data is list; .*return_tensors='pt'"),
        ([{}], "empty dict"),
        ([{"input_ids": torch.randn(1, 3)}], r"input_ids of batch 0 of data are torch.float32"),
        ([ids(1, 2, 3)], r"int64 \[1, 2, 3\]; integers of shape \[S\] or \[B, S\]"),
        ([{"input_ids": ids(1, 3), "attention_mask": torch.ones(1, 4)}], r"\[1, 4\], its input_ids \[1, 3\]"),
        ([{"input_ids": ids(1, 3), "attention_mask": torch.zeros(1, 3)}], "holds a token: all are empty or masked"),
        ([ids(3), {"input_ids": ids(3), "token_type_ids": ids(1, 3)}], "different inputs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_data_is_named(data, message):
    with pytest.raises(DataError, match=message):
        normalize(data)


class TakesIds(torch.nn.Module):
    def forward(self, input_ids, pixel_values=None):
        return input_ids


def test_token_ids_that_are_floats_are_named():
    with pytest.raises(DataError, match=r"input_ids of batch 0 of data are torch.float32 \[2, 3\]"):
        normalize([torch.rand(2, 3)], model=TakesIds())


def test_only_empty_strings_is_no_data(tokenizer):
    with pytest.raises(DataError, match="none of the 2 batches"):
        normalize(["", " "], tokenizer)


@pytest.mark.parametrize("bad", [VOCABULARY, -1])
def test_token_ids_out_of_range_are_named(bad):
    batches = normalize([ids(4), torch.tensor([1, bad])])
    check_token_ids(batches, VOCABULARY + 1 if bad > 0 else VOCABULARY) if bad > 0 else None
    with pytest.raises(
        DataError, match=rf"batch 1 holds token id {bad}, .* {VOCABULARY} entries \(0 to {VOCABULARY - 1}\)"
    ):
        check_token_ids(batches, VOCABULARY)


# -- a model's own text ----------------------------------------------------------------------------------------------


def test_sampled_text_follows_the_seed_and_leaves_no_trace(llama, caplog):
    torch.manual_seed(5)
    state, generation = torch.get_rng_state(), llama.generation_config
    with caplog.at_level(logging.INFO, logger="wush_compile"):
        first = sample_calibration_text(llama, count=70, length=9, seed=3, progress=False)
    assert torch.equal(torch.get_rng_state(), state) and llama.generation_config is generation
    assert "samples its own, 70 windows of 9 tokens, seed 3" in caplog.text
    assert len(first) == 70 and {tuple(w.shape) for w in first} == {(1, 9)}
    assert all(w[0, 0] == llama.config.bos_token_id for w in first)
    text = torch.cat(first)
    assert torch.equal(text, torch.cat(sample_calibration_text(llama, count=70, length=9, seed=3, progress=False)))
    assert not torch.equal(text, torch.cat(sample_calibration_text(llama, count=70, length=9, seed=4, progress=False)))
    # Nearly uniform over the vocabulary, as a random model is, and past ends of sequence.
    assert len(text.unique()) > 50
    after = text[:, 2:][text[:, 1:-1] == llama.config.eos_token_id]
    assert len(after) and (after != llama.config.pad_token_id).any()


def test_sampled_text_starts_with_ordinary_tokens_where_there_is_no_bos(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(llama.config, "bos_token_id", None)
    monkeypatch.setattr(llama.generation_config, "bos_token_id", None)
    starts = torch.cat(sample_calibration_text(llama, tokenizer, count=40, length=2, progress=False))[:, 0]
    assert len(starts.unique()) > 10 and 0 not in starts


def test_a_model_that_does_not_generate_asks_for_data():
    with pytest.raises(DataError, match="Linear generates no text to calibrate on: pass data"):
        sample_calibration_text(nn.Linear(2, 2))


# -- the tokens around a text --------------------------------------------------------------------------------------


def with_template(tokenizer, single):
    """The tokenizer, with a template such as `<s> $A`."""
    import copy

    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    names = [name for name in single.split() if name != "$A"]
    ids = [(name, changed.convert_tokens_to_ids(name)) for name in names]
    changed.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    return changed


@pytest.mark.parametrize("single, before, after", [("w7 $A", [7], []), ("w7 w8 $A w9", [7, 8], [9]), ("$A", [], [])])
def test_windows_begin_and_end_as_the_tokenizer_does(tokenizer, single, before, after):
    marked = with_template(tokenizer, single)
    assert data.special_tokens(marked) == (before, after)
    text = "w1 w2 w3 w4 w5 w6"
    cut = windows(text, marked, 2 + len(before) + len(after))
    assert [w.tolist() for w in cut] == [[[*before, i, i + 1, *after]] for i in (1, 3, 5)]
    assert [w.tolist() for w in windows(text, marked, 3, special=False)] == [[[1, 2, 3]], [[4, 5, 6]]]
    if before:
        with pytest.raises(DataError, match="no room for text"):
            windows(text, marked, len(before) + len(after))


def test_every_piece_of_a_long_string_begins_as_the_tokenizer_does(tokenizer, monkeypatch):
    monkeypatch.setattr(data, "TEXT_WINDOW", 4)
    marked = with_template(tokenizer, "w7 $A")
    pieces = [b["input_ids"].tolist() for b in normalize(["w1 w2 w3 w4 w5", "w1"], marked)]
    assert pieces == [[[7, 1, 2, 3]], [[7, 4, 5]], [[7, 1]]]


def test_the_text_is_described():
    batches = [{"input_ids": torch.tensor([[2, 1, 1], [2, 3, 4]])}, {"input_ids": torch.tensor([[2, 5]])}]
    assert data.described(batches) == {"windows": 3, "tokens": 8, "first_token": 2}
    batches[1]["input_ids"][0, 0] = 3
    assert data.described(batches)["first_token"] is None
    assert data.described([(torch.ones(2, 3),)]) is None
