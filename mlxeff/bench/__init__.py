"""Measuring speed on the user's machine: the verb `mlxeff bench`.

`request` what is asked for, `ttft` the measuring, `arms` what is measured, `kvp_paper` a suite with published numbers,
`report` its tables. The benchmarks of the project use these too: `samples` the file that keeps each sample, `selection`
which measurements are made, `machine` the card, `tables` tables in Markdown.
"""
