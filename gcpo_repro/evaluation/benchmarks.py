"""The benchmarks: where each lies on the Hub, its form, its prompt; loaded from there or from local files, and checked.

Texts of AIME and AMC problems belong to the MAA, Minerva's to MIT OpenCourseWare: the package ships none of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import toy
from ..errors import UserError
from .prompts import BARE, CODE, CODE_5_SHOT, MATH, Prompt
from .rows import Located, read_rows

SUFFIXES = (".jsonl", ".parquet")
TOY_SIZE, TOY_SEED = 512, 1  # the questions of toy.policy_scores
ALIASES = {"minerva": "minervamath"}
BUDGET = 16_384  # tokens, paper §experiments


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Args:
        name, title: its key here and its usual name.
        kind: how it is graded: "math", "code" or "toy".
        hub_id, config, split: on the Hub; "" for the toy task.
        columns: our field -> the Hub's column; without "id", problems are numbered.
        size: problems.
        verified: whether id, split and columns were seen on the data set's card or in lm-eval's or lighteval's code.
        licence: of the Hub's copy or its source, and of the texts.
        file: stem of the local file.
        gold: a pattern that every gold answer matches as a whole.
        prompt: how it is asked. max_tokens: default length of a response.
    """

    name: str
    title: str
    kind: str
    hub_id: str
    config: str
    split: str
    columns: dict[str, str]
    size: int
    verified: bool
    licence: str
    file: str
    prompt: Prompt = MATH
    gold: str = r"(?s).*"
    max_tokens: int = BUDGET

    @property
    def command(self) -> str:
        """What fetches the data on a machine with a network, into the file that `load` looks for."""
        config = f"'{self.config}', " if self.config != "default" else ""
        call = f"load_dataset('{self.hub_id}', {config}split='{self.split}').to_json('{self.file}.jsonl')"
        return f'python -c "from datasets import load_dataset; {call}"'


_QA = {"problem": "question", "answer": "answer"}
_MAA = "texts: Mathematical Association of America"
_CODE = {
    "id": "task_id", "problem": "prompt", "answer": "canonical_solution", "test": "test", "entry_point": "entry_point",
}  # fmt: skip
_HUMANEVAL = ("openai/openai_humaneval", "openai_humaneval", "test", _CODE, 164, True, "MIT", "humaneval")

REGISTRY = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "aime24", "AIME 2024", "math", "HuggingFaceH4/aime_2024", "default", "train",
            {"id": "id", "problem": "problem", "answer": "answer"}, 30, True, _MAA, "aime24", gold=r"\d{1,3}",
        ),
        Benchmark(
            "aime25", "AIME 2025", "math", "math-ai/aime25", "default", "test",
            {"id": "id", "problem": "problem", "answer": "answer"}, 30, False, f"Apache-2.0; {_MAA}", "aime25", gold=r"\d{1,3}",
        ),
        Benchmark(  # not the 83 problems of 2022 and 2023 in Dr.GRPO's suite
            "amc23", "AMC 2023", "math", "math-ai/amc23", "default", "test", {"id": "id", **_QA}, 40, False, _MAA, "amc23",
        ),
        Benchmark(
            "math500", "MATH500", "math", "HuggingFaceH4/MATH-500", "default", "test",
            {"id": "unique_id", "problem": "problem", "answer": "answer"}, 500, True, "MIT (Hendrycks et al. 2021)", "math500",
        ),
        Benchmark(  # lm-eval's minerva_math* are Hendrycks' MATH, another set
            "minerva_math", "MinervaMATH", "math", "math-ai/minervamath", "default", "test", _QA, 272, False,
            "texts: MIT OpenCourseWare, normally CC BY-NC-SA", "minerva_math",
        ),
        Benchmark(
            "gsm8k", "GSM8K", "math", "openai/gsm8k", "main", "test", _QA, 1319, True, "MIT", "gsm8k", gold=r"-?\d+(\.\d+)?",
        ),
        Benchmark("humaneval", "HumanEval", "code", *_HUMANEVAL, prompt=CODE),
        Benchmark("humaneval_5shot", "HumanEval, 5-shot", "code", *_HUMANEVAL, prompt=CODE_5_SHOT),
        Benchmark(
            "toy", "Toy task", "toy", "", "", "held_out", {}, TOY_SIZE, True, "made by this package", "", BARE, r"\d",
            toy.RESPONSE_LENGTH,
        ),
    )
}  # fmt: skip


def find(name: str) -> Benchmark:
    """The benchmark of that name or title ("aime24", "AIME 2024", "MATH-500", "Minerva"). Raises UserError: none has it."""
    for benchmark in REGISTRY.values():
        if ALIASES.get(_squeezed(name), _squeezed(name)) in (_squeezed(benchmark.name), _squeezed(benchmark.title)):
            return benchmark
    raise UserError(f"benchmark: {name!r} is unknown, choose from {', '.join(REGISTRY)}")


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def load(name: str, data: str | Path | None = None) -> list[dict[str, Any]]:
    """The problems of a benchmark, rows {"id", "problem", "answer", …} of strings; see `load_with_source`."""
    return load_with_source(name, data)[0]


def load_with_source(name: str, data: str | Path | None = None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The problems of a benchmark and where they came from.

    Args:
        name: of the registry.
        data: a JSONL or Parquet file, or a folder that holds `<file>.jsonl` or `<file>.parquet`; with our field names or the
            Hub's. None: the folder in the environment variable GCPO_DATA if that is set, else the Hub.

    Returns:
        Rows {"id", "problem", "answer", …}, strings; a worked solution that ends in "#### 42" is cut to "42", and the source's
        other columns are kept. And the source: id and resolved_revision, or path; `sha256` of what was used.

    Raises:
        UserError: not reachable (with the command that fetches it), broken, torn, a missing column or gold answer, a duplicate
            id or text of a problem, another number of problems than the benchmark has; with file and line.
    """
    benchmark = find(name)
    data = data or os.environ.get("GCPO_DATA") or None
    source: dict[str, Any]
    if benchmark.kind == "toy":
        drawn = toy.questions(benchmark.split, TOY_SIZE, TOY_SEED)
        table = [("toy", {"id": q["prompt"], "problem": q["prompt"], "answer": q["answer"]}) for q in drawn]
        source = {"generated": "toy.questions", "split": benchmark.split, "seed": TOY_SEED}
    elif data:
        path = _local_file(benchmark, Path(data).expanduser())
        table = list(read_rows(path, "data"))
        source = {"path": str(path.absolute())}
    else:
        table, revision = _read_hub(benchmark)
        source = {"hub_id": benchmark.hub_id, "config": benchmark.config, "split": benchmark.split}
        source |= {"resolved_revision": revision, "verified": benchmark.verified}
    rows = _checked(benchmark, table, source.get("path") or benchmark.hub_id)
    used = [[row[field] for field in ("id", "problem", "answer", "test") if field in row] for row in rows]
    return rows, source | {"sha256": hashlib.sha256(json.dumps(used).encode()).hexdigest(), "problems": len(rows)}


def _local_file(benchmark: Benchmark, path: Path) -> Path:
    if path.is_dir():
        candidates = [path / (benchmark.file + suffix) for suffix in SUFFIXES]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        names = " or ".join(candidate.name for candidate in candidates)
        raise UserError(f"data: {str(path)!r} holds no {names}; make it there, with a network: {benchmark.command}")
    if not path.is_file():
        raise UserError(f"data: there is no {str(path)!r}; give a JSONL or Parquet file, or the folder of {benchmark.file}.jsonl")
    if path.suffix not in SUFFIXES:
        raise UserError(f"data: {str(path)!r} is of no known kind; convert it to one of {', '.join(SUFFIXES)}")
    others = {other.file: other.title for other in REGISTRY.values() if other.file and other.file != benchmark.file}
    if path.stem in others:
        raise UserError(f"data: {str(path)!r} is named for {others[path.stem]}, not {benchmark.title}; give its folder")
    return path


def _read_hub(benchmark: Benchmark) -> tuple[list[Located], str]:
    import datasets

    config = None if benchmark.config == "default" else benchmark.config
    try:
        table = datasets.load_dataset(benchmark.hub_id, config, split=benchmark.split)
        return [(f"{benchmark.hub_id}, row {k}", row) for k, row in enumerate(table, 1)], resolved_revision(table)
    except Exception as error:  # no network, no such set, a changed split: each library has its own kinds
        cause = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0][:200]
        doubt = "" if benchmark.verified else " (this id was not verified)"
        raise UserError(
            f"data: {benchmark.title} could not be loaded from the Hub, {benchmark.hub_id!r}{doubt}: {cause}. On a machine with "
            f"a network run\n  {benchmark.command}\nand name the file's folder with --data FOLDER or GCPO_DATA=FOLDER"
        ) from error


def resolved_revision(table: Any) -> str:
    """The commit of the Hub repository that a data set was loaded from; "unknown" where `datasets` does not tell.

    `datasets` keeps each commit's tables in a folder of the commit's name, also when it later reads them offline.
    """
    folders = [Path(file["filename"]).parent.name for file in table.cache_files]
    return next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), "unknown")


def _checked(benchmark: Benchmark, table: list[Located], origin: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    asked: dict[str, str] = {}
    for number, (where, raw) in enumerate(table):
        row = {**raw, "id": f"{benchmark.name}-{number:04d}"}
        for field in ("id", "problem", "answer", *sorted(set(benchmark.columns) - {"id", "problem", "answer"})):
            column = benchmark.columns.get(field, field)
            found = field if field in raw else column
            if found in raw:
                row[field] = _text(raw[found], found, where)
            elif field != "id":
                names = " or ".join(sorted({field, column}))
                raise UserError(f"data: {where} has no column {names} for {benchmark.title}, it has {', '.join(map(str, raw))}")
        row["answer"] = _gold(benchmark, row["answer"], where)
        if row["id"] in seen:
            raise UserError(f"data: {where} repeats the id {row['id']!r} of {seen[row['id']]}; ids must be unique")
        text = " ".join(row["problem"].split())
        if text in asked:
            raise UserError(f"data: {where} repeats the problem of {asked[text]} under another id; every problem counts once")
        seen[row["id"]] = asked[text] = where
        rows.append(row)
    others = [b for b in REGISTRY.values() if b.file and b.file != benchmark.file]
    if foreign := [b for b in others if rows and rows[0]["id"].startswith(f"{b.file}-")]:
        raise UserError(f"data: {origin} holds problems of {foreign[0].title} ({rows[0]['id']}), not of {benchmark.title}")
    if len(rows) != benchmark.size:
        raise UserError(
            f"data: {origin} holds {len(rows)} problems, {benchmark.title} has {benchmark.size}; it is another set or incomplete"
        )
    return rows


def _text(value: Any, column: str, where: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # AMC's golds were stored as 27.0
    empty = value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip())
    if empty or isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"data: {where} has {value!r:.60} in column {column!r}; it needs a text or a number")
    return str(value)


def _gold(benchmark: Benchmark, answer: str, where: str) -> str:
    if benchmark.name == "gsm8k":
        answer = answer.rsplit("####", 1)[-1].replace(",", "")
    answer = answer if benchmark.kind == "code" else answer.strip()
    if not answer or not re.fullmatch(benchmark.gold, answer):
        raise UserError(f"data: {where}: {benchmark.title} has no gold answer like {answer!r:.60}; is the column the right one?")
    return answer
