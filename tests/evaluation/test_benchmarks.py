"""Registry and loading: local files in both forms and both spellings of columns, every fault with its place; the prompts."""

import doctest
import json
import math
import os
import re
import shlex

import datasets
import pyarrow
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from gcpo_repro import UserError, toy
from gcpo_repro.data import prompt_ids
from gcpo_repro.evaluation import benchmarks
from gcpo_repro.evaluation.benchmarks import REGISTRY, find, load, load_with_source, resolved_revision
from gcpo_repro.evaluation.prompts import FIVE_SHOTS, render

FROM_FILES = [name for name, benchmark in REGISTRY.items() if benchmark.kind != "toy"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
real_data = pytest.mark.skipif(not os.environ.get("GCPO_DATA"), reason="needs the benchmarks' files in GCPO_DATA")


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.delenv("GCPO_DATA", raising=False)


def made_up(name, hub=False):
    """As many invented problems as the benchmark has, in our columns or in the Hub's."""
    benchmark = REGISTRY[name]
    rows = []
    for k in range(benchmark.size):
        ours = {"id": f"p{k}", "problem": f"What is {k} + {{1}}? \u221a", "answer": str(k % 1000)}
        if benchmark.kind == "code":
            ours |= {"problem": f"def f{k}():\n", "answer": "    pass\n", "test": "def check(c): pass", "entry_point": f"f{k}"}
        if name == "gsm8k" and hub:
            ours["answer"] = f"It is <<{k}+1>>.\n#### 1,{k % 1000:03}"
        if hub:
            row = {column: ours[field] for field, column in benchmark.columns.items()}
        else:
            row = ours
        rows.append(row)
    return rows


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, rows, **options):
    pq.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


@pytest.mark.parametrize("hub", [False, True], ids=["ours", "hub"])
@pytest.mark.parametrize("name", FROM_FILES)
def test_jsonl_and_parquet_in_either_spelling_give_the_same_rows(name, hub, tmp_path):
    rows, benchmark = made_up(name, hub), REGISTRY[name]
    (tmp_path / "a").mkdir()
    first = load_with_source(name, write_jsonl(tmp_path / f"{benchmark.file}.jsonl", rows))
    (tmp_path / "a" / "notes.txt").write_text("not data")
    write_parquet(tmp_path / "a" / f"{benchmark.file}.parquet", rows, row_group_size=100)
    second = load_with_source(name, tmp_path / "a")
    assert first[0] == second[0] and first[1]["sha256"] == second[1]["sha256"]
    assert second[1]["path"] == str(tmp_path / "a" / f"{benchmark.file}.parquet")
    assert len(first[0]) == benchmark.size == first[1]["problems"]
    assert len({row["id"] for row in first[0]}) == benchmark.size
    assert all(isinstance(row[field], str) for row in first[0] for field in ("id", "problem", "answer"))
    expected = {"gsm8k": "1007" if hub else "7"}.get(name, "    pass\n" if benchmark.kind == "code" else "7")
    assert first[0][7]["answer"] == expected
    assert first[0][7]["problem"] == made_up(name)[7]["problem"]
    if "id" in benchmark.columns or not hub:
        assert first[0][7]["id"] == "p7"
    if benchmark.kind == "code":
        assert first[0][7]["test"] == "def check(c): pass" and first[0][7]["entry_point"] == "f7"


def test_the_hash_follows_what_is_used_and_nothing_else(tmp_path):
    rows = made_up("aime24")
    path = write_jsonl(tmp_path / "aime24.jsonl", rows)
    first = load_with_source("aime24", path)[1]["sha256"]
    assert load_with_source("aime24", write_jsonl(path, [{**row, "url": "x"} for row in rows]))[1]["sha256"] == first
    assert load_with_source("aime24", write_jsonl(path, [{**rows[0], "answer": "999"}, *rows[1:]]))[1]["sha256"] != first


def test_golds_that_are_numbers_become_texts(tmp_path):
    rows = [{**row, "answer": float(k)} for k, row in enumerate(made_up("amc23"))]
    rows[3]["answer"], rows[4]["answer"], rows[5]["answer"] = 0.5, -1, " 12 "
    answers = [row["answer"] for row in load("amc23", write_jsonl(tmp_path / "amc23.jsonl", rows))]
    assert answers[:6] == ["0", "1", "2", "0.5", "-1", "12"]


def test_the_environment_variable_names_the_folder_and_the_argument_wins(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    write_jsonl(tmp_path / "aime24.jsonl", made_up("aime24"))
    write_jsonl(tmp_path / "other" / "aime24.jsonl", made_up("aime24")[::-1])
    monkeypatch.setenv("GCPO_DATA", str(tmp_path))
    assert load("aime24")[0]["id"] == "p0"
    assert load("aime24", tmp_path / "other")[0]["id"] == "p29"


def changed(k, **columns):
    def change(rows):
        rows[k] = {key: value for key, value in {**rows[k], **columns}.items() if value is not ...}
        return rows

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (changed(4, answer=None), "line 5 has None in column 'answer'; it needs a text or a number"),
        (changed(4, answer=" "), "line 5 has ' ' in column 'answer'"),
        (changed(4, answer=math.nan), "line 5 has nan in column 'answer'"),
        (changed(4, answer=["7"]), r"line 5 has \['7'\] in column 'answer'"),
        (changed(4, answer=True), "line 5 has True in column"),
        (changed(4, answer="one half"), "line 5: AIME 2024 has no gold answer like 'one half'"),
        (changed(4, answer=...), "line 5 has no column answer for AIME 2024, it has id, problem"),
        (changed(4, problem=...), "line 5 has no column problem"),
        (changed(4, problem=""), "line 5 has '' in column 'problem'"),
        (changed(4, id="p2"), r"line 5 repeats the id 'p2' of .*aime24.jsonl, line 3; ids must be unique"),
        (changed(4, id=None), "line 5 has None in column 'id'"),
        (lambda rows: rows[:-1], "holds 29 problems, AIME 2024 has 30"),
        (lambda rows: [*rows, {**rows[0], "id": "new", "problem": "?"}], "holds 31 problems, AIME 2024 has 30"),
        (changed(4, problem=" What is 2 +\n{1}? \u221a"), "line 5 repeats the problem of .*24.jsonl, line 3 under another id"),
        (lambda rows: [], "holds 0 problems"),
        (lambda rows: rows[:6] + [rows[6:8]] + rows[8:], "line 7 holds a list; every line must be an object"),
    ],
)
def test_faulty_rows_are_told_with_file_and_line(change, message, tmp_path):
    path = write_jsonl(tmp_path / "aime24.jsonl", change(made_up("aime24")))
    with pytest.raises(UserError, match="aime24.jsonl.*" + message if not message.startswith("holds") else message):
        load("aime24", path)


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"id": "p4", "problem": "x", "ans', "line 5 is broken JSON"),
        (b'{"id": "p4"} {"id": "p5"}', "line 5 is broken JSON"),
        (b'{"id": "p4", "problem": "\xff\xfe", "answer": "1"}', r"line 5 is not UTF-8 \(byte 26\)"),
        (b"[" * 100_000 + b"]" * 100_000, "line 5 is broken JSON"),
        (b"\0" * 50, "line 5 is broken JSON"),
    ],
)
def test_broken_lines_are_told_with_their_number(line, message, tmp_path):
    lines = write_jsonl(tmp_path / "aime24.jsonl", made_up("aime24")).read_bytes().splitlines()
    (tmp_path / "aime24.jsonl").write_bytes(b"\n".join([*lines[:4], line, *lines[5:]]))
    with pytest.raises(UserError, match="aime24.jsonl, " + message):
        load("aime24", tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    path = write_jsonl(tmp_path / "aime24.jsonl", made_up("aime24"))
    plain = load("aime24", path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load("aime24", path) == plain
    path.write_bytes(path.read_text(encoding="utf-8-sig").encode("utf-16"))
    with pytest.raises(UserError, match="line 1 is not UTF-8 .byte 1.; save the file as UTF-8"):
        load("aime24", path)


def test_blank_lines_count_but_are_no_rows(tmp_path):
    rows = write_jsonl(tmp_path / "x.jsonl", made_up("aime24")).read_text().splitlines()
    (tmp_path / "x.jsonl").write_text("\n".join(["", *rows[:3], "  ", *rows[3:], "", ""]))
    assert len(load("aime24", tmp_path / "x.jsonl")) == 30
    (tmp_path / "x.jsonl").write_text("\n\n" + "\n".join([*rows[:-1], "{"]))
    with pytest.raises(UserError, match="line 32 is broken JSON"):
        load("aime24", tmp_path / "x.jsonl")


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 0.999])
def test_a_parquet_that_ends_early_is_refused(share, tmp_path):
    path = write_parquet(tmp_path / "gsm8k.parquet", made_up("gsm8k", hub=True), row_group_size=200)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="gsm8k.parquet is torn or no Parquet .*; fetch the file again"):
        load("gsm8k", path)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_parquet_torn_in_the_middle_names_the_rows(share, tmp_path):
    rows = made_up("gsm8k", hub=True)
    path = write_parquet(tmp_path / "gsm8k.parquet", rows, row_group_size=200, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little") + 8
    start = int(share * (len(content) - footer))
    content[start : start + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"row group (\d) of 7 \(from row (\d+)\) is torn") as error:
        load("gsm8k", path)
    group, row = map(int, re.search(r"group (\d) of 7 \(from row (\d+)\)", str(error.value)).groups())
    assert row == 200 * (group - 1) + 1 and abs(group - 7 * share) < 1.5


def test_a_torn_parquet_without_checksums_never_escapes_as_another_error(tmp_path):
    rows = made_up("gsm8k", hub=True)
    path = write_parquet(tmp_path / "gsm8k.parquet", rows, row_group_size=200)
    content = path.read_bytes()
    refused = 0
    for start in range(4, len(content) - 40, len(content) // 25):
        path.write_bytes(content[:start] + bytes(range(200, 240)) + content[start + 40 :])
        try:
            load("gsm8k", path)
        except UserError as error:
            assert "gsm8k.parquet" in str(error)
            refused += 1
    assert refused > 15


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing", "there is no '.*nothing'; give a JSONL or Parquet file, or the folder of aime24.jsonl"),
        ("x.csv", "is of no known kind; convert it to one of .jsonl, .parquet"),
        ("empty", r"holds no aime24.jsonl or aime24.parquet; make it there, with a network: python -c"),
    ],
)
def test_files_that_are_not_there(name, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").write_text("id,problem,answer\n")
    with pytest.raises(UserError, match=message):
        load("aime24", tmp_path / name)


@pytest.mark.parametrize("name", FROM_FILES)
def test_offline_the_command_is_told_and_makes_the_file_that_loads(name, tmp_path, monkeypatch, no_data):
    benchmark = REGISTRY[name]
    with pytest.raises(UserError, match="could not be loaded from the Hub") as error:
        load(name)
    assert ("not verified" in str(error.value)) is not benchmark.verified
    command = next(line.strip() for line in str(error.value).splitlines() if "python -c" in line)
    assert command == benchmark.command
    asked = []

    def load_dataset(hub_id, config=None, split=None):
        asked.append((hub_id, config or "default", split))
        return datasets.Dataset.from_list(made_up(name, hub=True))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    exec(shlex.split(command)[2], {})
    assert asked == [(benchmark.hub_id, benchmark.config, benchmark.split)]
    assert load(name, tmp_path)[0]["problem"] == made_up(name)[0]["problem"]


def test_from_the_hub_the_resolved_revision_is_recorded(tmp_path, monkeypatch, no_data):
    folder = tmp_path / "openai___gsm8k" / "main" / "0.0.0" / COMMIT  # how `datasets` keeps what it loaded
    folder.mkdir(parents=True)
    table = datasets.Dataset.from_list(made_up("gsm8k", hub=True))
    with datasets.arrow_writer.ArrowWriter(path=str(folder / "gsm8k-test.arrow"), features=table.features) as writer:
        for row in table:
            writer.write(row)
        writer.finalize()
    stored = datasets.Dataset.from_file(str(folder / "gsm8k-test.arrow"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: stored)
    rows, source = load_with_source("gsm8k")
    assert rows[2]["answer"] == "1002" and rows[2]["id"] == "gsm8k-0002"
    assert source["resolved_revision"] == COMMIT and source["hub_id"] == "openai/gsm8k" and source["verified"] is True
    assert resolved_revision(table) == "unknown"
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: stored.select(range(5)))
    with pytest.raises(UserError, match="openai/gsm8k holds 5 problems, GSM8K has 1319"):
        load("gsm8k")


def test_the_toy_task_has_its_own_questions(no_data):
    rows = load("toy")
    assert [row["problem"] for row in rows] == [q["prompt"] for q in toy.questions("held_out", 512, 1)]
    assert all(row["answer"] == toy.solve(row["problem"])[-1] and row["id"] == row["problem"] for row in rows)


@pytest.mark.parametrize(
    "said, name",
    [
        ("aime24", "aime24"), ("AIME 2024", "aime24"), ("AIME-2025", "aime25"), ("AMC23", "amc23"), ("MATH-500", "math500"),
        ("MinervaMATH", "minerva_math"), ("minerva", "minerva_math"),
        ("GSM8K", "gsm8k"), ("HumanEval", "humaneval"), ("humaneval_5shot", "humaneval_5shot"),
        ("toy", "toy"),
    ],
)  # fmt: skip
def test_benchmarks_are_found_by_name_and_title(said, name):
    assert find(said).name == name


@pytest.mark.parametrize("said", ["aime", "", "gsm", "math"])
def test_unknown_benchmarks_are_told_with_the_known_ones(said):
    with pytest.raises(UserError, match=f"benchmark: '{said}' is unknown, choose from aime24, .*, humaneval_5shot, toy"):
        load(said)


# --- The real files -----------------------------------------------------------------------------------------------


@real_data
@pytest.mark.parametrize("name", FROM_FILES)
def test_the_real_files_load(name):
    rows, source = load_with_source(name)
    benchmark = REGISTRY[name]
    assert len(rows) == benchmark.size and source["path"].startswith(os.environ["GCPO_DATA"])
    assert len({row["problem"] for row in rows}) == len(rows)
    with open(source["path"]) as file:
        raw = [json.loads(line) for line in file]
    assert [row["id"] for row in rows] == [row.get("id", row.get("task_id")) for row in raw]
    if name == "gsm8k":  # the upstream text goes through the same door as the Hub's
        worked = [{"question": row["problem"], "answer": row["solution"]} for row in raw]
        located = [(f"row {k}", row) for k, row in enumerate(worked, 1)]
        assert [row["answer"] for row in benchmarks._checked(benchmark, located, "x")] == [row["answer"] for row in raw]
    elif benchmark.kind == "math":
        assert [row["answer"] for row in rows] == [row["answer"].strip() for row in raw]


@real_data
def test_no_shot_is_a_problem_of_the_benchmark():
    rows = load("humaneval")
    names = {row["entry_point"] for row in rows}
    grams = {gram for row in rows for gram in six_words(row["problem"] + row["answer"])}
    for shot in FIVE_SHOTS:
        assert re.search(r"def (\w+)", shot.problem)[1] not in names
        shared = six_words(shot.problem + shot.solution) & grams
        assert len(shared) <= 1, shared  # nothing but a common import or signature


def six_words(text):
    words = re.findall(r"\w+", text)
    return {tuple(words[k : k + 6]) for k in range(len(words) - 5)}


# --- Prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shot", FIVE_SHOTS, ids=lambda shot: re.search(r"def (\w+)", shot.problem)[1])
def test_the_shots_do_what_their_docstrings_show(shot):
    space = {}
    exec(shot.problem + shot.solution, space)
    name = re.search(r"def (\w+)", shot.problem)[1]
    examples = doctest.DocTestFinder().find(space[name], name, globs=space)[0]
    result = doctest.DocTestRunner().run(examples)
    assert result.attempted > 0 and result.failed == 0


def test_a_chat_model_is_asked_in_turns():
    turns = REGISTRY["aime24"].prompt.build("What is {x}? \\frac{1}{2}\n", chat=True)
    assert [turn["role"] for turn in turns] == ["system", "user"]
    assert "step by step" in turns[0]["content"] and r"\boxed{}" in turns[0]["content"]
    assert turns[1]["content"] == "What is {x}? \\frac{1}{2}"
    assert [turn["role"] for turn in REGISTRY["humaneval"].prompt.build("def f():\n", chat=True)] == ["user"]
    five = REGISTRY["humaneval_5shot"].prompt.build("def f():\n", chat=True)
    assert [turn["role"] for turn in five] == ["user", "assistant"] * 5 + ["user"]
    for shot, question, reply in zip(FIVE_SHOTS, five[::2], five[1::2], strict=False):
        assert shot.problem.rstrip() in question["content"]
        code = re.fullmatch(r"```python\n(.*)```", reply["content"], re.DOTALL)[1]
        assert code == shot.problem + shot.solution
    assert five[-1]["content"] == REGISTRY["humaneval"].prompt.build("def f():\n", chat=True)[0]["content"]


def test_a_base_model_continues_text():
    assert REGISTRY["humaneval"].prompt.build("def f():\n", chat=False) == "def f():\n"
    five = REGISTRY["humaneval_5shot"].prompt.build("def f():\n", chat=False)
    space = {}
    exec(five + "    return 1\n", space)  # the shots and the problem are one program
    assert space["f"]() == 1 and space["trailing_zeros"](25) == 6
    assert REGISTRY["math500"].prompt.build("1+{problem}", chat=False).startswith("1+{problem}\n")
    assert REGISTRY["toy"].prompt.build("1a+1b-9c+9?", chat=False) == "1a+1b-9c+9?"


def test_a_template_without_a_system_role_gets_the_text_in_the_first_turn(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    plain = REGISTRY["aime24"].prompt.fit("1+1", tokenizer)
    assert plain[0]["role"] == "system"
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusing + tokenizer.chat_template
    turns = REGISTRY["aime24"].prompt.fit("1+1", tokenizer)
    assert [turn["role"] for turn in turns] == ["user"]
    assert turns[0]["content"] == plain[0]["content"] + "\n\n" + plain[1]["content"]
    text = render(turns, tokenizer)
    assert prompt_ids(turns, tokenizer) == tokenizer(text)["input_ids"]
    tokenizer.chat_template = "{{ raise_exception('broken') }}"
    with pytest.raises(Exception, match="broken"):
        REGISTRY["humaneval"].prompt.fit("def f():\n", tokenizer)


def test_a_file_of_another_benchmark_is_refused(tmp_path):
    rows = [json.dumps({"id": f"aime25-{k:02d}", "problem": f"p{k}", "answer": "1"}) for k in range(30)]
    for name in ("aime25.jsonl", "aime24.jsonl"):
        (tmp_path / name).write_text("\n".join(rows))
        with pytest.raises(UserError, match="AIME 2025.*not .*AIME 2024"):
            load("aime24", tmp_path / name)

