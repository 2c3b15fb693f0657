"""The device of a process: precision, seeds."""

import os
import random

import numpy as np
import pytest
import torch

from base.device import DeviceBatches, cpu_has_bf16, pick_amp, seed_device, use_fast_kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.mark.parametrize("unit", ["avx512_bf16", "amx_bf16", None])
def test_auto_is_off_on_a_cpu_also_if_it_has_bf16(unit: str | None, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True}, raising=False)
    assert pick_amp("auto", CPU) is None and pick_amp("bf16", CPU) == torch.bfloat16
    assert cpu_has_bf16(CPU) is (unit is not None)


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_auto_is_fp16_on_a_gpu_that_only_emulates_bf16(capability, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: type("Properties", (), {"major": capability[0], "minor": capability[1]}),
    )
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert torch.cuda.is_bf16_supported(), "emulation counts by default"
    assert pick_amp("auto", GPU) == expected


def test_a_seed_fixes_the_generators_as_torchs_own_seeding_does() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    seed_device(5)
    assert torch.equal(torch.rand(3), expected)
    first = random.random(), np.random.rand()
    seed_device(5)
    assert first == (random.random(), np.random.rand())


def test_only_the_generator_of_this_processes_gpu_is_seeded(monkeypatch) -> None:
    generators = [torch.Generator(), torch.Generator()]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "default_generators", tuple(generators), raising=False)
    before = generators[0].initial_seed()
    seed_device(7)
    assert generators[1].initial_seed() == 7 and generators[0].initial_seed() == before


@pytest.mark.parametrize("fast", [True, False])
def test_one_flag_sets_cudnn_benchmark_and_tf32_on_a_gpu_alone(fast: bool) -> None:
    def settings() -> tuple[bool, ...]:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        return cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32

    before = settings()
    use_fast_kernels(CPU, fast)
    assert settings() == before
    try:
        use_fast_kernels(GPU, fast)
        assert settings() == (fast, fast, fast)
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before[:2]
        torch.backends.cuda.matmul.allow_tf32 = before[2]


def test_a_batch_fetched_ahead_comes_next() -> None:
    fetched = []

    def loader():
        for i in range(3):
            fetched.append(i)
            yield torch.full((2, 3), i), torch.tensor([i, i])

    batches = DeviceBatches(loader(), CPU)
    assert int(next(batches)[1][0]) == 0 and fetched == [0]
    batches.fetch_ahead()
    assert fetched == [0, 1] and batches.batch_size == 2
    assert [int(labels[0]) for _, labels in batches] == [1, 2]


def test_tests_without_the_marker_gpu_mean_the_cpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
