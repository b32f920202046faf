"""Timings, by hand or by `make bench`; never part of the tests. Each script prints medians and ratios of one run."""
