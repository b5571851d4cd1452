"""An ensemble as files: manifest, aggregators, model card; and the reference release's folders.

Importing costs nothing.
"""
