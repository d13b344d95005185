"""Limits on what one spec may ask for; each has its diagnostic (FL0901)."""

# Text.
SOURCE_SIZE = 1_000_000  # code points
TOKENS = 200_000
NESTING = 100  # brackets inside brackets
INFIX = 200  # binary operators in one statement
INTEGER = 2**63 - 1

# ONNX: an autoregressive loop of at most so many stages is written out, unless `unroll` says otherwise.
WRITTEN_STAGES = 8

# Elaboration.
EXPRESSION_DEPTH = 100
LIST_ITEMS = 100_000
LIST_TOTAL = 200_000  # items of all lists made in one run
REPEAT_COUNT = 1_000_000
RANK = 16
EXACT_POWER = 100  # exponents in exact arithmetic (tableaus, paths)
AXIS_SIZE = 2**31 - 1
INSTANTIATION_DEPTH = 64
IMPORT_DEPTH = 16
ROUNDS = 2_000  # unrolled copies in one run
CALLS = 10_000  # of local functions, each written out
GRAPH_NODES = 200_000
REGIONS = 2_000
REGION_DEPTH = 128
FRAMES = 3_000  # Python's own, while one declaration is judged

# Size of a model.
PARAMETERS = 10**11

DIAGNOSTICS_SHOWN = 50
