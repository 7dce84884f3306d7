"""The study "Dissecting HOPE" as tables and claims: read from the record of a grid of runs, whoever ran it.

published   what the study printed, and how its runs were set
grid        the record of a grid: cells, what they share, where that differs from the study's setting
summary     one row a variant: losses, paired differences to `full`, resolution, what becomes of the published claim
scaling     the same differences at several sizes
claims      every published claim and its answer
probed      rows of probes, over seeds
writing     tables as CSV and Markdown
"""

from .grid import Cell, Grid, differences_to_study, read_grid
from .scaling import Growth, scaling
from .summary import Row, summarise

__all__ = ["Cell", "Grid", "Growth", "Row", "differences_to_study", "read_grid", "scaling", "summarise"]
