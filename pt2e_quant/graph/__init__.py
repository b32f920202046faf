"""Exported graphs: modules, attributes, values, constants, graphs inside graphs, devices, pickling, writing.

Nothing here knows of quantization. Each file is a topic of its own; import from the file.
"""
