"""Tasks: statistics of pairs, presets, the results file; with lm-eval (the extra `eval`) also self-made local tasks."""

import copy
import json
import math
import random

import pytest
import torch
from test_cli import run
from test_cli import tiny as without_eos  # noqa: F401

import wush_compile as wc
from wush_compile.errors import ConfigError, DataError
from wush_compile.evaluation import presets, task_file, tasks
from wush_compile.evaluation.paired import NORMAL_95, Stratum, average, paired
from wush_compile.evaluation.platinum import grading

needs_harness = pytest.mark.skipif(
    not tasks.importlib.util.find_spec("lm_eval"), reason="lm-eval is not installed: make test-eval"
)


@pytest.fixture(scope="module")
def tiny(without_eos, tmp_path_factory):  # noqa: F811
    """The directory of a model whose tokenizer has an EOS token, which the harness wants."""
    model, tokenizer = wc.load_model(without_eos[0])
    tokenizer.add_special_tokens({"pad_token": "!", "eos_token": "!"})
    directory = tmp_path_factory.mktemp("eos")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


# -- pairs ---------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_mean_difference():
    values, reference = [1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 1]
    found = paired([Stratum(1.0, values, reference)])
    differences = torch.tensor(values, dtype=torch.float64) - torch.tensor(reference)
    half = NORMAL_95 * float(differences.std() / math.sqrt(6))
    assert found.difference == 0 and found.difference_interval == pytest.approx((-half, half))
    assert found.recovery == 100 and found.items == 6
    ratios = (differences - 0) / (4 / 6)
    assert found.recovery_interval[1] - 100 == pytest.approx(100 * NORMAL_95 * float(ratios.std() / math.sqrt(6)))


def test_a_common_difficulty_of_items_does_not_widen_the_interval():
    draw = random.Random(0)
    reference = [draw.random() for _ in range(50)]
    found = paired([Stratum(1.0, [0.9 * r for r in reference], reference)])
    assert found.recovery == pytest.approx(90)
    assert found.recovery_interval == pytest.approx((90, 90))


@pytest.mark.parametrize("seed", range(3))
def test_intervals_cover_the_truth_as_often_as_they_say(seed):
    draw, inside, runs = random.Random(seed), 0, 400
    for _ in range(runs):
        reference = [float(draw.random() < 0.8) for _ in range(300)]
        values = [r if draw.random() < 0.9 else float(draw.random() < 0.5) for r in reference]
        low, high = paired([Stratum(1.0, values, reference)]).recovery_interval
        inside += low <= 100 * (0.9 * 0.8 + 0.1 * 0.5) / 0.8 <= high
    assert 0.92 <= inside / runs <= 0.98


def test_the_average_weighs_tasks_alike_whatever_their_size():
    large, small = Stratum(1.0, [1.0] * 90 + [0.0] * 10, [1.0] * 100), Stratum(1.0, [0.0, 1.0], [1.0, 1.0])
    found = average([[large], [small]])
    assert found.score == pytest.approx(0.7) and found.reference == 1 and found.recovery == pytest.approx(70)
    half = NORMAL_95 * math.sqrt((0.9 * 0.1 * 100 / 99 / 100 + 0.5 / 2) / 4)
    assert found.difference_interval == pytest.approx((-0.3 - half, -0.3 + half))


def test_what_has_no_interval_or_recovery_says_so():
    assert paired([Stratum(1.0, [1.0], [1.0])]).difference_interval is None
    nothing = paired([Stratum(1.0, [0.0, 1.0], [0.0, 0.0])])
    assert nothing.recovery is None and nothing.recovery_interval is None and nothing.difference == 0.5


# -- scores and files ----------------------------------------------------------------------------------------------


def score(values, items="same", task="t", weights=None):
    weights = weights or {task: 1.0}
    parts = [values] if weights == {task: 1.0} else values
    strata = tuple((name, w, tuple(v)) for (name, w), v in zip(weights.items(), parts))
    value = sum(w * sum(v) / len(v) for _, w, v in strata)
    return tasks.TaskScore(task, "acc,none", value, True, strata, items, {})


def test_scores_of_other_items_are_not_compared():
    with pytest.raises(DataError, match="same items"):
        tasks.compare_scores(score([1, 0]), score([1, 0], items="other"))


def test_subtasks_weighted_by_size_are_one_sample_and_others_are_strata():
    by_size = {"a": 2 / 3, "b": 1 / 3}
    pooled = tasks.compare_scores(score([[1, 0], [1]], weights=by_size), score([[1, 1], [1]], weights=by_size))
    assert pooled.difference_interval is not None and pooled.score == pytest.approx(2 / 3)
    alike = {"a": 0.5, "b": 0.5}
    apart = tasks.compare_scores(score([[1, 0], [1]], weights=alike), score([[1, 1], [1]], weights=alike))
    assert apart.difference_interval is None and apart.score == pytest.approx(0.75)  # one subtask has a single item


def test_a_file_goes_on_after_the_last_task_and_refuses_other_settings(tmp_path):
    path, head = tmp_path / "out" / "results.json", {"limit": 3}
    file = task_file.TaskFile(path, head)
    assert file.run("model", {"w": 1}) == {}
    file.put("model", "t", [score([1, 0, 1])])
    assert task_file.TaskFile(path, head).run("model", {"w": 1}) == {"t": [score([1, 0, 1])]}
    assert task_file.TaskFile(path, head).run("model", {"w": 2}) == {}  # written anew since
    with pytest.raises(DataError, match="another limit"):
        task_file.TaskFile(path, {"limit": 4})
    dated = task_file.TaskFile(tmp_path / "dated.json", head, {"date": "yesterday"})
    dated.run("model")
    dated.put("model", "t", [score([1])])
    assert list(json.loads((tmp_path / "dated.json").read_text()))[0] == "date"
    assert task_file.TaskFile(tmp_path / "dated.json", head, {"date": "today"}).run("model")
    path.write_text("[]")
    with pytest.raises(DataError, match="no file of task results"):
        task_file.TaskFile(path, head)


def test_presets_expand_and_keep_their_own_settings():
    found = presets.settings_of(["paper-llama", "mine", "hellaswag"], shots=3, chat=True)
    assert [s.name for s in found] == ["mmlu_cot_llama", "gsm8k_llama", "hellaswag", "winogrande", "mine", "hellaswag"]
    assert found[2].shots == 10 and not found[2].chat and found[4] == presets.TaskSetting("mine", 3, None, True)


def test_without_the_harness_the_error_names_the_extra(monkeypatch, tiny):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'wush-compile[eval]'" in run("evaluate", tiny, "--tasks", "winogrande", code=1)


@pytest.mark.parametrize("options", [(), ("--text", "a.txt", "--tasks", "x")])
def test_evaluate_takes_a_text_or_tasks(tiny, options):
    assert "either --text FILE or --tasks NAMES" in run("evaluate", tiny, *options, code=1)


# -- the harness ---------------------------------------------------------------------------------------------------

CHOICE = """task: wush_sums
tag: wush_tagged
dataset_path: json
dataset_kwargs:
  data_files:
    test: sums.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WRITE = """task: wush_write
tag: wush_tagged
dataset_path: json
dataset_kwargs:
  data_files:
    test: sums.jsonl
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  max_gen_toks: 4
  until: ["+"]
metric_list:
  - metric: exact_match
"""
GROUP = """group: wush_group
task:
  - wush_sums
  - task: wush_more
    dataset_path: json
    dataset_kwargs:
      data_files:
        test: more.jsonl
    output_type: multiple_choice
    test_split: test
    doc_to_text: "{{question}}"
    doc_to_choice: choices
    doc_to_target: answer
    metric_list:
      - metric: acc
aggregate_metric_list:
  - metric: acc
    weight_by_size: %s
"""


def items(seed, count):
    draw = random.Random(seed)
    pairs = [(draw.randrange(50), draw.randrange(50)) for _ in range(count)]
    rows = [{"question": f"{a} and {b} are", "choices": [f" {a + b}", f" {a}", " no"], "answer": 0} for a, b in pairs]
    return "\n".join(map(json.dumps, rows))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tasks"
    path.mkdir()
    (path / "sums.jsonl").write_text(items(0, 9))
    (path / "more.jsonl").write_text(items(1, 4))
    (path / "choice.yaml").write_text(CHOICE)
    (path / "write.yaml").write_text(WRITE)
    (path / "group.yaml").write_text(GROUP % "true")
    return path


@pytest.fixture(scope="module")
def pair(tiny):
    """(model, quantized model, tokenizer)"""
    model, tokenizer = wc.load_model(tiny)
    coarse = wc.load_model(tiny)[0]
    wc.quantize(coarse, None, solver="rtn", transform="hadamard", progress=False)
    return model, coarse, tokenizer


def evaluated(model, tokenizer, names, folder, **options):
    found = tasks.run_tasks(model, tokenizer, presets.settings_of(names), folder=folder, **options)
    return {setting.name: scores for setting, scores in found}


@needs_harness
def test_local_tasks_on_a_model_and_its_quantized_copy(pair, folder):
    model, coarse, tokenizer = pair
    names = ["wush_sums", "wush_write"]
    reference = evaluated(model, tokenizer, names, folder, batch_size=4)
    own = evaluated(coarse, tokenizer, names, folder, batch_size=4)
    [before], [after] = reference["wush_sums"], own["wush_sums"]
    assert before.metric == "acc_norm,none" and set(before.others) == {"acc,none"}
    assert len(before.strata[0][2]) == 9 and before.value == sum(before.strata[0][2]) / 9
    assert tasks.compare_scores(after, before).items == 9
    assert tasks.compare_average([after, *own["wush_write"]], [before, *reference["wush_write"]]).items == 18
    # The harness' own arithmetic, by hand: of each item the choice with the largest log-likelihood a byte.
    expected = []
    for row in map(json.loads, (folder / "sums.jsonl").read_text().splitlines()):
        sums = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(row["question"] + choice)["input_ids"]])
            with torch.no_grad():
                logp = model(ids).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])
            sums.append(float(logp[-len(choice) :].sum()) / len(choice))
        expected.append(float(sums.index(max(sums)) == row["answer"]))
    assert list(before.strata[0][2]) == expected
    assert [evaluated(model, tokenizer, ["wush_sums"], folder, batch_size=1)["wush_sums"][0].items] == [before.items]


@needs_harness
@pytest.mark.parametrize("by_size", ["true", "false"])
def test_a_group_has_the_number_of_the_harness_and_its_items(pair, folder, by_size):
    (folder / "group.yaml").write_text(GROUP % by_size)
    model, _, tokenizer = pair
    [found] = evaluated(model, tokenizer, ["wush_group"], folder)["wush_group"]
    weights = [9 / 13, 4 / 13] if by_size == "true" else [0.5, 0.5]
    assert {name: w for name, w, _ in found.strata} == pytest.approx(
        dict(zip(["wush_sums", "wush_group::wush_more"], weights))
    )
    assert sum(w * sum(v) / len(v) for _, w, v in found.strata) == pytest.approx(found.value)
    tagged = evaluated(model, tokenizer, ["wush_tagged"], folder, limit=2)["wush_tagged"]
    assert sorted(s.task for s in tagged) == ["wush_sums", "wush_write"] and len(tagged[0].strata[0][2]) == 2


@needs_harness
def test_the_errors_of_tasks_say_what_to_do(pair, folder, tmp_path):
    model, _, tokenizer = pair
    with pytest.raises(ConfigError, match="did you mean 'wush_sums'"):
        evaluated(model, tokenizer, ["wush_sum"], folder)
    with pytest.raises(ConfigError, match="no chat template"):
        list(tasks.run_tasks(model, tokenizer, [presets.TaskSetting("wush_sums", chat=True)], folder=folder))
    with pytest.raises(ConfigError, match="has no f1,none, but acc,none, acc_norm,none"):
        list(tasks.run_tasks(model, tokenizer, [presets.TaskSetting("wush_sums", metric="f1,none")], folder=folder))
    (folder / "sums.jsonl").unlink()
    with pytest.raises(DataError, match="wush_sums cannot be loaded"):
        evaluated(model, tokenizer, ["wush_sums"], folder)
    with pytest.raises(DataError, match="there is no folder"):
        evaluated(model, tokenizer, ["wush_sums"], tmp_path / "none")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a BOS nor an EOS"):
        evaluated(model, tokenizer, ["wush_write"], folder)
    with pytest.raises(DataError, match="is no language model"):
        evaluated(torch.nn.Linear(2, 2), tokenizer, ["wush_sums"], folder)


@needs_harness
def test_every_task_of_a_preset_is_known_to_the_harness():
    manager = tasks.task_manager()
    assert {s.name for settings in presets.PRESETS.values() for s in settings} <= set(manager.all_tasks)


@needs_harness
def test_the_command_compares_and_goes_on_after_a_kill(tiny, folder, tmp_path, monkeypatch):
    out, calls = tmp_path / "results.json", []
    options = ("--tasks", "wush_sums,wush_write", "--task-dir", folder, "--device", "cpu", "--out", out)
    command = ("evaluate", tiny, "--reference", tiny, *options)
    whole = tasks.run_tasks

    def killed(*args, **more):
        for setting, scores in whole(*args, **more):
            calls.append(setting.name)
            yield setting, scores
            raise DataError("killed")

    monkeypatch.setattr(tasks, "run_tasks", killed)
    assert "killed" in run(*command, code=1) and calls == ["wush_sums"]
    monkeypatch.setattr(tasks, "run_tasks", lambda *a, **k: (calls.append(s.name) or (s, x) for s, x in whole(*a, **k)))
    table = run(*command)
    assert calls == ["wush_sums", "wush_write"] and "100.00 ±0.00" in table and "average" in table
    assert run(*command) == table and len(calls) == 2
    assert "another limit" in run(*command, "--limit", 2, code=1)


@pytest.mark.parametrize(
    "output, strategy, parsed",
    [
        ("So 6 * 7.\nAnswer: $1,042.00", "math", "1042"),
        ("**Answer:** -3", "math", "-3"),
        ("It is \\boxed{12}", "math", "12"),
        ("first\nthe last line has 8 of them", "math", "8"),
        ("no number", "math", None),
        ("Answer: \\boxed{\\text{B}}", "multiple_choice", "b"),
        ("Answer: **C**.", "multiple_choice", "c"),
        ("Answer: (A)", "bbh_multiple_choice", "(a)"),
        ("none", "bbh_multiple_choice", None),
        ('Answer: "The Tower, London."\nmore', "text", "the tower london"),
        ("Answer: n/a because", "squad", "n/a"),
    ],
)
def test_platinum_answers_are_parsed_as_the_benchmark_does(output, strategy, parsed):
    assert grading.parse(output, strategy) == parsed


def test_platinum_numbers_are_equal_as_numbers():
    assert grading.right("5.50", ["5.5"], numeric=True) and not grading.right("5.50", ["5.5"], numeric=False)
    assert not grading.right("1.2.3", ["1"], numeric=True) and not grading.right(None, ["1"], numeric=True)


@needs_harness
def test_platinum_runs_through_the_harness(pair, tmp_path, monkeypatch):
    """Its group with local data in place of the hub's: every benchmark is loaded, asked and graded."""
    text = (tasks.PLATINUM / "platinum.yaml").read_text()
    names = [line.split(": ")[1] for line in text.splitlines() if "dataset_name" in line]
    assert len(names) == 14
    row = {"cleaning_status": "verified", "platinum_parsing_strategy": "math", "platinum_target": ["3"]}
    lines = [{**row, "platinum_prompt": "1 + 2?"}, {**row, "platinum_prompt": "?", "cleaning_status": "rejected"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    local = text.replace("dataset_path: madrylab/platinum-bench", "dataset_path: json")
    local = local.replace("    output_type", "    dataset_kwargs: {data_files: {test: data.jsonl}}\n    output_type")
    local = "\n".join(line for line in local.splitlines() if "dataset_name" not in line)
    (tmp_path / "platinum.yaml").write_text(local.replace("max_gen_toks: 2048", "max_gen_toks: 2"))
    (tmp_path / "grading.py").write_text((tasks.PLATINUM / "grading.py").read_text())
    model, _, tokenizer = pair
    [found] = evaluated(model, tokenizer, ["platinum_bench"], tmp_path)["platinum_bench"]
    assert [len(values) for _, _, values in found.strata] == [1] * 14 and found.metric == "exact_match,none"
