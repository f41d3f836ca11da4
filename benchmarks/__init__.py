"""lorica beside peft: times and counts, taken in one process.

``python -m benchmarks.run`` takes every measure and writes ``RESULTS.md``, ``results.json`` and ``results.png``.

- ``suite.py``: what a measure is, the registry, and how one case is taken.
- ``timing.py``: interleaved timing. ``counting.py``: FLOPs, kernels, bytes; they do not jitter.
- ``models.py``: the small models, adapted by both libraries with equal factors.
- ``measures/``: one file per question. A new measure is one function with ``@measure`` in one of these files.
- ``targets.py``: what was aimed at, with bounds; the page says which are reached, and why others are not.
- ``report.py``, ``chart.py``, ``machine.py``: the table, the picture, and what they were made on.
"""
