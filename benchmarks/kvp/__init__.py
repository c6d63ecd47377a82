"""Parts of `kvp_quality.py`: `pairs` which are measured, `questions` and `measures` of quality, `report`."""
