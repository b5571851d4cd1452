"""How to read a diffusers model as a flat list of stages. The table is in table.py; importing this package costs nothing."""
