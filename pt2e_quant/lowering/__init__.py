"""From a converted graph to what a backend runs: one folder per backend, each with one function `lower_to_...`.

Comes after `pt2e.convert_pt2e`. A lowering checks the backend's contract first and names the node that breaks it,
lowers, and returns a value that says what every operator became. Nothing is imported here: each backend has a package
of its own to install, and `pt2e_quant.lowering.executorch` works without the others.
"""
