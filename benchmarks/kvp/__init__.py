"""Parts of `kvp_quality.py`: the model `pairs`, the `questions` and `measures` of quality, and the `report`."""
