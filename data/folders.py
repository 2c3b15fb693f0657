"""Find the images of a folder that has one subfolder for every class."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from base.errors import UserError
from base.text import printable

SUFFIXES = (*IMG_EXTENSIONS, ".jfif", ".jpe")
# The first bytes of JPEG, PNG, GIF, BMP and TIFF files
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")
JUNK = {"thumbs.db", "desktop.ini"}  # what Windows writes beside images
HIDDEN, EMPTY = "hidden files or folders", "class folders without images"


@dataclass
class Skipped:
    """Files and folders that are not read as images, counted by reason."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, path: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.examples.setdefault(reason, path)

    def describe(self) -> str:
        """Return counts, reasons and the first example of each; "" if nothing was skipped."""
        return "; ".join(
            f"{reason}: {count} ({printable(self.examples[reason])}{', ...' * (count > 1)})"
            for reason, count in self.counts.items()
        )


@dataclass(frozen=True)
class Listing:
    """The images of a folder: paths relative to it, a class number for each, and class names."""

    paths: list[str]
    labels: list[int]
    classes: list[str]
    skipped: Skipped


def list_images(folder: str | os.PathLike, *, natural_order: bool = False) -> Listing:
    """List the images of `folder`, one subfolder per class. No image is opened.

    natural_order: False: classes are the folders in `folder`, sorted as strings, as torchvision
        and DeiT sort them. True: classes are the folders that hold images, sorted with numbers
        by value, as timm's reader `folder` sorts them.
    Hidden files and folders, pipes and devices, other files, images outside class folders, empty
    folders, and links to folders that are read already: these are skipped and counted.
    Raises UserError without any class, and for a class folder in which no file is an image.
    """
    folder, skipped = os.fspath(folder), Skipped()
    class_folders: list[str] = []
    found = list(_images_below(folder, skipped, class_folders))
    _check_class_folders(folder, found, class_folders, skipped)
    if natural_order:
        pairs = [(os.path.basename(os.path.dirname(path)), path) for path in found]
        pairs.sort(key=lambda pair: (natural_key(pair[1]), pair[1]))
        classes = sorted({name for name, _ in pairs}, key=lambda name: (natural_key(name), name))
    else:
        pairs = sorted((path.split(os.sep, 1)[0], path) for path in found)
        classes = list(dict.fromkeys(name for name, _ in pairs))
    number = {name: label for label, name in enumerate(classes)}
    return Listing(
        [path for _, path in pairs], [number[name] for name, _ in pairs], classes, skipped
    )


def list_tree(folder: str) -> tuple[list[str], list[str], Skipped]:
    """Return the images and the tar files below `folder`, sorted paths relative to it.

    Images may lie at any depth. What `list_images` skips is skipped here too.
    """
    skipped, tars = Skipped(), list[str]()
    return sorted(_images_below(folder, skipped, [], tars)), sorted(tars), skipped


def is_image_name(name: str) -> bool:
    """Return whether a file name ends like an image's."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _images_below(
    folder: str, skipped: Skipped, class_folders: list[str], tars: list[str] | None = None
) -> Iterator[str]:
    """Yield the images in the subfolders of `folder`, as paths relative to it.

    The names of the subfolders are added to `class_folders`. With `tars`, tar files are added to
    it, and images in `folder` itself are yielded too.
    """
    root = os.path.realpath(folder)
    linked: set[str] = set()  # where the links lead that were followed
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            entries = sorted(os.scandir(os.path.join(folder, below)), key=lambda e: e.name)
        except OSError as error:
            raise UserError(
                f"{printable(os.path.join(folder, below))}: cannot be read ({error.strerror})"
            ) from error
        for entry in entries:
            path = os.path.join(below, entry.name)
            if entry.name.startswith("."):
                skipped.add(HIDDEN, path)
            elif entry.is_dir():
                if entry.is_symlink() and _leads_back(entry.path, root, linked):
                    skipped.add("links to folders that are read already", path)
                else:
                    waiting.append(path)
                    class_folders += [path] * (not below)
            elif tars is not None and entry.name.endswith(".tar") and entry.is_file():
                tars.append(path)
            elif reason := _why_no_image(entry):
                skipped.add(reason, path)
            elif tars is None and not below:
                skipped.add("images outside class folders", path)
            else:
                yield path


def _leads_back(link: str, root: str, linked: set[str]) -> bool:
    """Return whether a link to a folder leads to files that are read without it."""
    target = os.path.realpath(link)
    common = os.path.commonpath([target, root])
    if common in (target, root) or target in linked:
        return True
    linked.add(target)
    return False


def _why_no_image(entry: os.DirEntry) -> str:
    """Return why a file is not read as an image, or "" if it is."""
    if not entry.is_file():
        return "broken links" if entry.is_symlink() else "pipes or devices"
    if is_image_name(entry.name):
        return ""
    if suffix := os.path.splitext(entry.name)[1].lower():
        return f"files with suffix {printable(suffix)}"
    try:
        with open(entry.path, "rb") as file:
            start = file.read(12)
    except OSError:
        return "unreadable files without suffix"
    is_webp = start[:4] == b"RIFF" and start[8:] == b"WEBP"
    return "" if start.startswith(IMAGE_STARTS) or is_webp else "files without suffix"


def _check_class_folders(
    folder: str, found: list[str], class_folders: list[str], skipped: Skipped
) -> None:
    """Skip empty class folders. Raises UserError for one that has files, but no image."""
    used = {path.split(os.sep, 1)[0] for path in found}
    others = [name for name in class_folders if name not in used]
    no_images = [name for name in others if _has_files(os.path.join(folder, name))]
    if no_images:
        raise UserError(
            f"{printable(folder)}: no file in {some(no_images)} is an image "
            f"({skipped.describe()}); images end in "
            f"{' '.join(SUFFIXES)}; convert them or remove the folder"
        )
    for name in others:
        skipped.add(EMPTY, name)
    if not used:
        raise UserError(
            f"{printable(folder)}: no folders of images in it; one folder per class is needed"
            + (f" (skipped: {skipped.describe()})" if skipped.counts else "")
        )


def _has_files(folder: str) -> bool:
    """Return whether a file that is neither hidden nor junk is below `folder`."""
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        if any(name[0] != "." and name.lower() not in JUNK for name in files):
            return True
    return False


def some(names: Sequence[str], limit: int = 3) -> str:
    """Return the first names, printable, and dots if there are more."""
    return ", ".join(map(printable, names[:limit])) + (", ..." if len(names) > limit else "")
