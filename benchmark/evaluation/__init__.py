"""Accuracy of a State, the free-rider's search over settings, scores and their intervals."""
