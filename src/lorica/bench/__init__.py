"""lorica beside peft and the frozen base: times and counts, taken in one process.

- ``contest.py``: what a measure is, and how one case of it is taken.
- ``timing.py``: interleaved timing. ``counting.py``: FLOPs, kernels, bytes; they do not jitter.
- ``sides.py``: a model adapted by both libraries with equal factors; steps and forwards of it.
- ``own.py``: the measures of a user's own model.
- ``report.py``, ``chart.py``, ``machine.py``: the table, the picture, and what they were made on.

PEFT is imported when a model is adapted by it, and only if it is installed.
"""
