"""Shipped recipes, one experiment each; the file's name is its address: `--recipe cospadi-20`."""
