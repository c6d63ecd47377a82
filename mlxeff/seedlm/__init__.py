"""SeedLM (arXiv 2410.10714): weights stored as seeds of a linear-feedback shift register and a few coefficients.

`format` is the stored layout, `lfsr` the register, `codec` decodes, `native` launches the CPU kernels,
`encode` searches for the seeds; `metal` launches the Metal kernels, `linear` has the modules of a model, `install` puts
them where a config says.
"""
