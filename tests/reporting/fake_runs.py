"""Small folders of results as `reproduce` and `train` leave them, with numbers that can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

PROVENANCE = {
    "versions": {"python": "3.11.7", "torch": "2.13.0"}, "commit": "0123456789abcdef-dirty", "command": ["gcpo-repro", "x_y"],
    "hardware": {"platform": "Linux", "cpu": "Test CPU", "cores": 2, "memory_gib": 4.0, "torch_threads": 1, "gpus": []},
    "started_unix": 1.7e9, "wall_time_seconds": 130.0, "seed": [0, 1],
}  # fmt: skip
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def experiment(final: dict[str, list[list[int]]], **settings: Any) -> dict[str, Any]:
    """`results.json` of an experiment: {method: right answers of 4, (seeds, questions), after training}; 1 of 4 before."""
    config = {
        "methods": list(final), "seeds": list(range(len(next(iter(final.values()))))), "model": "toy", "quantization": "nf4",
        "group_size": 4, "steps": 2, "eval_questions": 4, "eval_samples": 4, "batch_size": 8, "alpha": 2.0, "kappa": 0.06,
        **settings,
    }  # fmt: skip
    steps = [{"step": step, "reward": 0.5, "loss": 0.1, "grad_norm": 1.0} for step in (1, 2)]
    arms = [
        {
            "method": method, "seed": seed, "steps": steps, "wall_time_seconds": 10.0 if method == "grpo" else 15.0,
            "evaluations": [
                {"step": step, "counts": {"correct": counts, "samples": 4, "truncated": [0] * 4, "unscorable": [0] * 4}}
                for step, counts in ((0, [1, 1, 1, 1]), (2, correct))
            ],
        }
        for method, rows in final.items() for seed, correct in enumerate(rows)
    ]  # fmt: skip
    return {**PROVENANCE, "config": config, "kind": "experiment", "arms": arms}


def notebook(path: Path, *cells: Any, parameters: dict[str, Any] | None = None, failed: bool = False) -> None:
    """An executed notebook with papermill's notes in it."""
    nb = new_notebook(cells=list(cells))
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nb.metadata["papermill"] = {"parameters": parameters or {}, "exception": failed or None}
    write(path, nbformat.writes(nb))


def ran(source: str, *outputs: Any) -> Any:
    return new_code_cell(source, execution_count=1, outputs=list(outputs))


def picture(path: Path, data: Any) -> None:
    write(path.with_suffix(".json"), data)
    figure, axes = plt.subplots(figsize=(2, 1))
    axes.plot([0, 1])
    figure.savefig(path.with_suffix(".png"))
    figure.savefig(path.with_suffix(".svg"))
    plt.close(figure)


NASTY = "In [2]: ValueError: <script>alert(1)</script> *bold* $x^2$ | `code` {ref}`a` [b](c) \\ &amp; #"
DEPENDENCE = {"q": {"r": 0.001, "z": 0.1, "null_sd": 0.01, "groups": 2400},
              "q_right": {"r": -0.476, "z": -18.1, "null_sd": 0.02, "groups": 1493}}  # fmt: skip
COLLIDER = {
    "dependence": {"2": DEPENDENCE}, "model": "toy", "questions": 16, "slope_questions": 192, "rollouts": 4, "level": 0.95,
    "slope": {"algorithm": {"value": 0.19, "low": -0.07, "high": 0.44}, "theorem": {"value": 0.9, "low": 0.6, "high": 1.2}},
}  # fmt: skip


def reproduced(folder: Path) -> Path:
    """A run of `reproduce` with two notebooks that succeeded, one that failed, one that was killed and one that never ran."""
    names = ("00_start_here", "03_collider", "05_train", "06_killed", "07_never")
    states = dict(zip(names, ("done", "done", "failed", "running", "pending"), strict=True))
    write(folder / "run.json", {"kind": "reproduce", "state": "failed", "pid": 0, "profile": "cpu", "notebooks": states})
    display = new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"})
    table = f"<table><tr>{'<td>a wide cell</td>' * 40}</tr></table>"
    wide = new_output("execute_result", {"text/html": table}, execution_count=1)
    notebook(
        folder / "00_start_here/00_start_here.ipynb",
        new_markdown_cell("# 00 · Start here\n\nSee [the next](03_collider.ipynb), [03](03_collider.ipynb#given-a-right-answer), "
                          "[the README](../README.md), [home](https://example.org/x), ![a lost picture](../figures/no.png)."),
        new_markdown_cell("## Formulas\n\nInline $\\Upsilon_i = \\alpha$, and alone:\n\n$$\\frac{1}{n}\\sum_i A_i$$"),
        ran('figures.save(draw(3), {}, out / "graph")', display), ran("table", wide),
        ran("print('x' * 500)", new_output("stream", text="x" * 500 + "\n")),
    )  # fmt: skip
    picture(folder / "00_start_here/graph.png", {"n": 3})
    notebook(
        folder / "03_collider/03_collider.ipynb",
        new_markdown_cell("# 03 · The collider"),
        new_markdown_cell("## Given a right answer\n\nLeft, *two* candidates; right, the slope."),
        ran('figures.save(figure, shown, out / "collider_in_a_model")', display),
    )
    picture(folder / "03_collider/collider_in_a_model.png", COLLIDER)
    write(folder / "03_collider/formulas.csv", "formula,z\nR(m) | tr S_e,0.5\n*b*,-2.5\nc,1.0\nd,0.2\n")
    for name in names[:2]:
        config = {"seed": 0, "check_claims": name != "00_start_here", "out_dir": f"/somewhere/{name}"}
        write(folder / name / "success.json", {**PROVENANCE, "notebook": name, "config": config})
        write(folder / name / "log.txt", "")
    failing = new_output("error", ename="ValueError", evalue="no", traceback=["\x1b[31mValueError\x1b[0m: no"])
    notebook(folder / "05_train/05_train.ipynb", ran("raise ValueError('no')", failing))  # without a heading
    write(folder / "05_train/failure.json", {"reason": NASTY})
    write(folder / "05_train/log.txt", "\n".join(f"line {k}" for k in range(100)) + "\n```\nValueError: no")
    write(folder / "06_killed/log.txt", "half of it")
    return folder
