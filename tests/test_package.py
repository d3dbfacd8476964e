"""What a stranger gets: a light import, public names that work, and set-up files that agree with each other."""

import datetime
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import gcpo_repro

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = [Requirement(text) for name, extra in PROJECT["optional-dependencies"].items() for text in extra if name != "vllm"]
EXTRAS = [needed for needed in EXTRAS if needed.name != PROJECT["name"]]  # an extra may name another one; vllm is untested
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()


def fresh(code: str) -> str:
    """What a new interpreter prints, which has imported nothing yet."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("module", ["gcpo_repro", "gcpo_repro.cli", "gcpo_repro.experiment"])
def test_importing_it_imports_nothing_heavy(module):
    heavy = {"torch", "transformers", "trl", "peft", "datasets", "matplotlib", "papermill"}
    loaded = fresh(f"import sys, {module}; print(*sys.modules)").split()
    assert module in loaded
    assert not heavy & set(loaded)


def test_public_names_resolve_and_are_about_a_dozen():
    names = gcpo_repro.__all__
    assert len(names) == len(set(names)) and 8 <= len(names) <= 14
    for name in names:
        assert getattr(gcpo_repro, name) is not None, name
    assert dir(gcpo_repro) == sorted(names)
    star: dict[str, object] = {}
    exec("from gcpo_repro import *", star)
    assert set(names) <= star.keys()


def test_an_unknown_name_is_told_what_there_is():
    with pytest.raises(AttributeError, match="has no attribute 'GRPOTrainer'; it offers __version__, GCPOConfig, GCPOTrainer"):
        _ = gcpo_repro.GRPOTrainer
    with pytest.raises(ImportError):
        exec("from gcpo_repro import nothing_like_this")


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert gcpo_repro.__version__ == PROJECT["version"] == str(citation["version"])
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_it_is_typed_and_ships_its_data():
    package = ROOT / "gcpo_repro"
    assert (package / "py.typed").exists()
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["gcpo_repro"]
    found = {path.relative_to(package).as_posix() for pattern in shipped for path in package.glob(pattern)}
    assert {"py.typed", "toy_policy/model.safetensors", "toy_policy/tokenizer.json", "reporting/gcpo.mplstyle"} <= found


# Keys of the Citation File Format 1.2.0 (its schema): required ones, and all that this file may use.
CFF_REQUIRED = {"cff-version", "message", "title", "authors"}
CFF_KEYS = CFF_REQUIRED | {
    "abstract", "contact", "commit", "date-released", "doi", "identifiers", "keywords", "license", "license-url",
    "preferred-citation", "references", "repository", "repository-artifact", "repository-code", "type", "url", "version",
}  # fmt: skip
REFERENCE_REQUIRED = {"type", "title", "authors"}
REFERENCE_KEYS = REFERENCE_REQUIRED | {
    "collection-title", "conference", "doi", "end", "identifiers", "issue", "journal", "month", "notes", "publisher", "start",
    "url", "volume", "year",
}  # fmt: skip
PERSON_KEYS = {"affiliation", "alias", "email", "family-names", "given-names", "name-particle", "name-suffix", "orcid"}
ENTITY_KEYS = {"name", "address", "alias", "email", "website"}


def check_authors(authors):
    assert authors
    for author in authors:
        assert author and (author.keys() <= PERSON_KEYS or ("name" in author and author.keys() <= ENTITY_KEYS)), author


def test_citation_is_valid_and_cites_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert CFF_REQUIRED <= citation.keys() <= CFF_KEYS
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] in ("software", "dataset")
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:300]
    assert isinstance(citation["date-released"], datetime.date)
    check_authors(citation["authors"])
    paper = citation["preferred-citation"]
    assert REFERENCE_REQUIRED <= paper.keys() <= REFERENCE_KEYS
    assert paper["type"] in ("article", "conference-paper")
    check_authors(paper["authors"])
    # AAAI 2026, vol. 40, pp. 30834-30842; arXiv 2508.05428
    assert paper["title"] == "Group Causal Policy Optimization for Post-Training Large Language Models"
    surnames = [author["family-names"] for author in paper["authors"]]
    assert surnames == ["Gu", "Wang", "Zuo", "Sun", "Song", "Zheng", "Qiang"]
    assert (paper["year"], paper["volume"], paper["start"], paper["end"]) == (2026, 40, 30834, 30842)
    for identifier in paper["identifiers"]:
        assert identifier["type"] in ("doi", "url", "swh", "other") and identifier["value"]
    assert any("2508.05428" in identifier["value"] for identifier in paper["identifiers"])


def pins():
    """Canonical name -> version of every line of constraints.txt but the first."""
    found = {}
    for line in CONSTRAINTS[1:]:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)", line)
        assert match, f"not an exact version: {line!r}"
        name = canonicalize_name(match[1])
        assert name not in found, f"{name} is pinned twice"
        found[name] = Version(match[2])
    return found


def test_constraints_say_how_to_make_them_again():
    assert CONSTRAINTS[0].startswith("# regenerate: ") and "make constraints" in CONSTRAINTS[0]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^constraints:", makefile, re.MULTILINE)
    assert CONSTRAINTS[0] in makefile, "the target writes another first line"


def test_pins_have_no_local_labels():
    assert [name for name, version in pins().items() if version.local] == []
    assert "+" not in "".join(CONSTRAINTS[1:])


@pytest.mark.parametrize("needed", DIRECT + EXTRAS, ids=lambda requirement: requirement.name)
def test_every_direct_dependency_is_pinned_within_its_bounds(needed):
    version = pins()[canonicalize_name(needed.name)]
    assert needed.specifier.contains(version), f"{needed} against {version}"


def test_only_trl_has_an_upper_bound():
    """The trainer leans on trl's internals: its next minor version is not taken. All others may be upgraded."""
    for needed in DIRECT + EXTRAS:
        operators = {specifier.operator for specifier in needed.specifier}
        assert operators <= ({">=", "<"} if needed.name == "trl" else {">="}), needed
    (trl,) = (needed for needed in DIRECT if needed.name == "trl")
    tested = pins()["trl"]
    assert f"<{tested.major}.{tested.minor + 1}" in str(trl.specifier).split(",")


def test_dependencies_have_lower_bounds():
    assert [needed.name for needed in DIRECT if not needed.specifier] == []
