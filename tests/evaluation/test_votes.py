"""Votes of a majority: a wrong answer in several spellings is one, different ones are not, and hostile ones cost little."""

from gcpo_repro.evaluation import votes as module
from gcpo_repro.evaluation.stats import maj_at_k
from gcpo_repro.evaluation.votes import votes


def verdicts(*answers, right=()):
    reasons = ["equal" if answer in right else "different" for answer in answers]
    return [{"answer": a, "correct": a in right, "reason": reason} for a, reason in zip(answers, reasons, strict=True)]


def groups(*answers, right=()):
    """Votes as sets of the places where they stand."""
    (cast,) = votes([verdicts(*answers, right=right)])
    return {frozenset(k for k, other in enumerate(cast) if other == vote) for vote in cast if vote is not None}


def test_one_answer_in_several_spellings_is_one_vote():
    spellings = ("0.5", r"\frac{1}{2}", "7", "1/2", r"\dfrac{2}{4}", "7.0", None, "8")
    assert groups(*spellings) == {frozenset({0, 1, 3, 4}), frozenset({2, 5}), frozenset({7})}


def test_right_answers_are_one_vote_and_no_wrong_one_joins_them():
    assert groups("3", "3.0", "x", "4", right=("3", "x")) == {frozenset({0, 2}), frozenset({1}), frozenset({3})}


def test_algebra_decides_where_text_does_not():
    assert groups("x^2-1", "(x-1)(x+1)", "x^2+1", r"\sqrt{8}", r"2\sqrt{2}", "-1+x^2") == {
        frozenset({0, 1, 5}), frozenset({2}), frozenset({3, 4}),
    }  # fmt: skip


def test_numbers_start_no_child(monkeypatch):
    monkeypatch.setattr(module, "Pool", None)
    assert len(groups(*map(str, range(40)), "1.0", "2.0")) == 40


def test_each_problem_has_votes_of_its_own():
    first, second = votes([verdicts("x+1", "1+x"), verdicts("x+1", "x+2")])
    assert first[0] == first[1] and second[0] != second[1]


def test_hostile_answers_cost_their_limit_and_are_votes_of_their_own(monkeypatch):
    monkeypatch.setattr(module, "ALGEBRA_LIMIT", 0.3)
    found = groups("9^{9^{9^9}}", "x+1", "1+x", "y" * 5000, "y" * 5000)
    assert found == {frozenset({0}), frozenset({1, 2}), frozenset({3, 4})}


def test_what_the_grader_gave_up_is_not_compared_again(monkeypatch):
    monkeypatch.setattr(module, "Pool", None)
    given_up = verdicts("9^{9^{9^9}}", "9^{9^{9^8}}", "9^{9^{9^9}}", "4")
    for verdict in given_up[:3]:
        verdict["reason"] = "timed out"
    (cast,) = votes([given_up])
    assert cast[0] == cast[2] and len(set(cast)) == 3


def test_a_split_wrong_majority_wins_when_it_is_counted_as_one():
    """Two right ones among five answers, and three times one half in as many spellings: the half has the majority."""
    problem = verdicts("3", "3", "0.5", r"\frac12", "1/2", right=("3",))
    correct = [[v["correct"] for v in problem]]
    assert maj_at_k(votes([problem]), correct, 5).mean == 0
    assert maj_at_k([[v["answer"] for v in problem]], correct, 5).mean == 1  # by spelling
