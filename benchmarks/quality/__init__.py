"""Parts of `seedlm_quality.py`: the arms, the quantisers of other projects, the measures, the tables and the plot."""
