"""Measuring speed on the user's machine: the verb `mlxeff bench`.

`ttft` the measuring, `arms` what is measured, `kvp_paper` a suite with published numbers, `samples` the file that keeps
each sample, `machine` the card, `report` the tables.
"""
