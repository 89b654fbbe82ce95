"""Mergers that people use, one file per family, each closed-form in the weights.

Conventions that hold for all of them: τ = θ − θ0 leaves out tensors that did not move, which stay
shared with the base in the merged State; a member with coefficient 0 is left out, bit for bit; what
does not depend on the setting (trimming, drop masks) is done once in ``prepare``.
"""
