"""Figure 3 and the gradient norms: published numbers are only those printed, measured ones look different and say of what."""

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from gcpo_repro import UserError
from gcpo_repro.evaluation.published import load
from gcpo_repro.reporting import benchmark_figures, paper_figures
from gcpo_repro.reporting.figures import LOOKS
from tests.reporting.test_tables import entry, evaluation
from tests.texts import assert_readable, shown_texts

PUBLISHED = load()
ORANGE = paper_figures.MEASURED["color"].lower()


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def words(figure):
    return " ".join(text.get_text() for text, _ in shown_texts(figure))


# (a) code tasks


def test_code_tasks_draw_what_is_printed_and_nothing_else():
    """GCPO 65.1 and 72.0 are printed; the base follows from the printed gains, 65.1 − 2.9 and 72.0 − 5.5."""
    figure = paper_figures.code_tasks(PUBLISHED)
    for axes, base, gcpo in zip(figure.axes, (62.2, 66.5), (65.1, 72.0), strict=True):
        assert [bar.get_height() for bar in axes.patches] == pytest.approx([base, gcpo])
        implied, printed = axes.patches
        assert printed.get_hatch() and not implied.get_hatch() and implied.get_linestyle() == ":"
        assert sum(text.get_text() == "not printed in the paper" for text in axes.texts) == 4  # the other methods
    assert "measured: nothing yet" in words(figure)
    assert_readable(figure)


def test_code_tasks_measured_bars_differ_from_published_ones():
    runs = [
        evaluation(entry("HumanEval", 164, 5, 0.4, 0.3, 0.5), entry("AIME 2024", 30, 1, 0, 0, 1)),
        evaluation(
            entry("HumanEval", 164, 5, 0.5, 0.45, 0.55), entry("HumanEval, 5-shot", 164, 1, 0.6, 0.5, 0.7), source="other"
        ),
    ]
    figure = paper_figures.code_tasks(PUBLISHED, runs)
    first, second = figure.axes
    assert [bar.get_height() for bar in first.patches[2:]] == [40, 50]
    assert [bar.get_height() for bar in second.patches[2:]] == [60]
    for bar in first.patches[2:]:
        assert to_hex(bar.get_facecolor()) == ORANGE != to_hex(first.patches[0].get_facecolor()) and not bar.get_hatch()
    error = first.collections[0].get_paths()[0].vertices[:, 1]
    assert sorted(error) == [30, 50]
    text = words(figure)
    assert "measured 1: Qwen2.5-0.5B-Instruct, 164 problems × 5 answers, seed 7; bars: 95%" in text
    assert "measured 2: other, 164 problems × 1 answers" in text
    assert_readable(figure)


# (b)-(d) sweeps


def sweeps(seeds=2):
    rng = np.random.default_rng(0)
    values = {"alpha": [3.4, 0.0, 2.0], "kappa": [0.0, 0.05, 0.06], "similarity": ["gaussian", "cosine"]}
    points = [
        {"sweep": name, "value": value, "mean": 0.8, "low": 0.7, "high": 0.85, "seeds": rng.uniform(0.7, 0.9, seeds).tolist()}
        for name, group in values.items() for value in group
    ]  # fmt: skip
    config = {"model": "toy", "quantization": "nf4", "group_size": 4, "steps": 20}
    return {"points": points, "config": config, "seeds": list(range(seeds)), "questions": 256, "samples": 4, "level": 0.95}


FIGURES = {"alpha": paper_figures.alpha_sweep, "kappa": paper_figures.kappa_sweep, "similarity": paper_figures.similarities}
GRIDS = {
    "alpha": ([0, 0.5, 1, 1.4, 1.8, 2.4, 2.8, 3, 3.4], 2), "kappa": ([0.02, 0.04, 0.08], 0.06), "similarity": ([1, 2], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_without_measurements_the_published_grid_stands_alone(name):
    figure = FIGURES[name](PUBLISHED)
    above, below = figure.axes
    others, best = GRIDS[name]
    tried, star = (line.get_xdata().tolist() for line in above.lines)
    assert (tried, star) == (others, [best]), "the paper's grid, the star its choice"
    assert all(line.get_markerfacecolor() == "white" for line in above.lines)
    assert not below.lines and not below.collections and below.texts[0].get_text() == "no measured values"
    assert "not printed in the paper" in words(figure)
    assert_readable(figure)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("seeds", [1, 2])
def test_measured_points_with_their_seeds(name, seeds):
    data = sweeps(seeds)
    figure = FIGURES[name](PUBLISHED, data)
    below = figure.axes[1]
    points = [point for point in data["points"] if point["sweep"] == name]
    drawn = next(line for line in below.lines if line.get_marker() == "s")
    expected = sorted({"cosine": 0, "gaussian": 2}.get(point["value"], point["value"]) for point in points)
    assert drawn.get_xdata().tolist() == expected and set(drawn.get_ydata()) == {80.0}
    assert to_hex(drawn.get_color()) == ORANGE
    crosses = sorted(y for line in below.lines if line.get_marker() == "x" for y in line.get_ydata())
    assert crosses == pytest.approx(sorted(100 * value for point in points for value in point["seeds"]))
    bars = [path.vertices[:, 1].tolist() for path in below.collections[0].get_paths()]
    np.testing.assert_allclose(bars, [[70, 85]] * len(points))
    text = words(figure)
    assert "toy policy, nf4, n = 4, 20 steps" in text and "256 questions × 4 answers" in text and "95% t intervals" in text
    assert ("2 seeds (crosses)" if seeds == 2 else "one seed") in text
    assert_readable(figure)


# Gradient norms


def results(norms, methods=("grpo", "gcpo")):
    arms = [
        {"method": method, "seed": seed, "steps": [{"step": k, "grad_norm": x} for k, x in enumerate(row, start=1)]}
        for method in methods for seed, row in enumerate(norms[method])
    ]  # fmt: skip
    config = {
        "methods": list(methods), "seeds": list(range(len(norms[methods[0]]))), "model": "toy", "quantization": "nf4",
        "group_size": 4, "batch_size": 64, "alpha": 2.0, "learning_rate": 1e-3,
    }  # fmt: skip
    return {"kind": "experiment", "config": config, "arms": arms}


NORMS = {"grpo": [[0.1, 0.2], [0.3, 0.2]], "gcpo": [[0.4, 0.5], [0.4, 0.7]]}


def test_gradient_norms_by_hand():
    """t with one degree of freedom, .975, is 12.706; GRPO's step 1: mean .2, standard error .1."""
    data = paper_figures.gradient_norm_data(results(NORMS))
    grpo, gcpo = data["curves"]["grpo"], data["curves"]["gcpo"]
    assert grpo["step"] == [1, 2] and grpo["mean"] == pytest.approx([0.2, 0.2]) and gcpo["mean"] == pytest.approx([0.4, 0.6])
    assert grpo["high"] == pytest.approx([0.2 + 12.706205 * 0.1, 0.2])
    figure = paper_figures.gradient_norm(data)
    left, right = figure.axes
    np.testing.assert_allclose(right.lines[0].get_ydata(), [2, 3])
    assert right.lines[1].get_ydata() == [2.0, 2.0], "dotted: α"
    assert min(path.vertices[:, 1].min() for band in left.collections for path in band.get_paths()) >= 0
    assert "no norm is printed in the paper" in words(figure) and "over 2 seeds" in words(figure)
    assert_readable(figure)


def test_gradient_norms_of_one_seed_and_of_one_method():
    single = {method: rows[:1] for method, rows in NORMS.items()}
    figure = paper_figures.gradient_norm(paper_figures.gradient_norm_data(results(single)))
    assert "one seed, no interval" in words(figure) and not figure.axes[0].collections
    alone = paper_figures.gradient_norm(paper_figures.gradient_norm_data(results(NORMS, ["gcpo"])))
    assert len(alone.axes) == 1
    assert_readable(alone)
    methods = list(LOOKS)
    every = paper_figures.gradient_norm_data(results(dict.fromkeys(methods, NORMS["gcpo"]), methods))
    assert_readable(paper_figures.gradient_norm(every))


def test_a_gradient_norm_that_is_missing_is_named():
    norms = {**NORMS, "gcpo": [[0.4, None], [0.4, 0.7]]}
    with pytest.raises(UserError, match=r"gcpo, seed 0: no finite grad_norm at steps \[2\]"):
        paper_figures.gradient_norm_data(results(norms))


# Cost


def cost(n, literal=None, gpus=()):
    run = {"fast_ratio": 1.2, "full_ratio": 2.5, "fast_floor_ratio": 1.1, "full_floor_ratio": 2.0}
    run |= {"literal_ratio": literal, "literal_tokens": 16} if literal else {}
    run |= {"fast_memory_ratio": 1.0, "full_memory_ratio": 1.3} if n == 8 else {}
    config = {"group_size": str(n), "tokens": "64", "model": "", "groups": "4", "repeats": "5", "threads": "1"}
    return {**run, "config": config, "hardware": {"gpus": list(gpus), "cpu": "a processor"}}


def test_step_cost_draws_the_ratios_of_each_run():
    figure = benchmark_figures.step_cost([cost(4), cost(8, 60.0)])
    left, right = figure.axes
    assert [bar.get_height() for bar in left.patches] == [1.2, 1.2, 2.5, 2.5, 60.0]
    assert [bar.get_height() for bar in right.patches] == [1.0, 1.3], "measured in one run alone"
    floors = [line.get_ydata().tolist() for line in left.lines if line.get_marker() == "_"]
    assert floors[:2] == [[1.1, 1.1], [2.0, 2.0]] and np.isnan(floors[2]).all()
    assert "a processor, threads: 1" in words(figure) and "as printed: 16 tokens" in words(figure)
    assert_readable(figure)
    assert "H100" in words(benchmark_figures.step_cost([cost(8, gpus=[{"name": "H100"}])]))
