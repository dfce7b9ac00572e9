"""Compare the candidate with the baseline on scores alone, and decide on promotion.

`compare.evaluate` does it all; `settings` and `result` are what goes in and comes out. Nothing is imported here, since
scipy takes seconds and settings alone do not need it.
"""
