"""What is unusual about a data set, in plain sentences with what to do about it."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import islice

from recipe.look.counts import LARGER, Contents, RejectedRecords

_SMALL = 0.05  # share of objects below a vision token that is worth a word
_ONE_SIDED = 0.9  # of one caption among several
_MANY = 0.02  # rejected records
_SHOWN = 5


@dataclass(frozen=True)
class Limits:
    """What a run allows, by its configuration or the defaults."""

    num_queries: int
    max_seq_len: int


def judge(contents: Contents, rejected: RejectedRecords, copies: "Copies", limits: Limits) -> list[str]:
    """Return one sentence for each thing that may be wrong, the worst kinds first."""
    found = [
        *_judge_objects(contents, limits),
        *_judge_captions(contents),
        *_judge_images(contents),
        *_judge_rejected(contents, rejected),
        *_judge_copies(copies),
        *_judge_tokens(contents, limits),
    ]
    return [sentence for sentence in found if sentence]


@dataclass(frozen=True)
class Copies:
    """Images that are stored more than once.

    Attributes:
        within: Samples of this split whose image an earlier sample has.
        shared: Of each other split, its images that are in this one too.
    """

    within: int
    shared: dict[str, int]


def share(part: int, whole: int) -> str:
    """Return a share in percent; small ones are not rounded to nothing, nor large ones to all."""
    percent = 100 * part / max(1, whole)
    if 0 < percent < 0.1 or 99.9 < percent < 100:
        return "under 0.1 %" if percent < 50 else "over 99.9 %"
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.1f} %"


def count(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _judge_objects(contents: Contents, limits: Limits) -> list[str]:
    objects, (now, later) = contents.objects, contents.smaller
    if not objects:
        return (
            ["No image holds an object: the detection head would learn to find nothing."] if contents.annotated else []
        )
    found = []
    if now >= _SMALL * objects:
        budget = contents.spec.max_pixels
        if later < 0.9 * now:
            remedy = f"raise image.max_pixels, now {budget}: at {LARGER * budget} it would be {share(later, objects)}"
        else:
            remedy = (
                f"at {LARGER} times image.max_pixels it would still be {share(later, objects)}, so raise "
                "image.min_pixels to enlarge the images, or cut them into tiles"
            )
        found.append(f"{share(now, objects)} of the objects are smaller than a vision token: {remedy}.")
    queries = limits.num_queries
    if contents.per_image.largest > queries:
        found.append(
            f"An image holds up to {contents.per_image.largest:,.0f} objects, more than the head has queries: raise "
            f"detection_head.num_queries, now {queries}."
        )
    if contents.covering >= 0.5 * objects:
        found.append(
            f"{share(contents.covering, objects)} of the boxes cover the whole image: check the unit of the boxes "
            "(--bbox-type)."
        )
    if contents.repeated:
        what = f"repeat{'s' * (contents.repeated == 1)} another of the same image, with box and caption"
        found.append(f"{count(contents.repeated, 'object')} {what}.")
    return found


def _judge_captions(contents: Contents) -> list[str]:
    counts, objects = contents.captions.counts, contents.objects
    found = []
    if len(counts) > 1:
        caption, number = counts.most_common(1)[0]
        if number >= _ONE_SIDED * objects:
            found.append(f"One caption, {caption!r}, has {share(number, objects)} of the objects.")
    alike = defaultdict[str, list[str]](list)
    for caption in counts:
        alike["".join(caption.split()).casefold()].append(caption)
    groups = [sorted(group, key=lambda caption: -counts[caption]) for group in alike.values() if len(group) > 1]
    if groups:
        shown = "; ".join(" and ".join(map(repr, group[:3])) for group in islice(groups, _SHOWN))
        found.append(
            f"{count(len(groups), 'caption')} {'is' if len(groups) == 1 else 'are'} written in several ways, which "
            f"differ only in case or blanks: {shown}{', ...' * (len(groups) > _SHOWN)}. Write each in one way."
        )
    numbers = [caption for caption in counts if caption.replace(".", "").isdigit()]
    if counts and len(numbers) == len(counts):
        found.append(
            f"All captions are numbers, such as {numbers[0]!r}: the head learns to write words, so convert with the "
            "names of the classes."
        )
    return found


def _judge_images(contents: Contents) -> list[str]:
    images, found = contents.images, []
    if contents.empty:
        found.append(
            f"{count(contents.empty, 'image')} ({share(contents.empty, images)}) hold{'s' * (contents.empty == 1)} no "
            "object: check that nothing was left unannotated there."
        )
    if contents.not_annotated:
        found.append(
            f"{count(contents.not_annotated, 'image')} ({share(contents.not_annotated, images)}) "
            f"{'is' if contents.not_annotated == 1 else 'are'} not annotated: the detection head learns nothing from "
            "them."
        )
    if contents.text_only and not contents.images:
        found.append("No sample has an image: train with detection_head=null.")
    return found


def _judge_rejected(contents: Contents, rejected: RejectedRecords) -> list[str]:
    number = rejected.counts.total()
    if number < max(1, _MANY * (contents.samples + number)):
        return []
    reason, most = rejected.counts.most_common(1)[0]
    return [
        f"{count(number, 'record')} of {contents.samples + number:,} ({share(number, contents.samples + number)}) "
        f"{'was' if number == 1 else 'were'} rejected, {most:,} of them for: {reason}."
    ]


def _judge_copies(copies: Copies) -> list[str]:
    found = [
        f"{count(number, 'image')} of {name} {'is' if number == 1 else 'are'} also here: if one is trained on, scores "
        "on the other say too much (only a pool of teachers may share them). Convert again with --val-share."
        for name, number in copies.shared.items()
        if number
    ]
    if copies.within:
        what = f"repeat{'s' * (copies.within == 1)} the image or chat of another, perhaps with other annotations"
        found.append(f"{count(copies.within, 'sample')} {what}.")
    return found


def _judge_tokens(contents: Contents, limits: Limits) -> list[str]:
    found = []
    if contents.unusable:
        found.append(f"{count(contents.unusable, 'sample')} cannot be trained on: {contents.first_unusable}.")
    if contents.tokens.largest > limits.max_seq_len:
        found.append(
            f"A sample has up to {contents.tokens.largest:,.0f} tokens: raise max_seq_len, now {limits.max_seq_len}, "
            "or lower image.max_pixels."
        )
    return found
