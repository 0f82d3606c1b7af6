"""What people look at: `explain` in a terminal, `report` as a page, and their parts.

summary, table     a quantized model in a few lines; its groups as a table
graphs, picture    the graphs of a layer as text and as boxes
contents, weights  what a page shows, as plain data
plots, page        the charts and the page
follow             a page about a run that goes on
"""
