"""`gcpo-repro evaluate`: a model answers benchmarks; every answer is kept as it comes, graded, counted.

The answers to a benchmark are drawn in batches of prompts of similar length. Each batch has a seed of its own, made from the
evaluation's seed and the batch's contents, and is drawn whole: an evaluation that was killed goes on with the next batch and ends
with the responses of one that was not.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import provenance, toy
from ..data import prompt_ids
from ..errors import UserError
from ..provenance import run_state
from . import stats
from .benchmarks import Benchmark, find, load_with_source
from .code_execution import extract_code, require_permission, run_many
from .grading_pool import Pool
from .prompts import render
from .responses import Responses
from .votes import votes
from .writers import WRITERS, Writer, identify, load_tokenizer, require_backend

PLAIN_PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. R1-type models: temperature 0.6, top_p 0.95 (their model cards); the paper states neither."""

    samples: int = 4
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int | None = None  # None: the benchmark's own, 16,384 (paper) or the toy task's 7
    seed: int = 0
    batch_size: int = 32
    backend: str = "transformers"

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: {value} must be at least 1")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise UserError(f"temperature, top_p: {self.temperature}, {self.top_p}; the first is at least 0, the other in (0, 1]")
        if self.temperature == 0 and self.samples > 1:
            raise UserError(f"temperature: 0 writes the same answer {self.samples} times; set samples to 1, or a temperature")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed: {self.seed} must lie between 0 and 2**63 - 1")
        if self.backend not in WRITERS:
            raise UserError(f"backend: {self.backend!r} is unknown, choose {' or '.join(WRITERS)}")


@dataclass(frozen=True)
class Asked:
    """A benchmark, its problems, where they came from, and each problem's prompt (text or messages) and token ids."""

    benchmark: Benchmark
    rows: list[dict[str, Any]]
    source: dict[str, Any]
    max_tokens: int
    prompt_text: str  # of the problem "{problem}"
    contexts: list[list[int]]


def evaluate_model(
    model: str | Path, benchmarks: tuple[str, ...] | list[str], out: str | Path, adapter: str | Path | None = None,
    data: str | Path | None = None, samples: int = 4, temperature: float = 0.6, top_p: float = 0.95,
    max_tokens: int | None = None, seed: int = 0, batch_size: int = 32, backend: str = "transformers",
    allow_code_execution: bool = False, limit: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Draw `samples` answers to every problem of the benchmarks, grade and count them.

    Args:
        model: "toy", a Hub id or a local folder. adapter: a PEFT adapter's folder or Hub id, put on the model as it is: one that
            was trained on quantised weights meets the unquantised ones.
        benchmarks: names of `benchmarks.REGISTRY`.
        out: folder for `responses.jsonl`, `verdicts.jsonl` and `results.json`; the same call goes on where it stopped.
        data: file or folder of the problems; see `benchmarks.load_with_source`.
        samples, temperature, top_p, max_tokens, seed, batch_size, backend: see `Sampling`; temperature 0 is greedy. A folder can
            be gone on with in another batch size (after running out of memory), but then not to the same responses.
        allow_code_execution: HumanEval runs what the model wrote; HF_ALLOW_CODE_EVAL=1 allows it too.
        limit: only the first problems of each benchmark, for trials.

    Returns:
        What `results.json` holds: provenance and, for each benchmark, `measure`'s numbers, its source and prompt.

    Raises:
        UserError: bad arguments, data, model, or a folder of another evaluation; before anything is drawn.
    """
    started, out = time.time(), Path(out)
    sampling = Sampling(samples, temperature, top_p, max_tokens, seed, batch_size, backend)
    chosen = _choose(benchmarks, limit)
    if any(b.kind == "code" for b in chosen):
        require_permission(allow_code_execution)
    if not (out / "responses.jsonl").exists():  # else everything may have been drawn already
        require_backend(backend)
    loaded = [load_with_source(b.name, data) for b in chosen]
    answering = identify(model, adapter)
    tokenizer = load_tokenizer(answering)
    asked = [
        _ask(b, rows[:limit], source, tokenizer, max_tokens, answering.window)
        for b, (rows, source) in zip(chosen, loaded, strict=True)
    ]
    config = {**asdict(sampling), "model": asdict(answering), "limit": limit}
    config["benchmarks"] = {a.benchmark.name: {"data": a.source["sha256"], "prompt": a.prompt_text} for a in asked}
    shaping = {key: value for key, value in config.items() if key != "batch_size"}
    keys = {(a.benchmark.name, row["id"], s) for a in asked for row in a.rows for s in range(samples)}
    with Responses(out, shaping, keys) as store, run_state(out, ", what was drawn is kept", kind="evaluate"):
        writer = functools.cache(lambda: WRITERS[backend](answering, temperature, top_p))  # a complete evaluation needs none
        for a in asked:
            answer(a, tokenizer, store, sampling, writer)
        results, verdicts = [], []
        for a in asked:
            graded = grade_all(a, store, samples)
            verdicts += graded
            results.append(measure(a, graded, store, samples))
        _write_lines(out / "verdicts.jsonl", verdicts)
        content = {**provenance.record(config, seed, started), "kind": "evaluation", "benchmarks": results}
        provenance.write_json(out / "results.json", content)
    return content


def _choose(names: tuple[str, ...] | list[str], limit: int | None) -> list[Benchmark]:
    chosen = [find(name) for name in names]
    if not chosen or len({b.name for b in chosen}) < len(chosen):
        raise UserError(f"benchmarks: {list(names)} must name at least one, and none twice")
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} must be at least 1; leave it out for all problems")
    return chosen


def _ask(
    benchmark: Benchmark, rows: list[dict[str, Any]], source: dict[str, Any], tokenizer: Any, max_tokens: int | None,
    window: int | None,
) -> Asked:  # fmt: skip
    max_tokens = max_tokens or benchmark.max_tokens
    contexts = [prompt_ids(benchmark.prompt.fit(row["problem"], tokenizer), tokenizer) for row in rows]
    longest = max(map(len, contexts))
    if window is not None and longest + max_tokens > window:
        raise UserError(
            f"max_tokens: {max_tokens} and the longest prompt of {benchmark.title} ({longest} tokens) do not fit into the "
            f"model's window of {window}; give at most {max(window - longest, 0)}"
        )
    text = render(benchmark.prompt.fit("{problem}", tokenizer), tokenizer)
    return Asked(benchmark, rows, source, max_tokens, text, contexts)


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draft.replace(path)


# --- Drawing ----------------------------------------------------------------------------------------------------


def answer(a: Asked, tokenizer: Any, store: Responses, sampling: Sampling, writer: Callable[[], Writer]) -> None:
    """Draw what is missing in `store`. A batch of which a part is there is drawn again as it was, and only the rest is kept.

    A chat template that ends in <think> has opened the thought for the model; its response is kept with that word in front, since
    a reader of the response alone could not see that an answer is still a thought.
    """
    name = a.benchmark.name
    opened = "<think>\n" if a.prompt_text.rstrip().endswith("<think>") else ""
    batches = plan([len(ids) for ids in a.contexts], sampling.samples, sampling.batch_size)
    done = sum(key[0] == name for key in store.kept)
    progress = Progress(a.benchmark.title, len(a.rows) * sampling.samples, done)
    for batch in batches:
        keys = [(name, a.rows[q]["id"], s) for q, s in batch]
        if all(key in store.kept for key in keys):
            continue
        written = writer()([a.contexts[q] for q, _ in batch], a.max_tokens, batch_seed(sampling.seed, name, batch))
        lines = [
            {
                "benchmark": name, "id": id_, "sample": s, "response": opened + tokenizer.decode(ids, skip_special_tokens=True),
                "tokens": len(ids), "truncated": truncated,
            }
            for (_, id_, s), (ids, truncated) in zip(keys, written, strict=True)
        ]  # fmt: skip
        progress.add(store.append(lines), sum(len(ids) for ids, _ in written))
    progress.close()


def plan(lengths: list[int], samples: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """Batches of (question, sample), longest prompts first: little padding, and memory that does not suffice shows early."""
    order = sorted(((q, s) for q in range(len(lengths)) for s in range(samples)), key=lambda k: (-lengths[k[0]], k))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def batch_seed(seed: int, name: str, batch: list[tuple[int, int]]) -> int:
    """A seed below 2⁶³ for this batch alone: batches that share some answers but not all draw independently."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, name, batch]).encode()).digest()[:8]) >> 1


class Progress:
    """Answers drawn and tokens per second, on stderr: a bar in a terminal, a plain line every 10 seconds elsewhere."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self.title, self.total, self.done, self.tokens = title, total, done, 0
        self.began = self.told = time.monotonic()
        bar: Any = importlib.import_module("tqdm").tqdm
        self.bar = bar(total=total, initial=done, desc=title, unit="answer", disable=not sys.stderr.isatty())

    def add(self, answers: int, tokens: int) -> None:
        self.done, self.tokens = self.done + answers, self.tokens + tokens
        self.bar.set_postfix_str(self._speed(), refresh=False)
        self.bar.update(answers)
        if time.monotonic() - self.told > PLAIN_PROGRESS_SECONDS:
            self._tell()

    def close(self) -> None:
        self.bar.close()
        if self.tokens:
            self._tell()

    def _speed(self) -> str:
        return f"{self.tokens / max(time.monotonic() - self.began, 1e-9):,.0f} tokens/s"

    def _tell(self) -> None:
        self.told = time.monotonic()
        if self.bar.disable:
            print(f"{self.title}: {self.done} of {self.total} answers, {self._speed()}", file=sys.stderr, flush=True)


# --- Grading and counting ---------------------------------------------------------------------------------------


def grade_all(a: Asked, store: Responses, samples: int) -> list[dict[str, Any]]:
    """A verdict {"benchmark", "id", "sample", "correct", "answer", "reason"} on every response, in the problems' order."""
    kept = [store.kept[a.benchmark.name, row["id"], s] for row in a.rows for s in range(samples)]
    problems = [row for row in a.rows for _ in range(samples)]
    found = GRADERS[a.benchmark.kind](a.benchmark.name, problems, [line["response"] for line in kept])
    return [
        {**{key: line[key] for key in ("benchmark", "id", "sample")}, "correct": correct, "answer": given, "reason": reason}
        for line, (correct, given, reason) in zip(kept, found, strict=True)
    ]


Verdicts = list[tuple[bool, str | None, str]]  # correct, answer, reason


def _grade_toy(name: str, problems: list[dict[str, Any]], responses: list[str]) -> Verdicts:
    right = toy.exact_reward(responses, [row["answer"] for row in problems])
    formed = [toy.RESPONSE_FORM.fullmatch(text) is not None for text in responses]
    return [
        (value == 1, text[-1] if whole else None, "" if whole else "not of the form a1b2c3")
        for value, text, whole in zip(right, responses, formed, strict=True)
    ]


def _grade_math(name: str, problems: list[dict[str, Any]], responses: list[str]) -> Verdicts:
    requests = [(text, row["answer"], False) for row, text in zip(problems, responses, strict=True)]
    batches = [requests[k : k + 64] for k in range(0, len(requests), 64)]
    with Pool(min(len(batches), provenance.usable_cores())) as pool:  # a child per core, each answer within its limits
        found = [verdict for graded in [pool.submit(batch) for batch in batches] for verdict in graded.result()]
    return [(verdict.correct, verdict.answer, verdict.reason) for verdict in found]


def _grade_code(name: str, problems: list[dict[str, Any]], responses: list[str]) -> Verdicts:
    """The answer is the program; only what follows the thought counts, as in mathematics."""
    found: Verdicts = [(False, None, "no answer")] * len(responses)
    pairs = {}
    for k, (row, response) in enumerate(zip(problems, responses, strict=True)):
        text = response.rpartition("</think>")[2]
        if text.strip() and "<think>" not in text:
            pairs[k] = ({**row, "task_id": row["id"], "prompt": row["problem"]}, text)
    for (k, (row, text)), verdict in zip(pairs.items(), run_many(pairs.values(), progress=True), strict=True):
        found[k] = (verdict.passed, extract_code(text, row["entry_point"], row["prompt"]), verdict.reason)
    return found


GRADERS = {"toy": _grade_toy, "math": _grade_math, "code": _grade_code}


def measure(a: Asked, verdicts: list[dict[str, Any]], store: Responses, samples: int) -> dict[str, Any]:
    """The numbers of one benchmark, with 95% intervals (Wilson's kind, see `stats.pass_at_1`).

    Returns:
        pass_at_1 (avg@K; problems resampled), pass_at_1_same_problems (sampling noise only; 2 samples or more), pass_at_k
        (unbiased) and maj_at_k for k = 1, 2, 4 … K; shares `truncated` and `without_answer`; mean tokens; and each problem's
        counts of right, cut-off and answerless responses.
    """
    name, size = a.benchmark.name, len(a.rows)
    by_problem = [verdicts[q * samples : (q + 1) * samples] for q in range(size)]
    kept = [[store.kept[name, row["id"], s] for s in range(samples)] for row in a.rows]
    problems = [
        {
            "id": row["id"], "correct": sum(v["correct"] for v in found), "truncated": sum(line["truncated"] for line in lines),
            "without_answer": sum(v["answer"] is None for v in found), "tokens": sum(line["tokens"] for line in lines),
        }
        for row, found, lines in zip(a.rows, by_problem, kept, strict=True)
    ]  # fmt: skip
    correct, answers = [p["correct"] for p in problems], size * samples
    ks = sorted({k for k in (2**j for j in range(samples.bit_length())) if k <= samples} | {samples})
    result = {
        "benchmark": name, "title": a.benchmark.title, "source": a.source, "licence": a.benchmark.licence,
        "prompt": a.prompt_text, "max_tokens": a.max_tokens, "problems_asked": size, "samples": samples,
        "pass_at_1": _interval(stats.pass_at_1(correct, samples, method="wilson")),
        "pass_at_k": {str(k): _interval(stats.pass_at_k(correct, samples, k, method="wilson")) for k in ks},
        "maj_at_k": {} if a.benchmark.kind == "code" else _majorities(by_problem, ks),
        "truncated": sum(p["truncated"] for p in problems) / answers,
        "without_answer": sum(p["without_answer"] for p in problems) / answers,
        "mean_tokens": sum(p["tokens"] for p in problems) / answers, "problems": problems,
    }  # fmt: skip
    if samples > 1:
        result["pass_at_1_same_problems"] = _interval(stats.pass_at_1(correct, samples, problems="same", method="wilson"))
    return result


def summary(content: dict[str, Any]) -> str:
    """The numbers of `results.json` as a few lines of text, per cent with 95% intervals over problems."""
    lines = []
    for result in content["benchmarks"]:
        p, k = result["pass_at_1"], str(result["samples"])
        between = "" if p["low"] is None else f" [{100 * p['low']:.1f}, {100 * p['high']:.1f}]"
        line = f"{result['title']}: pass@1 {100 * p['mean']:.1f}%{between}, {result['problems_asked']} problems × {k} samples"
        for name, found in (("pass", result["pass_at_k"]), ("maj", result["maj_at_k"])):
            line += f"; {name}@{k} {100 * found[k]['mean']:.1f}%" if k in found and k != "1" else ""
        lines.append(f"{line}; {100 * result['truncated']:.1f}% cut off, {100 * result['without_answer']:.1f}% without an answer")
    return "\n".join(lines)


def _majorities(by_problem: list[list[dict[str, Any]]], ks: list[int]) -> dict[str, Any]:
    right, cast = [[v["correct"] for v in found] for found in by_problem], votes(by_problem)
    return {str(k): _interval(stats.maj_at_k(cast, right, k, method="wilson")) for k in ks}


def _interval(found: stats.Interval) -> dict[str, Any]:
    """As JSON: what is infinite (a single problem) is null."""
    return {key: value if math.isfinite(value) else None for key, value in asdict(found).items()}
