"""`make bench-gpu`: training, adapters, decoding and a profile at the published sizes, with random weights.

Needs torch, transformers and einops alone (peft for the adapters). Rows are those of a 512-pixel image: 342 image
tokens, 256 of DINOv2 and about 150 of text. Utilisation is the FLOPs of a step by the formula of `vpt.flops`, without
what is computed a second time, over its time and the GPU's dense peak in bf16.
"""
