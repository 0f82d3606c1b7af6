"""The tasks of published tables, by their names in lm-eval and with their settings."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskSetting:
    """One task of lm-eval, as a table takes it.

    `shots` None keeps the task's own number. `metric` is "name,filter" as lm-eval writes it; None takes the first of
    `tasks.METRICS` that the task has. `chat` applies the tokenizer's chat template, with the examples as turns.
    """

    name: str
    shots: int | None = None
    metric: str | None = None
    chat: bool = False


_HELLASWAG = TaskSetting("hellaswag", shots=10, metric="acc_norm,none")
_WINOGRANDE = TaskSetting("winogrande", shots=5, metric="acc,none")
_GSM8K = TaskSetting("gsm8k_llama", metric="exact_match,flexible_extract", chat=True)

# `paper-*`: Tables 2, 3 and 5 of the paper, whose average is over the four; settings from the authors' script. Thinking
# is off and at most 4096 tokens are seen, which are defaults of `run_tasks`.
PRESETS = {
    "paper-llama": (
        TaskSetting("mmlu_cot_llama", metric="exact_match,strict_match", chat=True),
        _GSM8K,
        _HELLASWAG,
        _WINOGRANDE,
    ),
    "paper-qwen": (TaskSetting("mmlu", metric="acc,none"), _GSM8K, _HELLASWAG, _WINOGRANDE),
    # What llm-compressor's continuous integration asks of a checkpoint: 95 % of this task recovered.
    "gsm8k": (TaskSetting("gsm8k", shots=5, metric="exact_match,flexible-extract"),),
    "gsm8k-platinum": (TaskSetting("gsm8k_platinum_cot_llama", metric="exact_match,flexible-extract", chat=True),),
    # Figures 3 and 7 to 10 of the paper.
    "platinum": (TaskSetting("platinum_bench", metric="exact_match,none", chat=True),),
}


def settings_of(names: list[str], shots: int | None = None, chat: bool = False) -> list[TaskSetting]:
    """Names of tasks and of presets -> settings. `shots` and `chat` hold for tasks; a preset has its own."""
    found = []
    for name in names:
        found += PRESETS.get(name, (TaskSetting(name, shots, None, chat),))
    return list(dict.fromkeys(found))
