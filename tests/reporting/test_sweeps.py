"""The sweeps of Figure 3 and Table 2: which experiments are run, and what one table of them says."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from gcpo_repro import UserError
from gcpo_repro.evaluation.published import load
from gcpo_repro.reporting import sweeps
from gcpo_repro.settings import Settings

SMALL = replace(sweeps.TOY, eval_questions=3)


def trained(settings, correct=((1, 2, 4), (3, 2, 0))):
    arms = [
        {"method": "gcpo", "seed": seed, "evaluations": [{"counts": {}}, {"counts": {"correct": list(row)}}]}
        for seed, row in zip(settings.seeds, correct, strict=True)
    ]
    return {"kind": "experiment", "config": settings.as_dict(), "arms": arms, "commit": "abc", "versions": {}, "hardware": {}}


def test_arms_are_the_papers_grids_with_the_rest_as_the_paper_chose_it():
    found = list(sweeps.arms(SMALL).values())
    published = load()
    alphas = [s.alpha for s in found if (s.kappa, s.similarity, s.control) == (0.06, "cosine", "none")]
    assert alphas == published[published["column"] == "α grid"]["value"].tolist()
    kappas = {s.kappa for s in found if (s.alpha, s.similarity, s.control) == (2.0, "cosine", "none")}
    assert kappas >= {0.0, *published[published["column"] == "κ grid"]["value"]}
    assert {s.similarity for s in found if (s.alpha, s.kappa) == (2.0, 0.06)} == {"cosine", "euclidean", "gaussian"}
    assert [(s.alpha, s.kappa) for s in found if s.control == "constant"] == [(1.0, 0.06)], "B = A"
    assert len(set(found)) == len(found) == len(sweeps.arms(SMALL)), "none twice"
    for settings in found:
        same = replace(settings, alpha=2.0, kappa=0.06, similarity="cosine", control="none")
        assert same == SMALL


def test_all_experiments_run_each_in_a_folder_of_its_own_and_the_same_again(tmp_path):
    calls = []

    def run(settings, out):
        calls.append((settings, out))
        return trained(settings)

    said = []
    found = sweeps.run_sweeps(SMALL, tmp_path, said.append, run)
    first = list(calls)
    assert len({out for _, out in first}) == len(first) == len(sweeps.arms(SMALL)) and first[0][1].parent == tmp_path
    assert said[0] == f"1 of {len(first)}: alpha-0.0"
    assert sweeps.run_sweeps(SMALL, tmp_path, said.append, run) == found and calls[len(first) :] == first, "so it can resume"
    counts = {sweep: sum(p["sweep"] == sweep for p in found["points"]) for sweep in ("alpha", "kappa", "similarity", "ablation")}
    assert counts == {"alpha": 10, "kappa": 7, "similarity": 3, "ablation": 3}
    alphas = [p["value"] for p in found["points"] if p["sweep"] == "alpha"]
    assert alphas == sorted(alphas)


def test_a_point_by_hand():
    """Seeds averaged: (1+3, 2+2, 4+0) / 8 = ½ everywhere, no spread; and (0, 4, 4), (0, 0, 4): 0, ½, 1 over three questions."""
    other = trained(replace(SMALL, alpha=1.0), ((0, 4, 4), (0, 0, 4)))
    found = sweeps.sweep_data([trained(SMALL), other])
    points = {(p["sweep"], p["value"]): p for p in found["points"]}
    assert set(points) == {("alpha", 1.0), ("alpha", 2.0), ("kappa", 0.06), ("similarity", "cosine"), ("ablation", "full")}
    middle = points["kappa", 0.06]
    assert (middle["mean"], middle["low"], middle["high"]) == (0.5, 0.5, 0.5) and middle["seeds"] == [7 / 12, 5 / 12]
    low, high = stats.t.interval(0.95, 2, 0.5, stats.sem([0, 0.5, 1]))
    assert points["alpha", 1.0]["low"] == pytest.approx(low) and points["alpha", 1.0]["high"] == pytest.approx(high)
    assert (found["questions"], found["samples"], found["seeds"], found["commit"]) == (3, 4, [0, 1], "abc")
    json.dumps(found, allow_nan=False)


def test_experiments_of_other_settings_are_left_out():
    strangers = [replace(SMALL, steps=21), replace(SMALL, alpha=1.0, kappa=0.0), replace(SMALL, seeds=(0, 2), alpha=3.0)]
    found = sweeps.sweep_data([trained(SMALL), *map(trained, strangers)])
    assert found == sweeps.sweep_data([trained(SMALL)])
    more_workers = trained(replace(SMALL, alpha=3.0, workers=7))
    assert len(sweeps.sweep_data([trained(SMALL), more_workers])["points"]) == len(found["points"]) + 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ([], "none of 0 has"),
        ([replace(SMALL, alpha=1.0)], "none of 1 has .*'alpha': 2.0"),
        ([SMALL, SMALL], "two of them have alpha = 2.0"),
        ([SMALL, replace(SMALL, kappa=0.0), replace(SMALL, kappa=0.0)], "two of them have kappa = 0.0"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(UserError, match=message):
        sweeps.sweep_data([trained(s) for s in settings])


def test_command(tmp_path, monkeypatch):
    seen = []

    def run_sweeps(base, out, echo):
        seen.append((base, out))
        return sweeps.sweep_data([trained(base)])

    monkeypatch.setattr(sweeps, "run_sweeps", run_sweeps)
    done = CliRunner().invoke(sweeps.main, ["--out", str(tmp_path)])
    assert done.exit_code == 0 and seen == [(sweeps.TOY, tmp_path)]
    assert json.loads((tmp_path / "sweeps.json").read_text())["points"]
    (tmp_path / "mine.yaml").write_text("steps: 3\nkappa: 0.5\nseeds: [0, 1]\n")
    done = CliRunner().invoke(sweeps.main, ["--config", str(tmp_path / "mine.yaml"), "--out", str(tmp_path)])
    assert done.exit_code == 1 and "Error: experiments: none of 1" in done.output  # the stub's one is not the paper's reference
    assert isinstance(seen[1][0], Settings) and seen[1][0].steps == 3


def test_score_counts_gcpo_alone():
    results = trained(SMALL)
    results["arms"].append({"method": "grpo", "seed": 0, "evaluations": [{"counts": {"correct": [4, 4, 4]}}]})
    assert sweeps._score(results, 0.95)["mean"] == np.mean([1, 2, 4, 3, 2, 0]) / 4
