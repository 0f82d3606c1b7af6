"""Makes batches for calibration and evaluation from texts, tensors or model inputs.

A batch is a dict of model inputs (`{"input_ids": int64 [B, S], ...}`) or a tuple of positional inputs. Only this file
sees padding: it splits a padded batch into its unpadded rows.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import DataError

log = logging.getLogger("wush_compile")

Batch = dict[str, Tensor] | tuple[Tensor, ...]

# Longer strings are cut into windows of this many tokens: attention over a whole book does not fit in memory.
TEXT_WINDOW = 2048
# Sequences that a model samples at once: enough for wide matmuls on a CPU, few enough for the KV cache.
SAMPLE_BATCH = 64


# -- texts -----------------------------------------------------------------------------------------------------------


def tokenize(text: str, tokenizer, special: bool) -> Tensor:
    """Text -> token ids int64 [S]. `special` keeps the tokens that the tokenizer puts around a text (BOS, [CLS] …)."""
    return torch.tensor(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"], dtype=torch.int64)


def special_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """The token ids that a tokenizer puts before a text (BOS, [CLS] …) and behind it ([SEP], EOS …)."""
    for probe in ("a", "the", "0"):
        whole, text = (tokenize(probe, tokenizer, special).tolist() for special in (True, False))
        for start in range(len(whole) - len(text) + 1 if text else 0):
            if whole[start : start + len(text)] == text:
                return whole[:start], whole[start + len(text) :]
    return [], []  # not even these are tokens


def _marked(pieces: Tensor, before: list[int], after: list[int]) -> Tensor:
    """Token ids [P, S] -> int64 [P, S + ...], each row between the special tokens."""
    first, last = (torch.tensor(ids, dtype=torch.int64).expand(len(pieces), -1) for ids in (before, after))
    return torch.cat([first, pieces, last], 1)


def windows(
    text: str | Sequence[str], tokenizer, length: int, count: int | None = None, special: bool = True
) -> list[Tensor]:
    """The first `count` windows (None: all) of `length` tokens of a text, or of several texts joined together.

    Each window is int64 [1, length]. Windows do not overlap, and a shorter rest is left out. Each window begins and
    ends with the tokens that the tokenizer puts around a text, such as BOS, for so the model was trained; with
    `special=False` there are none, as in many papers. Raises `DataError` if the text is too short for `count` windows,
    or for one.
    """
    texts = [text] if isinstance(text, str) else list(text)
    ids = torch.cat([torch.empty(0, dtype=torch.int64), *(tokenize(t, tokenizer, special=False) for t in texts)])
    before, after = special_tokens(tokenizer) if special else ([], [])
    own = length - len(before) - len(after)
    if own < 1:
        raise DataError(
            f"a window of {length} tokens has no room for text beside the tokenizer's {len(before) + len(after)} "
            "special tokens: give longer windows"
        )
    available = len(ids) // own
    if available < (1 if count is None else count):
        raise DataError(
            f"the text has {len(ids)} tokens, {available} windows of {length}; {1 if count is None else count} are "
            "wanted: give more text, or fewer or shorter windows"
        )
    return list(_marked(ids[: available * own].view(-1, own), before, after)[:count, None])


def python_topics() -> str:
    """The language reference that Python ships for `help()`: about half a megabyte of English text."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


# -- batches ---------------------------------------------------------------------------------------------------------


def normalize(data: Iterable, tokenizer=None, model: nn.Module | None = None) -> list[Batch]:
    """Makes a list of batches, all with the same inputs, from the data that a user gives.

    data
        An iterable of tensors ([S] or [B, S] token ids, or the single input of any other module), of dicts of model
        inputs, of tuples of positional inputs, or of strings (with `tokenizer`).
    model
        The arguments of its `forward` decide whether a tensor is `input_ids` or a positional input. Without a model,
        integer tensors are `input_ids`.

    Padding is removed. If a mask [B, S] is 0 only before or after the tokens of each row, and all other tensors are
    [B, S, ...], the batch becomes its unpadded rows [1, s]. A mask of ones is dropped. Other masks stay in the batch
    as `attention_mask`, for the model and for `wush::observe`. `labels` are dropped.

    Raises `DataError` if the data is empty or of another type, or if its batches have different inputs.
    """
    if isinstance(data, (str, Mapping)) or (isinstance(data, Tensor) and (data.dim() < 2 or data.is_floating_point())):
        raise DataError(f"data is a single {_kind(data)}; an iterable of batches is wanted: write [data]")
    if not isinstance(data, Iterable):
        raise DataError(
            f"data is {_kind(data)}; an iterable of input_ids tensors, of dicts of model inputs or of strings is wanted"
        )
    takes_ids = _takes_ids(model)
    batches: list[Batch] = []
    items = 0
    for index, item in enumerate(data):
        items += 1
        batches.extend(_batches(item, index, tokenizer, takes_ids))
    if not batches:
        raise DataError(
            f"none of the {items} batches of data holds a token: all are empty or masked"
            if items
            else "data is empty: give at least one batch (a generator can be used only once; pass a list)"
        )
    return _same_inputs(batches)


def described(batches: Iterable[Batch]) -> dict | None:
    """How many `windows` (rows) and `tokens` of text there are, and the id of their `first_token`, None if they differ.

    None for data without `input_ids`.
    """
    ids = [batch["input_ids"] for batch in batches if isinstance(batch, Mapping) and "input_ids" in batch]
    if not ids or any(rows.dim() != 2 or rows.is_meta for rows in ids):
        return None
    first = {int(token) for rows in ids for token in rows[:, 0]}
    return {
        "windows": sum(map(len, ids)),
        "tokens": sum(rows.numel() for rows in ids),
        "first_token": first.pop() if len(first) == 1 else None,
    }


def check_token_ids(batches: Iterable[Batch], vocab_size: int) -> None:
    """Raises `DataError`, which names batch and id, if `input_ids` do not fit an embedding of `vocab_size` rows."""
    for index, batch in enumerate(batches):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if ids is not None:
            check_ids(ids, vocab_size, f"batch {index}")


def check_ids(ids: Tensor, vocab_size: int, where: str) -> None:
    """Raises `DataError` if an id is negative or not below `vocab_size`."""
    low, high = (int(v) for v in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"{where} holds token id {low if low < 0 else high}, but the model's vocabulary has {vocab_size} entries "
            f"(0 to {vocab_size - 1}): use the tokenizer that belongs to the model"
        )


def _kind(value: object) -> str:
    return f"{value.dim()}-D tensor" if isinstance(value, Tensor) else type(value).__name__


def _takes_ids(model: nn.Module | None) -> Callable[[Tensor], bool]:
    """Returns whether a model takes a tensor as `input_ids`: any as its first input, integers as another one."""
    names = ["other", "input_ids"] if model is None else list(inspect.signature(model.forward).parameters)
    first = names[:1] == ["input_ids"]
    return lambda tensor: first or "input_ids" in names and not tensor.is_floating_point()


def _batches(item: object, index: int, tokenizer, takes_ids: Callable[[Tensor], bool]) -> list[Batch]:
    """The batches of one item of the user's data: several for padded rows and long texts, none for an empty text."""
    where = f"batch {index} of data"
    if isinstance(item, str):
        if tokenizer is None:
            raise DataError(f"{where} is a string: pass tokenizer=, the tokenizer of the model")
        ids = tokenize(item, tokenizer, special=True)
        if len(ids) > TEXT_WINDOW:
            before, after = special_tokens(tokenizer)
            pieces = tokenize(item, tokenizer, special=False).split(TEXT_WINDOW - len(before) - len(after))
            return [_ids_batch(_marked(piece[None], before, after), takes_ids(piece)) for piece in pieces]
        return [_ids_batch(ids[None], takes_ids(ids))] if len(ids) else []
    if isinstance(item, Tensor):
        _check_tensor(item, where)
        if takes_ids(item):
            return [_ids_batch(_rows(item, where), True)]
        return [(item.detach(),)]
    if isinstance(item, Mapping):
        return _mapping_batches(item, where)
    if isinstance(item, (tuple, list)) and item and all(isinstance(t, Tensor) for t in item):
        for position, tensor in enumerate(item):
            _check_tensor(tensor, f"input {position} of {where}")
        return [tuple(t.detach() for t in item)]
    raise DataError(f"{where} is {_kind(item)}; a tensor, a dict of tensors, a tuple of tensors or a string is wanted")


def _check_tensor(tensor: Tensor, where: str) -> None:
    if tensor.numel() == 0 or tensor.dim() == 0:
        raise DataError(f"{where} is an empty tensor, shape {list(tensor.shape)}: leave it out")


def _rows(ids: Tensor, where: str) -> Tensor:
    """Token ids [S] or [B, S] -> int64 [B, S]."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() > 2:
        raise DataError(
            f"input_ids of {where} are {ids.dtype} {list(ids.shape)}; integers of shape [S] or [B, S] are wanted"
        )
    return (ids[None] if ids.dim() == 1 else ids).detach().to(torch.int64)


def _ids_batch(ids: Tensor, named: bool) -> Batch:
    return {"input_ids": ids} if named else (ids,)


def _mapping_batches(item: Mapping, where: str) -> list[Batch]:
    batch = {}
    for name, value in item.items():
        if name == "labels" or value is None:
            continue
        if not isinstance(value, Tensor):
            raise DataError(
                f"{name} of {where} is {_kind(value)}; a tensor is wanted (tokenizers: return_tensors='pt')"
            )
        _check_tensor(value, f"{name} of {where}")
        batch[name] = value.detach()
    if not batch:
        raise DataError(f"{where} is an empty dict: it needs the inputs of the model, such as input_ids")
    if "input_ids" in batch:
        flat = batch["input_ids"].dim() == 1
        batch["input_ids"] = _rows(batch["input_ids"], where)
        if flat and "attention_mask" in batch and batch["attention_mask"].dim() == 1:
            batch = {name: value if name == "input_ids" else value[None] for name, value in batch.items()}
    return _unpad(batch, where)


def _unpad(batch: dict[str, Tensor], where: str) -> list[Batch]:
    """The batch without its padding: positions whose mask is 0 enter no moment and no loss (docs/spec.md §1)."""
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return [batch]
    keep = mask != 0  # [B, S]
    others = {name: value for name, value in batch.items() if name != "attention_mask"}
    if not others:
        raise DataError(f"{where} has an attention_mask but no inputs: add the inputs that it masks")
    ids = batch.get("input_ids")
    if ids is not None and ids.shape != mask.shape:
        raise DataError(f"the attention_mask of {where} is {list(mask.shape)}, its input_ids {list(ids.shape)}")
    if keep.all():
        return [others]
    edges = torch.diff(keep.to(torch.int8), dim=1, prepend=keep.new_zeros((len(keep), 1), dtype=torch.int8))
    contiguous = ((edges == 1).sum(1) <= 1).all()  # one run of ones in every row
    if not contiguous or any(value.shape[:2] != mask.shape for value in others.values()):
        return [{**others, "attention_mask": mask}] if keep.any() else []
    return [
        {name: value[row : row + 1, kept] for name, value in others.items()}
        for row, kept in enumerate(keep)
        if kept.any()
    ]


def _same_inputs(batches: list[Batch]) -> list[Batch]:
    """Checks that all batches have the same inputs, for one graph runs all. If one has a mask, the others get ones."""
    if any(isinstance(b, dict) and "attention_mask" in b for b in batches):
        batches = [
            {**b, "attention_mask": b["input_ids"].new_ones(b["input_ids"].shape)}
            if isinstance(b, dict) and "attention_mask" not in b and "input_ids" in b
            else b
            for b in batches
        ]

    def signature(batch: Batch) -> list:
        if isinstance(batch, dict):
            return sorted((name, value.dim()) for name, value in batch.items())
        return [(position, value.dim()) for position, value in enumerate(batch)]

    for batch in batches:
        if signature(batch) != signature(batches[0]):
            raise DataError(
                f"batches have different inputs: (name, dimensions) {signature(batches[0])} first, then "
                f"{signature(batch)}; give every batch the same"
            )
    return batches


# -- a model's own text ----------------------------------------------------------------------------------------------


class _Progress:
    """A streamer: `generate` calls it with the prompt and then with every new token."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def put(self, tokens: Tensor) -> None:
        self.bar.update()

    def end(self) -> None:
        pass


def sample_calibration_text(
    model: nn.Module, tokenizer=None, count: int = 64, length: int = 512, seed: int = 0, progress: bool = True
) -> list[Tensor]:
    """Token windows that a causal language model samples from itself, int64 [1, length] each. No data is needed.

    Each window starts with the model's BOS, or with a random ordinary token if the model has none. Sampling continues
    at temperature 1 over the whole vocabulary, and does not stop at an end of sequence. The same seed gives the same
    windows, and the global random state does not change. Raises `DataError` for a model that does not generate.
    """
    from transformers import GenerationConfig

    if not getattr(model, "can_generate", lambda: False)():
        raise DataError(f"{type(model).__name__} generates no text to calibrate on: pass data, a list of its inputs")
    log.warning(
        "no calibration data given: the model samples its own, %d windows of %d tokens, seed %d", count, length, seed
    )
    device = next(model.parameters()).device
    generation, mode = model.generation_config, model.training
    bos = (
        generation.bos_token_id if generation.bos_token_id is not None else getattr(model.config, "bos_token_id", None)
    )
    starts = _starts(model, tokenizer, bos, count, seed)  # [count, 1]
    bar = tqdm(total=length * -(-count // SAMPLE_BATCH), desc="sample text", unit="token", disable=not progress or None)
    # Without an end-of-sequence token no window ends early. The pad token must exist, but is never used.
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=bos)
    sampled = []
    try:
        model.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), bar:
            torch.manual_seed(seed)
            for start in starts.split(SAMPLE_BATCH):
                ids = start.to(device)
                if length > 1:
                    ids = model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=length - 1,
                        do_sample=True,
                        temperature=1.0,
                        top_k=0,
                        top_p=1.0,
                        streamer=_Progress(bar),
                    )
                sampled.extend(ids.cpu().split(1))
    finally:
        model.generation_config = generation
        model.train(mode)
    return sampled


def _starts(model: nn.Module, tokenizer, bos: int | None, count: int, seed: int) -> Tensor:
    """The first token of each window, int64 [count, 1]."""
    if bos is not None:
        return torch.full((count, 1), bos, dtype=torch.int64)
    allowed = torch.arange(model.get_input_embeddings().weight.shape[0])
    if tokenizer is not None:
        allowed = allowed[: len(tokenizer)]
        allowed = allowed[~torch.isin(allowed, torch.tensor(tokenizer.all_special_ids, dtype=torch.int64))]
    generator = torch.Generator().manual_seed(seed)
    return allowed[torch.randint(len(allowed), (count, 1), generator=generator)]
