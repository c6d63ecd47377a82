"""`mlxeff plan`: what a machine will do with a model, predicted from the model's config.json alone.

`shapes` counts weights, bytes and floating-point operations, `chips` describes machines, `predict` turns both into
times, `techniques` says what each technique changes, `memory` whether it fits. `calibrate` fits the constants of a
machine to measurements, `score` compares predictions with them. Nothing here loads weights.
"""
