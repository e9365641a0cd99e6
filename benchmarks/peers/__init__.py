"""
One module a contestant: the same jobs, each in its own best way.

A job returns seconds: for each task or round it was told to do. A contestant that cannot do a
job does not define it.
"""
