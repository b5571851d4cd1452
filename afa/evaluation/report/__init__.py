"""Results as a page, as Markdown, as CSV and as text for the terminal.

Importing this package loads nothing.
"""
