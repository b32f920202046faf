"""The zoo: small nets of many families through both backends. `python -m benchmarks.zoo` runs it."""
