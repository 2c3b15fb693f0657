"""The benchmark: every part runs, and its numbers are put together as they should be."""

import json
import sys

import pytest

from tools import bench_race, benchmark


def test_a_race_warms_up_and_rotates_the_order(capsys) -> None:
    ran = []
    entries = {name: lambda steps, name=name: ran.append(name) or 1.0 for name in "abc"}
    seconds = bench_race.race(entries, 3, 5)
    assert "".join(ran) == "bcacababcbcacab"
    assert seconds == {name: [1.0] * 3 for name in "abc"}


def test_a_ratio_is_taken_within_each_round() -> None:
    assert bench_race.ratio([1, 2, 4], [2, 6, 4]) == (2, 1.5, 2.5)  # of 2, 3 and 1
    columns = {"x a": lambda _: "a", "x itself": lambda name: name, "x c": lambda _: "c"}
    row = bench_race.table({"a": [0.002, 0.004], "b": [0.001, 0.002]}, columns)[-1]
    assert row == "| b | 2.00 (2.00-2.00) | 1 |  | 1.50 (1.00-2.00) |"


def test_the_break_even_is_told_in_runs_and_in_views() -> None:
    text = benchmark.break_even(0.010, 0.020, 0.012)
    assert "10.0 ms" in text and "saves 8.0 ms" in text
    assert "1.25 runs" in text and "0.80 views" in text
    assert "saves nothing" in benchmark.break_even(0.010, 0.020, 0.021)


@pytest.mark.slow
def test_every_part_runs_and_says_what_was_not_measured(capsys, monkeypatch, tmp_path) -> None:
    words = f"--student deit_tiny_distilled_patch16_224 --teacher resnet_pico --img-size 32 \
        --batch-size 4 --rounds 2 --steps 1 --growth-steps 10 --growth-batches 2 4 \
        --parts step optimizer agreement gpu growth --json {tmp_path}/found.json"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words.split()])
    assert benchmark.main() == 0
    out = capsys.readouterr().out
    for row in ("reference, fp32", "timm, bf16", "live, bf16", "cached, bf16",
                "no teacher, bf16 again", "ours again",
                "bf16, folded, channels-last", "Memory after 1 cached"):  # fmt: skip
        assert row in out, row
    assert "no GPU" in out and "Reading the answers to a batch takes" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(len(each) == 2 for each in found["step resnet_pico"]["seconds"].values())
    for predicted, there in found["growth"]["cache"].values():
        assert predicted == there
