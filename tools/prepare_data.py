"""Turn a data set into a few large files that training reads several times as fast.

    python tools/prepare_data.py /data/imagenet prepared
    python tools/prepare_data.py /data/imagenet prepared --format jpeg --short-side 256
    python tools/prepare_data.py cifar prepared --data-set CIFAR10
    python tools/prepare_data.py prepared --verify

Then train with `--data-set PREPARED --data-path prepared`. Images whose shorter side is above
`--short-side` are shrunk to it, bicubic, and keep their shape; none is enlarged. `raw` keeps their
pixels (ImageNet at 288: about 420 GB), `jpeg` encodes them again (about 50 GB), except JPEG files
that need no shrinking, which stay as they are. Interrupted or killed, the same command goes on
where it stopped, and the files are the same in every bit. `--verify` compares every image with
its checksum.
"""

import argparse
import hashlib
import itertools
import logging
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
from base.errors import UserError  # noqa: E402
from base.flag_table import INAT_CATEGORIES  # noqa: E402
from base.text import printable  # noqa: E402
from data import folders, image_dataset, image_ops, image_source, packed, sources  # noqa: E402
from data.labels import ModelClasses, map_labels  # noqa: E402

_logger = logging.getLogger("prepare_data")
SPLITS = {"train": True, "val": False}
Entry = tuple[int, bytes, int, int, int] | tuple[int, str]  # place, bytes, height, width, label


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help='the data set\'s folder ("" for the digits); with --verify the prepared one')
    add("target", nargs="?", help="new folder, or one that was begun")
    add("--data-set", default="IMNET", help="as for main.py: IMNET, CIFAR10, wds/..., ...")
    add("--format", default=packed.RAW, choices=(packed.RAW, packed.JPEG))
    add("--short-side", default=288, type=int, help="pixels")
    add("--quality", default=90, type=int, help="of JPEG, 1 to 95")
    add("--splits", default=list(SPLITS), nargs="+", choices=list(SPLITS))
    add("--val-fraction", default=None, type=float, help="as for main.py")
    add("--val-labels", default="", help="as for main.py")
    add("--on-bad-image", default="fail", choices=("fail", "skip"))
    add("--num-workers", default=datasets.cores_here(), type=int)
    add("--inat-category", default="name", choices=INAT_CATEGORIES)
    add("--val-split", default="test", choices=("test", "dev"), help="of the embedded digits")
    add("--verify", action="store_true", help="read every image and compare its checksum")
    return parser


class Encoded(Dataset):
    """The images of a source from `first` on, as they are to be kept (`Entry`)."""

    def __init__(self, source: image_source.Source, first: int, args: argparse.Namespace) -> None:
        self.source, self.first = source, first
        self.how = (args.format, args.short_side, args.quality)

    def __len__(self) -> int:
        return len(self.source) - self.first

    def __getitem__(self, index: int) -> Entry:
        place = self.first + index
        try:
            return place, *encode(self.source, place, *self.how)
        except image_ops.UNREADABLE as error:
            return place, f"{self.source.name(place)}: {' '.join(str(error).split())}"


def encode(
    source: image_source.Source, place: int, kind: str, short_side: int, quality: int
) -> tuple[bytes, int, int, int]:
    """Return bytes, height, width and label of an image; a JPEG file that fits stays as it is."""
    if not isinstance(source, image_source.Files):
        image, label = source.load(place)
        return *packed.encode(image, kind, short_side, quality), int(label)
    data, label = Path(source.path(place)).read_bytes(), int(source.labels[place])
    image = image_ops.decode(data)  # also what stays as it is, to find out damage
    height, width = image_ops.size_of(image)
    fits = min(height, width) <= short_side
    if kind == packed.JPEG and fits and data.startswith(image_ops.JPEG_START):
        return data, height, width, label
    return *packed.encode(image, kind, short_side, quality), label


def entries(
    source: image_source.Source | image_source.Shards, first: int, args: argparse.Namespace
) -> Iterator[Entry]:
    """Yield what is to be kept of each image, in the source's order, from place `first` on."""
    if not isinstance(source, image_source.Shards):
        yield from DataLoader(
            Encoded(source, first, args), batch_size=None, num_workers=args.num_workers
        )
        return
    how = (args.format, args.short_side, args.quality)
    stream = itertools.islice(source.dataset, first, None)
    for place, (image, label) in enumerate(stream, start=first):
        yield place, *packed.encode(image_ops.to_rgb(image), *how), int(label)


def open_all(args: argparse.Namespace) -> dict[str, image_source.Source]:
    """Return the source of each split, and print which files of it are not used."""
    opened = {}
    for split in args.splits:
        part = sources.Part(
            is_train=SPLITS[split],
            inat_category=args.inat_category,
            val_split=args.val_split,
            in_order=True,
            val_fraction=args.val_fraction if "val" in args.splits else 0,
            val_labels=args.val_labels,
        )
        opened[split] = sources.open_source(args.data_set, args.source, part)
        for note in opened[split].notes():
            print(note)
    return opened


def stored_labels(opened: Mapping[str, image_source.Source]) -> dict[str, Sequence[int] | None]:
    """Return for each split the stored label of each of its classes; None stores them as read.

    The first split's classes are stored, and others are matched with them by name. Raises
    UserError for a class that the first split does not have.
    """
    first, *_ = opened
    names = opened[first].classes
    found: dict[str, Sequence[int] | None] = {}
    for split, source in opened.items():
        found[split] = None
        if names is not None and source.classes is not None:
            model = ModelClasses(len(names), tuple(names), f"the {first} part")
            count = len(source.classes)
            found[split] = map_labels(
                source.classes, count, source.what, model, given=len(names)
            ).outputs
    return found


def plan_of(opened: Mapping[str, image_source.Source], args: argparse.Namespace) -> dict[str, Any]:
    """Return all that determines the bytes of the prepared data set."""
    found = {}
    for split, source in opened.items():
        found[split] = f"{len(source)}, {hashlib.sha256(source.identity()).hexdigest()[:12]}"
    plan = {
        "data set": args.data_set,
        "pictures": found,
        "classes": hashlib.sha256(repr(next(iter(opened.values())).classes).encode()).hexdigest(),
        "format": args.format,
        "short side": args.short_side,
        "bad images": args.on_bad_image,
        "Pillow": PIL.__version__,
        "version of our pixels": image_ops.VERSION,
    }
    return plan | ({"quality": args.quality} if args.format == packed.JPEG else {})


def prepare(args: argparse.Namespace) -> None:
    """Write the prepared data set, or what is missing of it."""
    folder = Path(args.target)
    opened = open_all(args)
    labels = stored_labels(opened)
    plan = plan_of(opened, args)
    if packed.begin(folder, plan):
        print(f"{folder}: complete already")
        return
    splits = {
        split: write_split(folder, split, source, labels[split], args)
        for split, source in opened.items()
    }
    first = next(iter(opened.values()))
    manifest = {"plan": plan, "kind": args.format, "classes": first.classes, "flips": first.mirrors}
    packed.finish(folder, manifest | {"splits": splits})
    print(f"ready: --data-set PREPARED --data-path {folder}")


def write_split(
    folder: Path,
    split: str,
    source: image_source.Source,
    labels: Sequence[int] | None,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Write the images of a split that are missing; return what the manifest holds about it."""
    writer, total = packed.Writer(folder, split), len(source)
    if writer.next_place:
        print(f"{split}: goes on after {writer.next_place} of {total}")
    with bar(split, total, writer.next_place) as shown:  # an error ends its line
        for place, *entry in entries(source, writer.next_place, args):
            if len(entry) == 1:
                if args.on_bad_image == "fail":
                    raise UserError(
                        f"image {entry[0]}; repair or remove it, or use --on-bad-image skip"
                    )
                _logger.warning("image %s; left out", entry[0])
                continue
            data, height, width, label = entry
            if labels is not None:
                label = labels[image_dataset.check_label(label, len(labels))]
            writer.append(data, height, width, label, place)
            shown.update(place + 1 - shown.n)
    facts = writer.close()
    if not facts["pictures"]:
        raise UserError(f"{args.source}: no image for {split}")
    print(f"{split}: {facts['pictures']} images, {facts['bytes'] / 1e9:.3f} GB")
    return facts


def bar(name: str, total: int, done: int = 0) -> tqdm:
    """Return a progress bar, which writes every half minute if stderr is no terminal."""
    seconds = 0.2 if sys.stderr.isatty() else 30
    return tqdm(desc=name, total=total, initial=done, unit=" images", mininterval=seconds)


def verify(folder: str) -> None:
    """Compare every image with its checksum. Raises UserError naming the first damaged ones."""
    bad = []
    for split in packed.read_manifest(Path(folder))["splits"]:
        source = packed.Prepared(folder, split)
        with bar(split, len(source)) as shown:
            for damaged in source.damaged():
                shown.update()
                bad += [] if damaged is None else [source.name(damaged)]
        print(f"{split}: {len(source)} images read")
    if bad:
        raise UserError(
            f"{folder}: {len(bad)} images are damaged ({folders.some(bad)}); remove the folder "
            "and prepare it again"
        )
    print("all images are as they were written")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.short_side < 1 or not 1 <= args.quality <= 95:
            raise UserError("--short-side must be at least 1, --quality from 1 to 95")
        if args.val_fraction is not None and not 0 < args.val_fraction < 1:
            raise UserError(f"--val-fraction {args.val_fraction}: must be between 0 and 1")
        if args.num_workers < 0:
            raise UserError(f"--num-workers {args.num_workers}: must be at least 0")
        if args.verify:
            verify(args.source)
        elif args.target is None:
            raise UserError("give the data set's folder and a new folder")
        else:
            prepare(args)
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{printable(str(error.filename))}: " if error.filename else ""
        reason = error.strerror or str(error)
        print(f"error: {where}{reason}; the same command goes on afterwards", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
