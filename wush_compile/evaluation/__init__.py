"""Measures what quantization costs. Public as `wush_compile.evaluate`.

language.py   perplexity, KL divergence and top-1 agreement of language models
layers.py     losses of single layers, solved with several configurations
tasks.py      tasks of lm-eval (extra `eval`), with the score of each item
paired.py     two models on the same items: difference, recovery, confidence intervals
presets.py    the tasks of published tables, with their settings
task_file.py  results of tasks on disk
"""

from .language import Comparison, compare, kl_divergence, perplexity
from .layers import LayerLosses, compare_layers
from .paired import Paired
from .presets import PRESETS, TaskSetting
from .tasks import TaskScore, compare_average, compare_scores, run_tasks

__all__ = [
    "PRESETS",
    "Comparison",
    "LayerLosses",
    "Paired",
    "TaskScore",
    "TaskSetting",
    "compare",
    "compare_average",
    "compare_layers",
    "compare_scores",
    "kl_divergence",
    "perplexity",
    "run_tasks",
]
