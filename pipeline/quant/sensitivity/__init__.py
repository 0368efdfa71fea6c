"""Mixed precision by budget: how much each group of linears loses in each format, and what to choose.

`groups` says what must have one format and what it weighs, `pick` chooses under a budget; both are
light enough for `plan`. `losses`, `walk` and `divergence` measure, `table`, `plot` and `record` show.
"""
