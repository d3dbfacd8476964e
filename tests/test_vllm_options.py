"""vLLM through TRL: what is refused, and that the rest reaches the trainer under TRL's own names. vLLM itself is untested."""

import dataclasses
from importlib.machinery import ModuleSpec

import pytest
from trl import GRPOConfig

from gcpo_repro import UserError, vllm_options
from gcpo_repro.settings import make_settings

COLOCATE = {"use_vllm": True, "quantization": "none"}
SERVER = COLOCATE | {"vllm_mode": "server", "vllm_server_base_url": "http://localhost:8000"}


@pytest.mark.parametrize(
    "given, message",
    [
        (COLOCATE | {"vllm_mode": "remote"}, "vllm_mode: 'remote' is unknown, choose from colocate, server"),
        ({"use_vllm": True}, r"use_vllm: not with quantization = 'nf4': .*trl#3466.*set quantization=none"),
        (COLOCATE | {"quantization": "int8"}, "not with quantization = 'int8'"),
        (COLOCATE | {"device": "cpu"}, "use_vllm: not with device = 'cpu'"),
        (COLOCATE | {"device": "mps"}, "use_vllm: not with device = 'mps'"),
        (COLOCATE | {"vllm_mode": "server"}, "vllm_server_base_url: '' with vllm_mode = 'server'; start `vllm serve toy`"),
        (COLOCATE | {"vllm_server_base_url": "http://x"}, "which has no server; set vllm_mode=server"),
        (SERVER | {"vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size: 2 with vllm_mode = 'server'; give it to"),
        (SERVER | {"vllm_gpu_memory_utilization": 0.5}, "vllm_gpu_memory_utilization: 0.5 with vllm_mode = 'server'"),
        (COLOCATE | {"vllm_gpu_memory_utilization": 1.0}, "vllm_gpu_memory_utilization: 1.0 must lie between 0 and 1"),
        ({"vllm_server_base_url": "http://x"}, "vllm_server_base_url: 'http://x' has no effect without use_vllm"),
        ({"vllm_max_model_length": 99}, "vllm_max_model_length: 99 has no effect without use_vllm"),
    ],
)
def test_wrong_combinations_are_refused_by_name(given, message):
    with pytest.raises(UserError, match=message):
        make_settings(given)


def test_options_reach_trl_under_its_own_names():
    names = {item.name for item in dataclasses.fields(GRPOConfig)}
    assert vllm_options.options(make_settings({})) == {}
    for given in (COLOCATE, SERVER):
        assert vllm_options.options(make_settings(given)).keys() <= names
    found = vllm_options.options(make_settings(SERVER | {"vllm_max_model_length": 4096}))
    assert found["vllm_mode"] == "server" and found["vllm_server_base_url"] == "http://localhost:8000"
    assert found["vllm_max_model_length"] == 4096
    colocated = vllm_options.options(make_settings(COLOCATE | {"vllm_gpu_memory_utilization": 0.4}))
    assert colocated["vllm_gpu_memory_utilization"] == 0.4 and colocated["vllm_server_base_url"] is None
    ours = make_settings({})
    for name in ("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_mode"):
        (default,) = (item.default for item in dataclasses.fields(GRPOConfig) if item.name == name)
        assert getattr(ours, name) == default, name


def test_missing_vllm_or_cuda_is_told_before_the_model_is_loaded(monkeypatch):
    settings = make_settings(COLOCATE)
    vllm_options.require(make_settings({}))
    monkeypatch.setattr(vllm_options, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "gcpo-repro\[vllm\]"'):
        vllm_options.require(settings)
    monkeypatch.setattr(vllm_options, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA device"):
        vllm_options.require(settings)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    vllm_options.require(settings)
