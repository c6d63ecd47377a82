"""The parts of `dynamoe.py`: fitted models, their rivals, and what is measured of them."""
