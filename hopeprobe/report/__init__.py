"""Reports: results as one page that needs nothing else, and their figures and tables as files.

page      the page: verdicts first, then a section a probe
export    figures as SVG and PNG, tables as CSV and LaTeX
"""

from .export import export
from .page import as_page, write_page

__all__ = ["as_page", "export", "write_page"]
