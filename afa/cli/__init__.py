"""The command line: thin, and quick to start. Nothing here imports torch before a command runs."""
