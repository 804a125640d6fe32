"""Speed and memory of attention over edges against the alternatives, behind a correctness gate.

``sparse-mhsa bench kernels`` and ``python -m sparse_mhsa.bench`` are the same tool. All methods of a row are timed
in one process, taking turns; nothing that computes the wrong thing is timed.
"""
