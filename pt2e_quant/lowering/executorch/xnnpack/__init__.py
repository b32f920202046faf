"""ExecuTorch's XNNPACK backend: what it runs in integers, and the contract that a graph must keep."""
