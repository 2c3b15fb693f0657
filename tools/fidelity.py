"""How well a student agrees with its teacher: numbers from logits, and the pass that computes them.

Shapes: P images, B batch, C classes, N tokens, D width.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import has_distillation_head
from models.features import FeatureTaps, Tap, TappedOutput, layout_of
from training.metrics import accuracy

BINS = 15  # of confidence, all of one width (Guo et al. 2017)
TEACHER, STUDENT, CLS, DIST = "teacher", "student", "class head", "distillation head"


def top(logits: Tensor, labels: Tensor, present: Sequence[int] | None = None) -> dict[str, float]:
    """Return {"acc1", "acc5"} in percent. logits: (P, C), labels: (P,).

    present: the classes that have images; adds "acc1_present", of the largest of their logits.
    """
    acc1, acc5 = (100 * float(hits) / len(labels) for hits in accuracy(logits, labels))
    if present is None:
        return {"acc1": acc1, "acc5": acc5}
    chosen = torch.tensor(present)
    hits = (chosen[logits[:, chosen].argmax(1)] == labels).double()
    return {"acc1": acc1, "acc5": acc5, "acc1_present": 100 * float(hits.mean())}


def agreement(predictions: Mapping[str, Tensor]) -> list[list[float]]:
    """Return the share of images (0 to 1) for which two of `predictions` are the same class.

    predictions: classes (P,) by name; labels may be among them. Symmetric, 1 on the diagonal.
    Source: Touvron et al. 2021 (arXiv 2012.12877), Table 4, which prints 1 minus it.
    """
    rows = list(predictions.values())
    return [[float((one == other).double().mean()) for other in rows] for one in rows]


def divergence(logits_T: Tensor, logits_S: Tensor) -> Tensor:
    """Return KL(teacher || student) of each image in nats, (P,) float64, at temperature 1."""
    log_T, log_S = logits_T.double().log_softmax(1), logits_S.double().log_softmax(1)
    return F.kl_div(log_S, log_T, reduction="none", log_target=True).sum(1)


def calibration(logits: Tensor, labels: Tensor, bins: int = BINS) -> dict[str, Any]:
    """Return {"ece", "bins"}: the calibration error, and confidence and accuracy of each bin.

    ECE is the mean over images of |accuracy - confidence| of the bin an image falls into, from
    0 to 1; a bin holds the confidences in (lower, upper]. An empty bin has no entry.
    Source: Guo et al. 2017 (arXiv 1706.04599), equation 3.
    """
    confidence, answer = logits.double().softmax(1).max(1)
    right = (answer == labels).double()
    places = (confidence * bins).ceil().long().clamp(1, bins) - 1
    found, ece = [], 0.0
    for place in places.unique().tolist():
        held = places == place
        share = float(held.double().mean())
        entry = {
            "lower": place / bins,
            "upper": (place + 1) / bins,
            "count": int(held.sum()),
            "confidence": float(confidence[held].mean()),
            "accuracy": float(right[held].mean()),
        }
        ece += share * abs(entry["accuracy"] - entry["confidence"])
        found.append(entry)
    return {"ece": ece, "bins": found}


def class_gaps(
    predictions_T: Tensor, predictions_S: Tensor, labels: Tensor, classes: list[str]
) -> list[dict[str, Any]]:
    """Return, for every class with images, both accuracies and student minus teacher (percent).

    predictions: classes (P,). Sorted from the student's worst gap to its best.
    """
    rows = []
    for label in labels.unique().tolist():
        held = labels == label
        acc_T, acc_S = (
            100 * float((predictions[held] == label).double().mean())
            for predictions in (predictions_T, predictions_S)
        )
        rows.append(
            {
                "class": classes[label],
                "count": int(held.sum()),
                "teacher": acc_T,
                "student": acc_S,
                "gap": acc_S - acc_T,
            }
        )
    return sorted(rows, key=lambda row: (row["gap"], row["class"]))


@dataclass
class Outputs:
    """The outputs of all networks for the same images.

    logits: (P, C) by name, `STUDENT` (the mean of two heads, where there are two) always among
    them. token_cosine: of class and distillation token, for hidden[0], hidden[1], ... farthest: the
    images with the largest divergence: (nats, image (3, H, W), index in the pass).
    """

    labels: Tensor
    logits: dict[str, Tensor]
    token_cosine: list[float] = field(default_factory=list)
    farthest: list[tuple[float, Tensor, int]] = field(default_factory=list)

    def predictions(self) -> dict[str, Tensor]:
        """Return the labels (P,) and the predicted classes (P,) of each network, teacher first."""
        names = [name for name in (TEACHER, STUDENT, CLS, DIST) if name in self.logits]
        return {"label": self.labels} | {name: self.logits[name].argmax(1) for name in names}


@torch.no_grad()
def collect(
    network: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable,
    device: torch.device,
    *,
    limit: int | None = None,
    keep: int = 12,
) -> Outputs:
    """Run both networks on the images, once. limit: most images; keep: how many farthest ones."""
    network.eval()
    layers = layout_of(network).hidden if has_distillation_head(network) else 0
    taps = FeatureTaps(network, [Tap("hidden", i) for i in range(layers)]) if layers else None
    predictions: dict[str, Tensor] = {}
    handles = [
        head.register_forward_hook(lambda _, __, out, name=name: predictions.__setitem__(name, out))
        for name, head in zip((CLS, DIST), network.get_classifier() if layers else ())
    ]
    labels: list[Tensor] = []
    logits: dict[str, list[Tensor]] = {}
    cosines = torch.zeros(layers, dtype=torch.float64)
    farthest: list[tuple[float, Tensor, int]] = []
    seen = 0
    for images, label, *_ in batches:
        room = len(label) if limit is None else min(len(label), limit - seen)
        images, label = images.to(device)[:room], label[:room]
        seen_inside = taps.forward(network, images) if taps else TappedOutput(network(images), {})
        output, hidden = seen_inside.logits, seen_inside.states
        outputs = {STUDENT: output, **predictions}
        if teacher is not None:
            outputs[TEACHER] = teacher(images)
        for name, values in outputs.items():
            logits.setdefault(name, []).append(values.float().cpu())
        labels.append(label)
        for tap, tokens in hidden.items():  # (B, N, D)
            cosine = F.cosine_similarity(tokens[:, 0].float(), tokens[:, 1].float())
            cosines[tap.layer] += cosine.double().sum().cpu()
        if teacher is not None:
            nats = divergence(logits[TEACHER][-1], logits[STUDENT][-1]).tolist()
            farthest += [(n, images[i].cpu(), seen + i) for i, n in enumerate(nats)]
            farthest = sorted(farthest, key=lambda one: -one[0])[:keep]
        seen += room
        if limit is not None and seen >= limit:
            break
    for handle in handles:
        handle.remove()
    if taps:
        taps.remove()
    together = {name: torch.cat(parts) for name, parts in logits.items()}
    return Outputs(torch.cat(labels), together, (cosines / seen).tolist(), farthest)


def numbers(
    outputs: Outputs, classes: list[str], present: Sequence[int] | None = None
) -> dict[str, Any]:
    """Return all that the report shows, except images, in plain types.

    present: the classes that have images, or None if all have.
    """
    labels, predictions = outputs.labels, outputs.predictions()
    logits = {name: outputs.logits[name] for name in predictions if name != "label"}
    found: dict[str, Any] = {
        "images": len(labels),
        "accuracy": {name: top(values, labels, present) for name, values in logits.items()},
        "agreement": {"names": list(predictions), "matrix": agreement(predictions)},
        "calibration": {name: calibration(values, labels) for name, values in logits.items()},
        "token_cosine": outputs.token_cosine,
    }
    if TEACHER in logits:
        found["kl_nats"] = {
            name: float(divergence(logits[TEACHER], values).mean())
            for name, values in logits.items()
            if name != TEACHER
        }
        found["class_gaps"] = class_gaps(
            predictions[TEACHER], predictions[STUDENT], labels, classes
        )
    return found
