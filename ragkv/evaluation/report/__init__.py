"""The report: one self-contained HTML page, and tables in Markdown. Its templates need jinja2."""

from ragkv.evaluation.report.page import page, tables, templates

__all__ = ["page", "tables", "templates"]
