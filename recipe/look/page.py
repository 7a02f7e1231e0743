"""The page of a data set: HTML that loads nothing, with bars as inline SVG. All text of the data is escaped."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from recipe.gallery import jpeg_url
from recipe.look.counts import LARGER, Contents, Histogram, RejectedRecords
from recipe.look.judge import count, share
from recipe.prediction.draw import draw_sample
from recipe.redact import redact_text
from recipe.schema import Sample

TEMPLATE = Path(__file__).with_name("page.html")
LONGEST = 640  # pixels of a drawn image
_TOP = 20  # captions
_FOLDERS = re.compile(r"(?<=['\"])/(?:[^/'\"]+/)+|(?<![\w.:/])/(?:[^/\s'\"]+/)+")  # in quotes also with blanks
_LONGEST_TEXT = 1500  # letters of a chat


@dataclass(frozen=True)
class Look:
    """All that the page shows.

    Attributes:
        title: Of the set and its part.
        tokens_unknown: Why tokens are not counted; empty if they are.
        images: The bytes of the shown images by position.
    """

    title: str
    contents: Contents
    warnings: Sequence[str]
    rejected: RejectedRecords
    tokens_unknown: str
    images: Mapping[int, bytes]


def render(look: Look) -> str:
    """Return the page."""
    contents = look.contents
    body = [
        f"<h1>{_text(look.title)}</h1>",
        f"<p>{_text(summary_line(contents, look.rejected))}</p>",
        _warnings(look.warnings),
        f'<div class="cards">{"".join(_cards(look))}</div>',
        *(
            _images(name, best.found(), look.images)
            for name, best in {"At random": contents.spread, **contents.shown}.items()
        ),
        _chats(contents.texts.found()),
    ]
    page = TEMPLATE.read_text(encoding="utf-8").replace("@TITLE@", _text(look.title))
    return page.replace("@BODY@", "\n".join(filter(None, body)))


def summary_line(contents: Contents, rejected: RejectedRecords) -> str:
    """Return the counts of the set in one sentence."""
    parts = [
        f"{count(contents.samples, 'sample')}: {count(contents.images, 'image')}",
        *([f"{contents.text_only:,} text only"] if contents.text_only else []),
        *([f"{contents.not_annotated:,} not annotated"] if contents.not_annotated else []),
        *([f"{contents.empty:,} known to hold nothing"] if contents.empty else []),
        *([f"{contents.searched:,} searched for some categories only"] if contents.searched else []),
        *([f"{contents.chats:,} with a chat of their own"] if contents.chats else []),
    ]
    crowds = f" and {count(contents.crowds, 'crowd region')}" * bool(contents.crowds)
    captions = f"{count(contents.objects, 'object')}{crowds}, {contents.captions.describe('caption')}"
    return f"{', '.join(parts)}. {captions}. {count(rejected.counts.total(), 'record')} rejected."


def without_folders(text: str) -> str:
    """Return a text without secrets, and its absolute paths without the folders: the page may be given to others."""
    return _FOLDERS.sub("", redact_text(text))


def _text(text: str) -> str:
    return escape(without_folders(text).encode(errors="backslashreplace").decode())


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return '<p class="calm">Nothing unusual was found. Look at the images all the same.</p>'
    return f'<ul class="warnings">{"".join(f"<li>{_text(warning)}</li>" for warning in warnings)}</ul>'


def _cards(look: Look) -> list[str]:
    contents, rejected = look.contents, look.rejected
    spec = contents.spec
    side = spec.patch_size * spec.merge_size
    now, later = contents.smaller
    small = (
        f"Side of a box, as the root of its area, in vision tokens of {side} x {side} pixels of the image as the model "
        f"sees it, with at most {spec.max_pixels:,} pixels. {share(now, contents.objects)} are smaller than a token; "
        f"at {LARGER} times the pixels {share(later, contents.objects)}."
    )
    budget = f"{share(contents.reduced, contents.images)} of the images are reduced to {spec.max_pixels:,} pixels."
    tokens = _card("Tokens per sample", _bars(contents.tokens.rows()), _mean(contents.tokens, "tokens"))
    if look.tokens_unknown:
        tokens = _card("Tokens per sample", "", look.tokens_unknown)
    of_sizes = f"{contents.sizes.describe('size')}, of at most {contents.longest.largest:,.0f} pixels a side."
    reasons = [
        f'<ul class="plain">{"".join(f"<li>{_text(_rejected_line(row))}</li>" for row in examples)}</ul>'
        if position
        else f"<p><b>{_text(reason)}</b>, such as</p>"
        for reason, examples in rejected.examples.items()
        for position in (0, 1)
    ]
    return [
        _card("Captions", _bars(contents.captions.rows(_TOP)), f"{contents.captions.describe('caption')}."),
        _card("Words per caption", _bars(contents.words.rows()), _mean(contents.words, "words")),
        _card("Objects per annotated image", _bars(contents.per_image.rows()), _mean(contents.per_image, "objects")),
        _card("Box sizes in vision tokens", _bars(contents.sides.rows()), small),
        _card("Longer side of the image, pixels", _bars(contents.longest.rows()), budget),
        _card("Most frequent sizes, width x height", _bars(contents.sizes.rows(8)), of_sizes),
        _card("Width / height", _bars(contents.aspects.rows())),
        _card("Vision tokens per image", _bars(contents.image_tokens.rows()), _mean(contents.image_tokens, "tokens")),
        tokens,
        *([_card("Rejected records", _bars(rejected.counts.most_common()) + "".join(reasons))] if reasons else []),
    ]


def _card(title: str, content: str, note: str = "") -> str:
    below = f'<p class="faint">{_text(note)}</p>' if note else ""
    return f'<section class="card"><h3>{_text(title)}</h3>{content}{below}</section>'


def _mean(histogram: Histogram, noun: str) -> str:
    return f"{histogram.mean:,.1f} {noun} on average, at most {histogram.largest:,.0f}." if histogram.number else ""


def _bars(rows: Sequence[tuple[str, int]]) -> str:
    if not rows:
        return '<p class="faint">None.</p>'
    total, most = sum(number for _, number in rows), max(number for _, number in rows)
    lines = [
        f'<tr><th>{_text(name) or "(empty)"}</th><td class="number">{number:,}</td>'
        f'<td class="share">{share(number, total)}</td>'
        f'<td><svg role="presentation"><rect width="{100 * number / max(1, most):.1f}%" height="100%"/></svg></td></tr>'
        for name, number in rows
    ]
    return f"<table>{''.join(lines)}</table>"


def _rejected_line(row: Mapping[str, str]) -> str:
    name = f" (id {row['id']})" if row["id"] else ""
    return f"{row['source']}{name}: {row['detail']}"


def _images(title: str, shown: Sequence[tuple[int, Sample]], images: Mapping[int, bytes]) -> str:
    if not shown:
        return ""
    figures = [_figure(replace(sample, image=images[position])) for position, sample in shown]
    return f'<h2>{_text(title)}</h2><div class="images">{"".join(figures)}</div>'


def _figure(sample: Sample) -> str:
    parts = [f"{sample.width} x {sample.height} pixels"]
    if sample.searched is not None:
        absent, incomplete = (", ".join(names[:8]) for names in (sample.searched.absent, sample.searched.incomplete))
        parts.append(f"searched and absent: {absent or 'nothing'}; maybe more of: {incomplete or 'nothing'}")
    chat = f"<pre>{_text(_chat_text(sample))}</pre>" if sample.messages is not None else ""
    try:
        drawn = f'<img alt="" src="{jpeg_url(draw_sample(sample, LONGEST))}">'
    except ValueError as error:
        drawn = f"<p>{_text(str(error))}</p>"
    return (
        f"<figure>{drawn}<figcaption><b>{_text(sample.id)}</b> · {_text('; '.join(parts))}{chat}</figcaption></figure>"
    )


def _chats(shown: Sequence[tuple[int, Sample]]) -> str:
    if not shown:
        return ""
    cards = [
        f'<section class="card"><h3>{_text(item.id)}</h3><pre>{_text(_chat_text(item))}</pre></section>'
        for _, item in shown
    ]
    return f'<h2>Text only</h2><div class="cards">{"".join(cards)}</div>'


def _chat_text(sample: Sample) -> str:
    """Return a sample's chat as lines, shortened."""
    lines = []
    for message in sample.messages or ():
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        words = "".join(str(part.get("text", part.get("box", f"<{part.get('type')}>"))) for part in parts)
        lines.append(f"{message.get('role')}: {words}")
    text = "\n".join(lines)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} ..."
