"""The command `mlxeff bench`: measures speed on the user's machine.

request     `bench ttft` and `bench decode`, from options to a result
kernels     `bench kernels`: products with a model's matrices; `ceilings`: what the machine can do at most
suites      `bench suite`: models and settings of publications; `kvp_paper` is that of the KV Prediction paper
contenders  the arms that a command line names
arms        a model with the way in which it is run
points      what is measured at one time, such as "pp512"
prompts     the tokens that are read
rounds      arms take turns at each point
passes      one pass of an arm
result      what was measured, and its document; `published` has lines with published numbers
report      the document as text

Results that lie in files:

reader           reads them; `schema` checks what they hold
compare          results beside each other; `intervals` says what is noise, `comparison_text` prints it
page             the report for a browser
words            names of metrics, numbers with their units

The folder `benchmarks` uses these modules, too:

rows        statistics, intervals and ratios of samples
samples     the file that keeps every sample
selection   the option --only, which selects measurements
machine     the description of the machine, and its memory; `conditions`: power supply and thermal pressure
tables      tables in Markdown
"""
