"""A Sphinx extension: formulas become MathML while the page is built, so that a browser needs neither script nor network."""

from __future__ import annotations

from html import escape
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def to_mathml(latex: str, display: str) -> str:
    """One formula as a MathML element, its LaTeX as the alternative text; what can't be converted stays LaTeX, with a warning.

    Args:
        latex: without dollar signs. display: "inline" or "block".
    """
    try:
        return convert(latex, display=display).replace("<math ", f'<math alttext="{escape(latex)}" ', 1)
    except Exception as error:  # latex2mathml has a class for each way in which a formula can be wrong
        logger.warning("formula %r: %s", latex, type(error).__name__)
        return f"<code>{escape(latex)}</code>"


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(to_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{to_mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx calls this; the configuration then says `html_math_renderer = "mathml"`."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
