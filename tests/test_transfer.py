"""Host to device: on a GPU beside what it computes, and in the right order."""

import contextlib

import pytest
import torch

from base import transfer

SAID: list[str] = []


class Stream:
    def __init__(self, name: object) -> None:
        self.name = name

    def wait_stream(self, other: "Stream") -> None:
        SAID.append(f"{self.name} waits for {other.name}")


class Values:
    """What a tensor in pinned memory is asked for."""

    is_cuda = False

    def to(self, device: torch.device, non_blocking: bool) -> "Values":
        SAID.append(f"copied to {device}" + ", in the background" * non_blocking)
        return self

    def pin_memory(self) -> "Values":
        SAID.append("pinned")
        return self

    def record_stream(self, stream: Stream) -> None:
        SAID.append(f"kept for {stream.name}")


@contextlib.contextmanager
def on(stream: Stream):
    SAID.append(f"on {stream.name}")
    yield
    SAID.append(f"off {stream.name}")


def test_a_gpu_copies_on_another_stream_and_computes_when_it_is_done(monkeypatch) -> None:
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(transfer, "_side", lambda device: Stream("side"))
    SAID.clear()
    transfer.send(Values(), gpu)
    assert SAID == [
        "on side",
        "copied to cuda:0, in the background",
        "off side",
        "main waits for side",
        "kept for main",
    ]
    transfer.send(Values(), gpu, pin=True)
    assert SAID[5:7] == ["pinned", "on side"]
    SAID.clear()
    there = Values()
    there.is_cuda = True
    transfer.send(there, gpu, pin=True)
    assert SAID == ["copied to cuda:0, in the background"]


def test_on_a_cpu_nothing_is_copied() -> None:
    values = torch.arange(3)
    assert transfer.send(values, torch.device("cpu"), pin=True) is values


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
def test_what_a_gpu_computes_next_sees_the_whole_copy() -> None:
    gpu = torch.device("cuda", torch.cuda.current_device())
    for round_ in range(20):
        busy = torch.randn(4096, 4096, device=gpu)
        for _ in range(4):
            busy = busy @ busy * 1e-3
        values = torch.full((2**24,), float(round_)).pin_memory()
        sums = transfer.send(values, gpu).sum()
        del values
        assert sums.item() == round_ * 2**24
