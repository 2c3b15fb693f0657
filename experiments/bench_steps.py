"""The steps that the benchmark compares: DeiT's, timm's and ours, for one student and teacher.

Shapes: B batch.
"""

import argparse
import contextlib
import io
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import TokenDistillationTask
from timm.utils import ModelEma, ModelEmaV3
from torch import Tensor, nn

import engine
import models
import options
from base.device import autocast
from data import transforms
from distill import cache_store, objective
from distill.cached_teacher import CachedTeacher
from distill.teacher import build_teacher
from experiments.bench_race import Stopwatch
from training import optim
from training.step_config import Hooks, StepConfig

CLASSES = 1000
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Case:
    """What all contestants share: names, sizes, the batch on the host, the teacher's weights.

    The weights are a file in `folder`, so that a copy in another process has the same.
    """

    student: str
    teacher: str
    size: int
    batch: int
    device: torch.device
    folder: Path

    def __post_init__(self) -> None:
        self.weights = self.folder / f"{self.teacher}.pth"
        if not self.weights.exists():
            torch.manual_seed(0)
            network = models.create_model(self.teacher, num_classes=CLASSES)
            settle(network)
            torch.save(network.state_dict(), self.weights)
        torch.manual_seed(0)
        images = torch.randn(self.batch, 3, self.size, self.size)
        labels = torch.randint(CLASSES, (self.batch,))
        pinned = self.device.type == "cuda"
        self.data = tuple(x.pin_memory() if pinned else x for x in (images, labels))

    def __reduce__(self) -> tuple[Any, ...]:
        return Case, tuple(getattr(self, each.name) for each in fields(self))

    def network_T(self) -> nn.Module:
        """Return the teacher as it is, in float32."""
        network = models.create_model(self.teacher, num_classes=CLASSES)
        network.load_state_dict(torch.load(self.weights))
        return network.to(self.device).eval().requires_grad_(False)

    def args(self, *flags: str) -> argparse.Namespace:
        return options.parse_args(
            [
                "--data-path",
                "none",
                "--model",
                self.student,
                "--input-size",
                str(self.size),
                "--batch-size",
                str(self.batch),
                "--teacher-model",
                self.teacher,
                "--teacher-path",
                str(self.weights),
                "--device",
                str(self.device),
                "--warmup-epochs",
                "0",
                "--min-lr",
                "0",
                *flags,
            ]
        ).args


def settle(network: nn.Module) -> None:
    """Give BatchNorm statistics as of training, so that no layer of a random network dies."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)


class Reference:
    """DeiT's step (facebookresearch/deit 7e160fe, engine.py and losses.py) on today's libraries.

    Teacher in float32 weights under the student's autocast, plain attention, the default AdamW,
    timm's first EMA, and the host waits for the loss in every step.
    """

    def __init__(self, case: Case, amp_dtype: torch.dtype | None) -> None:
        self.case, self.amp_dtype = case, amp_dtype
        network = models.create_model(
            case.student, num_classes=CLASSES, img_size=(case.size,) * 2, drop_path_rate=0.1
        )
        models.fast.set_attention(network, fused=False)
        self.network, self.network_T = network.to(case.device).train(), case.network_T()
        self.optimizer = create_optimizer_v2(self.network, opt="adamw", lr=1e-4, weight_decay=0.05)
        self.ema = ModelEma(self.network, decay=0.99996)
        self.mixup = transforms.build_mixup(case.args(), CLASSES)
        self.base = SoftTargetCrossEntropy()

    def loss(self, images: Tensor, outputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        with torch.no_grad():
            logits_T = self.network_T(images)
        hard = F.cross_entropy(outputs[1], logits_T.argmax(dim=1))
        return self.base(outputs[0], labels) * 0.5 + hard * 0.5

    def step(self) -> None:
        images, labels = (x.to(self.case.device, non_blocking=True) for x in self.case.data)
        images, labels = self.mixup(images, labels)
        with autocast(self.case.device, self.amp_dtype):
            loss = self.loss(images, self.network(images), labels)
        if not math.isfinite(loss.item()):
            raise SystemExit("the reference's loss is not finite")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.case.device.type == "cuda":
            torch.cuda.synchronize()
        self.ema.update(self.network)

    def __call__(self, steps: int) -> float:
        watch = Stopwatch(self.case.device, steps)
        for _ in range(steps + 1):
            self.step()
            watch.mark()
        return watch.per_step()


class Timm(Reference):
    """timm's TokenDistillationTask in the step of its train.py, with its EMA of today."""

    def __init__(self, case: Case, amp_dtype: torch.dtype | None, backend: str = "") -> None:
        self.case, self.amp_dtype = case, amp_dtype
        factory = getattr(timm.models.deit, case.student)  # the registry has ours by that name
        network = factory(num_classes=CLASSES, img_size=case.size, drop_path_rate=0.1)
        network = network.to(case.device).train()
        self.task = TokenDistillationTask(
            network,
            case.network_T(),
            SoftTargetCrossEntropy(),
            distill_type="hard",
            task_loss_weight=0.5,
            device=case.device,
            verbose=False,
        ).train()
        if backend:
            self.task.compile(backend=backend)
        self.optimizer = create_optimizer_v2(network, opt="adamw", lr=1e-4, weight_decay=0.05)
        self.network, self.updates = network, 0
        self.ema = ModelEmaV3(network, decay=0.99996, use_warmup=True)
        self.mixup = transforms.build_mixup(case.args(), CLASSES)

    def step(self) -> None:
        images, labels = (x.to(self.case.device, non_blocking=True) for x in self.case.data)
        images, labels = self.mixup(images, labels)
        with autocast(self.case.device, self.amp_dtype):
            loss = self.task(images, labels)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        self.ema.update(self.network, step=self.updates)


class Ours:
    """The engine's step, with what `main.py` would build from the flags.

    teacher: "live", "none" (labels alone), or "cached": its answers are read again in every step,
    from a folder that a live one has written (`answers`), or made up.
    """

    def __init__(
        self,
        case: Case,
        amp_dtype: torch.dtype | None,
        teacher: str,
        *,
        backend: str = "",
        steps: int = 0,
        answers: str = "",
    ) -> None:
        if case.device.type == "cpu":
            models.fast.keep_memory()
        kind = "none" if teacher == "none" else "hard"
        compiled = ["--torchcompile", backend] if backend else []
        args = case.args("--distillation-type", kind, *compiled)
        inputs = models.build_input_config(args)
        student = models.build_student(args, CLASSES, inputs).to(case.device)
        models.fast.select_kernels(student.network, case.device.type, amp_dtype)
        self.case, self.amp_dtype, self.student = case, amp_dtype, student
        self.mixup_fn = transforms.build_mixup(args, CLASSES)
        self.cycle_epochs, self.teacher = 0, None
        if teacher == "cached":
            if not answers:
                answers = tempfile.mkdtemp(dir=case.folder)
                self._write(answers, steps + 1, lambda x, place: torch.randn(len(x), CLASSES))
            self.cycle_epochs, self.teacher = 1, self._cached(answers, steps + 1, None)
        elif teacher == "live":
            self.teacher = build_teacher(args, CLASSES, inputs, case.device, amp_dtype)
        criterion = objective.build_objective(
            args,
            student,
            self.teacher,
            mixing=True,
            input_size=inputs.input_size,
            total_updates=10**6,
        )
        optimizer, _ = optim.build_optimizer(args, student, 1)
        if backend:
            student.compile(backend=backend, dynamic=False)
        self.engine: dict[str, Any] = {
            "model": student,
            "criterion": criterion,
            "optimizer": optimizer,
            "device": case.device,
            "epoch": 0,
            "teacher": self.teacher,
        }
        ema = optim.build_ema(args, student.network)
        self.config = StepConfig(
            amp_dtype=amp_dtype,
            schedule=optim.build_schedule(args, optimizer, 10**6),
            mixup_fn=self.mixup_fn,
            update_ema=partial(ema.update, student.network) if ema is not None else None,
            cycle_epochs=self.cycle_epochs,
            log_interval=10**9,
        )

    def loader(self, steps: int) -> list[tuple[Tensor, ...]]:
        return [self.case.data] * steps

    def _cached(
        self, folder: str, batches: int, network: Callable[[Tensor, Any], Tensor] | None
    ) -> CachedTeacher:
        rows = batches * self.case.batch
        store = cache_store.Store(
            folder,
            rows=rows,
            num_classes=CLASSES,
            keep="all",
            may_create=network is not None,
            fingerprint={"rows": rows, "classes": CLASSES, "precision": str(self.amp_dtype)},
        )
        return CachedTeacher(
            store,
            network,
            epoch_rows=rows,
            needed=rows,
            batch_size=self.case.batch,
            rank=0,
            world_size=1,
        )

    def _write(self, folder: str, batches: int, network: Callable[[Tensor, Any], Tensor]) -> float:
        writer, start = self._cached(folder, batches, network), time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            engine.query_epoch(
                self.loader(batches),
                writer,
                self.case.device,
                0,
                config=StepConfig(mixup_fn=self.mixup_fn, header="Write:"),
            )
        writer.store.flush()
        return time.perf_counter() - start

    def write(self, folder: str, batches: int) -> float:
        """Write the live teacher's answers to `batches` batches; return the seconds an image."""
        self._write(tempfile.mkdtemp(dir=self.case.folder), batches, self.teacher)  # a warm-up
        return self._write(folder, batches, self.teacher) / (batches * self.case.batch)

    def reading_s(self, batches: int) -> float:
        """Return the seconds that a cache's answers to one batch take."""
        start = time.perf_counter()
        for micro in range(batches):
            self.teacher(self.case.data[0], (0, micro))
        return (time.perf_counter() - start) / batches

    def __call__(self, steps: int) -> float:
        return self.turn(self.loader(steps + 1), steps)

    def turn(self, loader: Any, steps: int, lead: int = 0) -> float:
        """Return the seconds a step over the last `steps` batches of `loader`."""
        watch = Stopwatch(self.case.device, steps, lead)
        with contextlib.redirect_stdout(io.StringIO()):
            engine.train_one_epoch(
                **self.engine,
                data_loader=loader,
                config=self.config,
                hooks=Hooks(on_update=watch.mark),
            )
        return watch.per_step()
