"""The report: one self-contained HTML page, and tables in Markdown. Its templates need jinja2."""

from ragkv.evaluation.report.page import page, templates, write_markdown, write_page

__all__ = ["page", "templates", "write_markdown", "write_page"]
