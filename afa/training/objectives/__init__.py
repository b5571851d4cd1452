"""What is minimised, a file each. The table is in table.py."""
