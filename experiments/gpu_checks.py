"""Stage `correctness` of experiments/gpu_plan.py: small networks, on the device of the plan.

Every check returns plain values, with "passed" and the lines of its table. Shapes: B batch.
"""

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import datasets
import options
from base import distributed
from base.device import autocast
from experiments import kill_sweep
from experiments.bench_steps import CLASSES, PRECISIONS, Case, Ours
from experiments.compare import HARD, SETS
from training import setup

STUDENT, TEACHER = "deit_pico_distilled_patch8_32", "resnet_pico"
OBJECTIVES = SETS["objectives"] | {
    "cosub": "--distillation-type none --cosub",
    "temperature schedule": "--distillation-type soft --kd-loss-type ce "
    "--temperature-scheduler cwsm:0.1",
    "accumulation": f"{HARD} --grad-accum-steps 2",
    "LAMB": f"{HARD} --opt lamb",
}
WAITS_ALSO = "hard", "accumulation", "LAMB"  # objectives for fp32 and fp16; bf16 has all
WAIT_FREE = 2, 5  # updates between which the host must not wait
MOST_APART = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}  # of the gradient, relative
AUGMENTATIONS = ("--aa rand-m9-mstd0.5-inc1", "--ThreeAugment", "--aa original-mstd0.5")
# A plugin of main.py. An operator without a deterministic implementation raises an error.
DETERMINISTIC = """import os, torch
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
torch.use_deterministic_algorithms(True)
"""
Result = dict[str, Any]


class Checks:
    """The checks, on one device. toy: as small as a test needs."""

    def __init__(self, device: torch.device, folder: Path, *, toy: bool) -> None:
        self.device, self.folder, self.toy = device, folder, toy

    def all(self) -> dict[str, Callable[[], Result]]:
        """Return the checks by name, the most important first."""
        return {
            "host_waits": self.host_waits,
            "precision": self.precision,
            "bad_updates": self.bad_updates,
            "cached_is_live": self.cached_is_live,
            "device_augmentation": self.device_augmentation,
            "compiled": self.compiled,
            "process_group": self.process_group,
            "memory": self.memory,
            "resume": self.resume,
        }

    def ours(self, precision: str, *flags: str, teacher: str = "live", steps: int = 4) -> Ours:
        """Return our step with the small networks."""
        case = Case(STUDENT, TEACHER, 32, 4 if self.toy else 64, self.device, self.folder)
        return Ours(case, precision, teacher, steps=steps, flags=["--log-interval", "999", *flags])

    def host_waits(self) -> Result:
        """Train with every objective while a wait for the GPU is an error, backward included."""
        found = {}
        cases = [("bf16", name) for name in OBJECTIVES]
        if not self.toy:
            cases += [(precision, name) for precision in ("fp32", "fp16") for name in WAITS_ALSO]
        for precision, name in cases:
            flags = OBJECTIVES[name].split()
            ours = self.ours(precision, *flags)
            updates = (WAIT_FREE[1] + 1) * (1 + ("--grad-accum-steps" in flags))
            try:
                ours.train(updates, self.forbid_waits)
                found[f"{precision}, {name}"] = "none"
            except RuntimeError as error:
                found[f"{precision}, {name}"] = str(error).splitlines()[0]
            finally:
                self.forbid_waits(WAIT_FREE[1])
        return result(all(each == "none" for each in found.values()), "host waits", found)

    def forbid_waits(self, update: int) -> None:
        """Make waits an error from the first update of `WAIT_FREE` to the last one."""
        if update in WAIT_FREE and self.device.type == "cuda":
            mode = "error" if update == WAIT_FREE[0] else "default"
            torch.cuda.set_sync_debug_mode(mode)

    def precision(self) -> Result:
        """Compare the gradient of a step with that in float64 on the CPU."""
        found, passed = {}, True
        for precision, most in MOST_APART.items():
            ours = self.ours(precision, "--drop-path", "0")
            student = ours.training.student.train()
            images, labels = (x.to(self.device) for x in ours.case.data)
            labels = F.one_hot(labels, CLASSES).float()
            with torch.no_grad():
                logits_T = ours.training.teacher(images)
            exact = copy.deepcopy(student).to("cpu", torch.float64)
            with autocast(self.device, PRECISIONS[precision]):
                outputs = student(images)
            loss = ours.training.criterion(images, outputs, labels, teacher_outputs=logits_T)
            loss.backward()
            images, labels, logits_T = (x.cpu().double() for x in (images, labels, logits_T))
            ours.training.criterion.cpu()(
                images, exact(images), labels, teacher_outputs=logits_T
            ).backward()
            gradient, reference = flat_gradient(student), flat_gradient(exact)
            apart = float((gradient - reference).norm() / reference.norm())
            found[precision], passed = f"{apart:.1e} (at most {most:g})", passed and apart <= most
        return result(passed, "relative distance of the gradient from float64", found)

    def bad_updates(self) -> Result:
        """Check that an update with NaN, infinity or an overflow changes nothing."""
        found = {}
        for precision in PRECISIONS:
            for name in ("nan", "inf", *["overflow"] * (precision == "fp16")):
                ours = self.ours(precision)
                ours.train(2)
                images, labels = (x.clone() for x in ours.case.data)
                changes: dict[str, Any] = {"data_loader": [(images, labels)]}
                if name == "overflow":
                    scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**100)
                    changes["config"] = replace(ours.training.config, loss_scaler=scaler)
                else:
                    images[0] = math.nan if name == "nan" else math.inf
                before = copy.deepcopy(state_of(ours))
                skipped = ours.train(1, **changes)["skipped_updates"]
                different = list(kill_sweep.differences(before, state_of(ours)))
                good = not different and (skipped == 1 or name == "overflow")  # the scale falls
                text = f"{skipped} skipped; {', '.join(different[:2]) or 'no'} change"
                found[f"{precision}, {name}"] = "nothing changed" if good else text
        return result(
            all(each == "nothing changed" for each in found.values()), "after a bad update", found
        )

    def cached_is_live(self) -> Result:
        """Compare the loss with a cached teacher and with the live one."""
        found, passed = {}, True
        for precision in PRECISIONS:
            live, cached = (
                self.ours(precision, teacher=teacher).train(4)["loss"]
                for teacher in ("live", "cached")
            )
            found[precision] = f"{abs(live - cached) / live:.1e}"
            passed = passed and abs(live - cached) / live < 1e-3
        return result(passed, "relative difference of the loss, cached and live", found)

    def device_augmentation(self) -> Result:
        """Compare augmentation on the device with the CPU, for one batch and the same draws."""
        found, passed = {}, True
        for flags in AUGMENTATIONS:
            words = f"--data-set DIGITS --augment-on device --reprob 0.5 --color-jitter 0.3 {flags}"
            words += f" --num-workers 0 --batch-size {8 if self.toy else 256} --no-repeated-aug"
            args = options.parse_args([*words.split(), "--device", str(self.device)]).args
            runtime = setup.build_runtime(args)
            train = datasets.build_loaders(args, runtime.inputs, runtime.processes).train
            images, _ = next(iter(train))
            here, there = (images.to(device).cpu() for device in (self.device, torch.device("cpu")))
            apart = (here - there).abs()
            found[flags] = f"{apart.max():.1e}, mean {apart.mean():.1e} (normalised values)"
            passed = passed and float(apart.mean()) < 1e-3
        return result(passed, "largest difference from the CPU", found)

    def compiled(self) -> Result:
        """Compare the loss of compiled and eager steps, with a feature match and a projection."""
        backend, found, passed = "eager" if self.toy else "inductor", {}, True
        for name in ("hard + hidden", "hard", "hard + VkD")[: 1 if self.toy else 3]:
            flags = OBJECTIVES[name].split()
            plain = self.ours("bf16", *flags).train(4)["loss"]
            compiled = self.ours("bf16", *flags, "--torchcompile", backend).train(4)["loss"]
            found[name] = f"{abs(plain - compiled) / plain:.1e}"
            passed = passed and abs(plain - compiled) / plain < 1e-2
        return result(passed, "relative difference of the loss, compiled and eager", found)

    def process_group(self) -> Result:
        """Train in a group of one process, with accumulation, and compare with no group."""
        flags = OBJECTIVES["accumulation"].split()
        alone, grouped = self.ours("fp32", *flags), self.ours("fp32", *flags)
        expected = alone.train(4)["loss"]
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        with tempfile.TemporaryDirectory() as folder:
            store = f"file://{folder}/store"
            dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
            try:
                example = torch.zeros(2, 3, 32, 32, device=self.device)
                model = distributed.data_parallel(grouped.training.student, example)
                loss = grouped.train(4, model=model)["loss"]
            finally:
                dist.destroy_process_group()
        apart = abs(loss - expected) / expected
        return result(apart < 1e-3, "relative difference of the loss", {backend: f"{apart:.1e}"})

    def memory(self) -> Result:
        """Compare the memory held after 50 and after 500 steps."""
        held, at = {}, (2, 6) if self.toy else (50, 500)

        def on_update(number: int) -> None:
            if number in at and self.device.type == "cuda":
                held[number] = torch.cuda.memory_allocated(self.device)

        self.ours("bf16").train(at[1] + 1, on_update)
        values = list(held.values())
        found = {f"after {number} steps": f"{bytes_:,} bytes" for number, bytes_ in held.items()}
        return result(len(set(values)) <= 1, "memory of tensors", found)

    def resume(self) -> Result:
        """Kill a run and resume it: on this device, on the CPU and back, and deterministically."""
        device, found = str(self.device), {}
        common = f"{kill_sweep.FLAGS} --num_workers 0 --device {device}".split()
        with tempfile.TemporaryDirectory() as name:
            plugin = Path(name, "deterministic.py")
            plugin.write_text(DETERMINISTIC)
            plain = [*common, *kill_sweep.MATCH.split()]
            strict = f"{HARD} --no-teacher-check --no-cudnn-benchmark --plugin {plugin}".split()
            for kind, flags in (("as usual", plain), ("deterministic", [*common, *strict])):
                whole = Path(name, kind)
                kill_sweep.finish(flags, whole)
                for between in dict.fromkeys([device, "cpu"][: 1 + (kind == "as usual")]):
                    out = Path(name, f"{kind}, killed, {between}")
                    self.kill_and_resume(flags, out, between)
                    text = kill_sweep.verdict(whole, out)
                    if text != "identical":
                        text += f": weights differ by {largest(whole, out):.1e}"
                    where = "resumed here" if between == device else "CPU and back"
                    found[f"{kind}, {where}"] = text
        far = any(float(each.split()[-1]) > 1e-2 for each in found.values() if "differ" in each)
        passed = not far and found["deterministic, resumed here"] == "identical"
        return result(passed, "compared with the uninterrupted run", found)

    def kill_and_resume(self, flags: list[str], out: Path, between: str) -> None:
        """Kill a run and resume it; if `between` is another device, its middle runs there."""
        process = kill_sweep.start(flags, out)
        self.kill_at("Epoch: [1/2] [4/", process, out)
        if between != str(self.device):
            process = kill_sweep.start([*flags, "--device", between], out)
            self.kill_at("Epoch: [2/2] [2/", process, out)
        kill_sweep.finish(flags, out)

    def kill_at(self, words: str, process: Any, out: Path) -> None:
        """Kill a run when it has printed `words`."""
        kill_sweep.MOMENTS[words] = lambda out, text, draw: words in text
        kill_sweep.wait_for(words, process, out, kill_sweep.random.Random(0))
        kill_sweep.kill(process)


def result(passed: bool, what: str, found: dict[str, str]) -> Result:
    """Return a result with the lines of its table."""
    lines = [f"| {what} | {'passed' if passed else '**FAILED**'} |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in found.items()]
    return {"passed": passed, "found": found, "lines": lines}


def flat_gradient(network: torch.nn.Module) -> Tensor:
    """Return the gradients of all parameters as one float64 vector on the CPU."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return torch.cat([gradient.detach().cpu().double().flatten() for gradient in gradients])


def state_of(ours: Ours) -> dict[str, Any]:
    """Return weights, buffers and the optimizer's state."""
    training = ours.training
    return {
        "weights": training.student.state_dict(),
        "optimizer": training.optimizer.state_dict()["state"],
    }


def largest(one: Path, other: Path) -> float:
    """Return the largest difference of the weights of two runs."""
    a, b = (
        torch.load(folder / "checkpoint.pth", weights_only=True, map_location="cpu")["model"]
        for folder in (one, other)
    )
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)
