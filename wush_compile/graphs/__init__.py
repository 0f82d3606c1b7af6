"""Reading graphs.

printing.py   a graph as text, the same in every run
log.py        a record of what each pass of a compile did
"""
