"""The report's pages: HTML and Markdown from templates, SVG charts, and runs side by side.

Called by `nanochat.report`, which owns report.json. Start with `view.py`, which turns report.json into plain values;
`pages.py` puts them into the templates.
"""
