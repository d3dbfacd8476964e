"""What is written in a figure: nothing lies on anything else, nothing is cut off, all is large enough to read."""

import itertools

import matplotlib.text


def shown_texts(figure):
    """Every text that is drawn, with its box in pixels."""
    figure.canvas.draw()
    outside = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            labels = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=False)
            outside |= {label for at, label in labels if not low <= at <= high}
            if not axes.axison:
                outside |= {axis.label, *axis.get_ticklabels()}
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text().strip() and t not in outside]
    return [(text, text.get_window_extent()) for text in texts]


def assert_readable(figure):
    texts = shown_texts(figure)
    assert len(texts) >= 4
    for (one, box), (other, other_box) in itertools.combinations(texts, 2):
        assert not box.overlaps(other_box), f"{one.get_text()!r} lies on {other.get_text()!r}"
    for text, box in texts:
        assert text.get_fontsize() >= 7, text.get_text()
        inside = figure.bbox.padded(1)
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1, text.get_text()
