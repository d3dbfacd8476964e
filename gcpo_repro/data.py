"""Training data and rewards: the toy task, a local file, or any data set on the Hub, as columns prompt and answer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError

Reward = Callable[..., Sequence[float | None]]
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_rows(
    name: str, size: int, seed: int, split: str = "train", config: str = "", prompt_column: str = "prompt",
    answer_column: str = "answer", template: str = "{prompt}",
) -> list[dict[str, str]]:  # fmt: skip
    """Questions and answers as plain rows.

    Args:
        name: "toy", a local .jsonl, .json, .parquet or .csv file, or a Hub id.
        size: rows wanted, drawn without replacement in an order that `seed` sets; 0 takes all (not for "toy").
        seed: of the drawing.
        split, config: of a Hub data set; for "toy" the split is "train" or "held_out".
        prompt_column, answer_column: their names in the data.
        template: text of the prompt; `{prompt}` is replaced by the question.

    Returns:
        Rows {"prompt": str, "answer": str}. A worked solution that ends in "#### 42" (GSM8K) is cut to "42". Rows with an
        empty prompt or answer cannot be used; how many were left out is printed.

    Raises:
        UserError: data that cannot be read, a missing column, too few rows.
    """
    if "{prompt}" not in template:
        raise UserError(f"prompt_template: {template!r} does not contain {{prompt}}, so no question would be shown")
    if name == "toy":
        from . import toy

        rows: list[dict[str, str]] = toy.questions(split, size, seed)
    else:
        table = _read(name, split, config)
        for column in (prompt_column, answer_column):
            if column not in table.column_names:
                raise UserError(
                    f"data: {name!r} has no column {column!r}, it has {', '.join(table.column_names)}; "
                    "set prompt_column and answer_column"
                )
        table = table.shuffle(seed=seed)
        rows = _usable(zip(table[prompt_column], table[answer_column], strict=True), name, size)
    return [{"prompt": template.replace("{prompt}", row["prompt"]), "answer": row["answer"]} for row in rows]


def _read(name: str, split: str, config: str) -> Any:
    import datasets

    path = Path(name).expanduser()
    try:
        if path.suffix in READERS or path.exists():
            if not path.is_file():
                raise UserError(f"data: no file {str(path)!r}; give one of {', '.join(READERS)} or a Hub id")
            if path.suffix not in READERS:
                raise UserError(f"data: {path.name!r} is of no known kind; convert it to one of {', '.join(READERS)}")
            return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train")
        return datasets.load_dataset(name, config or None, split=split)
    except UserError:
        raise
    except Exception as error:  # network, missing split, broken JSON: each library has its own kinds
        cause = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"data: {name!r} (split {split!r}) could not be read: {cause[0][:300]}; check the name, the split, the "
            "network, or give a local file"
        ) from error


def _usable(pairs: Iterable[tuple[Any, Any]], name: str, size: int) -> list[dict[str, str]]:
    rows, left_out = [], 0
    for prompt, answer in pairs:
        prompt, answer = _text(prompt), _text(answer).rsplit("####", 1)[-1].strip()
        if prompt.strip() and answer:
            rows.append({"prompt": prompt, "answer": answer})
        else:
            left_out += 1
        if size and len(rows) == size:
            break
    if left_out:
        print(f"data: {left_out} rows of {name!r} left out: empty prompt or answer", flush=True)
    if not rows or len(rows) < size:
        raise UserError(f"data: {name!r} has {len(rows)} usable rows, {size or 'some'} are needed; ask for fewer")
    return rows


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


def load_reward(name: str, data: str) -> Reward:
    """A reward function in TRL's form, `f(completions, answer, **kwargs) -> list of floats`, None for unscorable.

    Args:
        name: "exact": 1 for a right final answer, else 0 (the toy task's own check for "toy" data, the benchmarks' grading
            otherwise). Or "module:function" of yours.
        data: the data set's name.

    Raises:
        UserError: a function that cannot be imported or called.
    """
    if name == "exact":
        if data == "toy":
            from .toy import exact_reward

            return exact_reward
        return math_reward
    module, _, function = name.partition(":")
    if not function:
        raise UserError(f"reward: {name!r} is neither 'exact' nor 'module:function'")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the user's module may fail in any way
        cause = f"{type(error).__name__}: {error}"
        raise UserError(f"reward: {name!r} could not be imported ({cause}); is its folder on PYTHONPATH?") from error
    if not callable(found):
        raise UserError(f"reward: {name!r} is a {type(found).__name__}, not a function")
    return found


def math_reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float | None]:
    """1.0 where the completion's final answer is the gold one, by the grading of the benchmarks; None if the gold is empty."""
    from .evaluation.grading import accuracy_reward

    return accuracy_reward(completions, answer)


def load_answer_reader(data: str) -> Callable[[str], str]:
    """A response's text -> its final answer in one spelling, to compare what responses say ("" where there is none).

    The last digit for the toy task, what the project's grader reads otherwise.
    """
    if data == "toy":
        return lambda text: text[-1:]
    from .evaluation.grading_text import extract, normalise

    return lambda text: normalise(extract(text).answer or "")
