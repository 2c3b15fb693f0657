"""Images of a run in TensorBoard, and the teacher's accuracy as a reference line."""

from collections.abc import Mapping

from checks import diagnose, visualize
from datasets import Loaders
from training.metrics import RunLog
from training.setup import Runtime, Training


def log_first_batch(
    log: RunLog,
    training: Training,
    loaders: Loaders,
    runtime: Runtime,
    teacher_stats: Mapping[str, float],
) -> None:
    """Log the first augmented batch with the teacher's logits, and the teacher's accuracy."""
    loaders.set_epoch(0)
    log.scalars("val_teacher", teacher_stats, 0)
    batch = visualize.train_batch(
        loaders.train,
        runtime.inputs,
        loaders.classes,
        runtime.device,
        mixup_fn=training.config.mixup_fn,
        teacher=training.teacher_logits,
    )
    log.image("train/batch", batch, 0)


def log_attention(
    log: RunLog,
    training: Training,
    loaders: Loaders,
    runtime: Runtime,
    teacher_stats: Mapping[str, float],
) -> None:
    """Log the student's attention after an epoch, and the teacher's accuracy again."""
    images_seen = training.images_seen(training.checkpointer.epoch + 1)
    log.scalars("val_teacher", teacher_stats, images_seen)
    images, _ = diagnose.sample(loaders.val, 4)
    maps = visualize.attention(training.student.network, images.to(runtime.device), runtime.inputs)
    log.image("val/attention", maps, images_seen)
