"""Verdicts against what is known: intervals of a known truth, peers' tests, results made so that the answer is clear."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from gcpo_repro.errors import UserError
from gcpo_repro.evaluation import published
from gcpo_repro.evaluation.stats import Interval, mean_interval
from gcpo_repro.reporting import claims, gallery, manifest
from gcpo_repro.reporting.verdicts import (
    AGREES,
    DISAGREES,
    NOT_MEASURED,
    NOTHING,
    UNDECIDED,
    VERDICTS,
    differs,
    equals,
    every,
    inside,
    positive,
    shown,
)

DATA = Path(__file__).parents[2] / "figures" / "data"
TABLE = published.load()


def interval(low, high):
    return Interval((low + high) / 2, low, high, 5, 0.95, 1.0)


def lines(**data):
    return claims.claims({"published": TABLE, **data})


def one(table, words, place=""):
    (row,) = [r for r in table.to_dict("records") if words in r["claim"] and r["source"].startswith(place)]
    return row


# --- verdicts ---


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0, 1, AGREES), (0.1, 9, AGREES), (-1, 1, UNDECIDED), (-2, -1, DISAGREES), (-inf, inf, UNDECIDED), (-1, 0, UNDECIDED)],
)
def test_a_range(low, high, verdict):
    assert inside(interval(low, high), 0) == verdict


def test_a_bounded_range():
    assert [inside(interval(*x), -1, 1) for x in ((-0.9, 1), (0, 2), (1.1, 3), (-9, 9))] == [
        AGREES, UNDECIDED, DISAGREES, UNDECIDED,
    ]  # fmt: skip


def test_one_value_needs_an_interval_that_could_have_seen_a_deviation():
    assert equals(interval(-0.1, 0.1), 0, 0.2) == AGREES
    assert equals(interval(-5, 5), 0, 0.2) == UNDECIDED
    assert equals(interval(0.1, 5), 0, 9) == DISAGREES
    assert [differs(interval(*x), 0) for x in ((0.1, 1), (-1, -0.1), (-1, 1))] == [AGREES, AGREES, UNDECIDED]


def test_better_is_more_than_a_tie():
    assert [positive(interval(*x)) for x in ((0.1, 1), (-1, 1), (0, 0), (-1, -0.1))] == [
        AGREES, UNDECIDED, UNDECIDED, DISAGREES,
    ]  # fmt: skip
    same = {value: [0.7, 0.7, 0.7] for value in (1.0, 2.0)}
    assert one(lines(sweeps=sweeps(alpha=same)), "α = 2 is the best")["verdict"] == UNDECIDED


def test_all_of_several_claims():
    assert [every(x) for x in ([AGREES, AGREES], [AGREES, UNDECIDED], [UNDECIDED, DISAGREES, AGREES])] == [
        AGREES, UNDECIDED, DISAGREES,
    ]  # fmt: skip


def test_a_true_claim_is_refuted_as_rarely_as_the_level_says():
    """The quantity is 0, the claim "at least 0" true at its edge: an interval of 95% lies below in 2.5% of the cases."""
    draws = np.random.default_rng(0).normal(size=(4000, 5))
    verdicts = [inside(mean_interval(row), 0) for row in draws]
    for verdict in (AGREES, DISAGREES):
        assert scipy_stats.binomtest(verdicts.count(verdict), len(verdicts), 0.025).pvalue > 1e-4


def test_numbers_have_no_negative_zero():
    assert shown(interval(-1e-12, 1e-12)) == "+0.000 [+0.000, +0.000]"
    assert shown(mean_interval([2.0]), ".1f") == "2.0 (no interval)"


# --- without and with data ---


def test_without_results_every_line_stands_there_unmeasured_and_says_what_would_measure_it():
    table = lines()
    measurable = table[~table["part"].str.startswith("Printed") & (table["source"] != "Eq. 13, with its sum over l")]
    assert set(measurable["verdict"]) == {NOT_MEASURED}
    assert (measurable["reason"] != "").all() and (measurable["found"] == NOTHING).all()
    with_data = claims.claims({source: manifest.read(source, DATA) for source in gallery.SOURCES})
    assert set(table["claim"]) == set(with_data["claim"])
    published_by = [dict(zip(t["claim"] + t["source"], t["published"], strict=True)) for t in (table, with_data)]
    assert published_by[0] == published_by[1], "nothing measured gets into the published column"
    assert set(with_data["verdict"]) <= set(VERDICTS)


def test_committed_collider_by_hand():
    data = json.loads((DATA / "collider_in_a_model.json").read_text())
    table = lines(collider_in_a_model=data)
    fork = table[table["claim"].str.contains("fork")]
    for (n, found), (_, row) in zip(data["dependence"].items(), fork.iterrows(), strict=True):
        low, high = (found["q"]["r"] + sign * 1.959964 * found["q"]["null_sd"] for sign in (-1, 1))
        assert row["found"] == f"r = {found['q']['r']:+.3f} [{low:+.3f}, {high:+.3f}]" and f"n = {n}," in row["sample"]
        assert (row["verdict"] == DISAGREES) == (not low <= 0 <= high)
    strong = json.loads(json.dumps(data))
    strong["dependence"]["2"]["q"]["r"] = 0.3
    assert lines(collider_in_a_model=strong)["verdict"].iloc[0] == DISAGREES
    assert strong["slope"]["theorem"]["high"] > 0.5
    strong["slope"]["theorem"] |= {"low": 0.6, "high": 0.9, "value": 0.8}
    assert one(lines(collider_in_a_model=strong), "Φ of the theorem")["verdict"] == AGREES


def test_a_test_that_could_see_nothing_agrees_with_nothing():
    data = json.loads((DATA / "collider_in_a_model.json").read_text())
    weak = data["dependence"]["4"]
    weak["q"] |= {"r": 0.01, "null_sd": abs(weak["q_right"]["r"])}
    assert [row["verdict"] for row in lines(collider_in_a_model=data).to_dict("records")[:4]] == [
        AGREES, AGREES, UNDECIDED, AGREES,
    ]  # fmt: skip


def predictors(*gaps, error):
    return {"measured 1": list(gaps), "error 1": [error] * len(gaps)}


def test_theorem_1_is_judged_for_all_predictors_together_and_corollary_2_by_its_worst_case():
    counter = {"a": [0.5, 1.5], "simulated": [0.5, -1.5], "error": [0.1, 0.1]}

    def of(**found):
        table = lines(theorems={"counter_example": counter, **found})
        return one(table, "any predictor")["verdict"], one(table, "for every f")["verdict"]

    assert of(predictors=predictors(1.0, 2.0, error=0.9)) == (UNDECIDED, DISAGREES)  # each alone is above 0, both are not
    assert of(predictors=predictors(1.0, 2.0, error=0.8)) == (AGREES, DISAGREES)  # 2.24 / 1.96 wider for two
    assert of(predictors=predictors(-2.0, 2.0, error=0.8)) == (DISAGREES, DISAGREES)
    counter["simulated"] = [0.5, 1.5]
    assert of(predictors=predictors(0.0, error=0.0)) == (AGREES, AGREES)


def test_the_bayes_predictor_by_hand():
    table = manifest.read("formulas", DATA)
    row = table[table["formula"].str.startswith("R(m) − R(μ)")].iloc[0]
    low, high = (row["simulated"] + sign * 1.959964 * row["standard error"] for sign in (-1, 1))
    assert one(lines(formulas=table), "Bayes predictor")["found"].endswith(f"[{low:+.3f}, {high:+.3f}]")


@pytest.mark.parametrize(("risk", "verdict"), [(2.0, AGREES), (3.0, DISAGREES), (2.5, UNDECIDED)])
def test_a_target_with_less_risk_than_the_mean_predicts_better(risk, verdict):
    phis = {"kind": ["query", "algorithm", "algorithm", "theorem"], "L": [0, 8, 2, 8], "risk theory": [2.5, 9, 9, 9],
            "risk": [2.6, risk, 9, 9], "risk error": [0.1, 0.1, 0.1, 0.1]}  # fmt: skip
    assert one(lines(two_phis=phis), "the target of steps")["verdict"] == verdict


# --- training ---


def training(shift, methods=("grpo", "gcpo"), seeds=4, questions=200):
    """Results of an experiment in which the last method answers `shift` more of 100 questions than the first."""
    rng = np.random.default_rng(1)
    arms = []
    for seed in range(seeds):
        for k, method in enumerate(methods):
            p = np.clip(0.5 + k * shift / 100 + 0.005 * rng.normal(), 0, 1)
            counts = {"correct": rng.binomial(4, p, questions).tolist(), "samples": 4}
            before = {"step": 0, "counts": counts | {"correct": [2] * questions}}
            steps = [{"step": s, "grad_norm": 1.0 + k + 0.1 * seed, "reward": 0.5} for s in (1, 2)]
            arms.append({"method": method, "seed": seed, "evaluations": [before, {"step": 2, "counts": counts}], "steps": steps})
    config = {
        "methods": list(methods), "seeds": list(range(seeds)), "eval_questions": questions, "eval_samples": 4, "alpha": 2.0,
        "model": "m", "quantization": "none", "group_size": 4, "batch_size": 8, "learning_rate": 1e-3,
    }  # fmt: skip
    return {"config": config, "arms": arms}


@pytest.mark.parametrize(("shift", "verdict"), [(20, AGREES), (-20, DISAGREES), (0, UNDECIDED)])
def test_a_comparison_follows_the_paired_t_test(shift, verdict):
    results = training(shift)
    row = one(lines(training=results), "GCPO does better than GRPO")
    per_seed = {m: [np.mean(a["evaluations"][-1]["counts"]["correct"]) / 4 for a in results["arms"] if a["method"] == m]
                for m in ("grpo", "gcpo")}  # fmt: skip
    peer = scipy_stats.ttest_rel(per_seed["gcpo"], per_seed["grpo"]).confidence_interval(0.95)
    assert f"[{100 * peer.low:+.1f}, {100 * peer.high:+.1f}]" in row["found"]
    assert row["verdict"] == verdict
    assert row["published"] == "+1.4 to +1.8 points, 3 base models"
    assert "norm of GRPO, median step: 1.8" in one(lines(training=results), "gradient norms")["found"]  # mean of 2.15 / 1.15


def test_one_seed_gives_no_verdict_and_other_methods_are_found_by_name():
    assert one(lines(training=training(20, seeds=1)), "better than GRPO")["verdict"] == UNDECIDED
    table = lines(training=training(20, ("dr_grpo", "gcpo")))
    assert one(table, "better than Dr.GRPO", "Table 1, averages")["verdict"] == AGREES
    assert one(table, "better than GRPO")["verdict"] == NOT_MEASURED


def sweeps(**values):
    """{sweep: {value: [pass@1 per seed]}} as `sweeps.sweep_data` writes it."""
    points = [{"sweep": s, "value": v, "seeds": seeds} for s, each in values.items() for v, seeds in each.items()]
    return {"points": points, "seeds": [0, 1, 2], "questions": 9, "samples": 4, "config": {"model": "m"}}


def test_best_of_a_grid():
    noise = [0.0, 0.001, -0.001]
    row = {1.0: [0.5, 0.5, 0.5], 2.0: [0.7 + x for x in noise], 3.0: [0.6, 0.6, 0.6]}
    assert one(lines(sweeps=sweeps(alpha=row)), "α = 2 is the best")["verdict"] == AGREES
    near = 100 * np.subtract(row[2.0], [0.65, 0.66, 0.64])
    found = scipy_stats.ttest_1samp(near, 0).confidence_interval(1 - 0.05 / 2)  # two comparisons
    text = one(lines(sweeps=sweeps(alpha=row | {3.0: [0.65, 0.66, 0.64]})), "α = 2 is the best")["found"]
    assert text == f"70.0%; best of the others α = 3: 65.0%, difference +5.0 [{found.low:+.1f}, {found.high:+.1f}] points"
    assert one(lines(sweeps=sweeps(alpha=row | {3.0: [0.8, 0.8, 0.8]})), "α = 2 is the best")["verdict"] == DISAGREES
    assert one(lines(sweeps=sweeps(alpha=row | {3.0: [0.69, 0.72, 0.70]})), "α = 2 is the best")["verdict"] == UNDECIDED
    assert one(lines(sweeps=sweeps(alpha={1.0: [0.5] * 3})), "α = 2 is the best")["verdict"] == NOT_MEASURED


def test_negligible_is_less_than_the_least_average_gain_that_the_paper_counts():
    base = [0.7, 0.71, 0.69]
    near, far = ({"cosine": base, "gaussian": [x + d for x in base]} for d in (0.001, 0.01))
    assert one(lines(sweeps=sweeps(similarity=near)), "similarity")["verdict"] == AGREES
    row = one(lines(sweeps=sweeps(similarity=far)), "similarity")
    assert row["verdict"] == DISAGREES and "below 0.5 points" in row["reason"]  # 47.4 − 46.9


def test_ablations():
    ablation = {"full": [0.7, 0.71, 0.69], "without upsilon": [0.6, 0.61, 0.59], "without kappa": [0.8, 0.81, 0.79]}
    table = lines(sweeps=sweeps(ablation=ablation))
    assert (one(table, "without Υ")["verdict"], one(table, "without the κ term")["verdict"]) == (AGREES, DISAGREES)
    assert one(table, "without Υ")["published"] == "-1.4 points"


# --- printed numbers ---


def evaluation(model, title, mean, half):
    score = {"mean": mean, "low": mean - half, "high": mean + half}
    entry = {"title": title, "pass_at_1": score, "problems_asked": 30, "samples": 64}
    return {"kind": "evaluation", "seed": 0, "config": {"model": {"source": model, "adapter": None}}, "benchmarks": [entry]}


@pytest.mark.parametrize(("mean", "half", "verdict"), [(0.43, 0.03, AGREES), (0.43, 0.1, UNDECIDED), (0.3, 0.1, DISAGREES)])
def test_a_base_model_is_compared_with_its_own_printed_score(mean, half, verdict):
    found = evaluation("agentica-org/DeepScaleR-1.5B-Preview", "AIME 2024", mean, half)
    table = lines(evaluations=[found])
    assert one(table, "DeepScaleR-1.5B-Preview reaches this on AIME 2024")["verdict"] == verdict  # printed 42.8, gain 3.9
    part = table[table["part"] == "Scores of the base models"]
    assert (part["verdict"] == NOT_MEASURED).sum() == len(part) - 1


def test_a_score_without_an_interval_decides_nothing():
    found = evaluation("agentica-org/DeepScaleR-1.5B-Preview", "AIME 2024", 0.9, 0.1)
    found["benchmarks"][0]["pass_at_1"] |= {"low": None, "high": None}  # one problem
    row = one(lines(evaluations=[found]), "DeepScaleR-1.5B-Preview reaches this on AIME 2024")
    assert row["verdict"] == UNDECIDED and row["found"] == "90.0 (no interval) per cent"


def test_another_models_score_is_no_evidence():
    part = lines(evaluations=[evaluation("toy", "AIME 2024", 0.428, 0.01)])
    assert set(part[part["part"] == "Scores of the base models"]["verdict"]) == {NOT_MEASURED}


def test_a_printed_gain_beyond_the_noise_would_agree():
    table = lines()
    gains = table[table["part"] == "Printed gains against their noise"]
    assert len(gains) == 18 + 2 and set(gains["verdict"]) == {UNDECIDED}
    variance = (0.467 * 0.533 + 0.461 * 0.539) / 30  # of two binomials, other problems each time
    assert gains["found"].iloc[0] == f"noise ±{200 * variance**0.5:.1f} points"
    large = TABLE.copy()
    cell = (large["table"] == "Table 1") & (large["method"] == "GCPO") & (large["column"] == "MATH500")
    large.loc[cell, ["printed", "value"]] = ["99.0", 99.0]
    changed = claims.claims({"published": large})
    assert set(changed[changed["claim"].str.contains(", MATH500: GCPO does")]["verdict"]) == {AGREES}


def test_arithmetic_names_the_numbers_that_do_not_fit():
    row = one(lines(), "DeepScaleR-1.5B-Preview: averages", "Table 1")
    assert row["verdict"] == DISAGREES and row["found"] == "GCPO 56.66, printed 56.8"  # (46.7 + 40.3 + 84.1 + 86.3 + 25.9) / 5
    assert one(lines(), "DeepSeek-R1-Distill-Qwen-7B: averages", "Table 1")["verdict"] == AGREES
    assert "Table 1 2.4, text 2.2" in one(lines(), "printed in several places")["found"]


# --- where the numbers come from ---


def test_a_run_comes_before_the_committed_numbers(tmp_path):
    for name in ("05_train_qlora", "07_paper_figures"):
        (tmp_path / name).mkdir()
    (tmp_path / "05_train_qlora/results.json").write_text(json.dumps(training(5)))
    for folders in (manifest.folders(tmp_path), manifest.folders("", tmp_path / "07_paper_figures")):
        assert folders == [tmp_path, DATA]
        assert manifest.read("training", *folders)["config"]["model"] == "m"
        assert manifest.files_of("formulas", *folders) == [DATA / "formulas.csv"]
    assert manifest.folders(tmp_path, committed=False) == [tmp_path]
    with pytest.raises(FileNotFoundError, match="formulas.csv"):
        manifest.find("formulas", tmp_path)


def test_folders_without_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="run_dir: .*nowhere' is no folder; name a folder"):
        manifest.folders(tmp_path / "nowhere")
    (tmp_path / "07").mkdir()
    with pytest.raises(UserError, match="run_dir: .*07' holds no results"):
        manifest.folders(tmp_path / "07")
    with pytest.raises(UserError, match="run the others first"):
        manifest.folders("", tmp_path / "07", committed=False)
    assert manifest.folders("", tmp_path / "07") == [DATA]
