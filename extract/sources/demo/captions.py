"""Says in words what a demo scene shows. Every phrase is chosen among those that the scene's geometry makes true."""

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
CLEAR_DISTANCE = 0.2
"""Groups whose centres are this far apart along one axis, in parts of the scene's side, stand in a relation."""
CLEAR_RATIO = 1.5
"""A group is big (small) beside another if it is this many times as large (smaller)."""

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


def headline(scene: Scene, rng: Random) -> Sequence[Group]:
    """Choose the groups that a short caption is about: all of one or two, and two of more."""
    return rng.sample(scene.groups, min(2, len(scene.groups)))


def raw_caption(groups: Sequence[Group], rng: Random) -> str:
    """Return a short caption that names some groups and counts them, and says nothing of layout."""
    return rng.choice((" and ", " and ", " with ")).join(
        _noun_phrase(group, _say(group, rng), "", rng) for group in groups
    )


def long_caption(scene: Scene, rng: Random) -> str:
    """Return a caption that names everything, with counts, layout, sizes and often the background."""
    subject, *others = rng.sample(scene.groups, len(scene.groups))
    sizes = clear_sizes(scene.groups)

    def phrase(group: Group) -> str:
        size = rng.choice(SIZES[sizes[group]]) if group in sizes and rng.random() < 0.6 else ""
        return _noun_phrase(group, _say(group, rng), size, rng)

    parts = [phrase(subject)]
    if others:
        places = [f"{_relation_phrase(subject, other, rng)} {phrase(other)}" for other in others]
        parts.append(_enumerate(places))
    elif len(subject.pictures) == 1:
        parts.append(_spot(subject))
    background = f"on a {scene.pattern} {scene.colour} background" if rng.random() < 0.5 else ""
    return " ".join(filter(None, [*parts, background]))


def relation(subject: Group, other: Group) -> str | None:
    """Return the relation of two groups along the axis where they are clearly and wholly apart, if there is one."""
    x, y = _gap(subject, other, "x"), _gap(subject, other, "y")
    if max(abs(x), abs(y)) < CLEAR_DISTANCE:
        return None
    if abs(x) > abs(y):
        return "left" if x > 0 else "right"
    return "above" if y > 0 else "below"


def clear_sizes(groups: Sequence[Group]) -> dict[Group, str]:
    """Say of the largest and the smallest group what they are, where that is clear to see."""
    ordered = sorted(groups, key=lambda group: group.size)
    if ordered[-1].size < CLEAR_RATIO * ordered[0].size:
        return {}
    return {ordered[0]: "small", ordered[-1]: "big"}


def with_article(words: str) -> str:
    """Put "a" or "an" before some words, by sound."""
    vowel = words.startswith("hour") or (words[0].lower() in "aeiou" and not words.startswith("uni"))
    return f"{'an' if vowel else 'a'} {words}"


def plural(name: str) -> str:
    """Return the plural of an object's name: of the word before "of" or "with", else of the last."""
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


def _say(group: Group, rng: Random) -> str:
    """Choose one of the object's names, mostly the first."""
    return rng.choice(group.thing.names) if rng.random() < 0.5 else group.thing.name


def _noun_phrase(group: Group, name: str, size: str, rng: Random) -> str:
    count = len(group.pictures)
    if count == 1:
        return with_article(f"{size} {name}".strip())
    numbers = NUMBERS[count] if " of " not in name and not size else NUMBERS[count][:1]
    return " ".join(filter(None, [rng.choice(numbers), size, plural(name)]))


def _relation_phrase(subject: Group, other: Group, rng: Random) -> str:
    found = relation(subject, other)
    return rng.choice(RELATIONS[found]) if found else rng.choice(("with", "along with", "together with"))


def _gap(subject: Group, other: Group, axis: str) -> float:
    """Return the distance from the last of `subject` to the first of `other`; negative the other way; 0 if mixed."""
    ours: list[float] = [getattr(picture, axis) for picture in subject.pictures]
    theirs: list[float] = [getattr(picture, axis) for picture in other.pictures]
    return max(0.0, min(theirs) - max(ours)) or min(0.0, max(theirs) - min(ours))


def _spot(group: Group) -> str:
    """Say where in the scene a lone picture is."""
    (picture,) = group.pictures
    down = "top" if picture.y < 0.4 else "bottom" if picture.y > 0.6 else ""
    across = "left" if picture.x < 0.4 else "right" if picture.x > 0.6 else ""
    if down and across:
        return f"in the {down} {across}"
    return f"at the {down}" if down else f"on the {across}" if across else "in the middle"


def _enumerate(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
