"""Graph passes, one a file. A pass edits the graph that it is given, returns the module, and ends with `tidy`.

The engine hands in a private copy (`pt2e_quant.graph.clone`); parameters are replaced, never written to.
"""
