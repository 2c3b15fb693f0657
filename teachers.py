"""The other side of the lesson: a frozen network with its own input adapter.

Shapes: B batch, C classes. A teacher is a function from the student's pictures to logits; the
engine cannot tell what answers.
"""

from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from augment import InputConfig
from errors import UserError


class InputAdapter(nn.Module):
    """From pictures as the student sees them to pictures as the teacher was trained on them.

    Undoes the student's normalisation, applies the teacher's, and resizes (bicubic, antialiased)
    where the sizes differ. Affine in the picture, so that mixing before it is mixing after it. A
    teacher that takes any size sees a picture of another aspect ratio at the student's size.
    """

    def __init__(
        self, student: InputConfig, teacher: InputConfig, *, any_size: bool = True
    ) -> None:
        super().__init__()
        std_S, std_T = torch.tensor(student.std), torch.tensor(teacher.std)
        shift = (torch.tensor(student.mean) - torch.tensor(teacher.mean)) / std_T
        self.register_buffer("scale", (std_S / std_T)[None, :, None, None], persistent=False)
        self.register_buffer("shift", shift[None, :, None, None], persistent=False)
        (height, width), (height_T, width_T) = student.input_size, teacher.input_size
        keeps = any_size and height * width_T != width * height_T
        self.size = (height, width) if keeps else (height_T, width_T)
        self.renormalises = student.mean != teacher.mean or student.std != teacher.std

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, height, width), normalised for the student. Returns the teacher's."""
        if self.renormalises:
            images = images * self.scale + self.shift
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return images

    def describe(self) -> str:
        own = "own mean and std" if self.renormalises else "the student's mean and std"
        return f"input {self.size[0]}x{self.size[1]}, {own}"


class Teacher(nn.Module):
    """A frozen network, always in evaluation mode, without gradients.

    amp_dtype: autocast type of its forward, or None.
    """

    def __init__(
        self,
        network: nn.Module,
        adapter: InputAdapter,
        *,
        name: str = "",
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.adapter, self.name, self.amp_dtype = adapter, name, amp_dtype
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, height, width), normalised for the student. Returns logits (B, C)."""
        device = images.device.type
        with torch.autocast(device, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            return self.network(self.adapter(images)).float()

    def describe(self) -> str:
        count = sum(p.numel() for p in self.network.parameters())
        return f"{self.name}, {count / 1e6:.2f} M parameters, {self.adapter.describe()}"


def build_teacher(
    args: Namespace,
    num_classes: int,
    student_inputs: InputConfig,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
) -> Teacher | None:
    """Return the teacher of the command line on `device`, or None without distillation.

    Raises UserError for an unknown model, a file that is missing or of another architecture, and
    another number of classes than the student's.
    """
    if args.distillation_type == "none":
        return None
    name, path = args.teacher_model, args.teacher_path
    own = models.data_config(name)
    if not path and own["num_classes"] not in (None, num_classes):
        raise UserError(_other_classes(name, "timm's weights", own["num_classes"], num_classes))
    network = models.create_model(name, num_classes=num_classes, pretrained=not path)
    if path:
        try:
            models.load_weights(network, path)
        except UserError as error:
            raise UserError(
                f"teacher {name}: {error}. To train a teacher on your classes: "
                f"python main.py --model {name} --data-path ... --output_dir teacher"
            ) from error
    teacher_inputs = InputConfig(
        input_size=own["input_size"][1:], mean=tuple(own["mean"]), std=tuple(own["std"]),
        interpolation=own["interpolation"], crop_ratio=own["crop_pct"],
    )  # fmt: skip
    takes_any = not own["fixed_input_size"] and not hasattr(network, "pos_embed")
    adapter = InputAdapter(student_inputs, teacher_inputs, any_size=takes_any)
    named = f"{name} from {path or 'timm'}"
    return Teacher(network, adapter, name=named, amp_dtype=amp_dtype).to(device)


def _other_classes(name: str, what: str, found: int, wanted: int) -> str:
    return (
        f"teacher {name}: {what} have {found} classes, the data has {wanted}; train a teacher on "
        f"them first: python main.py --model {name} --data-path ... --output_dir teacher"
    )
