"""Benchmarks as ratios of two sides: `make bench`, or `python -m vpt.bench inner_passes packing` for two groups.

Every figure is a ratio measured in one run, its sides in turn, the median of several rounds. The model has about 50 M
parameters; a row has 64 image, 40 question, 256 re-encoded and 30 answer tokens beside those of the chat format, unless
a figure says otherwise. Prints a table and writes `outputs/bench.json`: a list of {"name", "value", "bound", "better",
"ok"}. A figure of several parts is the worst of them; the parts follow it as `NAME.PART`. The allocator is left as it
comes, for both sides (`vpt.utils.heap`, which training sets, speeds up whatever takes large blocks).
"""
