"""The report's pages: tables and curves as HTML and Markdown, and runs side by side.

Called by `nanochat.report`, which keeps the report's data.
Start with `view.py`.
"""
