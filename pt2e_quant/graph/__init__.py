"""Exported graphs: modules, attributes, values, constants, nested graphs, devices, pickling, writing, running.

Nothing here knows of quantization. Each file is a topic of its own; import from the file.
"""
