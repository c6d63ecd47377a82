"""Parts of `benchmarks/cpu_peers.py`: the table of measurements, the peers' installation, the models, the workers (one
process per measurement), the ceilings and the report.
"""
