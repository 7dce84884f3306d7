"""The study "Dissecting HOPE" as tables and claims: read from the record of a grid of runs, whoever ran it.

published   what the study printed, and how its runs were set
grid        the record of a grid: cells, what they share, where that differs from the study's setting
summary     one row a variant: losses, paired differences to `full`, resolution, what becomes of the published claim
scaling     the same differences at several sizes
claims      every published claim and its answer
probed      rows of probes, over seeds
inside      any model's numbers beside those printed of what happens inside one
comparison  all of it for one grid or several, as tables and figures for a notebook
table       a table to read and to compute with
writing     tables as CSV and Markdown
"""

from .comparison import Comparison, compare
from .grid import Cell, Grid, differences_to_study, read_grid
from .inside import inside
from .scaling import Growth, scaling
from .summary import Row, summarise
from .table import Table

__all__ = [
    "Cell",
    "Comparison",
    "Grid",
    "Growth",
    "Row",
    "Table",
    "compare",
    "differences_to_study",
    "inside",
    "read_grid",
    "scaling",
    "summarise",
]
