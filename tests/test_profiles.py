"""The profiles' files: complete, commented, readable by all three readers, and the paper's where they say so."""

import re
from pathlib import Path

import pytest
import yaml

from gcpo_repro.architecture import _KNOWN
from gcpo_repro.data import SETS, TEMPLATES
from gcpo_repro.evaluation import benchmarks
from gcpo_repro.reporting.runner import PROFILES, declared_parameters, read_parameters
from gcpo_repro.settings import load_settings, make_settings

FOLDER = Path(__file__).parents[1] / "notebooks"
GPU = ("t4", "gpu24", "gpu80", "paper")
NOTEBOOK = FOLDER / "05_train_qlora.ipynb"


def training(profile):
    return FOLDER / "profiles" / profile / "05_train_qlora.yaml"


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_has_a_file_for_every_notebook_that_cpu_has(profile):
    known = {path.name for path in (FOLDER / "profiles/cpu").glob("*.yaml")}
    assert known - {path.name for path in (FOLDER / "profiles" / profile).glob("*.yaml")} == set()


@pytest.mark.parametrize("profile", GPU)
def test_notebooks_without_gpu_work_take_the_cpu_profiles_values(profile):
    for path in (FOLDER / "profiles" / profile).glob("*.yaml"):
        if path.name != "05_train_qlora.yaml" and path.is_symlink():
            assert path.resolve() == FOLDER / "profiles/cpu" / path.name
    assert not training(profile).is_symlink()


@pytest.mark.parametrize("profile", PROFILES)
def test_command_notebook_and_papermill_read_the_same(profile):
    settings = load_settings(training(profile))
    parameters = declared_parameters(NOTEBOOK) | read_parameters(training(profile), declared_parameters(NOTEBOOK))
    assert make_settings(parameters) == settings


@pytest.mark.parametrize("profile", GPU)
def test_every_value_has_its_source_or_reason(profile):
    lines = training(profile).read_text().splitlines()
    assert lines[0].startswith("# ")
    values = [line for line in lines if not line.startswith("#") and line != "more:"]
    assert len(values) > 25
    for line in values:
        assert re.match(r"(\w+: |  - \w+=).+ # \w.{3,}", line), line
    named = re.findall(r"^(?:  - )?(\w+)[:=]", "\n".join(values), re.MULTILINE)
    assert len(named) == len(set(named))


@pytest.mark.parametrize("profile", GPU)
def test_names_are_known(profile):
    settings = load_settings(training(profile))
    assert settings.model in _KNOWN and settings.data in SETS and settings.prompt_template in TEMPLATES
    benchmarks.find(settings.eval_data)
    assert yaml.safe_load(training(profile).read_text())["check_claims"] is False
    assert settings.workers == 1, "arms share one device"


def test_paper_is_the_papers():
    s = load_settings(training("paper"))
    assert (s.learning_rate, s.weight_decay, s.batch_size, s.max_completion_length) == (1e-6, 0.01, 256, 16_384)
    assert (s.alpha, s.kappa, s.estimator, s.phi) == (2.0, 0.06, "rollout", "algorithm")
    assert (s.similarity, s.control) == ("cosine", "none")
    assert (s.lora_rank, s.quantization, s.data) == (0, "none", "aime-1989-2023")
    assert s.model == "agentica-org/DeepScaleR-1.5B-Preview"
    assert s.num_integrated == s.num_rollouts == 0, "n, as in the paper"
    assert yaml.safe_load(training("paper").read_text())["run_dir"]  # the notebook reads, the command line trains
    others = training("paper").read_text()
    for model in ("DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen-7B", "Qwen2-7B-Instruct"):
        assert model in others


@pytest.mark.parametrize("profile", GPU)
def test_contexts_fit_into_the_models_window(profile):
    from gcpo_repro.memory import load
    from gcpo_repro.plan import PROMPT_TOKENS

    s = load_settings(training(profile))
    work = load(s, PROMPT_TOKENS[s.data])
    assert max(work.integration, work.collider) + work.answer <= _KNOWN[s.model][6]


def test_evaluated_problems_are_never_trained_on():
    assert load_settings(training("gpu80")).check_overlap == ("all",), "NuminaMath holds the benchmarks' problems"
    for profile in ("t4", "gpu24"):
        s = load_settings(training(profile))
        assert (s.data, s.data_split, s.eval_data, s.eval_split) == ("gsm8k", "train", "gsm8k", "test")
