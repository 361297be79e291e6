"""A score between 0 and 100 as a bar of inline SVG; colours come from the page's CSS, for both themes."""

from collections.abc import Sequence

from markupsafe import Markup, escape


def score_bar(value: float, chance: float | None, interval: Sequence[float] | None, style: str) -> Markup:
    """Draw a score with its interval as a line over the bar's end, and chance as a tick; the width is the page's.

    It says nothing to a screen reader: the numbers stand beside it.
    """
    parts = ['<rect class="track" width="100" height="12" y="4"/>']
    parts.append(f'<rect class="fill {escape(style)}" width="{_within(value)}" height="12" y="4"/>')
    if interval:
        line = "M{} 10H{}".format(*map(_within, interval))
        parts.append(f'<path class="halo" d="{line}"/><path class="whisker" d="{line}"/>')
    if chance is not None:
        parts.append(f'<path class="chance" d="M{_within(chance)} 0V20"/>')
    return Markup(
        f'<svg class="bar" viewBox="0 0 100 20" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'
    )


def _within(value: float) -> str:
    return f"{min(max(value, 0.0), 100.0):.2f}"
