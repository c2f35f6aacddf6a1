"""Cases that no user would think of, and what has to hold of a fit to them.

A case is an estimator with parameters drawn from its own constraints, data of an odd kind in an odd
container, and odd sample weights. `data` makes the data and the weights, `parameters` draws the
parameters, `cases` puts them together and simplifies a case that fails, `properties` says what has
to hold. `tests/test_hostile.py` runs cases as tests, `tests/hostile_survey.py` counts the faults of
thousands of them.
"""
