"""Images of a run in TensorBoard, and the teacher's accuracy as a reference line."""

from collections.abc import Mapping
from dataclasses import dataclass

from checks import diagnose, visualize
from datasets import Loaders
from training.metrics import RunLog
from training.setup import Runtime, Training


@dataclass(frozen=True)
class Board:
    """What the images are made from. teacher_stats: the teacher's accuracy, if known."""

    log: RunLog
    training: Training
    loaders: Loaders
    runtime: Runtime
    teacher_stats: Mapping[str, float]

    def first_batch(self) -> None:
        """Log the first augmented batch with the teacher's logits, and the teacher's accuracy."""
        self.loaders.set_epoch(0)
        self.log.scalars("val_teacher", self.teacher_stats, 0)
        batch = visualize.train_batch(
            self.loaders.train,
            self.runtime.inputs,
            self.loaders.classes,
            self.runtime.device,
            mixup_fn=self.training.config.mixup_fn,
            teacher=self.training.teacher_logits,
        )
        self.log.image("train/batch", batch, 0)

    def attention(self) -> None:
        """Log the student's attention after an epoch, and the teacher's accuracy again."""
        images_seen = self.training.images_seen(self.training.checkpointer.epoch + 1)
        self.log.scalars("val_teacher", self.teacher_stats, images_seen)
        images = diagnose.sample(self.loaders.val, 4)[0].to(self.runtime.device)
        maps = visualize.attention(self.training.student.network, images, self.runtime.inputs)
        self.log.image("val/attention", maps, images_seen)
