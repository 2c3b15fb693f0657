"""The benchmark: every part runs, and its numbers are put together as they should be."""

import json
import os
import sys

import pytest
import torch
from PIL import Image

from base.errors import UserError
from experiments import bench_gpu, bench_loader, bench_race, benchmark
from experiments.bench_steps import Case


def test_a_race_warms_up_and_rotates_the_order(capsys) -> None:
    ran = []
    entries = {name: lambda steps, name=name: ran.append(name) or 1.0 for name in "abc"}
    seconds = bench_race.race(entries, 3, 5)
    assert "".join(ran) == "bcacababcbcacab"
    assert seconds == {name: [1.0] * 3 for name in "abc"}


class Counter:
    def __init__(self, start: int) -> None:
        self.at = start

    def __call__(self, steps: int) -> float:
        self.at += steps
        return float(os.getpid())

    def fail(self) -> None:
        raise ValueError("no such thing")

    def die(self) -> None:
        os._exit(7)


def test_contestants_run_in_processes_of_their_own() -> None:
    both = [bench_race.Apart(Counter, start) for start in (10, 20)]
    pids = {each(3) for each in both}
    assert len(pids | {os.getpid()}) == 3
    assert [each.get("at") for each in both] == [13, 23]
    with pytest.raises(UserError, match="no such thing"):
        both[0].get("fail")
    with pytest.raises(UserError, match="ended by itself .7."):
        both[1].get("die")
    with pytest.raises(UserError, match="TypeError"):
        bench_race.Apart(Counter)
    waits = bench_race.Apart(Counter, 1)
    waits.process.kill()
    waits.process.join()
    with pytest.raises(UserError, match="ended by itself .-9."):
        waits(1)
    last = bench_race.Apart(Counter, 1)
    last.end()
    assert last.process.exitcode == 0


def test_a_ratio_is_taken_within_each_round() -> None:
    assert bench_race.ratio([1, 2, 4], [2, 6, 4]) == (2, 1.5, 2.5)  # of 2, 3 and 1
    columns = {"x a": lambda _: "a", "x itself": lambda name: name, "x c": lambda _: "c"}
    row = bench_race.table({"a": [0.002, 0.004], "b": [0.001, 0.002]}, columns)[-1]
    assert row == "| b | 2.00 (2.00-2.00) | 1 |  | 1.50 (1.25-1.75) |"


def test_the_watch_leaves_out_the_lead_and_the_first_step(monkeypatch) -> None:
    times = iter([0, 100, 101, 110, 120, 130])
    monkeypatch.setattr(bench_race.time, "perf_counter", lambda: next(times))
    watch = bench_race.Stopwatch(torch.device("cpu"), steps=2, lead=3)
    for _ in range(6):
        watch.mark()
    assert watch.per_step() == 10


@pytest.mark.parametrize("flag", ["--rounds", "--steps", "--gpu-steps", "--growth-steps"])
def test_too_few_to_make_a_number_are_refused_before_anything_is_measured(
    flag: str, monkeypatch
) -> None:
    few = "1" if flag == "--rounds" else "0"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--parts", "optimizer", flag, few])
    with pytest.raises(SystemExit, match="must be at least"):
        benchmark.main()
    with pytest.raises(SystemExit, match="must be at least"):
        bench_loader.main(["--rounds", "1"])


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--parts step --student vit_tiny_patch16_224", "no distillation head"),
        ("--parts optimizer --json nowhere/found.json", "--json nowhere/found.json: No such"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_measured(flags, told, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags.split()])
    with pytest.raises(UserError, match=told):
        benchmark.main()


@pytest.mark.slow
def test_a_stretch_from_a_loader_begins_behind_what_workers_have_ready(tmp_path) -> None:
    words = "--gpu-batch-size 4 --gpu-steps 2 --rounds 2 --teacher resnet_pico --num-workers 1"
    args = benchmark._parser().parse_args(words.split())
    cpu = torch.device("cpu")
    case = Case("deit_tiny_distilled_patch16_224", "resnet_pico", 32, 4, cpu, tmp_path)
    sources = bench_gpu.images(args, tmp_path)
    stretch = bench_gpu.Stretch(case, "cached", args, sources["prepared"])
    seen = []
    stretch.engine["model"].register_forward_pre_hook(lambda *_: seen.append(1))
    assert stretch.lead == 2 and stretch(2) > 0
    assert len(seen) == 2 + 1 + 2
    assert stretch.teacher.network is None and not stretch.teacher.missing()
    found = bench_gpu.measure_student(case, args, {}, peak=1e12)
    assert len(found["seconds"]) == 5 and all(len(each) == 2 for each in found["seconds"].values())
    row = next(line for line in found["lines"] if line.startswith("| no teacher |"))
    rate = 4 / (sum(found["seconds"]["no teacher"]) / 2)
    mfu = 100 * rate * 3 * found["forward_flops"] / 1e12
    assert f"| 1 | {mfu:.1f} |" in row


def test_the_break_even_is_told_in_runs_and_in_views() -> None:
    text = benchmark.break_even(0.010, 0.020, 0.012)
    assert "10.0 ms" in text and "saves 8.0 ms" in text
    assert "1.25 runs" in text and "0.80 views" in text
    assert "saves nothing" in benchmark.break_even(0.010, 0.020, 0.021)


def test_a_copy_is_the_softer_the_smaller_it_is(tmp_path) -> None:
    bench_loader.make_up(tmp_path, 3)
    found = bench_loader.softness(tmp_path, 3)
    small, middle, jpeg, large = (
        found[f"copy of {name}"]
        for name in ("256 px, raw", "288 px, raw", "288 px, jpeg", "320 px, raw")
    )
    for at in range(4):
        assert small[at] > middle[at] > large[at] > 0 and jpeg[at] > middle[at]
    image = Image.effect_noise((50, 40), 40).convert("RGB")
    assert bench_loader.difference(image, image, 0.25, Image.Resampling.BICUBIC, 0) == 0


@pytest.mark.slow
def test_the_loaders_rows_are_measured_and_put_into_tables(monkeypatch) -> None:
    monkeypatch.setattr(bench_loader, "GROWTH", (100,))
    found = bench_loader.run("", 0, 2, 2)
    json.dumps(found)
    assert set(bench_loader.TARGETS) < set(found["rows"]) and set(found["growth"]) == {100}
    assert found["rows"][bench_loader.FULL]["ratio"] == 1
    out = "\n".join(found["lines"])
    assert "| timm again |" in out and "| 100 entries |" in out and "takes real images" in out


@pytest.mark.slow
def test_every_part_runs_and_says_what_was_not_measured(capsys, monkeypatch, tmp_path) -> None:
    words = f"--student deit_tiny_distilled_patch16_224 --teacher resnet_pico --img-size 32 \
        --batch-size 4 --rounds 2 --steps 1 --growth-steps 10 --growth-batches 2 4 \
        --parts step optimizer agreement gpu growth --json {tmp_path}/found.json"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words.split()])
    assert benchmark.main() == 0
    out = capsys.readouterr().out
    for row in (
        "reference, fp32",
        "timm, bf16",
        "live, bf16",
        "cached, bf16",
        "no teacher, bf16 again",
        "ours again",
        "bf16, folded, channels-last",
        "`main.py` with two workers",
    ):
        assert row in out, row
    assert "no GPU" in out and "Reading the answers to a batch takes" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(len(each) == 2 for each in found["step resnet_pico"]["seconds"].values())
    for told, there in found["growth"]["cache"].values():
        assert told == there > 0
    assert all(len(each) == 2 and min(each) > 0 for each in found["growth"]["memory"].values())
