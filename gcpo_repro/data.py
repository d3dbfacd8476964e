"""Training data by name, from a local file or from the Hub, as columns prompt and answer; what cannot be used is counted."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .evaluation.grading_text import BOX, extract
from .evaluation.prompts import BOXED

Row = dict[str, str]
Refuse = Callable[[str], str]  # a question -> why it must not be trained on, "" if it may
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
NO_ROWS = "data: {!r} holds no rows; is it the right file?"
FIRST_TEST_YEAR = 2024  # AIME 2024 and later are benchmarks
TEMPLATES = {
    "boxed": f"{{prompt}}\n\n{BOXED}",
    "answer_tags": "{prompt}\n\nThink step by step inside <think> </think>, then give only the final answer inside "
    "<answer> </answer>.",
}


@dataclass(frozen=True)
class TrainingSet:
    """A training set with a name of its own.

    Args:
        hub_id, config: on the Hub, split "train". No revision is pinned: none could be verified without a network.
        prompt, answer: its columns.
        worked: whether the answer column holds worked solutions.
        file: stem of a local copy in the folder GCPO_DATA.
        years: first and last year that is used, (0, 0) where rows have none.
    """

    hub_id: str
    config: str
    prompt: str
    answer: str
    worked: bool
    file: str
    years: tuple[int, int] = (0, 0)

    @property
    def command(self) -> str:
        """What fetches the data on a machine with a network, into the file that is looked for."""
        config = f"'{self.config}', " if self.config else ""
        call = f"load_dataset('{self.hub_id}', {config}split='train').to_json('{self.file}.jsonl')"
        return f'python -c "from datasets import load_dataset; {call}"'


# Ids and columns as public training code uses them. The AIME collection has 933 rows, 14 of them of 2024: 919 are left, as many
# as the paper names for 1989-2023, years in which only 11 x 15 + 24 x 30 = 885 problems were set.
_AIME = ("gneubig/aime-1983-2024", "", "Question", "Answer", False, "aime_1983_2024")
SETS = {
    "gsm8k": TrainingSet("openai/gsm8k", "main", "question", "answer", True, "gsm8k_train"),
    "numinamath": TrainingSet("AI-MO/NuminaMath-CoT", "", "problem", "solution", True, "numinamath_train"),
    "math": TrainingSet("DigitalLearningGmbH/MATH-lighteval", "", "problem", "solution", True, "math_train"),
    "aime-1983-2023": TrainingSet(*_AIME, years=(1983, 2023)),
    "aime-1989-2023": TrainingSet(*_AIME, years=(1989, 2023)),
}


def load_rows(*args: Any, **kwargs: Any) -> list[Row]:
    """The rows of `load_with_source`, which see."""
    return load_with_source(*args, **kwargs)[0]


def load_with_source(
    name: str, size: int, seed: int, split: str = "train", config: str = "", prompt_column: str = "prompt",
    answer_column: str = "answer", template: str = "{prompt}", revision: str = "", refuse: Refuse | None = None,
) -> tuple[list[Row], dict[str, Any]]:  # fmt: skip
    """Questions and answers as plain rows, and where they came from.

    Args:
        name: "toy"; a name in `SETS` (with split "train"); a benchmark's name (with another split: never to train on); a local
            .jsonl, .json, .parquet or .csv file; or a Hub id. Named sets are read from the folder in the environment variable
            GCPO_DATA where it holds a copy, else from the Hub.
        size: rows wanted, drawn without replacement in an order that `seed` sets; 0 takes all (not for "toy").
        seed: of the drawing.
        split, config: of a Hub data set; for "toy" the split is "train" or "held_out".
        prompt_column, answer_column: their names in the data; a named set knows its own.
        template: text of the prompt, in which `{prompt}` is replaced by the question; or a name in `TEMPLATES`.
        revision: of the Hub's repository; "" is its newest.
        refuse: says of a question why it must not be used, see `overlap.refuser`.

    Returns:
        Rows {"prompt": str, "answer": str}: of a worked solution only the final answer, see `final_answer`. And the source: path,
        or hub_id and resolved_revision; sha256 of what is used; the numbers of rows used and left out, by reason, which are
        printed too.

    Raises:
        UserError: data that cannot be read, a missing column, too few rows, a benchmark as training data.
    """
    template = TEMPLATES.get(template, template)
    if "{prompt}" not in template:
        raise UserError(
            f"prompt_template: {template!r} does not contain {{prompt}}, so no question would be shown; nor is it one of "
            f"{', '.join(TEMPLATES)}"
        )
    source: dict[str, Any] = {"name": name, "split": split}
    left_out: Counter[str] = Counter()
    if name == "toy":
        from . import toy

        rows: list[Row] = toy.questions(split, size, seed)
    elif name in SETS and split == "train":
        table, origin = _read_named(name, revision)
        rows, left_out = _used(table, name, SETS[name], prompt_column, answer_column, size, seed, refuse)
        source |= origin
    elif (benchmark := _benchmark(name)) is not None:
        rows, origin = _benchmark_rows(benchmark, split, size, seed)
        source |= origin
    else:
        table, origin = _read(name, split, config, revision)
        rows, left_out = _used(table, name, None, prompt_column, answer_column, size, seed, refuse)
        source |= origin
    source |= {"rows": len(rows), "left_out": dict(left_out), "sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
    return [{"prompt": template.replace("{prompt}", row["prompt"]), "answer": row["answer"]} for row in rows], source


def _read_named(name: str, revision: str) -> tuple[Any, dict[str, Any]]:
    found = SETS[name]
    folder = os.environ.get("GCPO_DATA", "")
    if folder:
        for suffix in READERS:
            if (path := Path(folder).expanduser() / (found.file + suffix)).is_file():
                return _read(str(path), "train", "", "")
        print(f"data: {folder!r} holds no {found.file}.jsonl, so {name} comes from the Hub ({found.hub_id})", flush=True)
    try:
        return _read(found.hub_id, "train", found.config, revision)
    except UserError as error:
        raise UserError(
            f"{error}. On a machine with a network run\n  {found.command}\nand name the file's folder with GCPO_DATA=FOLDER"
        ) from error


def _read(name: str, split: str, config: str, revision: str) -> tuple[Any, dict[str, Any]]:
    """A local file or a Hub data set as a table, and where it is."""
    import datasets

    from .evaluation.benchmarks import resolved_revision

    path = Path(name).expanduser()
    if path.suffix in READERS or path.exists():
        return _read_file(path), {"path": str(path.absolute())}
    try:
        table = datasets.load_dataset(name, config or None, split=split, revision=revision or None)
    except Exception as error:  # network, missing split, no such set: each library has its own kinds
        raise UserError(
            f"data: {name!r} (split {split!r}) could not be read: {_cause(error)}; check the name, the split, the network, or "
            "give a local file"
        ) from error
    return table, {"hub_id": name, "config": config, "revision": revision, "resolved_revision": resolved_revision(table)}


def _read_file(path: Path) -> Any:
    import datasets
    from pyarrow import parquet

    if not path.is_file():
        raise UserError(f"data: no file {str(path)!r}; give one of {', '.join(READERS)} or a Hub id")
    if path.suffix not in READERS:
        raise UserError(f"data: {path.name!r} is of no known kind; convert it to one of {', '.join(READERS)}")
    if path.suffix != ".parquet" and not path.read_bytes().strip():
        raise UserError(f"data: {str(path)!r} is empty; write the questions and answers to it first")
    try:
        if path.suffix == ".parquet" and not parquet.read_metadata(path).num_rows:
            raise UserError(NO_ROWS.format(str(path)))
        return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    except UserError:
        raise
    except Exception as error:  # broken JSON, torn Parquet: each library has its own kinds
        if "corresponds to no data" in str(error):  # how `datasets` puts it
            raise UserError(NO_ROWS.format(str(path))) from error
        raise UserError(
            f"data: {str(path)!r} could not be read: {_cause(error)}; is it whole and a {path.suffix} file?"
        ) from error


def _cause(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0][:300]


def _benchmark(name: str) -> Any:
    """The benchmark of that name, None where there is none."""
    from .evaluation import benchmarks

    try:
        return benchmarks.find(name)
    except UserError:
        return None


def _benchmark_rows(benchmark: Any, split: str, size: int, seed: int) -> tuple[list[Row], dict[str, Any]]:
    from .evaluation import benchmarks

    if split == "train":
        raise UserError(
            f"data: {benchmark.title} is a benchmark, not to be trained on; name it in eval_data, and one of {', '.join(SETS)} "
            "in data"
        )
    if benchmark.kind != "math":
        raise UserError(f"eval_data: {benchmark.title} is graded by running code; use `gcpo-repro evaluate` after training")
    problems, source = benchmarks.load_with_source(benchmark.name)
    rows = [{"prompt": row["problem"], "answer": row["answer"]} for row in problems]
    random.Random(seed).shuffle(rows)
    if len(rows) < size:
        raise UserError(f"eval_data: {benchmark.title} has {len(rows)} problems, {size} are asked for; lower eval_questions")
    return rows[: size or len(rows)], source


def _used(
    table: Any, name: str, known: TrainingSet | None, prompt_column: str, answer_column: str, size: int, seed: int,
    refuse: Refuse | None,
) -> tuple[list[Row], Counter[str]]:  # fmt: skip
    """The first `size` usable rows in shuffled order, and how many were left out for which reason."""
    if not len(table):
        raise UserError(NO_ROWS.format(name))
    prompts = _column(table, name, prompt_column, known.prompt if known else "")
    answers = _column(table, name, answer_column, known.answer if known else "")
    years = _column(table, name, "Year") if known and known.years[0] else None
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    order = table.shuffle(seed=seed)
    columns = (order[prompts], order[answers], order[years] if years else (None for _ in range(len(order))))
    for prompt, answer, year in zip(*columns, strict=True):
        row = {"prompt": _text(prompt), "answer": final_answer(_text(answer), known is not None and known.worked)}
        if reason := _unusable(row, year, known, refuse):
            left_out[reason] += 1
        else:
            rows.append(row)
        if size and len(rows) == size:
            break
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
        print(f"data: {left_out.total()} of {len(rows) + left_out.total()} rows of {name!r} left out: {reasons}", flush=True)
    if not rows or len(rows) < size:
        raise UserError(f"data: {name!r} has {len(rows)} usable rows, {size or 'some'} are needed; ask for fewer")
    return rows, left_out


def _column(table: Any, name: str, wanted: str, own: str = "") -> str:
    """The set's own column where the table has it, else the one that was asked for."""
    for column in (own, wanted):
        if column in table.column_names:
            return column
    raise UserError(
        f"data: {name!r} has no column {own or wanted!r}, it has {', '.join(table.column_names)}; set prompt_column and "
        "answer_column"
    )


def _unusable(row: Row, year: Any, known: TrainingSet | None, refuse: Refuse | None) -> str:
    """Why a row cannot be trained on, "" if it can."""
    if known and known.years[0]:
        if not str(year).isdigit():
            return "without a year"
        if int(year) >= FIRST_TEST_YEAR:
            return f"of {FIRST_TEST_YEAR} or later"
        if not known.years[0] <= int(year) <= known.years[1]:
            return f"outside {known.years[0]}-{known.years[1]}"
        if not row["answer"].isdigit():
            return "without one whole number as the answer"  # copies of the collection give two for one problem
    if not row["prompt"].strip():
        return "with an empty prompt"
    if not row["answer"]:
        return "without an answer"
    return refuse(row["prompt"]) if refuse else ""


def final_answer(solution: str, worked: bool = False) -> str:
    r"""The answer at the end of a solution: after its last "####" (GSM8K), else in its last `\boxed{…}` (MATH, NuminaMath).

    Where it has neither, the whole text is the answer; unless it is a worked one, a proof say, that gives none ("").
    """
    if "####" in solution:
        return solution.rsplit("####", 1)[-1].strip()
    if BOX.search(solution):
        return extract(solution).answer or ""
    return "" if worked else solution.strip()


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def as_conversations(rows: list[dict[str, str]], tokenizer: Any, system_prompt: str = "") -> list[dict[str, Any]]:
    """Rows as TRL takes them: messages where the tokenizer has a chat template, plain text otherwise.

    Raises UserError: a system prompt for a tokenizer without a chat template, which would be lost.
    """
    if not getattr(tokenizer, "chat_template", None):
        if system_prompt:
            raise UserError("system_prompt: this model's tokenizer has no chat template; put the text in prompt_template")
        return [dict(row) for row in rows]
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [{**row, "prompt": [*system, {"role": "user", "content": row["prompt"]}]} for row in rows]


def check_prompt_lengths(rows: list[dict[str, Any]], tokenizer: Any, window: int | None, completion: int) -> None:
    """Raise UserError where a prompt and an answer of `completion` tokens do not fit into the model's window."""
    if window is None:
        return
    lengths = [len(prompt_ids(row["prompt"], tokenizer)) for row in rows]
    long = [length for length in lengths if length + completion > window]
    if long:
        raise UserError(
            f"data: {len(long)} of {len(lengths)} prompts (the longest: {max(long)} tokens) do not fit with "
            f"max_completion_length = {completion} into the model's window of {window} tokens; shorten them or the answer"
        )


def prompt_ids(prompt: str | list[dict[str, str]], tokenizer: Any) -> list[int]:
    """Token ids of a plain or conversational prompt, as the trainer makes them."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(ids["input_ids"])
