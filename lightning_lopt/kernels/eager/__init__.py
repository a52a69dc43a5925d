"""Faster eager torch code than a rule's own, for CPUs without a C++ compiler."""
