"""The tuned auxiliary of a pair: `mlxeff.tuning` of all matrices in its layers, and by method `full` of their norms.

Embedding, last norm and head stay as they are, so an auxiliary that consists of the base's own layers goes on sharing
them with the base. What was trained is stored beside the predictor (`files`), and folded when the pair is loaded.
"""

from ..tuning import Tuned

__all__ = ["Tuned"]
