"""Graph passes.

calibration/   run once, on the graph of the whole model
execution/     run in every compile, on whatever graph Dynamo or export made of the quantized model
pattern.py     the pattern language, and the graph edits that both share
pipeline.py    the ordered lists of execution passes
"""
