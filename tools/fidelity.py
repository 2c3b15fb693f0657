"""How well a student agrees with its teacher: numbers from logits, and the pass that computes them.

Shapes: P images, B batch, C classes, N tokens, D width.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.significance import wilson_interval
from base.text import class_name
from models import has_distillation_head
from models.features import FeatureTaps, Tap, TappedOutput, layout_of
from training.metrics import accuracy

MOST_CLASSES = 20  # of a confusion matrix
BINS = 15  # of confidence, all of one width (Guo et al. 2017)
TEACHER, STUDENT, CLS, DIST = "teacher", "student", "class head", "distillation head"


def top(logits: Tensor, labels: Tensor, present: Sequence[int] | None = None) -> dict[str, Any]:
    """Return {"acc1", "acc5", "acc1_interval"} in percent. logits: (P, C), labels: (P,).

    acc1_interval: the ends of the 95 % interval. present: the classes that have images; adds
    "acc1_present", of the largest of their logits.
    """
    hits1, hits5 = map(float, accuracy(logits, labels))
    found: dict[str, Any] = {"acc1": 100 * hits1 / len(labels), "acc5": 100 * hits5 / len(labels)}
    found["acc1_interval"] = [100 * end for end in wilson_interval(hits1, len(labels))]
    if present is not None:
        chosen = torch.tensor(present)
        hits = (chosen[logits[:, chosen].argmax(1)] == labels).double()
        found["acc1_present"] = 100 * float(hits.mean())
    return found


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
    predictions: Mapping[str, Tensor], labels: Tensor, classes: list[str]
) -> list[dict[str, Any]]:
    """Return the accuracy of each network in percent for every class with images.

    predictions: classes (P,) by name, `STUDENT` among them. With `TEACHER` each row has the "gap",
    student minus teacher. Sorted from the student's worst gap, or accuracy, to its best.
    """
    rows = []
    for label in labels.unique().tolist():
        held = labels == label
        row: dict[str, Any] = {"class": class_name(classes, label), "count": int(held.sum())}
        for name, predicted in predictions.items():
            row[name] = 100 * float((predicted[held] == label).double().mean())
        if TEACHER in row:
            row["gap"] = row[STUDENT] - row[TEACHER]
        rows.append(row)
    return sorted(rows, key=lambda row: (row.get("gap", row[STUDENT]), row["class"]))


def confusion(predicted: Tensor, labels: Tensor, classes: list[str]) -> dict[str, Any]:
    """Return {"classes", "counts"}: how many images of a class (row) got a prediction (column).

    Of more than `MOST_CLASSES` classes those with most errors are shown, in their order.
    """
    errors = torch.bincount(torch.cat([labels, predicted]))
    errors -= 2 * torch.bincount(labels[labels == predicted], minlength=len(errors))
    used = torch.cat([labels, predicted]).unique()
    shown = used[errors[used].argsort(descending=True, stable=True)][:MOST_CLASSES].sort().values
    counts = [[int(((labels == row) & (predicted == c)).sum()) for c in shown] for row in shown]
    return {"classes": [class_name(classes, int(c)) for c in shown], "counts": counts}


@dataclass
class Outputs:
    """The outputs of all networks for the same images.

    logits: (P, C) by name, `STUDENT` (the mean of two heads, where there are two) always among
    them. token_cosine: of class and distillation token, for hidden[0], hidden[1], ...
    """

    labels: Tensor
    logits: dict[str, Tensor]
    token_cosine: list[float] = field(default_factory=list)

    def predictions(self) -> dict[str, Tensor]:
        """Return the labels (P,) and the predicted classes (P,) of each network, teacher first."""
        names = [name for name in (TEACHER, STUDENT, CLS, DIST) if name in self.logits]
        return {"label": self.labels} | {name: self.logits[name].argmax(1) for name in names}

    def confidence(self) -> dict[str, Tensor]:
        """Return the probability (P,) of each prediction, and with a teacher "nats" (P,)."""
        found = {name: values.softmax(1).amax(1) for name, values in self.logits.items()}
        if TEACHER in self.logits:
            found["nats"] = divergence(self.logits[TEACHER], self.logits[STUDENT])
        return found


@torch.no_grad()
def collect(
    network: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable,
    device: torch.device,
    *,
    limit: int | None = None,
) -> Outputs:
    """Run both networks on the images, once. limit: most images."""
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
        seen += room
        if limit is not None and seen >= limit:
            break
    for handle in handles:
        handle.remove()
    if taps:
        taps.remove()
    together = {name: torch.cat(parts) for name, parts in logits.items()}
    return Outputs(torch.cat(labels), together, (cosines / seen).tolist())


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
    networks = {name: predictions[name] for name in (STUDENT, TEACHER) if name in logits}
    found["class_gaps"] = class_gaps(networks, labels, classes)
    found["confusion"] = confusion(predictions[STUDENT], labels, classes)
    if TEACHER in logits:
        found["kl_nats"] = {
            name: float(divergence(logits[TEACHER], values).mean())
            for name, values in logits.items()
            if name != TEACHER
        }
    return found
