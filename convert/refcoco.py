"""RefCOCO, RefCOCO+ and RefCOCOg → MDS.

    python -m convert.refcoco --annotations "refs(unc).p" --instances instances.json --images DIR --out OUT --split val

A ref is one object with about three sentences that name it. Each sentence becomes a record of its own: a chat that asks
for the sentence, and one object, the sentence its caption. So no sentence is lost, the prompt names what the head must
find, and `refcoco_acc` counts each sentence once, as the published accuracy does; an image is stored once per sentence.
`--split` picks the refs of that split. The pickle is read without running code: anything in it but lists, dicts,
texts and numbers is refused.
"""

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from convert.coco import parse_bbox, read_instances, to_key
from convert.formats import refuse_other
from convert.items import BadRecord, Found
from convert.records import Parse, Record, check_file, list_records, parse_dict, parse_size, parse_text
from convert.remote import input_path
from convert.write import add_box_options, box_options, build_parser, run
from recipe.schema import Message, Object

# What `predict.py --expression` asks with the default prompt.
QUESTION = "Locate every object in the image and report bounding boxes as JSON. Candidates: <ref-object>."
# What pickle raises for bytes that it cannot read.
_DAMAGE = (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain values alone: without a class or function, a pickle has nothing that it could call."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it holds {module_name}.{global_name}, and only plain values are read")

    def persistent_load(self, pid: Any, /) -> Any:
        raise pickle.UnpicklingError("it refers to something outside, and only plain values are read")


def read_refs(path: Path) -> list[Any]:
    """Return the refs of a pickled file, also one of Python 2; no code in it is run.

    Raises:
        ValueError: It is not such a file, or holds more than plain values.
    """
    check_file(path, "the refs of RefCOCO, such as refs(unc).p")
    refuse_other(path, "the pickled refs of RefCOCO", "refcoco")
    try:
        with path.open("rb") as file:
            refs = _PlainUnpickler(file, encoding="utf-8").load()
    except _DAMAGE as error:
        raise ValueError(
            f"{path} is not a file of refs ({error}): give the published one, such as refs(unc).p"
        ) from None
    if not isinstance(refs, list) or not all(isinstance(ref, dict) and "sentences" in ref for ref in refs):
        raise ValueError(f"{path} is not a list of refs with sentences: give the published one, such as refs(unc).p")
    return refs


def find(
    refs: Sequence[Mapping[str, Any]],
    instances: Mapping[str, Sequence[Any]],
    images: Path,
    split: str,
    question: str = QUESTION,
    source: str = "refs",
    **boxes: Any,
) -> Found:
    """Return one record per sentence of the refs of `split`, in order; see `list_records` for `boxes`.

    `instances` are `images` and `annotations` of the file that comes with the refs. `question` is the user's turn, with
    the sentence in the place of `<ref-object>`.

    Raises:
        ValueError: No ref is of this split, `question` has no place for the sentence, or `images` is not a folder.
    """
    splits = dict.fromkeys(str(ref.get("split")) for ref in refs)
    if split not in splits:
        raise ValueError(f"--split {split}: no ref of {source} is of this split, only of {', '.join(splits)}")
    if "<ref-object>" not in question:
        raise ValueError(f"--question {question!r} lacks <ref-object>, the place of the sentence")
    return Found(list_records(images, _rows(refs, instances, split, question, source), **boxes))


def _rows(
    refs: Sequence[Mapping[str, Any]], instances: Mapping[str, Sequence[Any]], split: str, question: str, source: str
) -> Iterator[tuple[str, str, Parse]]:
    entries, annotations = (
        {to_key(row.get("id")): row for row in instances[name] if isinstance(row, dict)}
        for name in ("images", "annotations")
    )
    for position, ref in enumerate(refs):
        if str(ref.get("split")) != split:
            continue
        annotation, image = annotations.get(to_key(ref.get("ann_id"))), entries.get(to_key(ref.get("image_id")))
        ref_id, where = to_key(ref.get("ref_id")) or position, f"{source}: ref {position}"
        sentences = ref["sentences"] if isinstance(ref["sentences"], list) and ref["sentences"] else [None]
        for number, sentence in enumerate(sentences):
            yield f"{ref_id}-{number}", where, partial(_parse, ref, image, annotation, sentence, question)


def _parse(ref: Mapping[str, Any], image: Any, annotation: Any, sentence: Any, question: str) -> Record:
    if image is None:
        raise BadRecord("unknown image", f"image_id {ref.get('image_id')!r}")
    if annotation is None or to_key(annotation.get("image_id")) != to_key(ref.get("image_id")):
        raise BadRecord("unknown annotation", f"ann_id {ref.get('ann_id')!r} is not an annotation of the image")
    sentence = parse_dict(sentence, "a sentence")
    text = parse_text(sentence.get("sent") or sentence.get("raw"), "the text of a sentence")
    item = Object(parse_bbox(annotation), text)
    # As `recipe.boxes.objects_to_text` writes it; the encoder writes the box in the form of its run.
    ends = '[{"bbox_2d": ', f', "label": {json.dumps(text, ensure_ascii=False)}}}]'
    before, after = ({"type": "text", "text": end} for end in ends)
    messages: list[Message] = [
        {"role": "user", "content": question.replace("<ref-object>", text)},
        {"role": "assistant", "content": [before, {"type": "box", "box": item.box}, after]},
    ]
    size = parse_size(image.get("width"), image.get("height"))
    return Record(parse_text(image.get("file_name"), "file_name"), [item], size, messages)


def main() -> None:
    """Run the command line."""
    parser = build_parser("refcoco", __doc__)
    parser.add_argument(
        "--annotations", type=input_path, required=True, metavar="FILE", help="the refs, such as refs(unc).p"
    )
    parser.add_argument(
        "--instances", type=input_path, required=True, metavar="FILE", help="the instances.json next to them"
    )
    parser.add_argument(
        "--images", type=input_path, required=True, metavar="DIR", help="folder of COCO's train2014 images"
    )
    parser.add_argument("--question", default=QUESTION, metavar="TEXT", help="what the user asks; default: %(default)s")
    add_box_options(parser)
    run(
        parser,
        lambda args: find(
            read_refs(args.annotations),
            read_instances(args.instances, ("images", "annotations")),
            args.images,
            args.split,
            args.question,
            args.annotations.name,
            **box_options(args),
        ),
    )


if __name__ == "__main__":
    main()
