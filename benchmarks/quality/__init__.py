"""What `seedlm_quality.py` is made of: the arms, the peers that quantise for it, the measures, tables and the plot."""
