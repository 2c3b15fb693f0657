"""The loss never waits for the device: no read of a value, no copy between host and device.

The CUDA tensors here are fake: operations compute shapes and devices alone, so no GPU is needed.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models.features import TappedOutput
from tests.test_objective import IMAGES, LABELS, MATCH_ALL, build, config, matches, several

SOFT = ["--distillation-type", "soft"]
OBJECTIVES = {
    "none": ["--distillation-type", "none"],
    "cosub": ["--distillation-type", "none", "--cosub"],
    "hard": ["--distillation-type", "hard"],
    "hard, bce": ["--distillation-type", "hard", "--bce-loss"],
    "soft": SOFT,
    "soft, batchmean": [*SOFT, "--distillation-reduction", "batchmean"],
    "soft, standardized": [*SOFT, "--logit-standardization"],
    "kd ce": [*SOFT, "--kd-loss-type", "ce"],
    "kd mse": [*SOFT, "--kd-loss-type", "mse"],
    "kd dist": [*SOFT, "--kd-loss-type", "dist"],
    "constant temperature": {"temperature_scheduler": "constant"},
    "flsw temperature": {"temperature_scheduler": ["flsw", 1, 2]},
    "cwsm temperature": {"temperature_scheduler": ["cwsm", 1]},
    "weight schedules": {
        "hard_label_weight_scheduler": "linear_growth",
        "kd_loss_weight_scheduler": "linear_decay",
    },
    "shifted probabilities": {"probability_shift": True},
    "ranking": [*SOFT, "--ranking-kl-weight", "1"],
}
ATTENTION = [
    f"layer_S=1,layer_T=2,feature=attention,loss={loss},tokens=patch{clip}"
    for loss in ("attention_mse_sum", "attention_ce_mean")
    for clip in ("", ",textbrewer_clip=true", ",attention=scores")
]
OBJECTIVES |= {f"match {text}": [*SOFT, *matches(text)] for text in [*MATCH_ALL, *ATTENTION]}


class HostWaits(TorchDispatchMode):
    """Collects the operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.__name__
        reads = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
        if name.startswith(reads):
            self.found.append(name)
        tensors = [x for x in [*args, *(kwargs or {}).values(), result] if torch.is_tensor(x)]
        is_copy = name.startswith(("_to_copy", "copy_", "to."))
        if is_copy and len({x.device.type for x in tensors}) > 1:
            self.found.append(name)
        return result


def on_cuda(value):
    """Return fake CUDA tensors with the shapes and types of those in `value`."""
    if torch.is_tensor(value):
        return torch.empty(value.shape, dtype=value.dtype, device="cuda")
    if isinstance(value, TappedOutput):
        return TappedOutput(on_cuda(value.logits), on_cuda(value.states))
    if isinstance(value, dict):
        return {key: on_cuda(each) for key, each in value.items()}
    return type(value)(on_cuda(each) for each in value)


def host_waits(criterion, *values, teacher_outputs) -> list[str]:
    with FakeTensorMode():
        fake, fake_T = [on_cuda(value) for value in values], on_cuda(teacher_outputs)
        with HostWaits() as waits:
            assert criterion(*fake, teacher_outputs=fake_T).device.type == "cuda"
    return waits.found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_does_not_wait_for_the_device(name: str, tmp_path) -> None:
    flags = OBJECTIVES[name]
    if isinstance(flags, dict):
        flags = config(tmp_path, **({"hard_label_weight": 1, "kd_loss_type": "ce"} | flags))
    student, teacher, criterion, _ = build(*flags)
    images = torch.cat([IMAGES, IMAGES]) if name == "cosub" else IMAGES
    outputs, outputs_T = student(images), teacher(IMAGES)
    assert not host_waits(criterion, IMAGES, outputs, LABELS, teacher_outputs=outputs_T)


def test_separate_terms_of_several_teachers_do_not_wait_for_the_device() -> None:
    teacher = several(3, 1, seeds=(1, 2), separate=True)
    flags = ["--teacher-model", "b", "--teacher-logits", "apart", "--distillation-type", "hard"]
    student, _, criterion, _ = build(*flags, teacher=teacher)
    outputs, outputs_T = student(IMAGES), teacher(IMAGES)
    assert not host_waits(criterion, IMAGES, outputs, LABELS, teacher_outputs=outputs_T)


def test_a_copy_and_a_read_are_found() -> None:
    """The count itself works: a mask on the host, and a branch on a value."""

    def copies(images, outputs, labels, *, teacher_outputs):
        return outputs * torch.ones(4, 5).to(outputs.device)

    def reads(images, outputs, labels, *, teacher_outputs):
        return outputs if outputs.sum().item() else labels

    values = IMAGES, torch.zeros(4, 5), LABELS
    assert host_waits(copies, *values, teacher_outputs=torch.zeros(4, 5))
    with pytest.raises(Exception, match="_local_scalar_dense"):
        host_waits(reads, *values, teacher_outputs=torch.zeros(4, 5))
