"""Where the cells of a sweep run: in this process, or on a Ray cluster.

A launcher is a function ``launch(cells, retries, started, finished)``. It carries out every cell, calls ``started``
with its index when it begins and ``finished`` with its index and result, exactly once, when it has ended. A cell that
failed is tried again ``retries`` times; if it fails still, its result says so. Out of memory is a result, no failure.
"""
