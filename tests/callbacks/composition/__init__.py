"""What a real Trainer has, times every estimator: each cell is a fit; `COMPATIBILITY.md` is written from the results.

`features.py` and `estimators.py` are the two lists: a new row or column is an entry there.
To write the table anew: `.venv/bin/python -m pytest tests/callbacks/composition --write-table`.
"""
