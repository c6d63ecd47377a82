"""Speculative decoding: some tokens are drafted in a cheap way, and one forward pass of the model verifies them all.

verify     which drafted tokens are accepted, and the token after them: exact for greedy decoding and for sampling
drafters   where drafts come from: the model itself on the upper plane of QuantSpec's cache (arXiv 2502.10424), another
           model, n-grams of the text so far, or n-grams that a draft model has verified
control    how many tokens to draft, from measured acceptance and cost; none where drafting does not pay
following  the decode loop, `Speculation`, a `decode.Following`

The output does not depend on the drafter: greedy decoding gives the tokens of plain decoding, sampling draws from the
same distribution (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).
"""
