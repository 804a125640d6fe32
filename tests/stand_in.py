"""A pytest plugin (``-p stand_in``) that puts `SparseMHSA` in the place of `torch.nn.MultiheadAttention`.

Everything that is imported or built afterwards, torch's own transformer layers included, gets ours.
"""

import torch

from sparse_mhsa import SparseMHSA

for namespace in (torch.nn, torch.nn.modules, torch.nn.modules.activation, torch.nn.modules.transformer):
    namespace.MultiheadAttention = SparseMHSA
