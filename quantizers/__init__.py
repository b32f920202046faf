"""Quantizers for concrete backends, one a file: values, rules and reasons for refusal. pt2e_quant does the walking."""
