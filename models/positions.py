"""Position embeddings: what their entries stand for, and how they move to another network.

Shapes: (1, N, D): entries for prefix tokens first (none in DeiT III), then the patches row by row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from base.errors import UserError

Grid = tuple[int, int]
TOKENS = ("cls_token", "dist_token")  # in the order of their entries


@dataclass(frozen=True)
class Layout:
    """tokens: the names of the tokens that have an entry; grid: patches in (height, width)."""

    tokens: tuple[str, ...]
    grid: Grid

    def describe(self) -> str:
        words = [f"{self.grid[0]}x{self.grid[1]} patches"]
        return " and ".join([*words, *(f"the {name.replace('_', ' ')}" for name in self.tokens)])


def layout_of_network(network: nn.Module) -> Layout | None:
    """Return the layout of a network's `pos_embed`; None for one without, or with another form."""
    own = network.state_dict()
    grid = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    if grid is None or "pos_embed" not in own or own["pos_embed"].dim() != 3:
        return None
    entries = own["pos_embed"].shape[1] - grid[0] * grid[1]
    tokens = tuple(name for name in TOKENS if name in own)
    return Layout(tokens[:entries], tuple(grid)) if 0 <= entries <= len(tokens) else None


def layout_of_file(weights: Mapping[str, Tensor], own: Layout, stated: Grid | None) -> Layout:
    """Return the layout of a file's `pos_embed`.

    stated: the grid by the file's settings. Without it the patches are a square, or the grid of
    the network where only that fits.
    Raises UserError for a form or a number of entries that fits no grid.
    """
    positions = weights["pos_embed"]
    if positions.dim() != 3 or len(positions) != 1 or not positions.shape[1]:
        raise UserError(f"the file's position embedding has shape {tuple(positions.shape)}")
    tokens = tuple(name for name in TOKENS if name in weights)
    kinds = dict.fromkeys((tokens, ()))
    count = positions.shape[1]
    for kind in kinds:
        if stated and stated[0] * stated[1] == count - len(kind):
            return Layout(kind, stated)
    for kind in kinds:
        side = math.isqrt(max(0, count - len(kind)))
        if side and side * side == count - len(kind):
            return Layout(kind, (side, side))
    for kind in kinds:
        if own.grid[0] * own.grid[1] == count - len(kind):
            return Layout(kind, own.grid)
    raise UserError(
        f"the file's position embedding has {count} entries, which is no square of patches with or "
        f"without its {len(tokens)} tokens, nor the model's {own.describe()}; use the resolution "
        "that it was trained at"
    )


def convert(weights: Mapping[str, Tensor], file: Layout, network: nn.Module, own: Layout) -> dict:
    """Return `pos_embed`, and the tokens that change with it, for `network`.

    An entry of a token is added to the token. If the network has no such entries, it goes into the
    token itself. If the file has none, it is zero. Both leave the logits as they are.
    Another grid is resampled (bicubic). Entries of tokens that the file lacks stay the network's.
    """
    positions = weights["pos_embed"]
    result = network.state_dict()["pos_embed"].clone()
    changed: dict[str, Tensor] = {}
    for index, token in enumerate(own.tokens):
        if token in file.tokens:
            result[:, index] = positions[:, file.tokens.index(token)]
        elif token in weights:
            result[:, index] = 0
    for index, token in enumerate(file.tokens):
        if not own.tokens and token in weights:
            changed[token] = weights[token] + positions[:, index : index + 1]
    patches = positions[:, len(file.tokens) :]
    if file.grid != own.grid:
        patches = resample_abs_pos_embed(
            patches.float(), list(own.grid), list(file.grid), num_prefix_tokens=0
        )
    result[:, len(own.tokens) :] = patches
    return changed | {"pos_embed": result}


def grid_of_settings(settings: Mapping[str, object], weights: Mapping[str, Tensor]) -> Grid | None:
    """Return the patch grid of a run by its `input_size`; None if it is not stated."""
    size, patch = settings.get("input_size"), weights.get("patch_embed.proj.weight")
    if not isinstance(size, list | tuple) or not size or not isinstance(patch, Tensor):
        return None
    if patch.dim() != 4 or not all(isinstance(side, int) for side in size):
        return None
    return size[0] // patch.shape[-2], size[-1] // patch.shape[-1]
