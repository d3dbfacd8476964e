"""The report of a run: a static web page that opens from the file system, without network or server.

Made by Sphinx with the theme Furo: pages, navigation, search, light and dark, phone and print come from there. Executed
notebooks become pages through MyST-NB, formulas become MathML while the page is built (`mathml.py`). The pages are Markdown
templates in `report_pages/`; every sentence with a number comes from `statements.py`.
"""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
import pandas as pd

from ..errors import UserError
from ..evaluation.audit import markdown
from ..provenance import git_commit, versions, write_json
from . import figures
from .report_notebooks import write_page
from .run_contents import STATES, Contents, Notebook, Picture, alternative, read_run, smaller
from .run_folders import MARKER, REPORT, check_writable
from .statements import UNUSABLE, Statement, statements
from .verdicts import AGREES, DISAGREES, VERDICTS

PAGES = Path(__file__).with_name("report_pages")
LARGEST_COPY = 5 * 2**20  # bytes; larger files stay in the run's folder and are named
ROWS_SHOWN = 12  # of a table
PROVENANCE = {"config", "seed", "versions", "commit", "hardware", "command", "started_unix", "wall_time_seconds"}
LOG_LINES = 25  # of a failed notebook
SPHINX = {
    "extensions": ["myst_nb", "gcpo_repro.reporting.mathml"],
    "html_theme": "furo",
    "html_math_renderer": "mathml",
    "html_css_files": ["report.css"],
    "html_js_files": ["report.js"],
    "html_copy_source": False,
    "html_use_index": False,
    "html_show_search_summary": False,  # it fetches pages, which browsers refuse from the file system
    "html_show_copyright": False,
    "html_show_sphinx": False,
    "language": "en",
    "smartquotes": False,  # messages and commands are shown as they are
    "myst_heading_anchors": 4,
    "nb_execution_mode": "off",  # the notebooks come executed
    "nb_merge_streams": True,
    "nb_ipywidgets_js": {},  # would come from a CDN
    "myst_enable_extensions": ["dollarmath", "amsmath", "colon_fence", "deflist"],
    "suppress_warnings": ["myst.header", "mystnb.unknown_mime_type", "toc.not_included"],
}


def build(run: str | Path, out: str | Path | None = None) -> Path:
    """Make the report of a run, finished or not, and return its `index.html`. An older report in its place is replaced.

    Args:
        run: a folder that `reproduce`, `train` or `evaluate` wrote to. A run with failed or missing notebooks or broken
            files has a report that says so.
        out: folder of the page (default: `<run>/report`).

    Raises:
        UserError: no such run, or `out` cannot be written or holds something else than a report.
    """
    started, contents = time.time(), read_run(run)
    out = Path(out).absolute() if out else contents.folder / "report"
    if out.exists() and not (out / REPORT).exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out: {out} exists and is no report; name another folder, or remove it")
    check_writable(out.parent)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".report-") as work:
        source, site = Path(work) / "source", Path(work) / "site"
        said = write_sources(contents, source)
        warnings = _sphinx(source, site, f"GCPO: {contents.folder.name}")
        plain = [{**vars(s), "file": contents.name(s.file) if s.file else None} for s in said]
        head = {"kind": "report", "run": str(contents.folder), "versions": versions(), "commit": git_commit()}
        seconds = {"wall_time_seconds": round(time.time() - started, 2)}
        write_json(site / REPORT, head | seconds | {"statements": plain, "warnings": warnings})
        if out.exists():
            shutil.rmtree(out)
        site.rename(out)
    return out / "index.html"


def _sphinx(source: Path, site: Path, title: str) -> list[str]:
    """Build the site; its warnings."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    heard = io.StringIO()
    settings = SPHINX | {"project": title, "html_title": title, "html_static_path": [str(PAGES / "static")]}
    with patch_docutils(), docutils_namespace():
        app = Sphinx(source, None, site, source.parent / "doctrees", "html", settings, None, heard, freshenv=True)
        app.build()
    (site / ".buildinfo").unlink(missing_ok=True)
    return heard.getvalue().replace(f"{source}/", "").splitlines()


# --- the pages' sources ------------------------------------------------------------------------------------


def write_sources(run: Contents, source: Path) -> list[Statement]:
    """Write the Markdown pages, notebooks and data files that Sphinx reads; what the front page states."""
    source.mkdir(parents=True)
    _draw_missing(run, source.parent)
    said = statements(run)
    pages = _pages(run, source)
    documents = _documents(run, source)
    links = _copy_files(run, said, source)
    records = _records(run)
    environments = _environments(records)
    context = {
        "run": run, "statements": said, "pages": pages, "documents": documents, "links": links, "states": STATES,
        "done": sum(notebook.state == "done" for notebook in run.notebooks), "records": records,
        "environments": environments, "machines": dict.fromkeys(e["machine"] for e in environments),
        "commits": dict.fromkeys(e["commit"] for e in environments), "tables": _tables(run), "problems": _problems(run, pages),
        "claims": _claims(run),
        "unchecked": [n.name for n in run.notebooks if n.record.get("config", {}).get("check_claims") is False],
        "seconds": sum(records[n.name]["wall_time_seconds"] for n in run.notebooks if n.name in records),
    }  # fmt: skip
    templates = _templates(run, links)
    for page in ("index", "figures", "configuration", "problems"):
        (source / f"{page}.md").write_text(templates.get_template(f"{page}.md").render(context))
    return said


def _templates(run: Contents, links: dict[Path, str]) -> jinja2.Environment:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGES), undefined=jinja2.StrictUndefined)

    def link(path: Path, name: str = "") -> str:
        where = text(name or run.name(path))
        return f"[{where}](</{links[path]}>)" if path in links else f"{where} (in the run's folder: too large to copy)"

    quoted = functools.partial(json.dumps, ensure_ascii=False)
    environment.filters |= {
        "text": text, "link": link, "fence": fence, "duration": duration, "time": clock, "quoted": quoted,
    }  # fmt: skip
    environment.globals |= {"alternative": alternative, "picture_of": functools.partial(picture_of, run)}
    return environment


def picture_of(run: Contents, statement: Statement) -> Picture | None:
    """The figure that shows what is stated: it has the same data, or is an experiment's learning curves."""
    for picture in run.pictures:
        if statement.file in picture.files:
            return picture
    beside = statement.file.with_name("learning_curves") if statement.file in run.results else None
    return next((picture for picture in run.pictures if picture.image.with_suffix("") == beside), None)


def text(value: object) -> str:
    """The value as Markdown that shows exactly this, on one line."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(str(value).split()))


def fence(content: str) -> str:
    """A block of literal text, whatever it contains."""
    marks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", content)), default=0))
    return f"{marks}text\n{content}\n{marks}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a person would say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def clock(unix: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix))


def _draw_missing(run: Contents, folder: Path) -> None:
    """Draw the learning curves of experiments that have none (`train` leaves only numbers), and add them to the pictures."""
    shown = {picture.image.with_suffix("") for picture in run.pictures}
    experiments = [p for p, content in run.results.items() if content.get("kind") == "experiment"]
    for number, path in enumerate(p for p in experiments if p.with_name("learning_curves") not in shown):
        image = folder / f"drawn{number}" / "learning_curves.png"
        try:
            data = figures.learning_curve_data(run.results[path])
            figures.save(figures.learning_curves(data), data, image)
        except UNUSABLE as error:
            run.broken[path] = f"gives no learning curves ({type(error).__name__}: {error})"
            continue
        finally:
            plt.close("all")
        files = [image.with_suffix(".json"), path]
        run.pictures.append(Picture("", smaller(image), "Learning curves", f"Drawn from {run.name(path)}.", files))


def _pages(run: Contents, source: Path) -> list[Notebook]:
    """The notebooks that have a page, which is written."""
    names, pages = {n.name for n in run.notebooks if n.executed}, []
    for notebook in run.notebooks:
        if notebook.executed and notebook.executed not in run.broken:
            try:
                write_page(notebook.executed, source / "notebooks", names)
                pages.append(notebook)
            except UNUSABLE as error:
                run.broken[notebook.executed] = f"is no notebook ({error})"
    return pages


def _documents(run: Contents, source: Path) -> list[str]:
    """The audit's text as a page."""
    for path in sorted(run.folder.rglob("audit/audit.md"))[:1]:
        shutil.copy(path, source / "audit.md")
        return ["audit"]
    return []


def _copy_files(run: Contents, said: list[Statement], source: Path) -> dict[Path, str]:
    """Copy what the pages link to, so that the report can be moved; {file of the run: path in the report's source}."""
    wanted = {s.file for s in said if s.file} | set(run.tables) | {p for picture in run.pictures for p in picture.files}
    images, links = {picture.image for picture in run.pictures}, {}
    for path in sorted(wanted | images):
        if path in images or path.stat().st_size <= LARGEST_COPY:
            links[path] = f"files/{run.name(path)}"
            (source / links[path]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, source / links[path])
    return links


def _records(run: Contents) -> dict[str, dict[str, Any]]:
    """{name: what `provenance.record` wrote} of notebooks and results; one that lacks a part of it is noted as broken."""
    told = {notebook.folder / MARKER: notebook.record for notebook in run.notebooks if notebook.record} | run.results
    whole = {}
    for path, record in told.items():
        if missing := PROVENANCE - record.keys():
            run.broken[path] = f"does not tell {', '.join(sorted(missing))}"
        else:
            whole[path.parent.name if path.name == MARKER else run.name(path)] = record
    return whole


def _environments(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The distinct surroundings of the results: machine, versions and commit, with the names of the results."""
    found: dict[str, dict[str, Any]] = {}
    for name, record in records.items():
        hardware = {key: value for key, value in record["hardware"].items() if key != "torch_threads"}  # a choice, no hardware
        key = json.dumps([hardware, record["versions"], record["commit"]], sort_keys=True)
        gpus = ", ".join(gpu["name"] for gpu in hardware.get("gpus", [])) or "no GPU"
        cpu, cores, memory = (hardware.get(name, "unknown") for name in ("cpu", "cores", "memory_gib"))
        machine = f"{cpu}, {cores} cores, {memory} GiB, {gpus}"
        hardware["gpus"] = gpus
        new = {"machine": machine, "hardware": hardware, "versions": record["versions"], "commit": record["commit"], "names": []}
        found.setdefault(key, new)["names"].append(name)
    return list(found.values())


def _tables(run: Contents) -> list[dict[str, Any]]:
    """The first rows of each CSV file in Markdown."""
    tables = []
    for path in run.tables:
        try:
            table = pd.read_csv(path)
        except (OSError, ValueError) as error:
            run.broken[path] = f"cannot be read: {error}"
            continue
        shown = table.head(ROWS_SHOWN).map(lambda x: text(x) if isinstance(x, str) else x).rename(columns=text)
        tables.append({"path": path, "markdown": markdown(shown), "left_out": max(0, len(table) - ROWS_SHOWN)})
    return tables


def _claims(run: Contents) -> dict[str, Any] | None:
    """Notebook 07's verdicts on the paper's lines: how many of each, and those that are decided, in Markdown."""
    path = next((path for path in run.tables if path.name == "claims.csv" and path not in run.broken), None)
    if path is None:
        return None
    table = pd.read_csv(path).fillna("")
    decided = table[table["verdict"].isin([AGREES, DISAGREES])][["claim", "source", "published", "found", "verdict"]]
    counts = {verdict: int((table["verdict"] == verdict).sum()) for verdict in VERDICTS}
    return {"path": path, "lines": len(table), "counts": counts, "markdown": markdown(decided.map(text))}


def _problems(run: Contents, pages: list[Notebook]) -> list[dict[str, str]]:
    """What failed, is missing or cannot be read: title, text, page and end of the log."""
    found = []
    for notebook in [notebook for notebook in run.notebooks if notebook.state != "done"]:
        lines = notebook.log.read_text(errors="replace").splitlines() if notebook.log.exists() else []
        found.append({
            "title": f"{notebook.name}: {STATES[notebook.state]}", "text": notebook.reason or "No reason was recorded.",
            "page": notebook.name if notebook in pages else "", "log": "\n".join(lines[-LOG_LINES:]),
        })  # fmt: skip
    return found + [{"title": run.name(path), "text": why, "page": "", "log": ""} for path, why in run.broken.items()]
