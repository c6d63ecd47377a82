"""What `benchmarks/cpu_peers.py` is made of: the table of what is measured, the peers' installation, the models, the
workers (a process a measurement), the ceilings and the report.
"""
