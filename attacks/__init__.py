"""Attacks: how a free-rider undoes a defense before merging.

One file each; none imports another.
"""
