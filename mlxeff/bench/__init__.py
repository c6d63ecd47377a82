"""The command `mlxeff bench`: measures speed on the user's machine.

request    the user's request, and its execution
ttft       the measurement of the time to first token (TTFT)
arms       the models to compare, each with the way in which it is run
kvp_paper  a suite of models and prompts with the numbers of the KV Prediction paper
report     medians, and tables of them

Results that lie in files:

result           reads them; `schema` checks what they hold, `ttft_results` knows the results of `ttft`
compare          results beside each other; `intervals` says what is noise, `comparison_text` prints it
page             the report for a browser
words            names of metrics, numbers with their units

The folder `benchmarks` uses these modules, too:

samples    the file that keeps every sample
selection  the option --only, which selects measurements
machine    the description of the machine, and its memory
tables     tables in Markdown
"""
