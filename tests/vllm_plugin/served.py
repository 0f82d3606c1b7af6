"""Tiny checkpoints, and what vLLM and our own model make of them.

Both compute in fp32, and our model goes over vLLM's tokens: a difference below a rounding threshold vanishes in the
next quantizer, so that log-probabilities agree to fp32's last digits, until one code flips. Few layers keep that rare.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from helpers import quantize
from torch import nn

import wush_compile as wc

VOCABULARY = 1000  # not a multiple of 64, to which vLLM pads a head
PROMPTS = (1, 3, 5, 9, 14, 20)  # tokens; more prompts than run at once, so that they join and leave the batch
NEW = 24

COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MODELS = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),  # biases on q, k, v
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "tied": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"tie_word_embeddings": True}),
    "phi": (
        transformers.PhiConfig,
        transformers.PhiForCausalLM,
        {"num_key_value_heads": 4},
    ),  # fc1 reads what q, k, v read
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {
            "moe_intermediate_size": 128,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "head_dim": 64,
        },
    ),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM, {}),  # fused on disk
}


def random_model(kind: str, seed: int = 0) -> nn.Module:
    """A bf16 model of random weights."""
    config_class, model_class, changes = MODELS[kind]
    torch.manual_seed(seed)
    model = model_class._from_config(config_class(**COMMON | changes), dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def checkpoint(directory: Path, kind: str = "qwen2", seed: int = 0, **settings) -> Path:
    """A checkpoint of a random model, rounded to nearest after a WUSH transform."""
    data = torch.randint(VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(2))
    wc.save(quantize(random_model(kind, seed), data, **settings), directory)
    return directory


class Agreement(NamedTuple):
    """Of greedy tokens and their log-probabilities: how many are our model's first choice, and the differences."""

    tokens: int
    same: int
    largest: float
    mean: float
    moved: int  # of more than 5e-5

    @property
    def close(self) -> bool:
        """All tokens are the first choice, and of 50 log-probabilities one at most has moved.

        vLLM's attention adds up in another order. Where a value lies at a tie its code flips. With feedback errors are
        rounded to bf16 on the way, which makes of a difference in the last place one of 1/256 where they lie at a tie:
        in these models one token in several hundred.
        """
        return self.same == self.tokens and self.moved <= self.tokens // 50


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in PROMPTS]


Row = tuple[list[int], list[int], list[float]]  # a prompt, its new tokens, their log-probabilities


@contextlib.contextmanager
def engine(directory: Path, **settings):
    """A `vllm.LLM` of a checkpoint, in fp32 and eager mode unless told otherwise; it is gone behind the context."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = dict(dtype="float32", max_model_len=128, max_num_seqs=4, enforce_eager=True, skip_tokenizer_init=True)
    llm = LLM(str(directory), **defaults | settings)
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def sampling():
    """Greedy, of `NEW` tokens with their log-probabilities."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=NEW, logprobs=0, ignore_eos=True, detokenize=False)


def rows_of(results) -> list[Row]:
    rows = []
    for result in results:
        (answer,) = result.outputs
        ids = list(answer.token_ids)
        rows.append((list(result.prompt_token_ids), ids, [p[i].logprob for i, p in zip(ids, answer.logprobs)]))
    return rows


def greedy(directory: Path, **settings) -> list[Row]:
    """What vLLM makes of each prompt."""
    with engine(directory, **settings) as llm:
        return rows_of(llm.generate([{"prompt_token_ids": p} for p in prompts()], sampling(), use_tqdm=False))


_SCRIPT = """
import json, sys
from served import greedy
if __name__ == "__main__":
    directory, target, settings = sys.argv[1:]
    json.dump(greedy(directory, **json.loads(settings)), open(target, "w"))
"""


def greedy_apart(directory: Path, folder: Path, **settings) -> tuple[int, str, list[Row]]:
    """(exit status, output, rows) of `greedy` in a process of its own, which may start others. `folder` takes files."""
    script, target = folder / "greedy.py", folder / "rows.json"
    script.write_text(_SCRIPT)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, script, directory, target, json.dumps(settings)]
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout + done.stderr, json.loads(target.read_text()) if target.exists() else []


@torch.no_grad()
def agreement(directory: Path, rows: list[Row], model: nn.Module | None = None) -> Agreement:
    """vLLM's tokens and log-probabilities beside those of our own eager model (or of `model`) over the same tokens."""
    model = model or nn.Module.float(wc.load(directory))  # transforms keep their bits
    same, differences = 0, []
    for prompt, new, log_probabilities in rows:
        logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        same += int((logits.argmax(-1) == torch.tensor(new)).sum())
        own = logits.log_softmax(-1)[range(len(new)), new]
        differences += (own - torch.tensor(log_probabilities)).abs().tolist()
    moved = sum(difference > 5e-5 for difference in differences)
    return Agreement(len(differences), same, max(differences), sum(differences) / len(differences), moved)


def tokenizer(directory: Path) -> None:
    """Adds a tokenizer of single bytes to a checkpoint, for servers of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    bytes_alone = Tokenizer(models.BPE(vocabulary, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
