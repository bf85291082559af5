"""How rows travel between the ranks of a head-parallel run, and how their gradients meet."""
