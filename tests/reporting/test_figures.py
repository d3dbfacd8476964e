"""Figures: their numbers by hand, their files, and that nothing in them lies on top of something else."""

import itertools
import json
import math

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.image import imread
from scipy import stats as scipy_stats

from gcpo_repro.reporting import figures
from tests.texts import assert_readable, shown_texts


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def step(k, reward, upsilon=None, corr=None, slope=None):
    names = ("gcpo/upsilon_mean", "gcpo/upsilon_reward_corr", "gcpo/slope")
    measured = {"step": k, "reward": reward, "loss": 0.0, **dict(zip(names, (upsilon, corr, slope), strict=True))}
    return {key: value for key, value in measured.items() if key == "gcpo/slope" or value is not None or k == 2}


def arm(method, seed, steps, counts):
    evaluations = [
        {"step": at, "counts": {"correct": correct, "unscorable": [0] * 3, "truncated": [0] * 3, "samples": 4, "seed": 9}}
        for at, correct in zip((0, 2), counts, strict=True)
    ]
    return {"method": method, "seed": seed, "steps": steps, "evaluations": evaluations, "wall_time_seconds": 1.0}


GRPO = [
    arm("grpo", 0, [step(1, 0.25), step(2, 0.5)], ([0, 2, 4], [1, 4, 4])),
    arm("grpo", 1, [step(1, 0.75), step(2, 0.5)], ([2, 2, 2], [3, 4, 2])),
]
GCPO = [
    arm("gcpo", 0, [step(1, 0.5, 1.9, 0.2, 0.1), step(2, 0.625, 1.8)], ([0, 2, 4], [4, 4, 4])),
    arm("gcpo", 1, [step(1, 0.5, 1.7, 0.4, 0.3), step(2, 0.875, 1.6, -0.5, None)], ([2, 2, 2], [4, 2, 0])),
]


def results(arms, methods=("grpo", "gcpo")):
    config = {
        "methods": list(methods), "seeds": sorted({a["seed"] for a in arms}), "eval_questions": 3, "eval_samples": 4,
        "model": "toy", "quantization": "nf4", "group_size": 4, "batch_size": 64, "alpha": 2.0,
    }  # fmt: skip
    return {"kind": "experiment", "config": config, "arms": arms}


BOTH = results([GRPO[0], GCPO[0], GRPO[1], GCPO[1]])  # arms in whatever order
T_1 = 12.706205  # t with one degree of freedom, .975


# Numbers


def test_learning_curve_data_by_hand():
    """Reward at step 1: .25 and .75, mean .5, standard error .25. Held out: (0+2+4)/12 = (2+2+2)/12 = .5 before,
    (1+4+4)/12 = .75 and (3+4+2)/12 = .75 after; GCPO's 1 and .5: mean .75, standard error .25.
    """
    data = figures.learning_curve_data(BOTH)
    grpo, gcpo = data["curves"]["grpo"], data["curves"]["gcpo"]
    assert (grpo["reward"]["step"], grpo["pass_at_1"]["step"]) == ([1, 2], [0, 2])
    assert grpo["reward"]["mean"] == [0.5, 0.5] and gcpo["reward"]["mean"] == [0.5, 0.75]
    assert grpo["reward"]["low"] == pytest.approx([0.5 - T_1 * 0.25, 0.5], abs=1e-6)
    assert grpo["reward"]["high"] == pytest.approx([0.5 + T_1 * 0.25, 0.5], abs=1e-6)
    assert grpo["pass_at_1"]["mean"] == [0.5, 0.75] and gcpo["pass_at_1"]["mean"] == [0.5, 0.75]
    assert grpo["pass_at_1"]["high"] == pytest.approx([0.5, 0.75])
    assert gcpo["pass_at_1"]["high"] == pytest.approx([0.5, 0.75 + T_1 * 0.25], abs=1e-6)
    described = {key: data[key] for key in ("level", "seeds", "questions", "samples", "batch_size", "group_size")}
    assert described == {"level": 0.95, "seeds": 2, "questions": 3, "samples": 4, "batch_size": 64, "group_size": 4}


def test_the_level_is_the_intervals():
    low = figures.learning_curve_data(BOTH, level=0.5)["curves"]["grpo"]["reward"]["low"][0]
    assert low == pytest.approx(0.5 - 1.0 * 0.25)  # t with one degree of freedom, .75, is 1
    assert figures.learning_curve_data(BOTH, level=0.5)["level"] == 0.5


def test_a_single_seed_has_no_interval():
    data = figures.learning_curve_data(results([GRPO[0], GCPO[0]]))
    for curve in data["curves"].values():
        for kind in ("reward", "pass_at_1"):
            assert curve[kind]["low"] == curve[kind]["high"] == [None, None]
            assert all(math.isfinite(mean) for mean in curve[kind]["mean"])
    figure = figures.learning_curves(data)
    assert "one seed, no interval" in figure.get_suptitle()
    assert not any(axes.collections for axes in figure.axes), "a band or a bar was drawn"


def test_pass_at_1_table_by_hand():
    """Rows of a method: over the three questions, seeds averaged. Last row: over the two seeds, 0 and -.25 of GCPO - GRPO."""
    table = figures.pass_at_1_table(BOTH)

    def shown(values, sign=""):
        low, high = scipy_stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy_stats.sem(values))
        return f"{100 * np.mean(values):{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"

    assert list(table.index) == ["GRPO", "GCPO", "GCPO − GRPO"] and list(table.columns) == ["before", "after", "gain"]
    before, grpo, gcpo = np.array([1, 2, 3]) / 4, np.array([2, 4, 3]) / 4, np.array([4, 3, 2]) / 4
    assert list(table.loc["GRPO"]) == [shown(before), shown(grpo), shown(grpo - before, "+")]
    assert list(table.loc["GCPO"]) == [shown(before), shown(gcpo), shown(gcpo - before, "+")]
    assert list(table.loc["GCPO − GRPO"]) == ["", shown([1 - 0.75, 0.5 - 0.75], "+"), ""]


def test_pass_at_1_table_of_one_method_and_of_one_seed():
    assert list(figures.pass_at_1_table(results(GRPO, ["grpo"])).index) == ["GRPO"]
    table = figures.pass_at_1_table(results([GRPO[0], GCPO[0]]))
    assert table.loc["GCPO − GRPO", "after"] == "+25.0 [one seed, no interval]"
    assert table.loc["GCPO", "after"].startswith("100.0 [")  # over questions there is one


def test_upsilon_curve_data_by_hand():
    data = figures.upsilon_curve_data(BOTH)
    assert data == {
        "step": [1, 2],
        "alpha": 2.0,
        "metrics": {
            "gcpo/upsilon_mean": [[1.9, 1.8], [1.7, 1.6]],
            "gcpo/upsilon_reward_corr": [[0.2, None], [0.4, -0.5]],
            "gcpo/slope": [[0.1, None], [0.3, None]],
        },
    }
    assert figures.upsilon_curve_data(results(GRPO, ["grpo"]))["step"] == []


def test_upsilon_curves_leave_gaps_where_nothing_was_measured():
    figure = figures.upsilon_curves(figures.upsilon_curve_data(BOTH))
    mean, corr, slope = ([line.get_ydata() for line in axes.lines] for axes in figure.axes)
    np.testing.assert_allclose(mean[2], [1.8, 1.7])  # after the two seeds: their mean
    np.testing.assert_allclose(corr, [[0.2, np.nan], [0.4, -0.5], [0.3, -0.5]])
    np.testing.assert_allclose(slope[:3], [[0.1, np.nan], [0.3, np.nan], [0.2, np.nan]])
    assert mean[3] == [2.0, 2.0] and slope[3] == [0.5, 0.5]  # dotted: α and ½


# Looks


def many(seeds, steps=40):
    rng = np.random.default_rng(0)
    return results([
        arm(
            method, seed,
            [step(k, *(float(v) for v in rng.uniform((0.4, 1.7, -1, -1), (1, 2, 1, 1)))) for k in range(1, steps + 1)],
            ([1, 2, 3], [3, 3, 4]),
        )
        for method in ("grpo", "gcpo") for seed in range(seeds)
    ])  # fmt: skip


def test_learning_curves_draw_the_data():
    data = figures.learning_curve_data(BOTH)
    figure = figures.learning_curves(data)
    left, right = figure.axes
    lines = {line.get_label(): line for line in left.lines}
    assert lines["GRPO"].get_ydata().tolist() == [0.5, 0.5] and lines["GCPO"].get_ydata().tolist() == [0.5, 0.75]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["GRPO", "GCPO"]
    for axes in figure.axes:
        grpo, gcpo = (next(line for line in axes.lines if line.get_label() == name) for name in ("GRPO", "GCPO"))
        assert grpo.get_linestyle() != gcpo.get_linestyle(), "grey copies need it"
        assert grpo.get_color() != gcpo.get_color()
    assert "2 seeds" in figure.get_suptitle() and "toy policy, nf4, n = 4" in figure.get_suptitle()
    assert "64 answers" in left.get_title(loc="left") and "3 questions × 4 answers" in right.get_title(loc="left")
    for band in left.collections:  # bounds outside [0, 1] mean nothing for a share
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.min() >= 0 and heights.max() <= 1
    points = [line.get_xdata() for line in right.lines if line.get_label() in ("GRPO", "GCPO")]
    assert (points[0] != points[1]).all() and abs(points[0] - points[1]).max() < 0.1  # side by side


def dependence():
    """Numbers of the size that notebook 03 measures."""
    r = {"2": (-0.002, -0.476, -0.414), "4": (0.012, -0.078, -0.066)}
    found = {
        n: {key: {"r": value, "null_sd": 0.02, "groups": 500} for key, value in zip(figures.CONDITIONS, values, strict=True)}
        for n, values in r.items()
    }
    slope = {
        "algorithm": {"value": 0.19, "low": -0.07, "high": 0.44, "questions": 192},
        "theorem": {"value": 0.46, "low": 0.27, "high": 0.64, "questions": 192},
    }
    return {"dependence": found, "slope": slope, "level": 0.95, "model": "toy"}


FIGURES = {
    "dependence": lambda: figures.dependence_and_slope(dependence()),
    "learning, 3 seeds": lambda: figures.learning_curves(figures.learning_curve_data(many(3))),
    "learning, 1 seed": lambda: figures.learning_curves(figures.learning_curve_data(many(1))),
    "learning, 3 steps": lambda: figures.learning_curves(figures.learning_curve_data(many(2, 3))),
    "upsilon": lambda: figures.upsilon_curves(figures.upsilon_curve_data(many(3))),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_lies_on_another_or_outside_and_all_is_large_enough(name):
    assert_readable(FIGURES[name]())


def test_the_check_of_texts_sees_an_overlap():
    figure = FIGURES["upsilon"]()
    figure.axes[1].set_title("a title so long that it reaches the one of the next panel", loc="left")
    boxes = [box for _, box in shown_texts(figure)]
    assert any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


# Files


def test_save_writes_both_pictures_and_the_numbers(tmp_path):
    data = figures.learning_curve_data(BOTH)
    figures.save(figures.learning_curves(data), data, tmp_path / "new" / "learning")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["learning.json", "learning.png", "learning.svg"]
    assert json.loads((tmp_path / "new" / "learning.json").read_text()) == data
    height, width, _ = imread(tmp_path / "new" / "learning.png").shape
    assert 1200 < width < 1600 and 400 < height < 700  # 7.0 × 2.8 inches at the style's 200 dots, less the margins


def test_the_same_data_give_the_same_bytes(tmp_path):
    before = dict(matplotlib.rcParams)
    for name in "ab":
        figures.save(FIGURES["learning, 3 seeds"](), {}, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert dict(matplotlib.rcParams) == before, "the style stays inside"
    figures.save(FIGURES["learning, 1 seed"](), {}, tmp_path / "c")
    assert (tmp_path / "c.svg").read_bytes() != (tmp_path / "a.svg").read_bytes()


def test_numbers_that_json_cannot_say_are_refused(tmp_path):
    with pytest.raises(ValueError):
        figures.save(FIGURES["upsilon"](), {"x": float("nan")}, tmp_path / "x")
    assert not (tmp_path / "x.json").exists()
