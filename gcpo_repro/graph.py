"""The model's graph, q → y_i, q → yn, y_i → yn: what it says about independence (d-separation), and its drawing.

The fork at q separates the candidates given q; the collider at yn, and whatever descends from it or from the
candidates, joins them again. Bad input raises UserError.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np

from .arrays import as_count
from .errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["causal_graph", "d_separated", "draw"]


def causal_graph(n: int, descendant: bool = False, reward_filter: bool = False) -> nx.DiGraph:
    """The model's DAG: nodes "q", "y0" … "y{n−1}", "yn".

    descendant     adds "d", a child of yn (a summary or a score of the integrated output)
    reward_filter  adds rewards "r0" …, a child of each y_i, and their child "filter" (`keep_mixed_groups`)
    """
    candidates = [f"y{i}" for i in range(as_count("n", n, 2))]
    graph = nx.DiGraph([("q", y) for y in candidates] + [(y, "yn") for y in candidates] + [("q", "yn")])
    if descendant:
        graph.add_edge("yn", "d")
    if reward_filter:
        graph.add_edges_from((y, y.replace("y", "r")) for y in candidates)
        graph.add_edges_from((y.replace("y", "r"), "filter") for y in candidates)
    return graph


def d_separated(
    x: str | Iterable[str], y: str | Iterable[str], given: str | Iterable[str] = (), graph: nx.DiGraph | int = 4
) -> bool:
    """Whether `given` d-separates x from y, each a node or several. graph: a DAG, or n for `causal_graph(n)`."""
    graph = causal_graph(graph) if isinstance(graph, int) else graph
    if not nx.is_directed_acyclic_graph(graph):
        raise UserError("graph: it is not a directed acyclic graph; d-separation needs one, as from causal_graph")
    sets = {name: _nodes(graph, name, nodes) for name, nodes in {"x": x, "y": y, "given": given}.items()}
    if shared := (sets["x"] & sets["y"]) | (sets["x"] & sets["given"]) | (sets["y"] & sets["given"]):
        raise UserError(f"x, y, given: {sorted(shared)} occur in two of them; they must be disjoint")
    return nx.is_d_separator(graph, sets["x"], sets["y"], sets["given"])


def draw(graph: nx.DiGraph | int = 4, given: str | Iterable[str] = ()) -> Figure:
    """The graph of `causal_graph` (or its n), q left, candidates in the middle, yn right; observed nodes shaded."""
    import matplotlib.pyplot as plt

    from .reporting.figures import STYLE

    graph = causal_graph(graph) if isinstance(graph, int) else graph
    observed, place = _nodes(graph, "given", given), _places(graph)
    (left, low), (right, _) = np.min(list(place.values()), axis=0) - 0.4, np.max(list(place.values()), axis=0) + 0.4
    # q → yn runs above every candidate. An arc is rad / 2 times as high as it is long, in inches.
    height = place["y0"][1] * (2.0 if "filter" in graph else 1.45)
    over = f"arc3,rad={-2 * 0.75 * height / (1.1 * (place['yn'][0] - place['q'][0]))}"
    look = {"node_size": 480, "edge_color": "#333333", "arrowsize": 8}
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(1.1 * (right - left), 0.75 * (height + 0.35 - low)))
        fill = ["#c9c9c9" if node in observed else "white" for node in graph]
        nx.draw_networkx_nodes(graph, place, ax=axes, node_size=480, node_color=fill, edgecolors="#333333")
        straight = [edge for edge in graph.edges if edge != ("q", "yn")]
        nx.draw_networkx_edges(graph, place, straight, ax=axes, **look)
        nx.draw_networkx_edges(graph, place, [("q", "yn")], ax=axes, connectionstyle=over, **look)
        names = {node: node if node == "filter" else f"${node[0]}_{{{node[1:]}}}$" for node in graph}
        nx.draw_networkx_labels(graph, place, names, ax=axes, font_size=8)
        axes.set(xlim=(left, right), ylim=(low, height + 0.35))
        axes.axis("off")
    return figure


def _places(graph: nx.DiGraph) -> dict[str, tuple[float, float]]:
    """Candidates one above the other; with rewards on a slant, so that each has its reward straight below."""
    rewards = "filter" in graph
    n = sum(node.startswith("y") for node in graph) - 1
    i = np.arange(n)
    top, slant = max(1.0, 0.3 * (n - 1)), 0.45 * (i - (n - 1) / 2) * rewards
    place = {"q": (slant[0], 0.0), "yn": (2 + slant[-1], 0.0), "d": (3 + slant[-1], 0.0), "filter": (1.0, -top - 1.8)}
    place |= {f"y{k}": (1 + slant[k], top * (1 - 2 * k / (n - 1))) for k in i}
    place |= {f"r{k}": (1 + slant[k], -top - 0.9) for k in i}
    if unknown := set(graph) - set(place):
        raise UserError(f"graph: no place is known for {sorted(unknown)}; draw() takes the graphs of causal_graph")
    return {node: place[node] for node in graph}


def _nodes(graph: nx.DiGraph, name: str, nodes: str | Iterable[str]) -> set[str]:
    found = {nodes} if isinstance(nodes, str) else set(nodes)
    if unknown := found - set(graph):
        raise UserError(f"{name}: {sorted(unknown)} not in the graph, whose nodes are {', '.join(graph)}")
    return found
