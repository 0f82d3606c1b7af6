"""Reading graphs.

printing.py   a graph as text that does not change from run to run
log.py        what each pass of a compile did
"""
