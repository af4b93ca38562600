"""The report: one self-contained HTML page, and tables in Markdown."""

from ragkv.evaluation.report.markdown import write_markdown
from ragkv.evaluation.report.page import page, write_page

__all__ = ["page", "write_markdown", "write_page"]
