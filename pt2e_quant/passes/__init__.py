"""Graph passes, one a file, and the runner. A pass edits the graph that it is given, returns it, and ends with `tidy`.

The engine hands in a private copy (`graph.module.clone`); parameters are replaced, never written to. Passes of one
backend alone live with it, in `lowering/<backend>/passes/`.
"""
