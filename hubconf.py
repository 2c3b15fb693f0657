"""torch.hub: the released checkpoints by DeiT's names.

    torch.hub.load(REPOSITORY, "deit_small_distilled_patch16_224", pretrained=True)
    torch.hub.load(REPOSITORY, "deit_small_patch16_LS", pretrained=True, tag="384_21k")

`tag` picks one of several files of a name; `python main.py --list-models` prints them.
"""

from functools import partial as _partial
from typing import Any as _Any

import models as _models
from models.released import RELEASED as _released

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL"]  # what building a network imports


def _load(name: str, pretrained: bool = False, *, tag: str = "", **options: _Any) -> _Any:
    """Return the network. options: num_classes, img_size, drop_rate, drop_path_rate."""
    return _models.create_model(f"{name}.{tag}" if tag else name, pretrained=pretrained, **options)


for _name in dict.fromkeys(key.partition(".")[0] for key in _released):
    globals()[_name] = _partial(_load, _name)
    globals()[_name].__doc__ = f"Return {_name}; {_load.__doc__}"
