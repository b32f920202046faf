"""What is rewritten for Inductor, one pass a file; `recipe` has their order."""
