"""Measurements: `python -m benchmarks` writes benchmarks/results/*.json and
benchmarks/REPORT.md.
"""
