"""KV Prediction (Horton et al., arXiv 2410.08391): a small auxiliary model reads the prompt, and linear maps turn its
keys and values into the base model's, which then runs on the last prompt token only.

`predictor` the maps, `predict` the prefill and the refinement, `layers` which layers serve which, `fit` the closed
form, `text` what to fit on, `files` pairs on disk, `flops` the accounting. Is handed models; knows no family of them.
"""

from .predict import KvPrediction, predict
from .predictor import Predictor

__all__ = ["KvPrediction", "Predictor", "predict"]
