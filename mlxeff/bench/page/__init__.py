"""The report `mlxeff bench page`: one HTML file that shows results of benchmarks, and the plots in it as PNG files.

plots     which plots a result has, and what they show
drawing   plots as matplotlib's figures
svg       figures as SVG for the page, and as PNG files
markup    HTML text: escaped, tables, folded parts
tables    its tables
sections  all parts of the page
files     writes the page and the PNG files
"""

from .files import report_folder, write, write_report

__all__ = ["report_folder", "write", "write_report"]
