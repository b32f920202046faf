"""Write docs/schemes.md from the code: python docs/make_schemes.py"""

from __future__ import annotations

from pathlib import Path

from pt2e_quant.schemes import scheme_table

if __name__ == "__main__":
    Path(__file__).with_name("schemes.md").write_text(scheme_table())
