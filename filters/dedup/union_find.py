"""Connected components of a graph whose links arrive in batches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Nodes = NDArray[np.signedinteger]
_ROWS_AT_ONCE = 1 << 22


class Components:
    """A union-find forest in which each tree is a component; the order of links makes no difference.

    It takes 4 bytes per node (8 from 2^31 nodes on). `num_linked` is nodes less components: the number of nodes dropped
    if one of each component stays.
    """

    def __init__(self, num_nodes: int) -> None:
        self._parents: Nodes = np.arange(num_nodes, dtype=np.int32 if num_nodes < 2**31 else np.int64)
        self.num_linked = 0

    def roots(self, nodes: Nodes) -> Nodes:
        """Returns the smallest node of each node's component."""
        roots = self._parents[nodes]
        while True:
            above = self._parents[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parents[nodes] = roots
        return roots

    def link(self, ones: Nodes, others: Nodes) -> None:
        """Joins the components of `ones` and `others` pairwise."""
        # Lazy, so that a build with nothing to do does not wait for scipy.
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        tops, bottoms = self.roots(ones), self.roots(others)
        apart = tops != bottoms
        if not apart.any():
            return
        ends = np.concatenate([tops[apart], bottoms[apart]])
        nodes, positions = np.unique(ends, return_inverse=True)
        rows, columns = positions.reshape(2, -1)
        edges = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(len(nodes), len(nodes)))
        num, labels = connected_components(edges, directed=False)
        # Nodes are sorted, so a label's first is its smallest.
        first = np.unique(labels, return_index=True)[1]
        self._parents[nodes] = nodes[first[labels]]
        self.num_linked += len(nodes) - num

    def grouped(self) -> NDArray[np.bool_]:
        """Returns (N,): whether each node has a link."""
        num = len(self._parents)
        linked = np.zeros(num, bool)
        for start in range(0, num, _ROWS_AT_ONCE):
            nodes = np.arange(start, min(start + _ROWS_AT_ONCE, num), dtype=self._parents.dtype)
            roots = self.roots(nodes)
            below = roots != nodes
            linked[nodes[below]] = True
            linked[roots[below]] = True
        return linked
