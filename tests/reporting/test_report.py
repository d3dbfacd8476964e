"""The report of a run: what it states against numbers worked out by hand, what it says of failures, and how a browser sees it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from bs4 import BeautifulSoup
from click.testing import CliRunner
from scipy import stats as scipy_stats

from gcpo_repro import cli
from gcpo_repro.errors import UserError
from gcpo_repro.evaluation import published
from gcpo_repro.reporting import mathml, report, statements
from gcpo_repro.reporting.run_contents import read_run
from tests.reporting import fake_runs
from tests.reporting.fake_runs import NASTY, experiment, write

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"wide": (1280, 800), "phone": (390, 800)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_runs.reproduced(tmp_path_factory.mktemp("runs") / "a run")


@pytest.fixture(scope="module")
def site(run: Path) -> Path:
    return report.build(run).parent


def page(site: Path, name: str) -> BeautifulSoup:
    return BeautifulSoup((site / name).read_text(), "html.parser")


def words(site: Path, name: str) -> str:
    article = page(site, name).find("article")
    assert article is not None
    return " ".join(article.get_text().replace("¶", "").split())


# --- what it states ----------------------------------------------------------------------------------------


def stated(content: dict[str, Any]) -> statements.Statement:
    (found,) = statements.training(content)
    return found


def test_a_difference_between_methods_by_hand() -> None:
    """Per seed 8, 12 of 16 for GRPO and 12, 14 of 16 for GCPO: differences .25 and .125, mean .1875, se .0625, t(1) = 12.706."""
    found = stated(experiment({"grpo": [[2, 2, 2, 2], [3, 3, 3, 3]], "gcpo": [[3, 3, 3, 3], [4, 4, 3, 3]]}))
    assert found.measured[0] == "GCPO − GRPO: +18.8 [-60.7, +98.2] points of pass@1."
    assert scipy_stats.t.ppf(0.975, 1) * 6.25 == pytest.approx(98.2 - 18.75, abs=0.05)
    assert found.title == "GCPO against GRPO: no difference shown"
    assert "GRPO: pass@1 25.0" in found.measured[1] and " before, 62.5" in found.measured[1] and "gain +37.5" in found.measured[1]
    assert found.measured[3] == "Training with GCPO took 1.5 times as long as with GRPO."
    assert "2 seeds, 4 held-out questions × 4 answers" in found.sure


@pytest.mark.parametrize(
    ("gcpo", "title"),
    [
        ([[4, 4, 4, 4], [4, 4, 4, 4]], "GCPO did better than GRPO"),
        ([[1, 1, 1, 1], [1, 1, 1, 1]], "GCPO did worse than GRPO"),
        ([[4, 4, 4, 4]], "GCPO against GRPO: one seed, so no interval and no verdict"),
    ],
)
def test_the_verdict_follows_the_interval(gcpo: list[list[int]], title: str) -> None:
    assert stated(experiment({"grpo": [[2, 2, 2, 2]] * len(gcpo), "gcpo": gcpo})).title == title


def test_the_published_gain_is_the_tables() -> None:
    table = published.load()
    table = table[(table["table"] == "Table 1") & (table["column"] == "average") & (table["unit"] == "% pass@1")]
    value = {(row.base, row.method): row.value for row in table.itertuples()}
    gains = [round(value[base, "GCPO"] - value[base, "GRPO"], 1) for base in {base for base, _ in value}]
    assert f"by {min(gains):+.1f} to {max(gains):+.1f} points, for 3 base models" in statements.printed_gain("gcpo", "grpo")
    assert statements.printed_gain("gcpo", "mine") == ""


def test_causal_statements_follow_the_numbers() -> None:
    fork, slope = statements.collider(fake_runs.COLLIDER)
    assert fork.title.endswith("given the question no dependence found; given a right integrated answer competition at n = 2")
    assert fork.measured[0].startswith("n = 2: correlation +0.001 (z = +0.1) given the question, -0.476 (z = -18.1)")
    assert slope.title == "Corollary 2's condition: Φ of the algorithm misses it; Φ of the theorem meets it"
    other = json.loads(json.dumps(fake_runs.COLLIDER))
    other["dependence"]["2"] = {"q": {"r": 0.3, "z": 5.0, "groups": 9}, "q_right": {"r": 0.0, "z": 0.0, "groups": 5}}
    fork, _ = statements.collider(other)
    assert "given the question dependence at n = 2; given a right integrated answer none found" in fork.title


def test_upsilon_ignores_what_could_not_be_measured() -> None:
    (found,) = statements.upsilon({"alpha": 2.0, "metrics": {"gcpo/upsilon_mean": [[1.0, None], [2.0, 1.5]]}})
    assert found.title == "Υ is 75% of its maximum on average"
    assert list(statements.upsilon({"alpha": 2.0, "metrics": {"gcpo/upsilon_mean": [[None]]}})) == []


# --- the pages ---------------------------------------------------------------------------------------------


def test_front_page_leads_with_state_and_findings(site: Path) -> None:
    front = words(site, "index.html")
    assert "2 of 5 notebooks succeeded. Profile cpu." in front
    assert "Measured on Test CPU, 2 cores, 4.0 GiB, no GPU. Commit 0123456789ab with local changes." in front
    assert "The work took 4 minutes." in front
    assert "1 of these notebooks ran without checking their claims (check_claims: false): 00_start_here." in front
    titles = [heading.get_text().strip("¶") for heading in page(site, "index.html").find_all("h3")]
    said = json.loads((site / "report.json").read_text())["statements"]
    assert titles == [statement["title"] for statement in said]
    assert titles[-1] == "3 of 4 closed forms agree with their simulation"
    assert front.index("In short") < front.index("Claimed, measured, how sure") < front.index("The method in two formulas")


def test_the_papers_lines_are_counted_and_the_decided_ones_shown(run: Path, site: Path, tmp_path: Path) -> None:
    """Of notebook 07's verdicts; without it the page has no such part."""
    assert "line by line" not in words(site, "index.html")
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    rows = ["claim,source,published,found,verdict", "peaks | at 2,Fig,2,1.9,disagrees", "falls,Tab,1,,not measured"]
    place = next(path for path in sorted(folder.glob("0*")) if path.is_dir())
    (place / "claims.csv").write_text("\n".join([*rows, "b,T,1,1,agrees"]))
    shown = words(report.build(folder).parent, "index.html")
    counts = "1 agrees, 1 disagrees, 0 cannot be told apart, 1 not measured."
    assert f"Of 3 lines of the paper, by computed verdicts: {counts}" in shown
    assert "peaks | at 2" in shown and "falls" not in shown


def test_failures_are_told_with_reason_log_and_page(site: Path) -> None:
    assert "3 things are missing or broken" in words(site, "index.html")
    problems = words(site, "problems.html")
    assert " ".join(NASTY.split()) in problems, "shown as it is, not as markup"
    assert "line 99" in problems and "line 70" not in problems
    assert "06_killed: stopped before its end" in problems and "half of it" in problems
    assert "07_never: never ran" in problems
    assert page(site, "problems.html").find("a", href="notebooks/05_train.html")
    assert "ValueError: no" in words(site, "notebooks/05_train.html")


def test_every_page_is_built_without_a_warning(site: Path) -> None:
    assert json.loads((site / "report.json").read_text())["warnings"] == []
    assert not list(site.parent.glob(".report-*"))


def test_links_images_and_alternative_texts(site: Path) -> None:
    pages = {path: BeautifulSoup(path.read_text(), "html.parser") for path in site.rglob("*.html")}
    assert len(pages) >= 8
    for path, soup in pages.items():
        for node in soup.find_all(["a", "img", "script", "link"]):
            url = urlsplit(node.get("href") or node.get("src") or "")
            if url.scheme in ("http", "https"):
                assert node.name == "a", f"{path.name} loads {node}"
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            assert target.is_relative_to(site) and target.exists(), f"{path.name}: {node}"
            if url.fragment and target in pages:
                assert pages[target].find(id=unquote(url.fragment)), f"{path.name}: no place {url.fragment}"
        for image in soup.find_all("img"):
            assert len(image.get("alt", "")) > 10, f"{path.name}: {image}"


def test_a_figure_has_the_notebooks_words_and_its_data(site: Path) -> None:
    (figure,) = (f for f in page(site, "figures.html").find_all("figure") if "collider" in f.img["src"])
    assert figure.img["alt"] == "Given a right answer. Left, two candidates; right, the slope."
    links = {a.get_text(): a["href"] for a in figure.find_all("a", class_="download")}
    assert list(links) == ["JSON"]
    assert json.loads((site / links["JSON"]).read_text()) == fake_runs.COLLIDER


def test_a_picture_that_a_later_notebook_draws_again_is_shown_once(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    first = next(path for path in sorted(folder.rglob("*.png")) if "report" not in path.parts)
    later = folder / "07_later"
    later.mkdir()
    shutil.copy(first, later / first.name)
    write(later / first.with_suffix(".json").name, {})
    before = [picture.image.stem for picture in read_run(run).pictures]
    assert [picture.image.stem for picture in read_run(folder).pictures] == before
    (later / first.name).write_bytes(first.read_bytes() + b"other")
    assert len(read_run(folder).pictures) == len(before) + 1


def test_tables_show_their_text_literally(site: Path) -> None:
    cells = [cell.get_text() for cell in page(site, "figures.html").find_all("td")]
    assert "R(m) | tr S_e" in cells and "*b*" in cells


def test_configuration_page(site: Path) -> None:
    shown = words(site, "configuration.html")
    assert "Commit 0123456789abcdef-dirty" in shown and "gcpo-repro x_y" in shown and "2023-11-14 22:13 UTC" in shown
    assert {"/somewhere/00_start_here", "2.13.0"} <= {c.get_text() for c in page(site, "configuration.html").find_all("td")}


def test_links_of_notebooks_lead_to_pages_or_become_words(site: Path) -> None:
    text = page(site, "notebooks/00_start_here.html").find("article")
    assert text is not None
    assert [a["href"] for a in text.find("p").find_all("a")] == [
        "03_collider.html", "03_collider.html#given-a-right-answer", "https://example.org/x",
    ]  # fmt: skip
    assert "the README" in text.get_text() and "a lost picture" in text.get_text()
    assert not text.find("img", src=re.compile("no.png"))


def test_it_can_be_moved_and_is_small(run: Path, site: Path) -> None:
    assert str(run) not in "".join(path.read_text() for path in site.rglob("*.html")), "no page points outside"
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file() and "notebooks" not in path.parts)
    assert size < 5e6


def test_formulas() -> None:
    one = BeautifulSoup(mathml.to_mathml(r"\frac{a}{b} < 1", "block"), "html.parser")
    assert one.math["display"] == "block" and one.math["alttext"] == r"\frac{a}{b} < 1"
    assert [node.get_text() for node in one.find("mfrac").find_all("mi")] == ["a", "b"]
    assert mathml.to_mathml(r"\frac{a", "inline").startswith(("<code>", "<math"))


# --- bad and other input -----------------------------------------------------------------------------------


def test_broken_files_are_told_and_stop_nothing(tmp_path: Path) -> None:
    run = fake_runs.reproduced(tmp_path / "run")
    write(run / "03_collider/collider_in_a_model.json", '{"dependence": {"2": {}}, "slope": {}}')
    write(run / "05_train/results.json", '{"kind": "experiment", "arms": [')
    write(run / "03_collider/03_collider.ipynb", "{}")
    write(run / "03_collider/empty.csv", "")
    write(run / "00_start_here/success.json", {"notebook": "00_start_here", "seed": 0})
    site = report.build(run).parent
    problems = words(site, "problems.html")
    assert "03_collider/collider_in_a_model.json has not the expected form (KeyError" in problems
    assert "05_train/results.json cannot be read" in problems
    assert "03_collider/03_collider.ipynb is no notebook" in problems
    assert "03_collider/empty.csv cannot be read" in problems
    assert "00_start_here/success.json does not tell command, commit, config, hardware, started_unix" in problems
    assert "The collider:" not in words(site, "index.html")
    assert not (site / "notebooks/03_collider.html").exists()


def test_a_trained_run_without_figures_gets_its_curves(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    write(run / "results.json", experiment({"grpo": [[2, 2, 2, 2]] * 2, "gcpo": [[3, 3, 3, 3]] * 2}))
    write(run / "gcpo-seed0/results.json", {"kind": "arm"})
    before = sorted(run.rglob("*"))
    out = tmp_path / "elsewhere/page"
    done = CliRunner().invoke(cli.main, ["report", "--run", str(run), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.output == f"report: {out / 'index.html'}\n"
    assert sorted(run.rglob("*")) == before
    assert "GCPO did better than GRPO" in words(out, "index.html")
    (image,) = page(out, "index.html").find("article").find_all("img")
    assert (out / image["src"]).exists() and "Learning curves" in image["alt"]


def test_an_older_report_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    run = fake_runs.reproduced(tmp_path / "run")
    shutil.rmtree(run / "03_collider")
    (run / "report").mkdir()
    first = report.build(run)
    write(first.parent / "old.html", "old")
    assert report.build(run) == first and not (first.parent / "old.html").exists()
    mine = write(tmp_path / "thesis/chapter.tex", "years of work")
    with pytest.raises(UserError, match=r"thesis exists and is no report; name another folder"):
        report.build(run, mine.parent)
    assert mine.read_text() == "years of work"


@pytest.mark.parametrize(("make", "message"), [(False, "is no folder; `gcpo-repro runs`"), (True, "holds no notebooks, no run")])
def test_what_is_no_run_is_refused(tmp_path: Path, make: bool, message: str) -> None:
    if make:
        (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=message):
        report.build(tmp_path / "nothing")


def test_state_of_a_notebook_whose_result_is_lost(tmp_path: Path) -> None:
    run = fake_runs.reproduced(tmp_path / "run")
    (run / "03_collider/03_collider.ipynb").unlink()
    states = {notebook.name: notebook.state for notebook in read_run(run).notebooks}
    assert states == {
        "00_start_here": "done", "03_collider": "lost", "05_train": "failed", "06_killed": "interrupted", "07_never": "pending",
    }  # fmt: skip


# --- in a browser ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("no chromium or google-chrome on the PATH: install one (Debian: apt install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    with api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def window(browser: Any, size: tuple[int, int], scheme: str = "light") -> tuple[Any, list[str]]:
    """An offline window, and what its pages should not do: console messages, errors, failed or other than local requests."""
    opened = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, offline=True).new_page()
    bad = list[str]()
    opened.on("console", lambda message: bad.append(f"console: {message.text}"))
    opened.on("pageerror", lambda error: bad.append(f"error: {error}"))
    opened.on("requestfailed", lambda request: bad.append(f"failed: {request.url}"))
    opened.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else bad.append(f"network: {r.url}"))
    return opened, bad


def visit(browser: Any, site: Path, name: str, size: tuple[int, int], scheme: str = "light") -> tuple[Any, list[str]]:
    opened, bad = window(browser, size, scheme)
    opened.goto((site / name).as_uri())
    return opened, bad


def look_at_every_page(browser: Any, site: Path) -> None:
    for size in SIZES.values():
        opened, bad = window(browser, size)
        for path in sorted(site.rglob("*.html")):
            opened.goto(path.as_uri())
            broken = opened.evaluate("[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)")
            assert bad + broken == [], path.name
            assert opened.evaluate("document.documentElement.scrollWidth") <= size[0], f"{path.name} is wider than {size[0]}"
        opened.context.close()


def test_every_page_loads_offline_and_fits_its_window(browser: Any, site: Path) -> None:
    look_at_every_page(browser, site)


def test_light_and_dark(browser: Any, site: Path) -> None:
    def colours(opened: Any) -> list[float]:
        look = "e => getComputedStyle(document.querySelector(e))"
        found = [opened.evaluate(f"({look})({e!r}).{what}") for e, what in (("body", "backgroundColor"), ("h1", "color"))]
        return [float(np.mean([float(part) for part in re.findall(r"[\d.]+", colour)[:3]])) for colour in found]

    for scheme in ("light", "dark"):
        opened, _ = visit(browser, site, "index.html", SIZES["wide"], scheme)
        paper, ink = colours(opened)
        assert (paper > 200 and ink < 80) if scheme == "light" else (paper < 60 and ink > 180)
        opened.locator(".content-icon-container .theme-toggle").click()
        for _ in range(2):  # the button goes through auto, light and dark
            if colours(opened) != [paper, ink]:
                break
            opened.locator(".content-icon-container .theme-toggle").click()
        assert colours(opened) != [paper, ink], "the button changes the colours"
        opened.context.close()


def test_formulas_are_laid_out_without_a_script(browser: Any, site: Path) -> None:
    opened, _ = visit(browser, site, "notebooks/00_start_here.html", SIZES["wide"])
    inline, block = (opened.locator(f"math[display={kind}]").bounding_box() for kind in ("inline", "block"))
    assert inline["height"] > 10 and block["height"] > 1.5 * inline["height"], "a fraction is taller than a line"
    opened.context.close()


def test_wide_things_scroll_on_their_own(browser: Any, site: Path) -> None:
    opened, _ = visit(browser, site, "notebooks/00_start_here.html", SIZES["phone"])
    inside = "e => [e.scrollWidth > e.clientWidth, getComputedStyle(e).overflowX]"
    assert [True, "auto"] in opened.evaluate(f"[...document.querySelectorAll('.cell_output, .cell_output *')].map({inside})")
    opened.context.close()


def test_keyboard_alone_reaches_menu_and_pages(browser: Any, site: Path) -> None:
    opened, _ = visit(browser, site, "index.html", SIZES["phone"])
    seen, name = list[str](), "e => e.getAttribute('aria-label') || e.textContent.trim()"
    for _ in range(8):
        opened.keyboard.press("Tab")
        seen.append(opened.evaluate(f"({name})(document.activeElement)"))
        if seen[-1] == "Site navigation":
            break
    assert "Skip to content" in seen and seen[-1] == "Site navigation", seen
    menu = opened.locator(".sidebar-drawer")
    before = menu.bounding_box()["x"]
    opened.keyboard.press("Enter")
    opened.wait_for_function("document.querySelector('.sidebar-drawer').getBoundingClientRect().x >= 0")
    assert before < 0 and opened.locator("label[for=__navigation][role=button]").first.get_attribute("aria-expanded") == "true"
    opened.context.close()


def test_search_finds_a_page_from_the_file_system(browser: Any, site: Path) -> None:
    opened, bad = visit(browser, site, "index.html", SIZES["wide"])
    opened.locator("input[name=q]").fill("collider")
    opened.keyboard.press("Enter")
    opened.wait_for_selector("#search-results li")
    assert not bad and "The collider" in opened.locator("#search-results").inner_text()
    opened.context.close()


@pytest.mark.slow
def test_the_report_of_the_real_notebooks(browser: Any, tmp_path: Path) -> None:
    from gcpo_repro.reporting import runner

    said: list[str] = []
    assert runner.reproduce("smoke", out=tmp_path / "smoke", echo=said.append), "\n".join(said)
    site = tmp_path / "smoke/report"
    assert said[-1] == f"report: {site / 'index.html'}"
    content = json.loads((site / "report.json").read_text())
    assert content["warnings"] == [] and content["wall_time_seconds"] < 60
    assert "None: everything that belongs to this run is there." in words(site, "problems.html")
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file() and "notebooks" not in path.parts)
    assert size < 5e6
    test_links_images_and_alternative_texts(site)
    look_at_every_page(browser, site)
