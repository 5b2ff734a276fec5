"""Where everything in a picture stands: boxes from top to bottom, what they say to other ranks in lanes beside them.

    gradients leave                a module and its parameters             its value leaves
    backward  <---------  +-------------------------------------+  ------------>  value
    all_reduce over tp    | q_proj                  colwise :7  |                 [1, 4096, 4096@tp]
                          | S tp   weight [4096@tp, 4096]       |                 forward collectives
                          +-------------------------------------+

All lengths are in pixels of the picture; a character of its text is `WIDE` of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from parallel_plans.verify.flow import Value
from parallel_plans.verify.picture import Box, Part, Passed, Shown
from parallel_plans.verify.units import shown_bytes

WIDE = 7.25  # of a character of 12 pixels
SMALL = 6.65  # of a character of 11 pixels
LINE, TITLE, PAD, GAP, INSET, FOOT = 19, 26, 7, 8, 12, 22
LEAST, MOST = 340, 520  # widths of a box
MARGIN = 8
ARROW, BESIDE = 46, 8  # the length of an arrow, and what lies between it and what is written beside it
CHIP = 8  # beside the text of a chip, in all
NARROWEST = 12  # characters of a text that has to be cut


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A letter and its axis on a ground of its colour."""

    x: float
    y: float
    width: float
    letter: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Words:
    """A line of text, and all of it where it had to be cut."""

    x: float
    y: float
    text: str
    whole: str
    role: str


@dataclass(frozen=True, kw_only=True)
class Arrow:
    """A line from a box outwards: its letter before and after the module's style hands the value on; marks on it."""

    x: float
    y: float
    length: float
    before: str
    after: str
    marks: int


@dataclass(frozen=True, kw_only=True)
class Badge:
    """The number of a finding, on a box."""

    x: float
    y: float
    number: int


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A box on its place, with all that belongs to it alone."""

    module: str
    about: str
    x: float
    y: float
    width: float
    height: float
    depth: int
    chips: tuple[Chip, ...]
    words: tuple[Words, ...]
    arrows: tuple[Arrow, ...]
    badges: tuple[Badge, ...]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A part of the picture: its boxes, outer ones before inner ones."""

    title: str
    layers: tuple[str, ...]
    width: float
    height: float
    boxes: tuple[Placed, ...]


def cut(text: str, width: float, wide: float = WIDE) -> str:
    """The text, with dots in its middle where it would be wider than `width`.

    >>> cut("a_rather_long_name", 90)
    'a_rat...name'
    """
    most = max(NARROWEST, int(width / wide))
    if len(text) <= most:
        return text
    back = (most - 3) // 2
    return f"{text[: most - 3 - back]}...{text[-back:]}"


def colour_of(letters: Mapping[str, str] | Iterator[str] | tuple[str, ...]) -> str:
    """The letter that says most about how something lies over several axes: what is not yet right comes first."""
    found = {letter[:1] for letter in (letters.values() if isinstance(letters, Mapping) else letters)}
    return next((letter for letter in "?PSVRI" if letter in found), "")


@dataclass(frozen=True, kw_only=True)
class Frame:
    """How wide the lanes are, and the boxes between."""

    left: float
    middle: float
    right: float


def drawings_of(parts: Sequence[Part]) -> list[Drawing]:
    """All parts, with everything on its place, in one frame."""
    boxes = [each for part in parts for box in part.boxes for each in _all(box)]
    wanted = max((_wanted(box) for part in parts for box in part.boxes), default=0)
    left = max((SMALL * len(_told(each)) for box in boxes for each in box.backward), default=0)
    right = max((width for box in boxes for width in _written_right(box)), default=0)
    lanes = [width + ARROW + BESIDE + MARGIN if width else MARGIN for width in (left, right)]
    frame = Frame(left=lanes[0], middle=min(max(wanted, LEAST), MOST), right=lanes[1])
    return [_drawing(part, frame) for part in parts]


def _all(box: Box) -> Iterator[Box]:
    """A box and all within."""
    yield box
    for inner in box.inner:
        yield from _all(inner)


def _written_right(box: Box) -> Iterator[float]:
    """The widths of what stands beside a box, on the right."""
    if box.value is not None:
        yield _chips_width(_lying(box.value)) + SMALL * len(box.value.marked)
    for each in box.forward:
        yield SMALL * len(_told(each))


def _lying(value: Value) -> tuple[tuple[str, str], ...]:
    """(letter, axis) of a value."""
    return tuple((letter, axis) for axis, letter in value.letters.items())


def _drawing(part: Part, frame: Frame) -> Drawing:
    placed: list[Placed] = []
    y: float = GAP
    for box in part.boxes:
        y = _place(placed, box, y, frame, 0) + GAP
    width = frame.left + frame.middle + frame.right
    return Drawing(title=part.title, layers=part.layers, width=width, height=y, boxes=tuple(placed))


def _wanted(box: Box) -> float:
    title = WIDE * len(_title(box)) + SMALL * (len(_styles(box)) + 3) + 22 * len(box.badges)
    lines = [_chips_width(each.letters) + WIDE * (len(each.name) + 1 + len(each.shape)) for each in box.parameters]
    return max([title, *lines, *(_wanted(inner) for inner in box.inner)]) + 2 * PAD + (2 * INSET if box.inner else 0)


def _chips_width(letters: tuple[tuple[str, str], ...]) -> float:
    return sum(SMALL * len(f"{letter} {axis}") + CHIP + 4 for letter, axis in letters) + 4


def _title(box: Box, depth: int = 0) -> str:
    """Its name from the box on in which it stands; its class where it is the layer."""
    return (box.name.rpartition(".")[2] if depth else box.name) or box.kind


def _styles(box: Box) -> str:
    """The styles of a box with their lines; its class where it has none."""
    told = ", ".join(style if line is None else f"{style} :{line}" for style, line in box.styles)
    return told or (box.kind if box.name else "")


def _place(placed: list[Placed], box: Box, top: float, frame: Frame, depth: int) -> float:
    """Puts a box and all within on their places, from `top` down; where it ends."""
    at = len(placed)
    x, width = frame.left + depth * INSET, frame.middle - 2 * depth * INSET
    y = top + TITLE + LINE * len(box.parameters) + (2 if box.parameters else 0)
    for inner in box.inner:
        y = _place(placed, inner, y + (0 if inner is box.inner[0] else GAP), frame, depth + 1)
    lane = LINE * max(len(box.forward) + (box.value is not None), len(box.backward))
    if box.inner:
        y, lane_top = y + PAD + (max(lane, FOOT - PAD) if lane else 0), y + PAD
    else:
        y = max(y, top + lane + PAD)
        lane_top = top + (y - top - lane) / 2
    placed.insert(at, _placed(box, (x, top, width, y - top), depth, lane_top))
    return y


def _placed(box: Box, frame: tuple[float, float, float, float], depth: int, lane_top: float) -> Placed:
    x, y, width, height = frame
    chips: list[Chip] = []
    words = _head(box, x, y, width, depth)
    for number, parameter in enumerate(box.parameters):
        _parameter(parameter, x + PAD, y + TITLE + LINE * number, width - 2 * PAD, chips, words)
    arrows = [
        *_value_lane(box, x + width, lane_top, depth, chips, words),
        *_gradient_lane(box, x, lane_top, depth, words),
    ]
    badges = [
        Badge(x=x + width - PAD - 9 - 22 * place, y=y + TITLE / 2, number=number)
        for place, number in enumerate(reversed(box.badges))
    ]
    return Placed(
        module=box.name, about=_about(box), x=x, y=y, width=width, height=height, depth=depth, chips=tuple(chips),
        words=tuple(words), arrows=tuple(arrows), badges=tuple(badges),
    )  # fmt: skip


def _about(box: Box) -> str:
    return f"{box.name or 'the layer'}: {box.kind}" + (f", {_styles(box)}" if box.styles else "")


def _head(box: Box, x: float, y: float, width: float, depth: int) -> list[Words]:
    """The title on the left, styles and lines on the right, beside the badges."""
    room = width - 2 * PAD - 22 * len(box.badges)
    title = cut(_title(box, depth), room)
    words = [Words(x=x + PAD, y=y + 17, text=title, whole=_title(box, depth), role="title")]
    left = room - WIDE * (len(title) + 1)
    styles = _styles(box)
    if styles and left > SMALL * NARROWEST:
        end = x + width - PAD - 22 * len(box.badges)
        role = "style" if box.styles else "kind"
        words.append(Words(x=end, y=y + 17, text=cut(styles, left, SMALL), whole=styles, role=role))
    return words


def _parameter(shown: Shown, x: float, y: float, width: float, chips: list[Chip], words: list[Words]) -> None:
    start = _chips(shown.letters, x, y, chips)
    text = f"{shown.name} {shown.shape}"
    fitting = cut(text, width - (start - x))
    words.append(Words(x=start, y=y + 13, text=fitting, whole=text, role="parameter"))


def _chips(letters: tuple[tuple[str, str], ...], x: float, y: float, chips: list[Chip]) -> float:
    """Puts chips side by side; where what comes behind them begins."""
    for letter, axis in letters:
        text = f"{letter} {axis}"
        width = SMALL * len(text) + CHIP
        chips.append(Chip(x=x, y=y + 1, width=width, letter=letter[:1], text=text))
        x += width + 4
    return x + 2 if letters else x


def _value_lane(
    box: Box, edge: float, top: float, depth: int, chips: list[Chip], words: list[Words]
) -> Iterator[Arrow]:
    """The value that leaves to the right, and below it the collectives of forward."""
    if box.value is None and not box.forward:
        return
    after = colour_of(box.value.letters) if box.value is not None else ""
    before = box.leaves[:1] if box.leaves and box.forward else after
    length = ARROW + depth * INSET
    yield Arrow(x=edge, y=top + LINE / 2, length=length, before=before, after=after, marks=len(box.forward))
    x = edge + length + BESIDE
    if box.value is not None:
        start = _chips(_lying(box.value), x, top, chips)
        marked = box.value.marked
        words.append(Words(x=start, y=top + 13, text=marked, whole=marked, role="value"))
        top += LINE
    _collectives(box.forward, x, top, "forward", words)


def _gradient_lane(box: Box, edge: float, top: float, depth: int, words: list[Words]) -> Iterator[Arrow]:
    """The gradient that leaves to the left, with the collectives of backward."""
    if not box.backward:
        return
    length = ARROW + depth * INSET
    yield Arrow(x=edge, y=top + LINE / 2, length=-length, before="", after="", marks=len(box.backward))
    _collectives(box.backward, edge - length - BESIDE, top, "backward", words)


def _collectives(passed: tuple[Passed, ...], x: float, top: float, role: str, words: list[Words]) -> None:
    for number, each in enumerate(passed):
        whole = f"{role}: {each.count} {each.op} over {each.axis}, {each.bytes:,} bytes"
        words.append(Words(x=x, y=top + 13 + LINE * number, text=_told(each), whole=whole, role=role))


def _told(passed: Passed) -> str:
    """What is written beside a mark."""
    times = f"{passed.count} x " if passed.count > 1 else ""
    return f"{times}{passed.op} {passed.axis} {shown_bytes(passed.bytes)}"
