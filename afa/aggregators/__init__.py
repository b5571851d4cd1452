"""How to fuse one stage. The table is in table.py; importing this package costs nothing."""
