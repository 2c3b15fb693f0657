"""The training steps that the benchmarks compare: DeiT's, timm's and ours.

Shapes: B batch.
"""

import argparse
import contextlib
import io
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
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

import datasets
import engine
import models
import options
from base.device import autocast
from checks import evaluation
from data import transforms
from data.image_source import Source
from data.samplers import TrainSampler
from experiments.bench_race import Stopwatch
from training import setup
from training.step_config import Hooks

CLASSES = 1000
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
AMP = {"fp32": "off", "bf16": "bf16", "fp16": "fp16"}


@dataclass
class Case:
    """What all steps share: the names of the networks, a batch, and the teacher's weights.

    size: pixels of a side. The weights are a file in `folder`, so that all processes have the same.
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
            for module in network.modules():  # statistics as after training
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 1.5)
            torch.save(network.state_dict(), self.weights)
        torch.manual_seed(0)
        images = torch.randn(self.batch, 3, self.size, self.size)
        labels = torch.randint(CLASSES, (self.batch,))
        pinned = self.device.type == "cuda"
        self.data = tuple(x.pin_memory() if pinned else x for x in (images, labels))

    def __reduce__(self) -> tuple[Any, ...]:
        return Case, tuple(getattr(self, each.name) for each in fields(self))

    def network_T(self) -> nn.Module:
        """Return the teacher's network in float32."""
        network = models.create_model(self.teacher, num_classes=CLASSES)
        network.load_state_dict(torch.load(self.weights))
        return network.to(self.device).eval().requires_grad_(False)

    def args(self, *flags: str) -> argparse.Namespace:
        """Return the settings of a run of this case."""
        text = (
            f"--data-path none --model {self.student} --input-size {self.size} "
            f"--batch-size {self.batch} --teacher-model {self.teacher} --device {self.device} "
            "--warmup-epochs 0 --min-lr 0 --output_dir= --num-workers 0 --no-teacher-check"
        )
        words = [*text.split(), "--teacher-path", str(self.weights), *flags]
        return options.parse_args(words).args


class Reference:
    """DeiT's step (facebookresearch/deit 7e160fe, engine.py and losses.py) on today's libraries.

    The teacher has float32 weights under the student's autocast. Attention is plain, AdamW is
    torch's default, the moving average is timm's first, and every step reads the loss.
    """

    def __init__(self, case: Case, precision: str) -> None:
        self.case, self.amp_dtype = case, PRECISIONS[precision]
        network = models.create_model(
            case.student, num_classes=CLASSES, img_size=(case.size,) * 2, drop_path_rate=0.1
        )
        models.set_attention(network, fused=False)
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
            raise SystemExit("the loss of the reference is not finite")
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
    """timm's TokenDistillationTask in the step of its train.py, with its current EMA."""

    def __init__(self, case: Case, precision: str, backend: str = "") -> None:
        self.case, self.amp_dtype = case, PRECISIONS[precision]
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


class MemoryLoaders(datasets.Loaders):
    """Loaders that repeat one batch in memory."""

    def fingerprint(self, *, of_train: bool = False) -> str:
        return "one batch in memory"

    def describe(self) -> str:
        return self.fingerprint()

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Do nothing: all epochs are the same."""


class Ours:
    """`engine.train_one_epoch` with what `main.py` builds from the flags.

    teacher: "none" (labels alone), "live" or "cached" (its logits are read from files that the live
    teacher has written). steps: the most steps of a call. flags: more flags of main.py; with
    --data-set batches come from its loader instead of memory.
    """

    def __init__(
        self,
        case: Case,
        precision: str,
        teacher: str,
        *,
        backend: str = "",
        steps: int = 1,
        flags: Sequence[str] = (),
    ) -> None:
        kind = "none" if teacher == "none" else "hard"
        words = ["--distillation-type", kind, "--amp", AMP[precision], *flags]
        words += ["--torchcompile", backend] if backend else []
        if teacher == "cached":
            folder = tempfile.mkdtemp(dir=case.folder)
            words += ["--teacher-cache", folder, "--teacher-cache-views", "1"]
        self.case, self.write_s, self.in_memory = case, 0.0, "--data-set" not in flags
        with contextlib.redirect_stdout(io.StringIO()):
            args = case.args(*words)
            runtime = setup.build_runtime(args)
            if self.in_memory:
                source = Source(None, "images in memory", mirrors=False)
                data = (datasets.ImageDataset(source, torch.as_tensor, CLASSES),)
                batches, sampler = [case.data] * (steps + 1), TrainSampler((steps + 1) * case.batch)
                self.loaders = MemoryLoaders(batches, batches, CLASSES, None, sampler, data)
            else:
                self.loaders = datasets.build_loaders(args, runtime.inputs, runtime.processes)
            student = setup.build_student(args, self.loaders, runtime)
            cached = setup.build_cache(args, self.loaders, runtime)
            if cached is not None:
                self.write_s = self._write(args, cached, runtime)
                cached = setup.build_cache(args, self.loaders, runtime)  # complete: no network
            live = setup.build_live_teacher(args, self.loaders, runtime) if cached is None else None
            self.training = setup.build_training(
                args, self.loaders, student, cached or live, runtime
            )

    def _write(self, args: argparse.Namespace, cached: Any, runtime: setup.Runtime) -> float:
        """Write the cache; return the seconds per image."""
        start = time.perf_counter()
        evaluation.fill_cache(args, self.loaders, cached, runtime)
        return (time.perf_counter() - start) / (len(self.loaders.train) * self.case.batch)

    def __call__(self, steps: int) -> float:
        """Return the seconds per step. Batches that workers have ready are used before."""
        train = self.loaders.train
        lead = 0 if self.in_memory else train.num_workers * (train.prefetch_factor or 0)
        watch = Stopwatch(self.case.device, steps, lead)
        self.train(lead + steps + 1, watch.mark)
        return watch.per_step()

    def train(self, count: int, on_update: Any = lambda step: None, **changes: Any) -> dict:
        """Train on `count` batches; return the averages. changes: of the engine's arguments."""
        training = self.training
        named = {
            "model": training.model,
            "criterion": training.criterion,
            "data_loader": Batches(self.loaders, count),
            "optimizer": training.optimizer,
            "device": self.case.device,
            "epoch": 0,
            "teacher": training.teacher,
            "config": training.config,
            "hooks": Hooks(on_update=on_update),
        }
        with contextlib.redirect_stdout(io.StringIO()):
            return engine.train_one_epoch(**named | changes)


@dataclass
class Batches(Iterable):
    """The next `count` batches of epoch after epoch."""

    loaders: datasets.Loaders
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        left, epoch = self.count, 0
        while left > 0:
            self.loaders.set_epoch(epoch)
            for _, batch in zip(range(left), self.loaders.train):
                yield batch
                left -= 1
            epoch += 1
