"""Passes of the lowering to ExecuTorch, one a file; `recipe` has their order."""
