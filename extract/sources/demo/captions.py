"""Captions of demo scenes. Every phrase is chosen among those that the geometry of the scene makes true."""

from collections.abc import Sequence
from random import Random

from sail_align.extract.sources.demo.scenes import Group, Scene

RELATIONS = {
    "left": ("on the left of", "to the left of", "left of"),
    "right": ("on the right of", "to the right of", "right of"),
    "above": ("above", "higher up than"),
    "below": ("below", "under", "beneath"),
}
SIZES = {"big": ("big", "large"), "small": ("small", "little")}
NUMBERS = {2: ("two", "a couple of"), 3: ("three",), 4: ("four",)}

_SAME_IN_PLURAL = ("fish", "sheep", "moose", "bison", "shrimp", "squid")
_PLURALS = {
    "mouse": "mice",
    "ox": "oxen",
    "goose": "geese",
    "man": "men",
    "woman": "women",
    "elf": "elves",
    "die": "dice",
    "loaf": "loaves",
    "leaf": "leaves",
    "sheaf": "sheaves",
    "knife": "knives",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "volcano": "volcanoes",
}


def describe(scene: Scene, named: Sequence[Group], rng: Random) -> dict[str, str]:
    """Return the captions of a scene.

    `raw` is short: it names and counts the groups in `named`, without their layout. `long` names everything, with
    counts, layout, some sizes and often the background.
    """
    raw = rng.choice((" and ", " and ", " with ")).join(_noun_phrase(group, "", rng) for group in named)
    subject, *others = rng.sample(scene.groups, len(scene.groups))
    sizes = scene.clear_sizes()

    def phrase(group: Group) -> str:
        size = rng.choice(SIZES[sizes[group]]) if group in sizes and rng.random() < 0.6 else ""
        return _noun_phrase(group, size, rng)

    parts = [phrase(subject)]
    if others:
        places = []
        for other in others:
            relation = subject.relation_to(other)
            words = rng.choice(RELATIONS[relation] if relation else ("with", "along with", "together with"))
            places.append(f"{words} {phrase(other)}")
        parts.append(" and ".join(filter(None, [", ".join(places[:-1]), places[-1]])))
    elif len(subject.pictures) == 1:
        parts.append(_place_phrase(subject))
    if rng.random() < 0.5:
        parts.append(f"on a {scene.pattern} {scene.colour} background")
    return {"raw": raw, "long": " ".join(parts)}


def with_article(words: str) -> str:
    """Put "a" or "an" before words, by their sound."""
    vowel = words.startswith("hour") or (words[0].lower() in "aeiou" and not words.startswith("uni"))
    return f"{'an' if vowel else 'a'} {words}"


def plural(name: str) -> str:
    """Return the plural of an object's name: that of the word before "of" or "with", otherwise of the last word."""
    for joint in (" of ", " with "):
        if joint in name:
            head, tail = name.split(joint, 1)
            return plural(head) + joint + tail
    before, _, word = name.rpartition(" ")
    if word in _PLURALS:
        word = _PLURALS[word]
    elif word.endswith(_SAME_IN_PLURAL):
        pass
    elif word.endswith(("s", "x", "ch", "sh")):
        word += "es"
    elif word.endswith("y") and word[-2] not in "aeiou":
        word = word[:-1] + "ies"
    else:
        word += "s"
    return f"{before} {word}".strip()


def _noun_phrase(group: Group, size: str, rng: Random) -> str:
    """Return count, size and name of a group: the label half of the time, otherwise any of its names."""
    name = rng.choice(group.thing.names) if rng.random() < 0.5 else group.thing.name
    count = len(group.pictures)
    if count == 1:
        return with_article(f"{size} {name}".strip())
    numbers = NUMBERS[count] if " of " not in name and not size else NUMBERS[count][:1]
    return " ".join(filter(None, [rng.choice(numbers), size, plural(name)]))


def _place_phrase(group: Group) -> str:
    """Return where in the scene a single picture is."""
    (picture,) = group.pictures
    vertical = "top" if picture.y < 0.4 else "bottom" if picture.y > 0.6 else ""
    horizontal = "left" if picture.x < 0.4 else "right" if picture.x > 0.6 else ""
    if vertical and horizontal:
        return f"in the {vertical} {horizontal}"
    if vertical:
        return f"at the {vertical}"
    return f"on the {horizontal}" if horizontal else "in the middle"
