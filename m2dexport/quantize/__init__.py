"""Weight precision: a float32 graph in, the same graph in fewer bits out, one module per recipe.

=================  =====================================================================
precision          weights, and what is computed with
=================  =====================================================================
fp32               as exported
fp16, bf16         stored in half, computed with in float32 (``half``)
int8               8 bits, and 8-bit activations of fixed scale or of a scale per token (``int8``)
int8-dynamic       8 bits, and 8-bit activations scaled per batch, while running (``dynamic``)
int8-static        8 bits, and 8-bit activations of fixed scale, by NNCF (``static``)
int8-weight-only   8 bits and a scale for every 32 values (``blockwise``)
int4-weight-only   4 bits and a scale for every 32 values, tables too (``blockwise``)
=================  =====================================================================

Embedding tables are quantized per row in every integer precision (``tables``). LayerNorm, softmax,
pooling, heads after pooling and normalisation stay in float32.

Nothing here knows an engine: each engine's ``make`` says which recipes it runs, and in which form.
"""
