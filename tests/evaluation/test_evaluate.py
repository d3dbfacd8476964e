"""Evaluations end to end on the toy policy and a tiny random one: what is drawn, kept, gone on with, refused and counted."""

import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gcpo_repro import UserError, toy
from gcpo_repro.evaluation import evaluate as module
from gcpo_repro.evaluation import writers
from gcpo_repro.evaluation.benchmarks import REGISTRY, load
from gcpo_repro.evaluation.evaluate import Progress, batch_seed, evaluate_model, plan, summary
from gcpo_repro.evaluation.responses import FIELDS, Responses

TOY = {"model": "toy", "benchmarks": ("toy",), "samples": 3, "temperature": 1.0, "top_p": 1.0, "batch_size": 16, "limit": 24}


def lines_of(folder, name="responses.jsonl"):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def responses_of(folder):
    """(benchmark, id, sample) -> the line, each there once."""
    found = {(line["benchmark"], line["id"], line["sample"]): line for line in lines_of(folder)}
    assert len(found) == len(lines_of(folder))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An evaluation of the toy policy that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, evaluate_model(out=folder, **TOY)


@pytest.fixture
def asked(monkeypatch):
    """Counts the contexts of each batch that a model is given."""
    seen = []
    plain = writers.respond

    def respond(model, tokenizer, contexts, *arguments):
        seen.append(len(contexts))
        return plain(model, tokenizer, contexts, *arguments)

    monkeypatch.setattr(writers, "respond", respond)
    return seen


# --- What is drawn and counted ------------------------------------------------------------------------------------


def test_an_evaluation_keeps_every_response_and_counts_it(whole):
    folder, result = whole
    found = responses_of(folder)
    rows = load("toy")[:24]
    assert set(found) == {("toy", row["id"], s) for row in rows for s in range(3)}
    assert all(set(line) == set(FIELDS) for line in found.values())
    (scores,) = result["benchmarks"]
    right = {}
    for (_, question, s), line in found.items():
        assert line["tokens"] == len(line["response"]) + 1 - line["truncated"]
        right[question, s] = len(line["response"]) == 6 and line["response"][-1] == toy.solve(question)[-1]
    assert [p["id"] for p in scores["problems"]] == [row["id"] for row in rows]
    assert [p["correct"] for p in scores["problems"]] == [sum(right[row["id"], s] for s in range(3)) for row in rows]
    assert scores["pass_at_1"]["mean"] == pytest.approx(sum(right.values()) / 72)
    assert scores["problems_asked"] == 24 and scores["samples"] == 3 and list(scores["pass_at_k"]) == ["1", "2", "3"]
    assert scores["mean_tokens"] == pytest.approx(sum(line["tokens"] for line in found.values()) / 72)
    verdicts = lines_of(folder, "verdicts.jsonl")
    assert [(v["id"], v["sample"]) for v in verdicts] == [(row["id"], s) for row in rows for s in range(3)]
    assert all(v["correct"] == right[v["id"], v["sample"]] for v in verdicts)
    assert json.loads((folder / "results.json").read_text()) == result
    assert result["seed"] == 0 and result["config"]["model"]["files"] and result["versions"]["torch"] == torch.__version__
    assert scores["source"]["generated"] == "toy.questions" and scores["prompt"] == "{problem}"
    assert json.loads((folder / "run.json").read_text())["state"] == "done"


def test_pass_at_1_is_that_of_the_policys_card(tmp_path):
    """The card's .5435 on the same 512 questions, from another sampler; sampling noise √(.25/1024) each at most."""
    result = evaluate_model(out=tmp_path, **{**TOY, "samples": 2, "batch_size": 512, "limit": None})
    card = json.loads((toy.POLICY / "scores.json").read_text())["fp32"]["pass@1"]
    assert abs(result["benchmarks"][0]["pass_at_1"]["mean"] - card["correct"] / card["total"]) < 4 * math.sqrt(0.25 / 1024)


def test_greedy_answers_are_the_likeliest_tokens(tmp_path):
    result = evaluate_model(out=tmp_path, **{**TOY, "temperature": 0.0, "samples": 1, "limit": 9})
    model, tokenizer = (kind.from_pretrained(toy.POLICY) for kind in (AutoModelForCausalLM, AutoTokenizer))
    right = []
    for row in load("toy")[:9]:
        ids = tokenizer(row["problem"])["input_ids"]
        for _ in range(7):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == tokenizer.eos_token_id:
                break
        text = tokenizer.decode(ids, skip_special_tokens=True)[len(row["problem"]) :]
        assert responses_of(tmp_path)["toy", row["id"], 0]["response"] == text
        right.append(text[-1] == row["answer"])
    assert [p["correct"] for p in result["benchmarks"][0]["problems"]] == right
    assert "pass_at_1_same_problems" not in result["benchmarks"][0]


def test_the_seed_sets_every_draw_and_nothing_else_does(whole, tmp_path):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    evaluate_model(out=tmp_path / "again", **TOY)
    assert torch.equal(torch.get_rng_state(), state)
    assert (tmp_path / "again" / "responses.jsonl").read_bytes() == (whole[0] / "responses.jsonl").read_bytes()
    evaluate_model(out=tmp_path / "other", **TOY, seed=1)
    assert responses_of(tmp_path / "other") != responses_of(whole[0])


def test_top_p_cuts_the_tail(tiny_folder):
    """With top_p below the likeliest token's probability only that one is drawn."""
    model, tokenizer = (kind.from_pretrained(tiny_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    contexts = [tokenizer("12+34=?")["input_ids"]] * 40
    law = model(torch.tensor(contexts[:1])).logits[0, -1].softmax(-1)
    first = {tuple(ids) for ids in writers.respond(model, tokenizer, contexts, 1, 0, 1.0, 40, 0.9 * law.max().item())}
    assert first == {(law.argmax().item(),)}
    likely = law.sort(descending=True)
    kept = set(likely.indices[: 1 + int((likely.values.cumsum(0) < 0.8).sum())].tolist())
    drawn = {ids[0] for ids in writers.respond(model, tokenizer, contexts * 25, 1, 0, 1.0, 1000, 0.8)}
    assert drawn == kept & drawn and len(drawn) > len(kept) / 2


def test_a_models_own_generation_settings_do_not_shape_the_draw(tiny_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    expected = writers.transformers_writer(writers.identify(tiny_folder), 1.0, 1.0)([[5, 6, 7]] * 8, 20, 3)
    model.generation_config.update(repetition_penalty=3.0, no_repeat_ngram_size=1, temperature=0.1, top_k=1, do_sample=True)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    found = writers.transformers_writer(writers.identify(tmp_path), 1.0, 1.0)([[5, 6, 7]] * 8, 20, 3)
    assert found == expected and len({tuple(ids) for ids, _ in found}) > 1


def test_answers_without_an_end_are_cut_off(tiny_folder):
    ends = set(AutoModelForCausalLM.from_pretrained(tiny_folder).generation_config.eos_token_id)
    found = writers.transformers_writer(writers.identify(tiny_folder), 1.0, 1.0)([[5, 6, 7]] * 40, 4, 0)
    assert {truncated for _, truncated in found} == {True, False}
    assert all(truncated == (ids[-1] not in ends) and (len(ids) == 4 or not truncated) for ids, truncated in found)
    assert any(len(ids) == 4 and not truncated for ids, truncated in found)  # ends with its very last token: whole


def test_an_adapter_changes_the_answers_and_is_part_of_the_configuration(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(toy.POLICY)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    options = {**TOY, "temperature": 0.0, "samples": 1, "limit": 8}
    evaluate_model(out=tmp_path / "base", **options)
    evaluate_model(out=tmp_path / "with", adapter=tmp_path / "adapter", **options)
    plain, changed = responses_of(tmp_path / "base"), responses_of(tmp_path / "with")
    assert plain != changed
    tokenizer = AutoTokenizer.from_pretrained(toy.POLICY)
    for key, line in changed.items():
        ids = tokenizer(key[1], return_tensors="pt")
        text = tokenizer.decode(adapted.generate(**ids, do_sample=False, max_new_tokens=7)[0], skip_special_tokens=True)
        assert line["response"] == text[len(key[1]) :]
    with pytest.raises(UserError, match="holds another evaluation"):
        evaluate_model(out=tmp_path / "base", adapter=tmp_path / "adapter", **options)
    with pytest.raises(UserError, match="adapter: .* holds no adapter_config.json"):
        evaluate_model(out=tmp_path / "new", adapter=tmp_path, **options)
    with pytest.raises(UserError, match="model: .* is an adapter; give the model that it was trained on"):
        evaluate_model(out=tmp_path / "new", **{**options, "model": tmp_path / "adapter"})


def test_a_model_of_the_hub_is_held_to_its_commit(tiny_folder, tmp_path, monkeypatch):
    """From a cache as the Hub's client keeps it, offline."""
    commit, repository = "ab" * 20, tmp_path / "models--some--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    for path in tiny_folder.iterdir():
        (repository / "snapshots" / commit / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    options = {**TOY, "limit": 2, "samples": 1, "temperature": 0.0}
    result = evaluate_model(out=tmp_path / "out", **{**options, "model": "some/tiny"})
    assert result["config"]["model"]["revision"] == commit and result["config"]["model"]["files"] is None
    local = evaluate_model(out=tmp_path / "local", **{**options, "model": tiny_folder})
    assert local["config"]["model"]["revision"] is None and local["benchmarks"] == result["benchmarks"]
    (repository / "refs" / "main").write_text("cd" * 20)
    (repository / "snapshots" / commit).rename(repository / "snapshots" / ("cd" * 20))
    with pytest.raises(UserError, match="holds another evaluation .*model: "):
        evaluate_model(out=tmp_path / "out", **{**options, "model": "some/tiny"})
    with pytest.raises(UserError, match="model: 'some/other' is no folder, and not to be had from the Hub"):
        evaluate_model(out=tmp_path / "out", **{**options, "model": "some/other"})


# --- Going on -----------------------------------------------------------------------------------------------------


def test_a_complete_evaluation_needs_no_model(whole, monkeypatch):
    folder, result = whole
    before = (folder / "responses.jsonl").read_bytes()
    monkeypatch.setitem(writers.WRITERS, "transformers", None)
    again = evaluate_model(out=folder, **TOY)
    assert again["benchmarks"] == result["benchmarks"] and (folder / "responses.jsonl").read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.5, 0.83, 0.999])
def test_a_torn_evaluation_goes_on_to_the_same_responses(whole, share, tmp_path, asked):
    content = (whole[0] / "responses.jsonl").read_bytes()
    (tmp_path / "config.json").write_bytes((whole[0] / "config.json").read_bytes())
    kept = content[: int(share * len(content))]
    (tmp_path / "responses.jsonl").write_bytes(kept)
    result = evaluate_model(out=tmp_path, **TOY)
    assert (tmp_path / "responses.jsonl").read_bytes() == content
    assert result["benchmarks"] == whole[1]["benchmarks"]
    assert sum(asked) == 72 - kept.count(b"\n") // 16 * 16 - (8 if kept.count(b"\n") >= 72 else 0)  # whole batches are not asked


@pytest.mark.parametrize("tail", [b"\0" * 300, b"\0" * 300 + b"\n", b'{"benchmark": "toy"}\n', b"\xff\xfe"])
def test_what_a_power_cut_leaves_at_the_end_is_cut_off(whole, tail, tmp_path):
    content = (whole[0] / "responses.jsonl").read_bytes()
    (tmp_path / "config.json").write_bytes((whole[0] / "config.json").read_bytes())
    start = content.index(b"\n", len(content) // 3) + 1
    (tmp_path / "responses.jsonl").write_bytes(content[:start] + tail)
    evaluate_model(out=tmp_path, **TOY)
    assert (tmp_path / "responses.jsonl").read_bytes() == content


def test_a_ctrl_c_keeps_what_is_there(whole, tmp_path, monkeypatch):
    plain, calls = writers.respond, []

    def respond(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(writers, "respond", respond)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(out=tmp_path, **TOY)
    assert len(lines_of(tmp_path)) == 32 and not (tmp_path / "results.json").exists()
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "interrupted"
    evaluate_model(out=tmp_path, **TOY)
    assert len(calls) == 3 + 3 and responses_of(tmp_path) == responses_of(whole[0])


@pytest.mark.slow
def test_killed_at_a_random_moment_it_ends_as_if_it_had_not_been(tmp_path):
    options = {**TOY, "benchmarks": ["toy"], "samples": 8, "limit": 64, "batch_size": 8}
    code = (
        f"import torch; torch.set_num_threads(1)\nfrom gcpo_repro.evaluation.evaluate import evaluate_model\n"
        f"evaluate_model(out={str(tmp_path / 'killed')!r}, **{options!r})"
    )
    moment = random.Random(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    path = tmp_path / "killed" / "responses.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not (path.exists() and path.stat().st_size > 1000) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 0.2))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    survived = path.read_bytes()
    assert 0 < survived.count(b"\n") < 512
    evaluate_model(out=tmp_path / "killed", **options)
    assert path.read_bytes().startswith(survived[: survived.rfind(b"\n") + 1])
    evaluate_model(out=tmp_path / "whole", **options)
    assert path.read_bytes() == (tmp_path / "whole" / "responses.jsonl").read_bytes()


def test_another_batch_size_may_go_on(whole, tmp_path, asked):
    lines = (whole[0] / "responses.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "config.json").write_bytes((whole[0] / "config.json").read_bytes())
    (tmp_path / "responses.jsonl").write_bytes(b"".join(lines[:40]))
    evaluate_model(out=tmp_path, **{**TOY, "batch_size": 10})
    found, before = responses_of(tmp_path), responses_of(whole[0])
    assert set(found) == set(before) and asked == [10, 10, 10, 2]
    assert (tmp_path / "responses.jsonl").read_bytes().startswith(b"".join(lines[:40]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 0.9}, "temperature: 1.0 there, 0.9 now"),
        ({"top_p": 0.5}, "top_p: 1.0 there, 0.5 now"),
        ({"seed": 5}, "seed: 0 there, 5 now"),
        ({"samples": 4}, "samples: 3 there, 4 now"),
        ({"max_tokens": 6}, "max_tokens: None there, 6 now"),
        ({"limit": 20}, "limit: 24 there, 20 now"),
    ],
)
def test_a_changed_configuration_is_refused_and_nothing_is_lost(whole, change, message):
    before = {path.name: path.read_bytes() for path in whole[0].iterdir()}
    with pytest.raises(UserError, match=f"holds another evaluation .*{message}.*; choose another folder"):
        evaluate_model(out=whole[0], **{**TOY, **change})
    assert {path.name: path.read_bytes() for path in whole[0].iterdir()} == before


def test_a_retrained_model_of_the_same_name_is_refused(tiny_folder, tmp_path):
    model, tokenizer = (kind.from_pretrained(tiny_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = {**TOY, "model": tmp_path / "model", "limit": 2, "samples": 1}
    evaluate_model(out=tmp_path / "out", **options)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="holds another evaluation .*model: "):
        evaluate_model(out=tmp_path / "out", **options)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: [*lines[:4], b'{"benchmark": "toy", "id', *lines[5:]], "line 5 is broken"),
        (lambda lines: [*lines[:4], lines[4].replace(b'"tokens": 7', b'"tokens": "7"'), *lines[5:]], "line 5 is broken"),
        (lambda lines: [*lines[:4], b"[" * 99999, *lines[5:]], "line 5 is broken"),
        (lambda lines: [*lines[:4], lines[4].replace(b'"benchmark": "toy"', b'"benchmark": "aime24"'), *lines[5:]],
         r"line 5 answers \('aime24', .*\), which this evaluation does not ask"),
        (lambda lines: [*lines[:4], lines[4].replace(b'"id": "', b'"id": "9'), *lines[5:]], "line 5 answers .*does not ask"),
        (lambda lines: [*lines[:4], lines[2], *lines[5:]], "line 5 answers .* a second time"),
    ],
)  # fmt: skip
def test_broken_and_foreign_responses_are_told_with_their_line(whole, change, message, tmp_path):
    (tmp_path / "config.json").write_bytes((whole[0] / "config.json").read_bytes())
    lines = (whole[0] / "responses.jsonl").read_bytes().splitlines()
    content = b"\n".join(change(lines)) + b"\n"
    (tmp_path / "responses.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"responses.jsonl, {message}"):
        evaluate_model(out=tmp_path, **TOY)
    assert (tmp_path / "responses.jsonl").read_bytes() == content


def test_a_folder_is_written_by_one_evaluation_at_a_time(tmp_path):
    with Responses(tmp_path, {}, set()), pytest.raises(UserError, match="another evaluation is writing to"):
        evaluate_model(out=tmp_path, **TOY)
    evaluate_model(out=tmp_path, **{**TOY, "limit": 1, "samples": 1})


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out: cannot write to .*file"):
        evaluate_model(out=tmp_path / "file", **TOY)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device.*what was written is kept"):
        patch.setattr(os, "fsync", full)
        evaluate_model(out=tmp_path / "full", **TOY)
    evaluate_model(out=tmp_path / "full", **TOY)
    assert len(responses_of(tmp_path / "full")) == 72
    with monkeypatch.context() as patch, pytest.raises(UserError, match="is on a full disk; free some space"):
        patch.setattr(module, "_write_lines", full)
        evaluate_model(out=tmp_path / "full", **TOY)


# --- Mathematics and code -----------------------------------------------------------------------------------------


def write_problems(folder, name, answer="7"):
    rows = [{"id": f"p{k}", "problem": "1+" * (k % 7) + f"{k}=?", "answer": answer} for k in range(REGISTRY[name].size)]
    if name == "humaneval":
        test = "def check(candidate):\n    assert candidate(2) == 3\n"
        rows = [
            {"task_id": row["id"], "prompt": f"def next_one(n):\n    # {row['id']}\n", "test": test,
             "canonical_solution": "    return n + 1\n", "entry_point": "next_one"}
            for row in rows
        ]  # fmt: skip
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Letters:
    """A tokenizer: a token is a character, a chat is its turns' texts, each between its role and a line's end."""

    chat_template = "there is one"
    opening = "assistant:"

    def __call__(self, text):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(chr, ids))

    def apply_chat_template(self, turns, add_generation_prompt, tokenize, return_dict=False):
        text = "".join(f"{turn['role']}:{turn['content']}\n" for turn in turns) + self.opening
        return self(text) if tokenize else text


@pytest.fixture
def scripted(monkeypatch):
    """A model whose k-th response is the k-th of some texts, over and over; gives a list of the prompts it is shown."""

    def script(*texts, opening="assistant:"):
        tokenizer, replies, shown = Letters(), itertools.cycle(texts), []
        tokenizer.opening = opening

        def write(contexts, max_tokens, seed):
            shown.extend(tokenizer.decode(ids) for ids in contexts)
            ids = [tokenizer(next(replies))["input_ids"] for _ in contexts]
            return [(reply[:max_tokens], len(reply) > max_tokens) for reply in ids]

        monkeypatch.setattr(module, "identify", lambda model, adapter: writers.Model("scripted"))
        monkeypatch.setattr(module, "load_tokenizer", lambda model: tokenizer)
        monkeypatch.setitem(writers.WRITERS, "transformers", lambda *arguments: write)
        return shown

    return script


def test_mathematics_is_graded_counted_and_voted_on(tmp_path, scripted):
    write_problems(tmp_path, "aime24")
    shown = scripted(r"So \boxed{007}.", r"\boxed{8}", "The answer is 7.0", r"\boxed{7", r"Well, \boxed{8.} but I am not sure")
    options = {"samples": 5, "max_tokens": 20, "batch_size": 5, "data": tmp_path}
    result = evaluate_model("x", ("AIME 2024",), tmp_path / "out", **options)["benchmarks"][0]
    system = REGISTRY["aime24"].prompt.system
    assert shown == sorted(shown, key=len, reverse=True) and len(shown) == 150
    assert set(shown) == {f"system:{system}\nuser:{'1+' * (k % 7)}{k}=?\nassistant:" for k in range(30)}
    assert result["prompt"] == f"system:{system}\nuser:{{problem}}\nassistant:"
    verdicts = lines_of(tmp_path / "out", "verdicts.jsonl")
    assert [v["correct"] for v in verdicts] == [True, False, True, False, False] * 30
    assert [v["answer"] is None for v in verdicts] == [False, False, False, True, False] * 30
    assert [p["correct"] for p in result["problems"]] == [2] * 30
    assert result["pass_at_1"]["mean"] == pytest.approx(2 / 5) and result["without_answer"] == pytest.approx(1 / 5)
    assert result["truncated"] == pytest.approx(1 / 5) and result["mean_tokens"] == pytest.approx((15 + 9 + 17 + 8 + 20) / 5)
    for k in (1, 2, 4, 5):  # 1, 2, 4 … K
        chosen = list(itertools.combinations((1, 0, 1, 0, 0), k))
        assert result["pass_at_k"][str(k)]["mean"] == pytest.approx(sum(map(any, chosen)) / len(chosen))
        # Votes: two for 7, two for 8 however it is written, one silent; ties by lot.
        credit = []
        for votes in itertools.combinations("7878-", k):
            most = max(votes.count("7"), votes.count("8"))
            credit.append((votes.count("7") == most) / ((votes.count("7") == most) + (votes.count("8") == most)) if most else 0)
        assert result["maj_at_k"][str(k)]["mean"] == pytest.approx(sum(credit) / len(credit))
    assert result["source"]["path"] == str(tmp_path / "aime24.jsonl")


    text = summary({"benchmarks": [result]})
    assert re.fullmatch(
        r"AIME 2024: pass@1 40\.0% \[\d+\.\d, \d+\.\d\], 30 problems × 5 samples; pass@5 100\.0%; maj@5 50\.0%; 20\.0% cut off, "
        r"20\.0% without an answer",
        text,
    )


def test_one_problem_has_no_interval(tmp_path, scripted):
    write_problems(tmp_path, "aime24")
    scripted("7")
    result = evaluate_model("x", ("aime24",), tmp_path / "out", samples=1, limit=1, data=tmp_path)["benchmarks"][0]
    assert result["pass_at_1"]["mean"] == 1 and result["pass_at_1"]["low"] is None
    said = "AIME 2024: pass@1 100.0%, 1 problems × 1 samples; 0.0% cut off, 0.0% without an answer"
    assert summary({"benchmarks": [result]}) == said


def test_a_thought_that_the_template_opened_is_seen_in_the_response(tmp_path, scripted):
    write_problems(tmp_path, "aime24")
    shown = scripted("The answer is 7.", "hm</think>The answer is 7.", opening="assistant:<think>\n")
    options = {"samples": 2, "max_tokens": 60, "batch_size": 2, "data": tmp_path}
    result = evaluate_model("x", ("aime24",), tmp_path / "out", **options)["benchmarks"][0]
    assert all(text.endswith("<think>\n") for text in shown)
    assert {line["response"] for line in lines_of(tmp_path / "out")} == {
        "<think>\nThe answer is 7.", "<think>\nhm</think>The answer is 7.",
    }  # fmt: skip
    assert result["pass_at_1"]["mean"] == 0.5 and result["without_answer"] == 0.5


def test_code_is_run_and_only_what_follows_the_thought(tmp_path, scripted):
    write_problems(tmp_path, "humaneval")
    right = "```python\ndef next_one(n):\n    return n + 1\n```"
    scripted(right, "    return n + 1\n", right.replace("+", "-"), "<think>" + right, "", "<think>?</think>" + right)
    options = {"samples": 6, "limit": 1, "data": tmp_path, "allow_code_execution": True}
    result = evaluate_model("x", ("humaneval",), tmp_path / "out", **options)["benchmarks"][0]
    verdicts = lines_of(tmp_path / "out", "verdicts.jsonl")
    assert [v["correct"] for v in verdicts] == [True, True, False, False, False, True]
    assert [v["answer"] is None for v in verdicts] == [False, False, False, True, True, False]
    assert result["problems"][0]["correct"] == 3 and result["maj_at_k"] == {} and result["without_answer"] == pytest.approx(1 / 3)
    assert result["pass_at_k"]["4"]["mean"] == 1.0


@pytest.mark.skipif(not os.environ.get("GCPO_DATA"), reason="needs the benchmarks' files in GCPO_DATA")
def test_five_shot_humaneval_with_the_canonical_solutions(tmp_path, scripted, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    rows = load("humaneval_5shot")[:4]
    order = sorted(rows, key=lambda row: -len(row["problem"].rstrip()))
    shown = scripted(*(row["answer"] for row in order))
    result = evaluate_model("x", ("humaneval_5shot",), tmp_path, samples=1, limit=4, batch_size=4)["benchmarks"][0]
    assert result["pass_at_1"]["mean"] == 1.0
    assert all(text.count("assistant:") == 6 and "trailing_zeros" in text for text in shown)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("GCPO_DATA"), reason="needs the benchmarks' files in GCPO_DATA")
def test_real_files_with_a_model_that_knows_nothing(tiny_folder, tmp_path):
    options = {"limit": 3, "samples": 2, "max_tokens": 8}
    (tmp_path / "wide").mkdir()
    config = json.loads((tiny_folder / "config.json").read_text()) | {"max_position_embeddings": 100_000}
    for path in tiny_folder.iterdir():
        (tmp_path / "wide" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config))
    names = [name for name, benchmark in REGISTRY.items() if benchmark.kind == "math"]
    result = evaluate_model(tmp_path / "wide", names, tmp_path / "out", **options)
    assert [scores["benchmark"] for scores in result["benchmarks"]] == names
    for scores in result["benchmarks"]:
        assert scores["pass_at_1"]["mean"] < 0.5 and scores["problems_asked"] == 3
        assert scores["source"]["problems"] == REGISTRY[scores["benchmark"]].size
        assert "{problem}" in scores["prompt"] and "<system>" in scores["prompt"]


@pytest.mark.parametrize("value", [None, "0", "true"])
def test_code_is_not_run_without_permission(value, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    if value is not None:
        monkeypatch.setenv("HF_ALLOW_CODE_EVAL", value)
    write_problems(tmp_path, "humaneval")
    with pytest.raises(UserError, match="HumanEval runs code that a model wrote.*HF_ALLOW_CODE_EVAL=1"):
        evaluate_model(tiny_folder, ("toy", "humaneval"), tmp_path / "out", data=tmp_path, samples=1)
    assert not (tmp_path / "out").exists()


# --- Bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"benchmarks": ()}, "benchmarks: .* must name at least one"),
        ({"benchmarks": ("toy", "Toy task")}, "none twice"),
        ({"benchmarks": ("aime99",)}, "benchmark: 'aime99' is unknown"),
        ({"samples": 0}, "samples: 0 must be at least 1"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"max_tokens": 0}, "max_tokens: 0"),
        ({"limit": 0}, "limit: 0 must be at least 1"),
        ({"temperature": -1.0}, "temperature, top_p: -1.0"),
        ({"temperature": math.nan}, "temperature, top_p: nan"),
        ({"temperature": 0.0}, "temperature: 0 writes the same answer 3 times"),
        ({"top_p": 0.0}, "temperature, top_p: 1.0, 0.0"),
        ({"top_p": 1.1}, "temperature, top_p: 1.0, 1.1"),
        ({"seed": -1}, "seed: -1 must lie between"),
        ({"backend": "sglang"}, "backend: 'sglang' is unknown, choose transformers or vllm"),
        ({"model": "/no/such/folder"}, "model: '/no/such/folder' is no folder, and not to be had from the Hub"),
        ({"adapter": "some/adapter"}, "adapter: 'some/adapter' is no folder, and not to be had from the Hub"),
        ({"max_tokens": 250}, "max_tokens: 250 and the longest prompt of Toy task .11 tokens. .*window of 256; give at most 245"),
    ],
)  # fmt: skip
def test_bad_arguments_are_told_before_anything_is_drawn(change, message, tmp_path, asked):
    with pytest.raises(UserError, match=message):
        evaluate_model(out=tmp_path / "out", **{**TOY, **change})
    assert not asked and not (tmp_path / "out" / "responses.jsonl").exists()


def test_without_vllm_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r'vllm is not installed; pip install "gcpo-repro\[vllm\]"'):
        evaluate_model(out=tmp_path / "out", **TOY, backend="vllm")
    assert not (tmp_path / "out").exists()


def test_out_of_memory_names_a_smaller_batch(tmp_path, monkeypatch):
    def respond(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(writers, "respond", respond)
    with pytest.raises(UserError, match="batch_size: 16 answers of up to 7 tokens do not fit.*same folder with 8"):
        evaluate_model(out=tmp_path, **TOY)
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "failed"


# --- Parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples, batch_size", [(1, 1), (3, 4), (5, 100)])
def test_batches_hold_everything_once_and_sorted_by_length(samples, batch_size):
    lengths = [3, 9, 1, 9, 4, 4]
    batches = plan(lengths, samples, batch_size)
    flat = [entry for batch in batches for entry in batch]
    assert sorted(flat) == [(q, s) for q in range(6) for s in range(samples)]
    assert [lengths[q] for q, _ in flat] == sorted((lengths[q] for q, _ in flat), reverse=True)
    assert all(len(batch) == batch_size for batch in batches[:-1]) and 0 < len(batches[-1]) <= batch_size


def test_batch_seeds_differ_whatever_differs():
    seeds = {
        batch_seed(seed, name, [(q, s) for q in range(size) for s in range(2)])
        for seed in range(3) for name in ("toy", "aime24") for size in range(1, 6)
    }  # fmt: skip
    assert len(seeds) == 30 and all(0 <= seed < 2**63 for seed in seeds)
    assert batch_seed(0, "toy", [(0, 0)]) == batch_seed(0, "toy", [(0, 0)])


def test_progress_is_plain_lines_without_a_terminal(capfd, monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 20.0, 20.5])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock, 22.0))
    progress = Progress("Toy task", 10, 2)
    for _ in range(4):
        progress.add(2, 100)
    progress.close()
    out, err = capfd.readouterr()
    assert out == "" and "\r" not in err
    assert err.splitlines()[-1].startswith("Toy task: 10 of 10 answers, ") and err.splitlines()[-1].endswith(" tokens/s")
    assert 2 <= len(err.splitlines()) <= 4
