"""Which texts an augmented image makes untrue, and which words a flip exchanges instead: one table, by language.

A flip exchanges words only where they certainly name a side of the image ("on the left", not "the right answer").
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from recipe.config import ConfigError, WordsConfig, nearest

_MOST_KNOWN = 1 << 16  # texts whose verdicts are kept


@dataclass(frozen=True)
class Language:
    """The words of one language; `|` separates entries, case does not count.

    Attributes:
        certain: {(a, b): phrases with {} for a or b}, in which a flip exchanges a and b. A `$` ends a phrase that must
            be followed by a punctuation mark, the end, or one of `after`.
        after: What may follow a phrase that ends with `$`.
        sides: Of a phrase that is not in `certain`; prevent a flip.
        read: What is to be read; prevent a flip.
        places: Of an object in the image or among others; prevent a crop, as do all words of sides.
    """

    certain: Mapping[tuple[str, str], str]
    sides: str
    read: str
    places: str
    after: str = ""


LANGUAGES: Mapping[str, Language] = {
    "en": Language(
        certain={
            ("left", "right"): (
                "{} side|{}-hand side|{} hand side|{} hand|{} arm|{} leg|{} foot|{} eye|{} ear|{} wing|{} half"
                "|{} corner|{} edge|to the {}$|on the {}$|at the {}$|from the {}$|in the {}$|on his {}$|on her {}$"
                "|far {}$|top {}$|bottom {}$|upper {}$|lower {}$|center {}$|centre {}$|facing {}$"
            ),
            ("leftmost", "rightmost"): "{}",
            ("left-most", "right-most"): "{}",
            ("clockwise", "counterclockwise"): "{}",
            ("clockwise", "counter-clockwise"): "{}",
            ("clockwise", "anticlockwise"): "{}",
            ("clockwise", "anti-clockwise"): "{}",
        },
        after="of|and|or|is|are|with|who|that|which|in|near|behind|next",
        sides="left|right|lefty|righty|leftward|leftwards|rightward|rightwards|port side|starboard|east|west",
        read=(
            "letter|letters|lettering|number|numbers|numbered|numeral|numerals|digit|digits|text|texts|word|words"
            "|writing|written|handwriting|inscription|inscriptions|sign|signs|signage|signboard|label|labels|labeled"
            "|labelled|logo|logos|read|reads|says|saying|spells|spelling|license plate|license plates|licence plate"
            "|licence plates|number plate|number plates|poster|posters|billboard|billboards|banner|banners|barcode"
            "|newspaper|scoreboard|clock|map"
        ),
        places=(
            "top|bottom|upper|lower|middle|center|centre|central|corner|edge|first|second|third|last|nearest|closest"
            "|farthest|furthest|largest|biggest|smallest|tallest|only"
        ),
    ),
    "de": Language(
        certain={
            ("links", "rechts"): "{}",
            ("linke", "rechte"): "{} Seite|{} Hand|{} Ecke|{} Hälfte|{} Kante",
            ("linken", "rechten"): "{} Seite|{} Hand|{} Ecke|{} Hälfte|{} Rand|{} Arm|{} Bildrand|{} Kante",
            ("linker", "rechter"): "{} Hand|{} Seite|{} Rand|{} Arm",
            ("im Uhrzeigersinn", "gegen den Uhrzeigersinn"): "{}",
        },
        sides="linke|linken|linker|linkes|linkem|rechte|rechten|rechter|rechtes|rechtem|Uhrzeigersinn|Osten|Westen",
        read=(
            "Buchstabe|Buchstaben|Zahl|Zahlen|Ziffer|Ziffern|Nummer|Nummern|Text|Texte|Wort|Worte|Wörter|Schrift"
            "|Schriftzug|Aufschrift|Inschrift|beschriftet|Schild|Schilder|Etikett|Logo|Logos|Kennzeichen|Plakat|Plakate"
            "|Uhr|Zeitung|Straßenschild|Verkehrsschild|Nummernschild"
        ),
        places=(
            "oben|unten|obere|oberen|oberer|oberes|untere|unteren|unterer|unteres|Mitte|mittlere|mittleren|mittlerer"
            "|mittleres|Ecke|Rand|erste|ersten|erster|erstes|zweite|zweiten|zweiter|zweites|letzte|letzten|letzter"
            "|letztes|größte|größter|größtes|kleinste|kleinster|kleinstes|einzige|einziger|einziges"
        ),
    ),
    "fr": Language(
        certain={
            ("gauche", "droite"): "à {}|sur la {}|de {}|main {}|moitié {}|partie {}",
            ("gauche", "droit"): "côté {}|coin {}|bord {}|bras {}",
            ("le sens des aiguilles d'une montre", "le sens inverse des aiguilles d'une montre"): "{}",
        },
        sides="gauche|gauches|droite|droites|droit|droits|gaucher|gauchère|droitier|droitière|horaire|antihoraire",
        read=(
            "lettre|lettres|chiffre|chiffres|nombre|nombres|numéro|numéros|texte|textes|mot|mots|inscription"
            "|inscriptions|écrit|écrite|écrits|écrites|écriture|panneau|panneaux|enseigne|enseignes|étiquette"
            "|étiquettes|logo|logos|plaque d'immatriculation|affiche|affiches|horloge|journal"
        ),
        places=(
            "haut|bas|milieu|centre|coin|bord|premier|première|deuxième|second|seconde|dernier|dernière|plus grand"
            "|plus grande|plus petit|plus petite|seul|seule"
        ),
    ),
    "es": Language(
        certain={
            ("izquierda", "derecha"): "a la {}|de la {}|mano {}|parte {}|esquina {}|mitad {}",
            ("izquierdo", "derecho"): "lado {}|borde {}|brazo {}|costado {}",
            ("sentido horario", "sentido antihorario"): "{}",
        },
        sides=(
            "izquierda|izquierdas|derecha|derechas|izquierdo|izquierdos|derecho|derechos|zurdo|zurda|diestro|diestra"
            "|agujas del reloj|horario|antihorario"
        ),
        read=(
            "letra|letras|número|números|cifra|cifras|dígito|dígitos|texto|textos|palabra|palabras|escrito|escrita"
            "|escritos|escritas|escritura|letrero|letreros|cartel|carteles|señal|señales|etiqueta|etiquetas|logo|logos"
            "|logotipo|logotipos|matrícula|matrículas|rótulo|rótulos|reloj|periódico"
        ),
        places=(
            "arriba|abajo|superior|inferior|medio|centro|esquina|borde|primer|primero|primera|segundo|segunda|último"
            "|última|más grande|más pequeño|más pequeña|único|única"
        ),
    ),
    "zh": Language(
        certain={
            ("左", "右"): (
                "{}边|{}邊|{}侧|{}側|{}方|{}面|{}手|{}上角|{}下角|{}上方|{}下方|{}半|最{}|靠{}|向{}|往{}|朝{}|偏{}"
            ),
            ("顺时针", "逆时针"): "{}",
            ("順時針", "逆時針"): "{}",
        },
        sides="左|右|东|東|西侧|西側|西边|西邊",
        read="字|数|數|号|號|文本|标志|標誌|标识|標識|招牌|牌|标签|標籤|写着|寫著|海报|海報|商标|商標|钟|鐘|报纸|報紙",
        places="上方|下方|上角|下角|顶部|頂部|底部|中间|中間|中央|中部|角落|第|最|唯一",
    ),
}
_ALWAYS_READ = r"\b\d+\b|[\"“”„«»「」『』]"  # single numbers, and quoted words


class Vocabulary:
    """Judges texts by the words of all languages and the yaml's own."""

    def __init__(self, languages: Sequence[str], own: WordsConfig):
        """Compile the words; raise ConfigError at a language without a table.

        Args:
            languages: Those in which a flip exchanges words; words of the others prevent it.
            own: The yaml's additions.
        """
        for name in languages:
            if name not in LANGUAGES:
                raise ConfigError(f"train_loader.augment.languages holds {name!r}: {nearest(name, list(LANGUAGES))}")
        tables = LANGUAGES.values()
        phrases = [(pair, "{}", "") for pair in own.swapped.items()]
        for name in languages:
            for pair, texts in LANGUAGES[name].certain.items():
                phrases += [(pair, text, LANGUAGES[name].after) for text in texts.split("|")]
        phrases.sort(key=lambda phrase: -len(phrase[1]) - max(map(len, phrase[0])))  # "counter-clockwise" first
        # Of the group of each phrase, in order.
        self._partners = [{first.lower(): second, second.lower(): first} for (first, second), _, _ in phrases]
        self._swap = _any_of(_phrase_pattern(*phrase) for phrase in phrases)
        sides = [word for table in tables for pair in table.certain for word in pair]
        sides += [word for table in tables for word in table.sides.split("|")] + [*own.swapped, *own.swapped.values()]
        read = [word for table in tables for word in table.read.split("|")] + own.not_flipped
        places = [word for table in tables for word in table.places.split("|")] + own.not_cropped
        self._unflippable = _any_of([*map(_bounded, [*sides, *read]), _ALWAYS_READ])
        self._uncroppable = _any_of(map(_bounded, [*sides, *places]))
        self._known: dict[str, str | None] = {}
        self.described = f"{self._swap.pattern} {self._unflippable.pattern} {self._uncroppable.pattern}"

    def mirrored(self, text: str) -> str | None:
        """Return the text of a flipped image, its sides exchanged; None if that is not certain to be true."""
        if text not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            is_certain = not self.unflippable(text)
            self._known[text] = self._swap.sub(self._exchange, text) if is_certain else None
        return self._known[text]

    def unflippable(self, text: str) -> str:
        """Return the first word that prevents a flip; empty if there is none."""
        found = self._unflippable.search(self._swap.sub("\0", text))
        return "" if found is None else found[0]

    def survives_crop(self, text: str) -> bool:
        """Return whether no word of the text depends on what else the image shows."""
        return self._uncroppable.search(text) is None

    def _exchange(self, found: re.Match[str]) -> str:
        assert found.lastindex is not None
        word, start = found[found.lastindex], found.start(found.lastindex) - found.start()
        other = self._partners[found.lastindex - 1][word.lower()]
        if word.isupper():
            other = other.upper()
        elif word[:1].isupper():
            other = other[:1].upper() + other[1:]
        return found[0][:start] + other + found[0][start + len(word) :]


def _phrase_pattern(pair: tuple[str, str], phrase: str, after: str) -> str:
    """Return a phrase's pattern, with one group for the word that is exchanged."""
    before, _, behind = phrase.removesuffix("$").partition("{}")
    start, end = _edges(before + pair[0] + behind)
    if phrase.endswith("$"):
        end = rf"(?=\s*(?:$|[.,;:!?)\]]|(?:{after})\b))"
    elif end:
        end = r"(?![\w-])"  # not "left hand-made"
    pair_pattern = "|".join(map(re.escape, pair))
    return f"{start}{re.escape(before)}({pair_pattern}){re.escape(behind)}{end}"


def _bounded(word: str) -> str:
    start, end = _edges(word)
    return start + re.escape(word) + end


def _edges(text: str) -> tuple[str, str]:
    """Return the patterns of word boundaries around a text; none in a script without spaces between words."""
    return "" if _is_dense(text[0]) else r"(?<!\w)", "" if _is_dense(text[-1]) else r"(?!\w)"


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(patterns) or r"(?!)", re.IGNORECASE)


def _is_dense(letter: str) -> bool:
    """Return whether a letter is of a script without spaces between words."""
    return "\u2e80" <= letter <= "\uffdc"
