"""KV Prediction (Horton et al., arXiv 2410.08391): a small auxiliary model reads the prompt, and linear maps turn its
keys and values into the base model's, which then runs on the last prompt token only.

predictor  the linear maps
predict    prefill with predicted keys and values, and their refinement
layers     which base layers an auxiliary consists of, and which of its layers each base layer reads
fit        the maps in closed form, by ridge regression
train      the maps, and tuned auxiliaries, by gradient descent; `losses` has what is minimised
text       text that a model samples itself, to fit on
files      the folder of a pair: an auxiliary and its predictor
flops      FLOPs to the first token

The package is handed models with the seam "kv", and knows no model family.
"""

from .predict import KvPrediction, predict
from .predictor import Predictor

__all__ = ["KvPrediction", "Predictor", "predict"]
